//! What a client tells about itself.

#![forbid(unsafe_code)]

/// Whether the daemon can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// A session is up.
    Connected = 1,
    /// The daemon is away: queries miss, everything else fails fast; a reconnect is under way.
    Disconnected = 2,
    /// The daemon is away and this client will not reconnect.
    Closed = 3,
}

impl State {
    pub(crate) fn from_code(code: u32) -> State {
        match code {
            1 => State::Connected,
            2 => State::Disconnected,
            _ => State::Closed,
        }
    }

    /// Label for logs and tables.
    pub fn label(self) -> &'static str {
        match self {
            State::Connected => "connected",
            State::Disconnected => "disconnected",
            State::Closed => "closed",
        }
    }
}

/// Counters of one client since it connected first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests accepted by `query`, `load`, `save` and so on.
    pub submitted: u64,
    /// Completions that arrived or were made here.
    pub completed: u64,
    /// Completions with another status than `Ok`.
    pub failed: u64,
    /// Submissions refused with `Again`.
    pub again: u64,
    /// Probes answered.
    pub probes: u64,
    /// Blocks that probes were asked about.
    pub probed_blocks: u64,
    /// Blocks that probes found.
    pub probe_hits: u64,
    /// Bytes that completions of loads named.
    pub loaded_bytes: u64,
    /// Bytes that completions of saves named.
    pub saved_bytes: u64,
    /// Sessions lost.
    pub disconnects: u64,
    /// Sessions regained; the first one of a client that began without a daemon does not count.
    pub reconnects: u64,
    /// Requests without a consumed completion at this moment.
    pub outstanding: u64,
    /// Time without a session in milliseconds, up to this moment.
    pub away_ms: u64,
    /// Attempts to get a session that failed.
    pub failed_attempts: u64,
    /// Registrations that the present daemon refuses at this moment.
    pub refused_registrations: u64,
    /// Saves and loads whose call waited for the engine's stream or event, because its events
    /// cannot be shared with the daemon.
    pub waited_orders: u64,
}

/// Sizes that bound one request or all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most hashes in one query.
    pub query_hashes: usize,
    /// Most hashes in one query of a group other than 0, whose bitmap must fit the result arena.
    pub membership_hashes: usize,
    /// Most blocks in one save.
    pub save_blocks: usize,
    /// Most blocks in one load.
    pub load_blocks: usize,
    /// Most requests without a consumed completion.
    pub requests: usize,
}
