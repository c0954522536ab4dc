//! The node's folder in shared memory: made, checked, locked and swept.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat, fchmod, fstat, mkdir, open};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::lock::{LockError, LockFile};

/// Permission bits of the folder of all nodes: each user may add a node, nobody may remove
/// another's.
const ROOT_MODE: u32 = 0o1777;
/// Permission bits of a node's folder.
const NODE_MODE: u32 = 0o700;
/// Folder of the links to the sessions' segments.
const SESSIONS: &str = "sessions";
/// Begins the names of the index files.
const INDEX_PREFIX: &str = "index-";

/// A folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeDirError {
    /// It belongs to somebody who could take files away.
    #[error(
        "{path} belongs to user {owner}, not to root or to this daemon's user {own}: have it \
         removed, or name another tmpfs folder in PEGAFLOW_SHM_DIR"
    )]
    Owner {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The daemon's user.
        own: u32,
    },
    /// It is something else, such as a symbolic link.
    #[error("{path} is no folder (or a symbolic link to one): remove it")]
    NotFolder {
        /// The path.
        path: PathBuf,
    },
    /// Another daemon serves this node.
    #[error(
        "node `{node}` is already served by pegaflowd with process id {holder}: stop it, or start \
         this one with another --node"
    )]
    Served {
        /// Name of the node.
        node: String,
        /// Process id of the other daemon.
        holder: String,
    },
    /// The lock file could not be used.
    #[error(transparent)]
    Lock(LockError),
    /// A system call failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// The folder, locked by this daemon for as long as the value lives.
#[derive(Debug)]
pub struct NodeDir {
    path: PathBuf,
    fd: OwnedFd,
    _lock: LockFile,
}

impl NodeDir {
    /// Makes what is missing, refuses what is not safe, takes the lock and removes what a previous
    /// daemon's sessions left.
    ///
    /// # Errors
    /// See [`NodeDirError`].
    pub fn open(path: &Path) -> Result<NodeDir, NodeDirError> {
        if let Some(root) = path.parent() {
            open_folder(root, ROOT_MODE, &[0, geteuid().as_raw()])?;
        }
        let fd = open_folder(path, NODE_MODE, &[geteuid().as_raw()])?;
        let node = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let lock = LockFile::take(&path.join("lock")).map_err(|error| match error {
            LockError::Held { holder, .. } => NodeDirError::Served { node, holder },
            other => NodeDirError::Lock(other),
        })?;
        let dir = NodeDir {
            path: path.to_owned(),
            fd,
            _lock: lock,
        };
        dir.sweep_sessions()?;
        Ok(dir)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Folder of the links to the sessions' segments.
    pub fn sessions(&self) -> PathBuf {
        self.path.join(SESSIONS)
    }

    /// Removes the index files, which no later daemon adopts. Whoever has one mapped keeps it.
    ///
    /// # Errors
    /// The folder cannot be listed, or a file cannot be removed.
    pub fn remove_index_files(&self) -> Result<(), NodeDirError> {
        let failed = |operation| {
            move |source| NodeDirError::Io {
                operation,
                path: self.path.clone(),
                source,
            }
        };
        for entry in fs::read_dir(&self.path).map_err(failed("listing"))? {
            let entry = entry.map_err(failed("listing"))?;
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with(INDEX_PREFIX)
            {
                fs::remove_file(entry.path()).map_err(failed("removing an index file in"))?;
            }
        }
        Ok(())
    }

    fn sweep_sessions(&self) -> Result<(), NodeDirError> {
        let path = self.sessions();
        open_folder(&path, NODE_MODE, &[geteuid().as_raw()])?;
        let failed = |operation| {
            let path = path.clone();
            move |source| NodeDirError::Io {
                operation,
                path,
                source,
            }
        };
        for entry in fs::read_dir(&path).map_err(failed("listing"))? {
            let entry = entry.map_err(failed("listing"))?;
            fs::remove_file(entry.path()).map_err(failed("removing a stale link in"))?;
        }
        Ok(())
    }
}

/// Opens a folder that one of `owners` has, making it if it is missing; a folder of our own gets
/// `mode`.
fn open_folder(path: &Path, mode: u32, owners: &[u32]) -> Result<OwnedFd, NodeDirError> {
    let failed = |operation| {
        let path = path.to_owned();
        move |errno: Errno| NodeDirError::Io {
            operation,
            path,
            source: errno.into(),
        }
    };
    let made = match mkdir(path, Mode::from_raw_mode(0o700)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(errno) => return Err(failed("making folder")(errno)),
    };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = match open(path, flags, Mode::empty()) {
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(NodeDirError::NotFolder {
                path: path.to_owned(),
            });
        }
        other => other.map_err(failed("opening folder"))?,
    };
    let stat: Stat = fstat(&fd).map_err(failed("examining folder"))?;
    debug_assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::Directory);
    let own = geteuid().as_raw();
    if !owners.contains(&stat.st_uid) {
        return Err(NodeDirError::Owner {
            path: path.to_owned(),
            owner: stat.st_uid,
            own,
        });
    }
    // The folder of all nodes keeps the mode that an operator gave it; a node's folder is ours
    // alone.
    let private = mode & 0o077 == 0;
    if made || (private && stat.st_mode & 0o7777 != mode) {
        fchmod(&fd, Mode::from_raw_mode(mode)).map_err(failed("setting the mode of"))?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn folders_are_made_with_their_modes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pegaflow/n1");
        let dir = NodeDir::open(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(path.parent().unwrap()), ROOT_MODE);
        assert_eq!(mode(&path), NODE_MODE);
        assert_eq!(mode(&dir.sessions()), NODE_MODE);
    }

    #[test]
    fn a_second_daemon_on_a_node_is_told_whose_it_is() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("n1");
        let first = NodeDir::open(&path).unwrap();
        let error = NodeDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("node `n1` is already served"), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        NodeDir::open(&root.path().join("n2")).unwrap();
        drop(first);
        NodeDir::open(&path).unwrap();
    }

    #[test]
    fn stale_links_go_and_a_loose_mode_is_tightened() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("n1");
        fs::create_dir_all(path.join(SESSIONS)).unwrap();
        symlink("/proc/1/fd/99", path.join(SESSIONS).join("7.c2d")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let dir = NodeDir::open(&path).unwrap();
        assert_eq!(fs::read_dir(dir.sessions()).unwrap().count(), 0);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, NODE_MODE);
    }

    #[test]
    fn index_files_go_and_everything_else_stays() {
        let root = tempfile::tempdir().unwrap();
        let dir = NodeDir::open(&root.path().join("n1")).unwrap();
        for name in ["index-0", "index-1000", "pool", "catalog"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        dir.remove_index_files().unwrap();
        let left = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["catalog", "lock", "pool", "sessions"]);
    }

    #[test]
    fn a_link_in_the_way_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().join("real");
        fs::create_dir(&real).unwrap();
        let link = root.path().join("link");
        symlink(&real, &link).unwrap();
        assert!(matches!(
            NodeDir::open(&link),
            Err(NodeDirError::NotFolder { .. })
        ));
        let below = NodeDir::open(&link.join("n1"));
        assert!(matches!(below, Err(NodeDirError::NotFolder { .. })));
    }

    #[test]
    fn a_folder_of_another_user_is_refused() {
        if !geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("n1");
        fs::create_dir(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
        let error = NodeDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("belongs to user 4242"), "{error}");
        assert!(error.contains("PEGAFLOW_SHM_DIR"), "{error}");
    }
}
