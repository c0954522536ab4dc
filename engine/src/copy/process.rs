//! The address space of another process, reached by `process_vm_readv` and `process_vm_writev`, or
//! by its `/proc/<pid>/mem`.
//!
//! The memory must be the session's user's own. That is not said by the process alone: it connects
//! as its user, may then run a set-user-ID program, and leave a child behind that goes on with the
//! session. The kernel's checks see to it unless the daemon may trace everybody (`CAP_SYS_PTRACE`).
//! Then the daemon asks whom the memory belongs to when it is registered, and copies through the
//! file that it opened before it asked: that stays with the address space whatever the process runs
//! later. Root's sessions need none of this.
//!
//! The system calls are faster, but name their target by process id, and ids are used again. Two
//! descriptors taken at registration say whether the id still means the same memory: a pidfd (the
//! process lives) and the file (a read from it says 0 once its address space is gone, as after an
//! `execve`, unless another process shares it). Both are asked right before and right after each
//! call. What was read from a stranger is thus never taken for a block, and a write to one would
//! need the owner to end, be reaped, and its id to come round again within a microsecond.

use std::fs::{File, OpenOptions, metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};
use rustix::time::Timespec;

use super::error::{CopyError, MemoryError};
use super::task::Direction;

/// Another process's memory.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: i32,
    pidfd: OwnedFd,
    /// Asked whether the address space still exists.
    address_space: File,
    /// Bytes go through `address_space`, because the kernel would let this process reach any other.
    through_file: bool,
}

impl ProcessMemory {
    /// Takes hold of the memory of the process behind `pidfd`, whose id is `pid` in the daemon's
    /// process namespace (`SO_PEERCRED` and `SO_PEERPIDFD` of its session's socket). It must belong
    /// to user `uid`, the session's.
    pub fn open(pid: i32, pidfd: OwnedFd, uid: u32) -> Result<Self, MemoryError> {
        let path = format!("/proc/{pid}/mem");
        let through_file = uid != 0 && may_trace_all();
        let opened = OpenOptions::new()
            .read(true)
            .write(through_file)
            .open(&path);
        // Asked after opening, and by a look-up of its own: what the process ran meanwhile is seen,
        // or its address space is gone below. Memory that only privileged processes may trace is
        // root's, whoever the process is.
        let owner = metadata(&path).map(|found| found.uid());
        // As late: if the process lives now, the file was opened on it.
        if !process_lives(&pidfd) {
            return Err(MemoryError::OwnerGone { pid });
        }
        let failed = |call| {
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => MemoryError::NotPermitted { pid, source },
                _ => MemoryError::Process { pid, call, source },
            }
        };
        let address_space = opened.map_err(failed("open(/proc/<pid>/mem)"))?;
        let owner = owner.map_err(failed("stat(/proc/<pid>/mem)"))?;
        if owner != uid {
            return Err(MemoryError::OtherOwner { pid, uid, owner });
        }
        let memory = Self {
            pid,
            pidfd,
            address_space,
            through_file,
        };
        // Whether it still is the address space of the process is asked at each copy, too.
        if !memory.address_space_lives() {
            return Err(MemoryError::OwnerGone { pid });
        }
        Ok(memory)
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
    /// an address that is not there (nothing could be moved) comes back as `Ok(0)` because only the
    /// caller knows what lies at the start of `remote`.
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
        // SAFETY: the caller's promise.
        let moved = unsafe {
            if self.through_file {
                self.move_by_file(direction, local, remote)
            } else {
                self.move_by_call(direction, local, remote)
            }
        };
        if !self.is_alive() {
            return Err(CopyError::OwnerGone { pid });
        }
        moved.or_else(|errno| match errno {
            libc::EFAULT | libc::EIO => Ok(0),
            libc::EPERM | libc::EACCES => Err(CopyError::NotPermitted { pid, direction }),
            libc::ESRCH => Err(CopyError::OwnerGone { pid }),
            errno => Err(CopyError::System {
                pid,
                direction,
                errno,
            }),
        })
    }

    /// By one system call, to whatever the process runs now: the kernel checks whether it may.
    ///
    /// # Safety
    ///
    /// As for [`Self::transfer`].
    unsafe fn move_by_call(
        &self,
        direction: Direction,
        local: &[libc::iovec],
        remote: &[libc::iovec],
    ) -> Result<u64, i32> {
        let call = match direction {
            Direction::Save => libc::process_vm_readv,
            Direction::Load => libc::process_vm_writev,
        };
        let (local_count, remote_count) = (local.len() as u64, remote.len() as u64);
        // SAFETY: the vectors live through the call; the local ranges are the caller's promise, and
        // the remote ones are checked by the kernel.
        let moved = unsafe {
            call(
                self.pid,
                local.as_ptr(),
                local_count,
                remote.as_ptr(),
                remote_count,
                0,
            )
        };
        u64::try_from(moved).map_err(|_| last_errno())
    }

    /// Range by range, and never to another address space than the one registered.
    ///
    /// # Safety
    ///
    /// As for [`Self::transfer`].
    unsafe fn move_by_file(
        &self,
        direction: Direction,
        local: &[libc::iovec],
        remote: &[libc::iovec],
    ) -> Result<u64, i32> {
        let fd = self.address_space.as_raw_fd();
        let (mut moved, mut number, mut used) = (0, 0, 0);
        for range in remote {
            let mut done = 0;
            while done < range.iov_len
                && let Some(piece) = local.get(number)
            {
                let bytes = (piece.iov_len - used).min(range.iov_len - done);
                let near = piece.iov_base.wrapping_byte_add(used);
                let far = (range.iov_base.addr() + done) as libc::off_t;
                // SAFETY: `near .. near + bytes` lies inside one of the caller's ranges; the kernel
                // checks `far`.
                let count = unsafe {
                    match direction {
                        Direction::Save => libc::pread(fd, near, bytes, far),
                        Direction::Load => libc::pwrite(fd, near, bytes, far),
                    }
                };
                let Ok(count) = usize::try_from(count) else {
                    // What went before counts; the next call starts here and says so.
                    return if moved > 0 {
                        Ok(moved)
                    } else {
                        Err(last_errno())
                    };
                };
                moved += count as u64;
                if count < bytes {
                    return Ok(moved);
                }
                done += bytes;
                used += bytes;
                if used == piece.iov_len {
                    (number, used) = (number + 1, 0);
                }
            }
        }
        Ok(moved)
    }
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Whether the kernel lets this process reach the memory of others whoever they are. An answer that
/// cannot be had counts as yes.
fn may_trace_all() -> bool {
    capabilities(None).map_or(true, |sets| {
        sets.effective.contains(CapabilitySet::SYS_PTRACE)
    })
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
