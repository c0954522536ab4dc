//! The memory that drives read and write: the pool's, and the tier's own for what does not fit.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// The memory that pages lie in. Drives read and write it directly.
#[derive(Clone)]
pub struct PoolMemory {
    area: Area,
    lock: Option<Arc<File>>,
}

/// Mapped memory and what keeps it so.
#[derive(Clone)]
pub(crate) struct Area {
    /// Its first byte.
    pub base: NonNull<u8>,
    /// Its length.
    pub bytes: u64,
    /// Most of it lies in pages much larger than 4 KiB.
    pub is_in_huge_pages: bool,
    _keep_alive: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is to memory touched only through raw copies and by the kernel; who may touch
// which page when is the owner's business (see `Tier::write` and `Tier::read`), not this handle's.
unsafe impl Send for Area {}
// SAFETY: as above; the handle itself never changes.
unsafe impl Sync for Area {}

impl PoolMemory {
    /// Names `bytes` bytes at `base` as the pool.
    ///
    /// # Safety
    ///
    /// `base .. base + bytes` is mapped readable and writable, cannot be truncated, and stays so as
    /// long as `keep_alive` lives. No Rust reference points into it. Between a request that names a
    /// page and its completion nobody else writes to the page, nor reads it while it is filled.
    pub unsafe fn new(
        base: NonNull<u8>,
        bytes: u64,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            area: Area {
                base,
                bytes,
                is_in_huge_pages: false,
                _keep_alive: keep_alive,
            },
            lock: None,
        }
    }

    /// Names the file whose lock (`flock`, taken on this very description) says that the memory is
    /// in use. It stays locked until no drive touches the memory any more, also when the process is
    /// killed before: whoever uses the memory next takes the lock first.
    #[must_use]
    pub fn locked_by(mut self, file: Arc<File>) -> Self {
        self.lock = Some(file);
        self
    }

    /// Says whether most of it lies in huge pages, which decides how it is best read.
    #[must_use]
    pub fn mostly_in_huge_pages(mut self, is_so: bool) -> Self {
        self.area.is_in_huge_pages = is_so;
        self
    }

    pub(crate) fn lock(&self) -> Option<&Arc<File>> {
        self.lock.as_ref()
    }

    /// Memory with that content, at a page's boundary, for programs that have no pool.
    ///
    /// # Panics
    /// If there is no content.
    pub fn with_content(content: &[u8]) -> Self {
        let area = aligned(content.len());
        area.fill(0, content);
        Self { area, lock: None }
    }

    /// Memory with that content in a file that other processes can map, as the daemon's pool is.
    ///
    /// # Errors
    /// What the system answers.
    ///
    /// # Panics
    /// If there is no content.
    pub fn in_a_file(content: &[u8]) -> io::Result<(Self, File)> {
        let file = File::from(memfd_create("ssd-pool", MemfdFlags::CLOEXEC)?);
        file.set_len(content.len() as u64)?;
        let area = Mapping::of(Some(&file), content.len())?.area(content.len(), 1);
        area.fill(0, content);
        Ok((Self { area, lock: None }, file))
    }

    /// Memory with that content in huge pages, as far as the system has any.
    ///
    /// # Errors
    /// What the system answers: `EINVAL` if it has no huge pages on request.
    ///
    /// # Panics
    /// If there is no content.
    pub fn in_huge_pages(content: &[u8]) -> io::Result<Self> {
        const HUGE: usize = 2 << 20;
        let bytes = content.len().next_multiple_of(HUGE);
        let mapping = Mapping::of(None, bytes + HUGE)?;
        // SAFETY: the range is this mapping, and the advice changes no content.
        unsafe {
            madvise(
                mapping.start.as_ptr().cast(),
                mapping.bytes,
                Advice::LinuxHugepage,
            )?
        };
        let area = mapping.area(content.len(), HUGE);
        area.fill(0, content);
        Ok(Self { area, lock: None }.mostly_in_huge_pages(true))
    }

    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.area.bytes
    }

    /// The address of byte 0.
    pub fn base(&self) -> NonNull<u8> {
        self.area.base
    }

    pub(crate) fn area(&self) -> Area {
        self.area.clone()
    }
}

