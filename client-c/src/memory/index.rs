//! The block index, mapped read-only.

use std::ptr::NonNull;
use std::sync::Arc;

use pegaflow_shm::index::{IndexMemory, RawReadMemory};
use pegaflow_shm::mapping::Mapping;
use pegaflow_shm::sync::AtomicU64;

use crate::Error;

/// A mapped index file.
#[derive(Debug)]
pub(crate) struct IndexMapping {
    words: RawReadMemory<Arc<Mapping>>,
}

impl IndexMapping {
    pub(crate) fn new(mapping: Arc<Mapping>) -> Result<IndexMapping, Error> {
        let bytes = mapping.len();
        let base = NonNull::new(mapping.ptr_at(0, bytes)?)
            .ok_or_else(|| Error::Protocol("the index is mapped at address 0".into()))?;
        // SAFETY: `base` leads to `bytes` mapped bytes that stay mapped while the owner lives; the
        // mapping starts at a page; nothing else in this process accesses them; the daemon, whose
        // file it is, never shrinks it (`mapping::file` states that trust).
        let words = unsafe { RawReadMemory::new(base, bytes, mapping) };
        Ok(IndexMapping { words })
    }
}

impl IndexMemory for IndexMapping {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self.words.words()
    }
}
