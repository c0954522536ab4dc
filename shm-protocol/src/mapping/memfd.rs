//! Sealed memfds: segments (one writer) and KV regions (both sides write).
//!
//! Seals make promises that the kernel keeps whatever the creator does later: `SHRINK` and `GROW`
//! fix the size (a truncated mapping would kill its reader with SIGBUS), `FUTURE_WRITE` leaves the
//! creator's own mapping the only writable one (and forbids `write` and hole punching), `SEAL`
//! fixes the set of seals.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, FileType, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals,
    fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io::Errno;

use super::{Access, Mapping, MappingError, Seals};

/// Most bytes a session segment may have: 1 GiB.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;

/// Most bytes one shared KV region may have: 16 TiB.
pub const MAX_KV_REGION_BYTES: u64 = 1 << 44;

/// Seals of a session segment.
pub const SEGMENT_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

/// Seals of a shared KV region.
pub const KV_REGION_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// `statfs` magic of tmpfs, which memfds lie on (hugetlb ones do not).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Makes a sealed memfd.
#[derive(Clone, Debug)]
pub struct MemfdBuilder {
    purpose: &'static str,
    bytes: u64,
    maximum: u64,
    seals: SealFlags,
    reserve: bool,
}

impl MemfdBuilder {
    /// A session segment of `bytes` bytes: only the mapping made here can ever write it. `purpose`
    /// names it in errors and in `/proc/*/maps`.
    #[must_use]
    pub fn segment(purpose: &'static str, bytes: u64) -> Self {
        let (maximum, seals) = (MAX_SEGMENT_BYTES, SEGMENT_SEALS);
        Self {
            purpose,
            bytes,
            maximum,
            seals,
            reserve: true,
        }
    }

    /// A KV region of `bytes` bytes that every holder of the descriptor may write.
    #[must_use]
    pub fn kv_region(purpose: &'static str, bytes: u64) -> Self {
        let (maximum, seals) = (MAX_KV_REGION_BYTES, KV_REGION_SEALS);
        Self {
            purpose,
            bytes,
            maximum,
            seals,
            reserve: true,
        }
    }

    /// Whether all pages are allocated now (the default), so that memory that is not there is an
    /// error here and not a SIGBUS at the first touch.
    #[must_use]
    pub fn reserve(mut self, reserve: bool) -> Self {
        self.reserve = reserve;
        self
    }

    /// Creates, reserves, maps and seals, in this order: a writable mapping can only be made before
    /// the seal.
    ///
    /// # Errors
    /// Zero or too many bytes, or a system call that failed (no memory, no descriptor).
    pub fn create(&self) -> Result<(OwnedFd, Mapping), MappingError> {
        let Self {
            purpose,
            bytes,
            maximum,
            seals,
            reserve,
        } = *self;
        check_bytes(purpose, bytes, maximum)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the no-exec flag; those with `vm.memfd_noexec=2` insist on
        // it.
        let fd = match memfd_create(purpose, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(purpose, flags),
            other => other,
        }
        .map_err(|errno| MappingError::errno(purpose, "memfd_create", errno))?;
        ftruncate(&fd, bytes).map_err(|errno| MappingError::errno(purpose, "ftruncate", errno))?;
        if reserve {
            fallocate(&fd, FallocateFlags::empty(), 0, bytes)
                .map_err(|errno| MappingError::errno(purpose, "fallocate", errno))?;
        }
        let mapping = Mapping::map(fd.as_fd(), purpose, bytes, Access::ReadWrite)?;
        fcntl_add_seals(&fd, seals)
            .map_err(|errno| MappingError::errno(purpose, "fcntl(F_ADD_SEALS)", errno))?;
        Ok((fd, mapping))
    }
}

/// Creates a session segment; see [`MemfdBuilder::segment`].
///
/// # Errors
/// As [`MemfdBuilder::create`].
pub fn create_segment(
    purpose: &'static str,
    bytes: u64,
) -> Result<(OwnedFd, Mapping), MappingError> {
    MemfdBuilder::segment(purpose, bytes).create()
}

/// Creates a shareable KV region; see [`MemfdBuilder::kv_region`].
///
/// # Errors
/// As [`MemfdBuilder::create`].
pub fn create_kv_region(
    purpose: &'static str,
    bytes: u64,
) -> Result<(OwnedFd, Mapping), MappingError> {
    MemfdBuilder::kv_region(purpose, bytes).create()
}