impl Area {
    /// The address of byte `offset`.
    ///
    /// # Panics
    /// If `bytes` bytes from there are not in the area.
    pub fn at(&self, offset: u64, bytes: u64) -> NonNull<u8> {
        assert!(bytes <= self.bytes && offset <= self.bytes - bytes);
        // SAFETY: the sum lies in the area, which is one mapping.
        unsafe { self.base.add(offset as usize) }
    }

    /// Puts content at `offset`, which no request names.
    pub fn fill(&self, offset: u64, content: &[u8]) {
        let target = self.at(offset, content.len() as u64);
        // SAFETY: in the area (checked by `at`); the content lies elsewhere.
        unsafe {
            target
                .as_ptr()
                .copy_from_nonoverlapping(content.as_ptr(), content.len());
        }
    }

    /// The bytes at `offset`, to be hashed.
    ///
    /// # Safety
    ///
    /// Nobody writes them as long as the slice lives.
    ///
    /// # Panics
    /// If they are not in the area.
    pub unsafe fn bytes_at(&self, offset: u64, bytes: u32) -> &[u8] {
        let start = self.at(offset, u64::from(bytes));
        // SAFETY: in the area (checked above), mapped as long as it lives, and not written
        // meanwhile, which the caller promises.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes as usize) }
    }
}

impl fmt::Debug for PoolMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolMemory")
            .field("base", &self.base())
            .field("bytes", &self.bytes())
            .finish()
    }
}

/// Zeroed memory at a page's boundary.
struct Aligned {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the only use of the pointer is to free the memory, once.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Allocates zeroed memory that direct I/O takes.
///
/// # Panics
/// If `bytes` is zero or more than half of the address space.
pub(crate) fn aligned(bytes: usize) -> Area {
    assert!(bytes > 0);
    let layout = Layout::from_size_align(bytes, 4096).expect("no such size is asked for");
    // SAFETY: the size is not zero.
    let base = unsafe { alloc_zeroed(layout) };
    let Some(base) = NonNull::new(base) else {
        handle_alloc_error(layout)
    };
    Area {
        base,
        bytes: bytes as u64,
        is_in_huge_pages: false,
        _keep_alive: Arc::new(Aligned { base, layout }),
    }
}

/// A mapping of its own.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the only use of the pointer is to unmap, once.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: Option<&File>, bytes: usize) -> io::Result<Self> {
        assert!(bytes > 0);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let anywhere = std::ptr::null_mut();
        let start = match file {
            // SAFETY: a new mapping, at an address of the system's choice.
            Some(file) => unsafe { mmap(anywhere, bytes, access, MapFlags::SHARED, file, 0)? },
            // SAFETY: as above.
            None => unsafe { mmap_anonymous(anywhere, bytes, access, MapFlags::PRIVATE)? },
        };
        let start = NonNull::new(start.cast()).expect("the system maps nothing at zero");
        Ok(Self { start, bytes })
    }

    /// Its first `bytes` bytes from a multiple of `alignment` on, which keep it mapped.
    fn area(self, bytes: usize, alignment: usize) -> Area {
        let skip = self.start.align_offset(alignment);
        assert!(skip <= self.bytes && bytes <= self.bytes - skip);
        Area {
            // SAFETY: in the mapping (checked above).
            base: unsafe { self.start.add(skip) },
            bytes: bytes as u64,
            is_in_huge_pages: false,
            _keep_alive: Arc::new(self),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this length, and unmapped only here.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
impl Area {
    /// What is at `offset`, which no request names.
    pub fn content(&self, offset: u64, bytes: u32) -> Vec<u8> {
        // SAFETY: nobody writes meanwhile.
        unsafe { self.bytes_at(offset, bytes) }.to_vec()
    }
}

#[cfg(test)]
impl From<Area> for PoolMemory {
    fn from(area: Area) -> Self {
        Self { area, lock: None }
    }
}
