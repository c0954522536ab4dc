//! The pool file in this process's address space.
//!
//! All of the pool's `unsafe` is here. The mapping never becomes a Rust reference: copy engines and
//! the kernel write to it at any time, so only its address is given out.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// The mapping begins at a multiple of this, in bytes, so that hugepages can back it.
pub(super) const HUGEPAGE_BYTES: u64 = 2 << 20;

/// What the kernel maps at least, in bytes.
const MEMORY_PAGE_BYTES: usize = 4096;

/// A read-write shared mapping of a whole file.
pub(super) struct PoolMapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the value is an address and a length; nothing behind the address belongs to a thread.
unsafe impl Send for PoolMapping {}
// SAFETY: no method reads or writes the memory behind the address but the kernel on our behalf.
unsafe impl Sync for PoolMapping {}

impl PoolMapping {
    /// Maps `len` bytes of `fd`, which the file must have; `len` is a multiple of 4096.
    pub(super) fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(MEMORY_PAGE_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let align = HUGEPAGE_BYTES as usize;
        let reserved = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, ProtFlags::empty(), flags)? };
        let head = start.align_offset(align);
        let base = start.wrapping_byte_add(head);
        let tail = reserved - head - len;
        // SAFETY: `base..base + len` lies inside the reservation made above, which nobody else
        // knows, so replacing it replaces nothing in use; the rest of the reservation is unused.
        unsafe {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            let mapped = mmap(base, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0);
            if let Err(errno) = mapped {
                munmap(start, reserved)?;
                return Err(errno.into());
            }
            if head > 0 {
                munmap(start, head)?;
            }
            if tail > 0 {
                munmap(base.wrapping_byte_add(len), tail)?;
            }
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { base, len };
        // A core dump of the daemon must not contain users' KV state, nor take hours.
        mapping.advise(0, len, Advice::LinuxDontDump)?;
        Ok(mapping)
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Asks for hugepages behind the mapping.
    pub(super) fn advise_hugepages(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxHugepage)
    }

    /// Makes every page of the range present and writable, allocating it in the file where it is a
    /// hole; [`io::ErrorKind::Unsupported`] before Linux 5.14.
    pub(super) fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        match self.advise(offset, len, Advice::LinuxPopulateWrite) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            result => result,
        }
    }

    /// Puts the range, already populated, on hugepages where that is possible.
    pub(super) fn collapse(&self, offset: usize, len: usize) -> io::Result<()> {
        let at = self.checked(offset, len)?;
        // SAFETY: the range is inside the mapping, and moving pages does not change their content.
        match unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads one byte of each page of a range that was allocated in the file: a hole would raise
    /// SIGBUS on a full file system.
    pub(super) fn touch(&self, offset: usize, len: usize) -> io::Result<()> {
        let at = self.checked(offset, len)?;
        for page in (0..len).step_by(MEMORY_PAGE_BYTES) {
            // SAFETY: inside the mapping, allocated as the caller promises; volatile, because
            // others may write the byte meanwhile.
            unsafe { at.add(page).read_volatile() };
        }
        Ok(())
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        let at = self.checked(offset, len)?;
        // SAFETY: the range is inside the mapping, and none of the advices used here changes what
        // the memory contains.
        unsafe { madvise(at.cast(), len, advice)? };
        Ok(())
    }

    fn checked(&self, offset: usize, len: usize) -> io::Result<*mut u8> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.base.as_ptr().wrapping_add(offset))
    }
}

impl Drop for PoolMapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; whoever uses the address keeps this value alive.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping what was mapped cannot fail");
    }
}