/// Maps a peer's session segment read-only after checking that it is a tmpfs memfd with
/// [`SEGMENT_SEALS`], exactly `expected_bytes` long and without holes: reading a hole makes a page,
/// at the reader's cost, and raises SIGBUS where none can be had.
///
/// # Errors
/// Any of these checks, `expected_bytes` above [`MAX_SEGMENT_BYTES`], or a failed system call.
pub fn open_peer_segment(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
    expected_bytes: u64,
) -> Result<Mapping, MappingError> {
    check_bytes(purpose, expected_bytes, MAX_SEGMENT_BYTES)?;
    check_memfd(fd, purpose, expected_bytes, SEGMENT_SEALS)?;
    check_allocated(fd, purpose, expected_bytes)?;
    Mapping::map(fd, purpose, expected_bytes, Access::ReadOnly)
}

/// Maps a peer's KV region read-write after checking that it is a tmpfs memfd with
/// [`KV_REGION_SEALS`] and exactly `expected_bytes` long.
///
/// # Errors
/// Any of these checks, `expected_bytes` above [`MAX_KV_REGION_BYTES`], or a failed system call.
pub fn open_peer_kv_region(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
    expected_bytes: u64,
) -> Result<Mapping, MappingError> {
    check_bytes(purpose, expected_bytes, MAX_KV_REGION_BYTES)?;
    check_memfd(fd, purpose, expected_bytes, KV_REGION_SEALS)?;
    Mapping::map(fd, purpose, expected_bytes, Access::ReadWrite)
}

fn check_bytes(purpose: &'static str, bytes: u64, maximum: u64) -> Result<(), MappingError> {
    if bytes == 0 {
        return Err(MappingError::Empty { purpose });
    }
    if bytes > maximum {
        return Err(MappingError::TooLarge {
            purpose,
            found: bytes,
            maximum,
        });
    }
    Ok(())
}

fn check_memfd(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
    expected: u64,
    required: SealFlags,
) -> Result<(), MappingError> {
    check_tmpfs_file(fd, purpose)?;
    // Seals before size: once the seals are seen, the size read after cannot change any more.
    let found = fcntl_get_seals(fd)
        .map_err(|errno| MappingError::errno(purpose, "fcntl(F_GET_SEALS)", errno))?;
    if !found.contains(required) {
        let (required, found) = (Seals(required), Seals(found));
        return Err(MappingError::MissingSeals {
            purpose,
            required,
            found,
        });
    }
    check_size(fd, purpose, expected)
}

/// Refuses a file with holes. Nobody can punch one later: the seals forbid it.
fn check_allocated(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
    expected: u64,
) -> Result<(), MappingError> {
    /// Unit of `st_blocks`, whatever the file system's own is.
    const BLOCK_BYTES: u64 = 512;
    let stat = fstat(fd).map_err(|errno| MappingError::errno(purpose, "fstat", errno))?;
    let allocated = (stat.st_blocks as u64).saturating_mul(BLOCK_BYTES);
    if allocated < expected {
        return Err(MappingError::Holes {
            purpose,
            expected,
            allocated,
        });
    }
    Ok(())
}

/// Refuses whatever is not a regular file on tmpfs: a page of another file system can block or fail
/// when it is touched.
pub(super) fn check_tmpfs_file(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
) -> Result<(), MappingError> {
    let stat = fstat(fd).map_err(|errno| MappingError::errno(purpose, "fstat", errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MappingError::NotRegular {
            purpose,
            found: stat.st_mode,
        });
    }
    let statfs = fstatfs(fd).map_err(|errno| MappingError::errno(purpose, "fstatfs", errno))?;
    // The kernel's type is signed and of varying width; magics are 32 bits.
    let found = (statfs.f_type as u64) & 0xFFFF_FFFF;
    if found != TMPFS_MAGIC {
        return Err(MappingError::NotTmpfs {
            purpose,
            expected: TMPFS_MAGIC,
            found,
        });
    }
    Ok(())
}

pub(super) fn check_size(
    fd: BorrowedFd<'_>,
    purpose: &'static str,
    expected: u64,
) -> Result<(), MappingError> {
    let stat = fstat(fd).map_err(|errno| MappingError::errno(purpose, "fstat", errno))?;
    let found = stat.st_size as u64;
    if found != expected {
        return Err(MappingError::WrongSize {
            purpose,
            expected,
            found,
        });
    }
    Ok(())
}
