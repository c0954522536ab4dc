//! What can be wrong with shared memory.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;

use rustix::fs::SealFlags;
use thiserror::Error;

/// A set of memfd seals, printed by name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seals(pub SealFlags);

impl fmt::Display for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(SealFlags, &str); 5] = [
            (SealFlags::SEAL, "SEAL"),
            (SealFlags::SHRINK, "SHRINK"),
            (SealFlags::GROW, "GROW"),
            (SealFlags::WRITE, "WRITE"),
            (SealFlags::FUTURE_WRITE, "FUTURE_WRITE"),
        ];
        let mut rest = self.0;
        let mut separator = "";
        for (seal, name) in NAMES {
            if self.0.contains(seal) {
                write!(f, "{separator}{name}")?;
                separator = "|";
                rest.remove(seal);
            }
        }
        match (rest.bits(), separator) {
            (0, "") => f.write_str("none"),
            (0, _) => Ok(()),
            (bits, _) => write!(f, "{separator}{bits:#x}"),
        }
    }
}

impl fmt::Debug for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seals({self})")
    }
}

/// Why memory could not be made, mapped or reached. `purpose` says which file it was.
#[derive(Debug, Error)]
pub enum MappingError {
    /// A system call failed.
    #[error("{purpose}: {operation} failed: {source}")]
    Io {
        /// Which file.
        purpose: &'static str,
        /// System call.
        operation: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The file is not one that lies in tmpfs memory.
    #[error(
        "{purpose}: descriptor is on file system {found:#x}, not tmpfs ({expected:#x}); \
         pass a memfd without MFD_HUGETLB"
    )]
    NotTmpfs {
        /// Which file.
        purpose: &'static str,
        /// `statfs` magic of tmpfs.
        expected: u64,
        /// `statfs` magic found.
        found: u64,
    },
    /// The file is not a regular one (but a directory, a device, a pipe).
    #[error("{purpose}: descriptor has file mode {found:#o}, not a regular file's")]
    NotRegular {
        /// Which file.
        purpose: &'static str,
        /// `st_mode` found.
        found: u32,
    },
    /// The memfd could still be resized, written or unsealed.
    #[error("{purpose}: memfd has seals {found}, needs {required}; seal it before passing it")]
    MissingSeals {
        /// Which file.
        purpose: &'static str,
        /// Seals that must be there.
        required: Seals,
        /// Seals that are.
        found: Seals,
    },
    /// Some of the file's pages are not there yet.
    #[error(
        "{purpose}: {allocated} of {expected} bytes are allocated; fallocate all of it before \
         sealing it"
    )]
    Holes {
        /// Which file.
        purpose: &'static str,
        /// Bytes of the file.
        expected: u64,
        /// Bytes that have memory.
        allocated: u64,
    },
    /// The file's size is not the one agreed on.
    #[error("{purpose}: file has {found} bytes, expected {expected}")]
    WrongSize {
        /// Which file.
        purpose: &'static str,
        /// Bytes agreed on.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// More bytes than this kind of memory may have.
    #[error("{purpose}: {found} bytes asked for, the maximum is {maximum}")]
    TooLarge {
        /// Which file.
        purpose: &'static str,
        /// Bytes asked for.
        found: u64,
        /// Most that are allowed.
        maximum: u64,
    },
    /// No bytes at all.
    #[error("{purpose}: a mapping of 0 bytes was asked for")]
    Empty {
        /// Which file.
        purpose: &'static str,
    },
    /// An access outside the mapping.
    #[error("{purpose}: {length} bytes at offset {offset} lie outside the {mapped} bytes mapped")]
    OutOfBounds {
        /// Which file.
        purpose: &'static str,
        /// Byte offset of the access.
        offset: usize,
        /// Bytes accessed.
        length: usize,
        /// Bytes mapped.
        mapped: usize,
    },
    /// An access that is not aligned.
    #[error("{purpose}: offset {offset} is not a multiple of {alignment}")]
    Misaligned {
        /// Which file.
        purpose: &'static str,
        /// Byte offset of the access.
        offset: usize,
        /// Alignment it needs.
        alignment: usize,
    },
    /// A write to a mapping that is read-only for this process.
    #[error("{purpose}: the mapping is read-only for this process")]
    ReadOnly {
        /// Which file.
        purpose: &'static str,
    },
}

impl MappingError {
    pub(in crate::mapping) fn errno(
        purpose: &'static str,
        operation: &'static str,
        errno: rustix::io::Errno,
    ) -> Self {
        Self::Io {
            purpose,
            operation,
            source: errno.into(),
        }
    }
}
