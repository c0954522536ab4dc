//! Status codes, from one table that Rust, C, metrics and messages share.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

macro_rules! statuses {
    ($($(#[$meta:meta])* $name:ident = $code:literal, $label:literal, $text:literal;)*) => {
        /// Outcome of an operation. The numbers are part of the ABI and never change.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum Status { $($(#[$meta])* #[doc = $text] $name = $code,)* }

        impl Status {
            /// Every status, in numeric order.
            pub const ALL: &'static [Status] = &[$(Status::$name),*];

            /// The status with this number, if there is one.
            pub fn from_code(code: u8) -> Option<Status> {
                match code { $($code => Some(Status::$name),)* _ => None }
            }

            /// Short `snake_case` label, as metrics and `--json` print it.
            pub fn label(self) -> &'static str {
                match self { $(Status::$name => $label,)* }
            }

            /// One sentence: what happened, and what the caller can do.
            pub fn text(self) -> &'static str {
                match self { $(Status::$name => $text,)* }
            }
        }
    };
}

statuses! {
    Ok = 0, "ok", "The operation succeeded.";
    Loading = 1, "loading", "Blocks are coming up from a slower tier: repeat the query.";
    InvalidArgument = 2, "invalid_argument", "An argument is malformed: see the error text for its name and value.";
    NotReady = 3, "not_ready", "The instance is incomplete: wait until all world_size ranks have registered.";
    UnknownRegistration = 4, "unknown_registration", "No such registration in this session: register first.";
    UnknownGroup = 5, "unknown_group", "The registration has no such cache group.";
    UnknownLease = 6, "unknown_lease", "No such lease: it was consumed, released, never given, or belongs to another instance.";
    LeaseExpired = 7, "lease_expired", "The lease ran past its time to live: query again.";
    LeaseConsumed = 8, "lease_consumed", "This worker has already loaded from the lease.";
    BlockOutOfRange = 9, "block_out_of_range", "A block id is not below the group's num_blocks.";
    DuplicateBlock = 10, "duplicate_block", "A block id occurs twice in one load.";
    TooMany = 11, "too_many", "The list is longer than the arena, the lease or a named limit allows: split it.";
    NoSpace = 12, "no_space", "The pool or index is full of leased or unfinished blocks: the rest was not stored.";
    SaveOnly = 13, "save_only", "The registration is save-only: it cannot query or load.";
    NoMemory = 14, "no_memory", "The registration has no KV memory (a scheduler's): it cannot save or load.";
    CopyFailed = 15, "copy_failed", "Copying to or from the engine's memory failed; nothing of it became visible.";
    Cancelled = 16, "cancelled", "The request was cancelled; no copy of it is running any more.";
    Draining = 17, "draining", "The daemon is shutting down and takes no new work.";
    Disconnected = 18, "disconnected", "The daemon is gone or closed the session: treat queries as misses; the library reconnects.";
    Timeout = 19, "timeout", "The bound given for waiting ran out; the request goes on.";
    Again = 20, "again", "The ring or arena has no room now: poll completions, then submit again.";
    VersionMismatch = 21, "version_mismatch", "Client and daemon share no protocol version: upgrade one of them.";
    PermissionDenied = 22, "permission_denied", "The daemon does not serve this user, or not with this model: see --allow-uid and the domain tables of pegaflowd.";
    BadLayout = 23, "bad_layout", "The KV layout is impossible: see the error text.";
    AlreadyRegistered = 24, "already_registered", "A live session already holds this rank of the instance.";
    NamespaceMismatch = 25, "namespace_mismatch", "Ranks of one instance must register one namespace, world size and mode.";
    ProtocolError = 26, "protocol_error", "The session broke the protocol and was closed.";
    SystemError = 27, "system_error", "A system call failed: see the error text.";
    Internal = 28, "internal", "A defect in PegaFlow: please report it with the log.";
    NoDaemon = 29, "no_daemon", "No daemon answers on the socket: start pegaflowd or set PEGAFLOW_AUTOSTART=1.";
    Limit = 30, "limit", "A named maximum of the daemon is reached (sessions, instances, leases).";
    UnknownRequest = 31, "unknown_request", "No unfinished request has this id.";
    DeviceUnavailable = 32, "device_unavailable", "The daemon cannot use this GPU: see the error text.";
}

impl Status {
    /// True for `Ok` alone.
    pub fn is_ok(self) -> bool {
        self == Status::Ok
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_round_trip() {
        for (position, status) in Status::ALL.iter().enumerate() {
            assert_eq!(*status as usize, position);
            assert_eq!(Status::from_code(*status as u8), Some(*status));
        }
        assert_eq!(Status::from_code(Status::ALL.len() as u8), None);
    }

    #[test]
    fn labels_are_unique() {
        let labels: std::collections::HashSet<_> = Status::ALL.iter().map(|s| s.label()).collect();
        assert_eq!(labels.len(), Status::ALL.len());
    }
}
