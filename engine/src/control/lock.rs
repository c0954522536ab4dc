//! Lock files: at most one daemon per socket and per node folder, even after a crash.
//!
//! The kernel drops the lock when its holder dies, so a stale file never keeps anybody out. The
//! file itself is never removed: a lock on an unlinked file would protect nothing.

#![forbid(unsafe_code)]

use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

/// A lock that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{path} is locked by process {holder}")]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Process id that the holder wrote, or `unknown`.
        holder: String,
    },
    /// A system call failed.
    #[error("lock file {path}: {source}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// A lock, held until dropped.
#[derive(Debug)]
pub struct LockFile {
    _file: std::fs::File,
}

impl LockFile {
    /// Takes the lock without waiting and writes this process's id into the file.
    ///
    /// # Errors
    /// Another process holds it, or the file cannot be opened.
    pub fn take(path: &Path) -> Result<LockFile, LockError> {
        let failed = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // A holder that has not written its id yet, or a file that is no lock of ours.
                let _ = file.take(32).read_to_string(&mut text);
                let holder = text.trim().parse::<u32>();
                let holder = holder.map_or_else(|_| "unknown".to_owned(), |pid| pid.to_string());
                return Err(LockError::Held {
                    path: path.to_owned(),
                    holder,
                });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        let write_id = |file: &mut std::fs::File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write_id(&mut file).map_err(failed)?;
        Ok(LockFile { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_taker_learns_who_holds_it_and_a_dropped_lock_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = LockFile::take(&path).unwrap();
        let held = LockFile::take(&path).unwrap_err().to_string();
        assert!(
            held.contains(&format!("process {}", std::process::id())),
            "{held}"
        );
        assert!(held.contains("lock is locked"), "{held}");
        drop(lock);
        LockFile::take(&path).unwrap();
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(LockFile::take(&path), Err(LockError::Io { .. })));
    }
}
