//! One atomic word in a mapping, together with what keeps it mapped.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Mapping, MappingError};
use crate::sync::{AtomicU32, AtomicU64};

macro_rules! shared_word {
    ($(#[$doc:meta])* $name:ident, $atomic:ty, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            word: NonNull<$atomic>,
            _keep_alive: Arc<Mapping>,
        }

        impl $name {
            /// The word at byte `offset` of `mapping`. Only loads are possible if that is
            /// read-only.
            ///
            /// # Errors
            /// `offset` is misaligned or the word lies outside the mapping.
            pub fn new(mapping: &Arc<Mapping>, offset: usize) -> Result<Self, MappingError> {
                let word = mapping.aligned_ptr(offset, $bytes, $bytes)?.cast();
                Ok(Self { word, _keep_alive: mapping.clone() })
            }
        }

        // SAFETY: the pointer is valid for as long as `_keep_alive`, which moves along, and leads
        // to an atomic, which any thread may access.
        unsafe impl Send for $name {}
        // SAFETY: as for `Send`.
        unsafe impl Sync for $name {}

        impl Deref for $name {
            type Target = $atomic;

            #[inline]
            fn deref(&self) -> &$atomic {
                // SAFETY: `new` checked bounds and alignment, `_keep_alive` keeps it mapped, and an
                // atomic may be written by the peer at any time.
                unsafe { self.word.as_ref() }
            }
        }
    };
}

shared_word!(
    /// A 4-byte word in shared memory.
    SharedU32,
    AtomicU32,
    4
);
shared_word!(
    /// An 8-byte word in shared memory.
    SharedU64,
    AtomicU64,
    8
);
