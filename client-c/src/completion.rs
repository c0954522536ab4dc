//! Ids, and the answer to a request.

#![forbid(unsafe_code)]

use pegaflow_shm::desc::{MissReason, Op};
use pegaflow_shm::status::Status;

use crate::requests::ResultSource;

/// A request of one client, from its submission until its completion is consumed. Never 0, never
/// used twice by one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A registration of one client; stays valid across reconnections. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistrationId(pub u32);

/// The answer to one request. Fields that an operation does not use are 0.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The request.
    pub request: RequestId,
    /// Its operation.
    pub op: Op,
    /// How it went.
    pub status: Status,
    /// Query: why the first position that is not a hit is none.
    pub reason: MissReason,
    /// Query: hits. Load: blocks loaded. Save: blocks newly stored.
    pub count: u32,
    /// Query: the lease, 0 when there was no hit.
    pub lease: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// Save: blocks already held or on their way in, not copied again.
    pub skipped: u32,
    /// Save: blocks not stored, for want of room or because a copy failed.
    pub dropped: u32,
    /// Error: the value it is about. Query: the lease's time to live in ms.
    pub arg0: u64,
    /// Nanoseconds from the daemon seeing the request to its answer.
    pub daemon_ns: u64,
    /// Query of a group other than 0: bit `i % 64` of word `i / 64` says that position `i` is a
    /// hit. All zeros unless the status is `Ok`.
    pub bitmap: Option<Box<[u64]>>,
    /// The caller's own value, as given at submission; 0 if none was.
    pub cookie: u64,
    /// Where the bitmap still lies; resolved before the completion is handed out.
    pub(crate) source: Option<ResultSource>,
    /// Load: its blocks; kept elsewhere, or dropped, before the completion is handed out.
    pub(crate) blocks: Option<Box<[u32]>>,
}

impl Default for Completion {
    fn default() -> Completion {
        Completion {
            request: RequestId(0),
            op: Op::Nop,
            status: Status::Ok,
            reason: MissReason::None,
            count: 0,
            lease: 0,
            bytes: 0,
            skipped: 0,
            dropped: 0,
            arg0: 0,
            daemon_ns: 0,
            bitmap: None,
            cookie: 0,
            source: None,
            blocks: None,
        }
    }
}

impl Completion {
    /// True if the status is `Ok`.
    pub fn is_ok(&self) -> bool {
        self.status.is_ok()
    }
}
