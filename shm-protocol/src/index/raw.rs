//! The index over mapped memory, and the prefetch hint: the only unsafe code of the index.

#[cfg(not(loom))]
pub use mapped::{RawMemory, RawReadMemory};

/// Asks the CPU to bring the line of `target` closer; touches nothing, changes nothing.
#[inline(always)]
pub fn prefetch_read<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is that of a live reference, and a prefetch is a hint that never
        // faults; SSE is part of every x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(target).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = target;
}

#[cfg(not(loom))]
mod mapped {
    use core::ptr::NonNull;

    use super::super::layout::WORD_BYTES;
    use super::super::memory::{IndexMemory, WritableIndexMemory};
    use crate::mapping::{Mapping, MappingError};
    use crate::sync::{Arc, AtomicU64};

    /// The daemon's writable mapping of an index file. `O` keeps the mapping alive.
    #[derive(Debug)]
    pub struct RawMemory<O> {
        inner: RawReadMemory<O>,
    }

    /// A client's read-only mapping of an index file. `O` keeps the mapping alive.
    ///
    /// Only relaxed loads of 8 bytes reach the words (ordering comes from fences), which the
    /// language guarantees to work on memory that is mapped without write permission.
    #[derive(Debug)]
    pub struct RawReadMemory<O> {
        base: NonNull<AtomicU64>,
        count: usize,
        _owner: O,
    }

    // SAFETY: the pointer stands for `&[AtomicU64]`, which is Send and Sync; it is valid as long
    // as the owner lives, and the owner goes along, so the owner's own bounds decide the rest.
    unsafe impl<O: Send> Send for RawReadMemory<O> {}
    // SAFETY: as above; shared access to the words is atomic.
    unsafe impl<O: Sync> Sync for RawReadMemory<O> {}

    impl<O> RawReadMemory<O> {
        /// Lays words over `bytes` bytes at `base`; a rest below 8 bytes is left out.
        ///
        /// # Panics
        /// If `base` is not aligned to 8 bytes (a mapping is aligned to its page size).
        ///
        /// # Safety
        /// `base..base + bytes` must stay mapped and readable as long as `owner` lives, wherever
        /// `owner` is moved; the file behind it must not shrink. Everybody in this process who
        /// accesses these bytes meanwhile must do so atomically.
        pub unsafe fn new(base: NonNull<u8>, bytes: usize, owner: O) -> Self {
            let base = base.cast::<AtomicU64>();
            assert!(
                base.is_aligned(),
                "index mapping at {base:p} is not aligned to 8 bytes"
            );
            Self {
                base,
                count: bytes / WORD_BYTES,
                _owner: owner,
            }
        }
    }

    impl RawReadMemory<Arc<Mapping>> {
        /// The words of a mapped index file, read-only or not.
        ///
        /// # Errors
        /// A mapping without bytes.
        pub fn from_mapping(mapping: Arc<Mapping>) -> Result<Self, MappingError> {
            let bytes = mapping.len();
            let base = mapping.aligned_ptr(0, bytes, WORD_BYTES)?;
            // SAFETY: the bytes stay mapped while the Arc that goes along lives, index files are
            // written by the daemon alone and never shrink (`mapping::file`), and a mapping gives
            // no plain references, so all access in this process is atomic.
            Ok(unsafe { Self::new(base, bytes, mapping) })
        }
    }

    impl RawMemory<Arc<Mapping>> {
        /// The words of a mapped index file, for its writer.
        ///
        /// # Errors
        /// The mapping is read-only or has no bytes.
        pub fn from_mapping(mapping: Arc<Mapping>) -> Result<Self, MappingError> {
            mapping.require_writable()?;
            Ok(Self {
                inner: RawReadMemory::from_mapping(mapping)?,
            })
        }
    }

    impl<O> RawMemory<O> {
        /// Lays words over `bytes` bytes at `base`; a rest below 8 bytes is left out.
        ///
        /// # Panics
        /// If `base` is not aligned to 8 bytes.
        ///
        /// # Safety
        /// As [`RawReadMemory::new`], and the bytes must be writable.
        pub unsafe fn new(base: NonNull<u8>, bytes: usize, owner: O) -> Self {
            // SAFETY: the caller's promise includes the one that is needed here.
            let inner = unsafe { RawReadMemory::new(base, bytes, owner) };
            Self { inner }
        }
    }

    impl<O> IndexMemory for RawReadMemory<O> {
        #[inline]
        fn words(&self) -> &[AtomicU64] {
            // SAFETY: `new`'s caller promised that the bytes stay mapped while the owner, a field
            // of self, lives, and that all access is atomic; alignment was checked there.
            unsafe { core::slice::from_raw_parts(self.base.as_ptr(), self.count) }
        }
    }

    impl<O> IndexMemory for RawMemory<O> {
        #[inline]
        fn words(&self) -> &[AtomicU64] {
            self.inner.words()
        }
    }

    impl<O> WritableIndexMemory for RawMemory<O> {}
}

#[cfg(all(test, not(loom)))]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::super::tests_util::{BOOT_ID, GROUP, NAMESPACE, hashes, key};
    use super::super::{IndexLayout, IndexReader, IndexWriter, OpenError};
    use super::*;
    use crate::mapping::{Access, Mapping, MappingError, NamedFile};
    use crate::sync::Arc;

    #[test]
    fn a_reader_on_a_read_only_mapping_of_the_file_sees_what_the_daemon_seals() {
        let layout = IndexLayout::for_capacity(1000).unwrap();
        let fd = memfd_create("index", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, layout.total_bytes()).unwrap();
        let file = NamedFile::from_fd(fd, "index").unwrap();
        file.reserve(0, layout.fixed_bytes()).unwrap();
        let memory = |access| Arc::new(file.map_exact(access, layout.total_bytes()).unwrap());

        let read = || RawReadMemory::from_mapping(memory(Access::ReadOnly)).unwrap();
        assert_eq!(IndexReader::open(read()).unwrap_err(), OpenError::Magic(0));
        let refused = RawMemory::from_mapping(memory(Access::ReadOnly));
        assert!(matches!(refused, Err(MappingError::ReadOnly { .. })));

        let write = RawMemory::from_mapping(memory(Access::ReadWrite)).unwrap();
        let mut writer = IndexWriter::create(write, layout, BOOT_ID, 5).unwrap();
        let allocate =
            |range: core::ops::Range<u64>| file.reserve(range.start, range.end - range.start);
        assert_eq!(writer.reserve(400, allocate).unwrap(), 448);
        let reader = IndexReader::open(read()).unwrap();
        for i in 0..300 {
            let id = writer.insert(&key(i)).unwrap();
            writer.seal(id).unwrap();
        }
        assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &hashes(0..400)), 300);
        drop(writer);
        drop(file);
        assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &hashes(0..400)), 300);
    }

    #[test]
    fn a_mapping_with_a_rest_below_a_word_is_cut_to_words() {
        let mapping = Arc::new(Mapping::anonymous(4101).unwrap());
        let memory = RawReadMemory::from_mapping(mapping).unwrap();
        assert_eq!(super::super::IndexMemory::words(&memory).len(), 512);
    }
}
