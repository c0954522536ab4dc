//! Mapped shared memory: making it, checking a peer's, reaching into it.
//!
//! A [`Mapping`] never hands out a slice or a plain reference, because the other process may write
//! at any instant. There are three ways in, each with its offset checked: atomics
//! ([`Mapping::atomic_u32`], [`Mapping::atomic_u64`]), copies that the compiler cannot look into
//! ([`Mapping::copy_out`], [`Mapping::copy_in`]), and an address for copy engines
//! ([`Mapping::ptr_at`]).
//!
//! A mapping must never fault, whatever the peer does to the file behind it. Hence the seals on
//! memfds ([`memfd`]), the size check before mapping, and the reservation of every page before use.
//!
//! When an owner dies: a memfd lives until its last descriptor and mapping are gone; a named file
//! ([`mod@file`]) stays until someone unlinks it.

mod copy;
mod error;
pub mod file;
pub mod memfd;
mod word;

pub use copy::{copy_from_shared, copy_to_shared};
pub use error::{MappingError, Seals};
pub use file::{Access, NamedFile};
pub use memfd::{
    MAX_KV_REGION_BYTES, MAX_SEGMENT_BYTES, MemfdBuilder, create_kv_region, create_segment,
    open_peer_kv_region, open_peer_segment,
};
pub use word::{SharedU32, SharedU64};

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use crate::sync::{AtomicU32, AtomicU64};

/// A shared mapping of a whole file, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
    writable: bool,
    purpose: &'static str,
}

impl Mapping {
    /// Maps `bytes` bytes of `fd`, shared. The caller has made sure that the file has and keeps
    /// that size.
    pub(in crate::mapping) fn map(
        fd: BorrowedFd<'_>,
        purpose: &'static str,
        bytes: u64,
        access: Access,
    ) -> Result<Self, MappingError> {
        let length = usize::try_from(bytes).map_err(|_| MappingError::TooLarge {
            purpose,
            found: bytes,
            maximum: usize::MAX as u64,
        })?;
        let mut options = MmapOptions::new();
        options.len(length);
        let map = match access {
            Access::ReadOnly => options.map_raw_read_only(fd.as_raw_fd()),
            Access::ReadWrite => options.map_raw(fd.as_raw_fd()),
        };
        let map = map.map_err(|source| MappingError::Io {
            purpose,
            operation: "mmap",
            source,
        })?;
        Ok(Self {
            map,
            writable: access == Access::ReadWrite,
            purpose,
        })
    }

    /// Zeroed memory of this process only, with the accessors of a shared mapping: for tests and
    /// tools.
    ///
    /// # Errors
    /// Zero bytes, or no address space.
    pub fn anonymous(bytes: usize) -> Result<Self, MappingError> {
        let purpose = "anonymous memory";
        if bytes == 0 {
            return Err(MappingError::Empty { purpose });
        }
        let map = MmapOptions::new()
            .len(bytes)
            .map_anon()
            .map_err(|source| MappingError::Io {
                purpose,
                operation: "mmap",
                source,
            })?;
        Ok(Self {
            map: map.into(),
            writable: true,
            purpose,
        })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// True for a mapping of no bytes (which cannot be made).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the mapping is for, as errors name it.
    #[must_use]
    pub fn purpose(&self) -> &'static str {
        self.purpose
    }

    /// True if this process may write through the mapping.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// # Errors
    /// [`MappingError::ReadOnly`] if this process may not write through the mapping.
    pub fn require_writable(&self) -> Result<(), MappingError> {
        if self.writable {
            Ok(())
        } else {
            Err(MappingError::ReadOnly {
                purpose: self.purpose,
            })
        }
    }

    /// The 4-byte word at byte `offset`. In a read-only mapping, use relaxed loads (and a fence
    /// where order matters) only: a store faults.
    ///
    /// # Errors
    /// `offset` is misaligned or the word lies outside the mapping.
    #[inline]
    pub fn atomic_u32(&self, offset: usize) -> Result<&AtomicU32, MappingError> {
        let word = self.aligned_ptr(offset, 4, 4)?.cast::<AtomicU32>();
        // SAFETY: aligned and inside the mapping, which outlives the reference; the peer may write
        // it at any time, which an atomic allows.
        Ok(unsafe { word.as_ref() })
    }

    /// The 8-byte word at byte `offset`. In a read-only mapping, use relaxed loads (and a fence
    /// where order matters) only: a store faults.
    ///
    /// # Errors
    /// `offset` is misaligned or the word lies outside the mapping.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> Result<&AtomicU64, MappingError> {
        let word = self.aligned_ptr(offset, 8, 8)?.cast::<AtomicU64>();
        // SAFETY: as for `atomic_u32`.
        Ok(unsafe { word.as_ref() })
    }

    /// Copies `out.len()` bytes from byte `offset` on. If the peer writes meanwhile, `out` holds
    /// some mixture of old and new bytes: validate the copy, then use only the copy.
    ///
    /// # Errors
    /// The range lies outside the mapping.
    #[inline]
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> Result<(), MappingError> {
        let source = self.ptr_at(offset, out.len())?;
        // SAFETY: `source` has `out.len()` mapped bytes, and `out` is private memory that cannot
        // overlap.
        unsafe { copy_from_shared(out.as_mut_ptr(), source, out.len()) };
        Ok(())
    }

    /// Copies `bytes` to byte `offset` on. Nothing is published by it: that takes a release store
    /// after.
    ///
    /// # Errors
    /// The range lies outside the mapping, or the mapping is read-only.
    #[inline]
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), MappingError> {
        self.require_writable()?;
        let target = self.ptr_at(offset, bytes.len())?;
        // SAFETY: `target` has `bytes.len()` mapped writable bytes, and `bytes` is private memory
        // that cannot overlap.
        unsafe { copy_to_shared(target, bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Address of `length` bytes at byte `offset`, for copy engines and system calls. Never null;
    /// never make a plain Rust reference of it.
    ///
    /// # Errors
    /// The range lies outside the mapping.
    #[inline]
    pub fn ptr_at(&self, offset: usize, length: usize) -> Result<*mut u8, MappingError> {
        let mapped = self.len();
        match offset.checked_add(length) {
            Some(end) if end <= mapped => {}
            _ => {
                let purpose = self.purpose;
                return Err(MappingError::OutOfBounds {
                    purpose,
                    offset,
                    length,
                    mapped,
                });
            }
        }
        // SAFETY: `offset` is at most the mapping's length, so the result stays in (or one past)
        // the mapping.
        Ok(unsafe { self.map.as_mut_ptr().add(offset) })
    }

    /// [`Self::ptr_at`], and `offset` must be a multiple of `alignment` (a power of two of at most
    /// a page).
    ///
    /// # Errors
    /// The range lies outside the mapping or is misaligned.
    #[inline]
    pub fn aligned_ptr(
        &self,
        offset: usize,
        length: usize,
        alignment: usize,
    ) -> Result<NonNull<u8>, MappingError> {
        debug_assert!(alignment.is_power_of_two() && alignment <= 4096);
        if offset & (alignment - 1) != 0 {
            return Err(MappingError::Misaligned {
                purpose: self.purpose,
                offset,
                alignment,
            });
        }
        let address = self.ptr_at(offset, length)?;
        // SAFETY: inside a mapping, whose base is not null.
        Ok(unsafe { NonNull::new_unchecked(address) })
    }
}
