//! Links under `sessions/` to a session's segments, for `pegactl` and people.

#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::lane::api::SessionId;

/// The two segments of a session, reachable by name while this lives.
#[derive(Debug)]
pub(super) struct SegmentLinks {
    links: Vec<PathBuf>,
    _c2d: OwnedFd,
    _d2c: OwnedFd,
}

impl SegmentLinks {
    /// Makes the links. A session does not need them, so a failure is logged and no more.
    pub(super) fn make(folder: &Path, id: SessionId, c2d: OwnedFd, d2c: OwnedFd) -> SegmentLinks {
        let pid = std::process::id();
        let mut links = Vec::new();
        for (fd, suffix) in [(&c2d, "c2d"), (&d2c, "d2c")] {
            let link = folder.join(format!("{id}.{suffix}"));
            match symlink(format!("/proc/{pid}/fd/{}", fd.as_raw_fd()), &link) {
                Ok(()) => links.push(link),
                Err(error) => tracing::warn!(link = %link.display(), %error, "no link made"),
            }
        }
        SegmentLinks {
            links,
            _c2d: c2d,
            _d2c: d2c,
        }
    }
}

impl Drop for SegmentLinks {
    fn drop(&mut self) {
        for link in &self.links {
            if let Err(error) = std::fs::remove_file(link) {
                tracing::warn!(link = %link.display(), %error, "the link cannot be removed");
            }
        }
    }
}
