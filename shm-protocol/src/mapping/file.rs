//! Named files under `/dev/shm/pegaflow/<node>/`: node, index, pool, catalog.
//!
//! The daemon alone writes them; clients get read-only descriptors and tools open them read-only.
//! They are not sealed (they have names and outlive the daemon): a reader trusts the daemon, by the
//! 0700 directory, not to truncate a file that it has handed out.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, ftruncate, open, unlink};

use super::memfd::{check_size, check_tmpfs_file};
use super::{Mapping, MappingError};

/// How a mapping may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads and copies out.
    ReadOnly,
    /// Everything.
    ReadWrite,
}

/// A named tmpfs file, open.
#[derive(Debug)]
pub struct NamedFile {
    fd: OwnedFd,
    purpose: &'static str,
    bytes: u64,
}

impl NamedFile {
    /// Creates the file, which must not exist, with mode 0600 and `bytes` bytes, all of them holes:
    /// see [`Self::reserve`]. On an error no file is left that was not there before.
    ///
    /// # Errors
    /// Zero bytes, not on tmpfs, or a failed system call (it exists, no permission).
    pub fn create(path: &Path, purpose: &'static str, bytes: u64) -> Result<Self, MappingError> {
        if bytes == 0 {
            return Err(MappingError::Empty { purpose });
        }
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| MappingError::errno(purpose, "open", errno))?;
        let sized = check_tmpfs_file(fd.as_fd(), purpose).and_then(|()| {
            ftruncate(&fd, bytes).map_err(|errno| MappingError::errno(purpose, "ftruncate", errno))
        });
        if let Err(error) = sized {
            // The error that led here matters more than one of the removal.
            let _ = unlink(path);
            return Err(error);
        }
        Ok(Self { fd, purpose, bytes })
    }

    /// Opens an existing file, whatever its size.
    ///
    /// # Errors
    /// Not a regular file on tmpfs, empty, or a failed system call.
    pub fn open(path: &Path, purpose: &'static str, access: Access) -> Result<Self, MappingError> {
        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        // Non-blocking, so that a FIFO of that name cannot hold the caller up.
        let flags = mode | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = open(path, flags, Mode::empty())
            .map_err(|errno| MappingError::errno(purpose, "open", errno))?;
        Self::from_fd(fd, purpose)
    }

    /// Takes a descriptor of such a file that came over a socket.
    ///
    /// # Errors
    /// Not a regular file on tmpfs, empty, or a failed system call.
    pub fn from_fd(fd: OwnedFd, purpose: &'static str) -> Result<Self, MappingError> {
        check_tmpfs_file(fd.as_fd(), purpose)?;
        let stat = fstat(&fd).map_err(|errno| MappingError::errno(purpose, "fstat", errno))?;
        let bytes = stat.st_size as u64;
        if bytes == 0 {
            return Err(MappingError::Empty { purpose });
        }
        Ok(Self { fd, purpose, bytes })
    }

    /// Size in bytes when it was opened.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The descriptor, to pass on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The descriptor, to keep.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Maps the whole file.
    ///
    /// # Errors
    /// The size has changed since it was opened, the descriptor does not allow `access`, or no
    /// address space.
    pub fn map(&self, access: Access) -> Result<Mapping, MappingError> {
        check_size(self.as_fd(), self.purpose, self.bytes)?;
        Mapping::map(self.as_fd(), self.purpose, self.bytes, access)
    }

    /// [`Self::map`] for a file whose size is agreed on.
    ///
    /// # Errors
    /// As [`Self::map`], and [`MappingError::WrongSize`] if the file is not of `expected_bytes`.
    pub fn map_exact(&self, access: Access, expected_bytes: u64) -> Result<Mapping, MappingError> {
        check_size(self.as_fd(), self.purpose, expected_bytes)?;
        Mapping::map(self.as_fd(), self.purpose, expected_bytes, access)
    }

    /// Allocates the pages of a range of bytes, so that a full tmpfs is an error here and not a
    /// SIGBUS at the first touch.
    ///
    /// # Errors
    /// The range lies outside the file, or there is no memory.
    pub fn reserve(&self, offset: u64, bytes: u64) -> Result<(), MappingError> {
        self.fallocate(FallocateFlags::empty(), offset, bytes)
    }

    /// Gives the pages of a range of bytes back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// The range lies outside the file, or a failed system call.
    pub fn release(&self, offset: u64, bytes: u64) -> Result<(), MappingError> {
        self.fallocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            bytes,
        )
    }

    fn fallocate(
        &self,
        flags: FallocateFlags,
        offset: u64,
        bytes: u64,
    ) -> Result<(), MappingError> {
        let purpose = self.purpose;
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(MappingError::OutOfBounds {
                purpose,
                offset: offset as usize,
                length: bytes as usize,
                mapped: self.bytes as usize,
            });
        }
        fallocate(&self.fd, flags, offset, bytes)
            .map_err(|errno| MappingError::errno(purpose, "fallocate", errno))
    }
}
