//! The session socket: one daemon per path, a stale file removed only by whoever holds its lock.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use rustix::process::geteuid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::lock::{LockError, LockFile};
use super::watch::watch;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon serves it.
    #[error(
        "socket {path} is already served by pegaflowd with process id {holder}: stop it, or start \
         this one with another --socket"
    )]
    Served {
        /// The socket.
        path: PathBuf,
        /// Process id of the other daemon.
        holder: String,
    },
    /// The lock file could not be used.
    #[error("socket {path}: {source}")]
    Lock {
        /// The socket.
        path: PathBuf,
        /// The error.
        source: LockError,
    },
    /// The folder is not safe: somebody else could put another socket there.
    #[error("socket folder {path} {problem}: choose another --socket")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Something that is no socket lies there.
    #[error("{path} exists and is no socket: remove it, or choose another --socket")]
    NotSocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("socket {path}: {operation} failed: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The error.
        source: io::Error,
    },
}

/// The right to a socket path, had before the slow part of the start and kept until the end.
#[derive(Debug)]
pub struct SocketClaim {
    path: PathBuf,
    _lock: LockFile,
}

impl SocketClaim {
    /// Makes the folder (0711 when other users may connect, else 0700), checks it and takes the
    /// lock.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn take(path: &Path, serves_others: bool) -> Result<SocketClaim, ListenError> {
        check_folder(path, serves_others)?;
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = LockFile::take(Path::new(&lock_path)).map_err(|error| match error {
            LockError::Held { holder, .. } => ListenError::Served {
                path: path.to_owned(),
                holder,
            },
            source => ListenError::Lock {
                path: path.to_owned(),
                source,
            },
        })?;
        remove_stale(path)?;
        Ok(SocketClaim {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Listens. Needs a tokio runtime.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn listen(&self, mode: u32) -> Result<Listener, ListenError> {
        let path = &self.path;
        let failed = |operation| {
            move |source: io::Error| ListenError::Io {
                path: path.clone(),
                operation,
                source,
            }
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| failed("socket")(errno.into()))?;
        let address =
            SocketAddrUnix::new(path).map_err(|errno| failed("naming it")(errno.into()))?;
        bind(&socket, &address).map_err(|errno| failed("bind")(errno.into()))?;
        // Nobody can connect before `listen`, so the mode is in force from the first connection on.
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("chmod"))?;
        listen(&socket, BACKLOG).map_err(|errno| failed("listen")(errno.into()))?;
        let socket = watch(socket, Interest::READABLE).map_err(failed("epoll"))?;
        Ok(Listener {
            socket,
            path: path.clone(),
        })
    }
}

/// A listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// The next connection, non-blocking and close-on-exec.
    ///
    /// # Errors
    /// No descriptor or no memory; a later call may succeed.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.socket.readable().await?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(self.socket.get_ref(), flags) {
                Ok(connection) => return Ok(connection),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "the socket cannot be removed");
        }
    }
}

/// Removes a socket that nobody listens on any more: the caller holds its lock.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |operation| {
        move |source: io::Error| ListenError::Io {
            path: path.to_owned(),
            operation,
            source,
        }
    };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(ListenError::NotSocket {
            path: path.to_owned(),
        }),
        Ok(_) => fs::remove_file(path).map_err(failed("removing a stale socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("stat")(error)),
    }
}

fn check_folder(path: &Path, serves_others: bool) -> Result<(), ListenError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mode = if serves_others { 0o711 } else { 0o700 };
    let io_failed = |source| ListenError::Io {
        path: path.to_owned(),
        operation: "making its folder",
        source,
    };
    match fs::DirBuilder::new().mode(mode).create(folder) {
        // The umask may have taken bits away.
        Ok(()) => {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).map_err(io_failed)?
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(io_failed(error)),
    }
    let found = fs::symlink_metadata(folder).map_err(io_failed)?;
    let own = geteuid().as_raw();
    let problem = if found.is_symlink() {
        // Such as /var/run: follow it only where root has put it.
        let target = fs::metadata(folder).map_err(io_failed)?;
        (found.uid() != 0 || !target.is_dir()).then(|| "is a symbolic link".to_owned())
    } else if !found.is_dir() {
        Some("is no folder".to_owned())
    } else if found.uid() != own && found.uid() != 0 {
        Some(format!(
            "belongs to user {}, who could replace the socket",
            found.uid()
        ))
    } else if found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0 {
        Some(format!(
            "has mode {:04o}: others could replace the socket",
            found.mode() & 0o7777
        ))
    } else {
        None
    };
    match problem {
        Some(problem) => Err(ListenError::Folder {
            path: folder.to_owned(),
            problem,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_listener_on_a_socket_is_told_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let claim = SocketClaim::take(&path, false).unwrap();
        let listener = claim.listen(0o600).unwrap();
        let error = SocketClaim::take(&path, false).unwrap_err().to_string();
        assert!(error.contains("s.sock is already served"), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        assert!(path.exists(), "the living daemon's socket stays");
        drop(listener);
        assert!(!path.exists());
        drop(claim);
        SocketClaim::take(&path, false).unwrap();
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_another_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let claim = SocketClaim::take(&path, false).unwrap();
        assert!(!path.exists(), "gone before the slow part of the start");
        let listener = claim.listen(0o660).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        drop((listener, claim));
        fs::write(&path, "precious").unwrap();
        let refused = SocketClaim::take(&path, false);
        assert!(matches!(refused, Err(ListenError::NotSocket { .. })));
        assert!(path.exists());
    }

    #[test]
    fn the_folder_is_made_private_or_passable() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        SocketClaim::take(&dir.path().join("a/s.sock"), false).unwrap();
        assert_eq!(mode(&dir.path().join("a")), 0o700);
        SocketClaim::take(&dir.path().join("b/s.sock"), true).unwrap();
        assert_eq!(mode(&dir.path().join("b")), 0o711);
    }

    #[test]
    fn a_folder_that_everybody_may_write_is_refused_unless_sticky() {
        let dir = tempfile::tempdir().unwrap();
        let loose = dir.path().join("loose");
        fs::create_dir(&loose).unwrap();
        fs::set_permissions(&loose, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = SocketClaim::take(&loose.join("s.sock"), false);
        assert!(
            matches!(refused, Err(ListenError::Folder { .. })),
            "{refused:?}"
        );
        fs::set_permissions(&loose, fs::Permissions::from_mode(0o1777)).unwrap();
        SocketClaim::take(&loose.join("s.sock"), false).unwrap();
    }
}
