//! A client's shared-memory region, mapped into the daemon.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::error::MemoryError;

/// A client's memfd, mapped readable and writable until the last handle is dropped.
///
/// The bytes are the client's: they change at any time, and no Rust reference ever points to them.
/// What keeps the daemon safe is checked in [`RegionMapping::map`]: the file cannot shrink, and a
/// hole that the client punches is filled with zero pages by the kernel. Filling is charged to the
/// daemon; only strict overcommit (`vm.overcommit_memory=2`) or a memory limit can refuse it.
#[derive(Debug)]
pub struct RegionMapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, may be unmapped by any thread, and is touched
// only by raw copies that make no claim about who else touches the bytes.
unsafe impl Send for RegionMapping {}
// SAFETY: as above; nothing in the value changes after `map`.
unsafe impl Sync for RegionMapping {}

impl RegionMapping {
    /// Maps the first `bytes` bytes of a client's memfd.
    ///
    /// Refuses a file that could shrink under the mapping, and one that is not plain tmpfs memory.
    pub fn map(fd: BorrowedFd<'_>, bytes: u64) -> Result<Arc<Self>, MemoryError> {
        if bytes == 0 {
            return Err(MemoryError::EmptyRegion);
        }
        check_file(fd, bytes)?;
        let length = usize::try_from(bytes).expect("64-bit target");
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; no existing memory
        // is replaced. `length` is not zero.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(region_error("mmap"));
        }
        let base: NonNull<u8> =
            NonNull::new(base.cast()).expect("mmap never returns null without MAP_FIXED");
        // The region is the client's memory: a core dump or a fork of the daemon has no use for it.
        // SAFETY: the range was mapped just now. Failure leaves a correct mapping, so it is
        // ignored.
        unsafe {
            libc::madvise(base.as_ptr().cast(), length, libc::MADV_DONTDUMP);
            libc::madvise(base.as_ptr().cast(), length, libc::MADV_DONTFORK);
        }
        Ok(Arc::new(Self {
            base,
            bytes: length,
        }))
    }

    /// The mapping's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Raises the 32-bit word at byte `offset` to `value`, unless it is higher; what other memory
    /// was written before is seen by whoever sees the word. Nothing where no word lies there.
    pub(crate) fn raise(&self, offset: usize, value: u32) {
        let inside = offset
            .checked_add(size_of::<u32>())
            .is_some_and(|end| end <= self.bytes);
        if !inside || !offset.is_multiple_of(align_of::<u32>()) {
            return;
        }
        // SAFETY: an aligned word of the mapping, which starts at a page. The other process reaches
        // it by atomic operations, too, or breaks its own signals.
        let word = unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) };
        // SYNC: load-signal. Pairs with the GPU's wait and with the client's own raise.
        word.fetch_max(value, Ordering::Release);
    }

    /// The address of byte 0 in the daemon.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for RegionMapping {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and every user holds the `Arc` this value is in.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.bytes);
        }
    }
}

fn region_error(call: &'static str) -> MemoryError {
    MemoryError::Region {
        call,
        source: io::Error::last_os_error(),
    }
}

fn check_file(fd: BorrowedFd<'_>, bytes: u64) -> Result<(), MemoryError> {
    let io_error = |call| {
        move |e: rustix::io::Errno| MemoryError::Region {
            call,
            source: e.into(),
        }
    };
    let magic = rustix::fs::fstatfs(fd).map_err(io_error("fstatfs"))?.f_type;
    if magic != libc::TMPFS_MAGIC {
        return Err(MemoryError::NotTmpfs { magic });
    }
    // The seal comes before the size: a size read earlier could still shrink.
    // SAFETY: F_GET_SEALS takes no argument and touches no memory of ours.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(region_error("fcntl(F_GET_SEALS)"));
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(MemoryError::NotSealed { seals });
    }
    let file_bytes = rustix::fs::fstat(fd).map_err(io_error("fstat"))?.st_size;
    let file_bytes = u64::try_from(file_bytes).unwrap_or(0);
    if file_bytes < bytes {
        return Err(MemoryError::RegionTooSmall {
            asked_bytes: bytes,
            file_bytes,
        });
    }
    Ok(())
}
