//! Limits of the process.

#![forbid(unsafe_code)]

use crate::control::MAX_AWAITED_CHUNKS;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors of one session: socket, pidfds, `/proc/<pid>/mem`, segments, bells, and room for a
/// message's.
const PER_SESSION: u64 = 16;
/// Descriptors of the daemon itself: files, epolls, HTTP, index files, and physical allocations of
/// GPUs on their way in.
const OWN: u64 = 256 + MAX_AWAITED_CHUNKS as u64;

/// Raises the soft limit of descriptors as far as the sessions may need, and says so if that is too
/// little.
pub(super) fn raise_descriptors(max_sessions: u32) {
    let needed = OWN + PER_SESSION * u64::from(max_sessions);
    let found = getrlimit(Resource::Nofile);
    let Some(soft) = found.current.filter(|soft| *soft < needed) else {
        return;
    };
    let wanted = found.maximum.map_or(needed, |hard| hard.min(needed));
    let raised = Rlimit {
        current: Some(wanted),
        maximum: found.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, soft, "the limit of descriptors cannot be raised");
    } else if wanted < needed {
        tracing::warn!(
            limit = wanted,
            needed,
            "too few descriptors for all sessions: raise `ulimit -Hn` (LimitNOFILE= in the unit), or \
             lower --max-sessions"
        );
    }
}
