//! The address space of another process, reached by `process_vm_readv` and `process_vm_writev`.
//!
//! Those calls name their target by process id, and ids are used again. Two descriptors taken at
//! registration say whether the id still means the same memory: a pidfd (the process lives) and its
//! `/proc/<pid>/mem` (the address space is still the one registered, so no `execve` came between; a
//! read from it says 0 once that address space is gone). Both are asked right before and right
//! after each call. What was read from a stranger is thus never taken for a block, and a write to
//! one would need the owner to end, be reaped, and its id to come round again within a microsecond.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use super::error::{CopyError, MemoryError};
use super::task::Direction;

/// Another process's memory.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: i32,
    pidfd: OwnedFd,
    /// Never read for its bytes: only to learn whether the address space still exists.
    address_space: File,
}

impl ProcessMemory {
    /// Takes hold of the memory of the process behind `pidfd`, whose id is `pid` in the daemon's
    /// process namespace (`SO_PEERCRED` and `SO_PEERPIDFD` of its session's socket).
    pub fn open(pid: i32, pidfd: OwnedFd) -> Result<Self, MemoryError> {
        let opened = File::open(format!("/proc/{pid}/mem"));
        // Asked after opening: if the process lives now, the file was opened on it.
        if !process_lives(&pidfd) {
            return Err(MemoryError::OwnerGone { pid });
        }
        let address_space = opened.map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => MemoryError::NotPermitted { pid, source },
            _ => MemoryError::Process {
                pid,
                call: "open(/proc/<pid>/mem)",
                source,
            },
        })?;
        // Whether it still is the address space of the process is asked at each copy.
        Ok(Self {
            pid,
            pidfd,
            address_space,
        })
    }

    /// The process id at registration.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the process lives and its memory is the one registered.
    pub fn is_alive(&self) -> bool {
        process_lives(&self.pidfd) && self.address_space_lives()
    }

    fn address_space_lives(&self) -> bool {
        let mut byte = 0u8;
        // Address 0 is never mapped: a living address space answers EIO without touching a page.
        // SAFETY: the kernel writes at most one byte, into `byte`.
        let read =
            unsafe { libc::pread(self.address_space.as_raw_fd(), (&raw mut byte).cast(), 1, 0) };
        read != 0
    }

    /// Moves bytes between `local` and `remote`, which have the same total length, and returns how
    /// many were moved: at least one, perhaps not all.
    ///
    /// Errors: [`CopyError::OwnerGone`], [`CopyError::NotPermitted`], [`CopyError::System`];
    /// `EFAULT` (nothing could be moved) comes back as `Ok(0)` because only the caller knows what
    /// lies at the start of `remote`.
    ///
    /// # Safety
    ///
    /// The local ranges are mapped (writable for a save) while the call runs, and no Rust reference
    /// points into them.
    pub(super) unsafe fn transfer(
        &self,
        direction: Direction,
        local: &[libc::iovec],
        remote: &[libc::iovec],
    ) -> Result<u64, CopyError> {
        let pid = self.pid;
        if !self.is_alive() {
            return Err(CopyError::OwnerGone { pid });
        }
        let call = match direction {
            Direction::Save => libc::process_vm_readv,
            Direction::Load => libc::process_vm_writev,
        };
        let (local_count, remote_count) = (local.len() as u64, remote.len() as u64);
        // SAFETY: the vectors live through the call; the local ranges are the caller's promise, and
        // the remote ones are checked by the kernel.
        let moved = unsafe {
            call(
                pid,
                local.as_ptr(),
                local_count,
                remote.as_ptr(),
                remote_count,
                0,
            )
        };
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        if !self.is_alive() {
            return Err(CopyError::OwnerGone { pid });
        }
        match (u64::try_from(moved), errno) {
            (Ok(moved), _) => Ok(moved),
            (Err(_), libc::EFAULT) => Ok(0),
            (Err(_), libc::EPERM | libc::EACCES) => Err(CopyError::NotPermitted { pid, direction }),
            (Err(_), libc::ESRCH) => Err(CopyError::OwnerGone { pid }),
            (Err(_), errno) => Err(CopyError::System {
                pid,
                direction,
                errno,
            }),
        }
    }
}

/// A pidfd becomes readable when its process ends. An answer that cannot be had counts as ended.
fn process_lives(pidfd: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&now)) {
            // A pending signal ends even a poll that does not wait.
            Err(Errno::INTR) => {}
            result => return result == Ok(0),
        }
    }
}
