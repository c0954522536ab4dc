//! How the tier is set up.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use pegaflow_policy::PolicyKind;

/// One shard: a file, on a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSpec {
    /// The file. It is made if nothing has that name.
    pub path: PathBuf,
    /// Its size in bytes; rounded down to whole segments. Needed to make the file; without it an
    /// existing shard keeps its size, with it an existing shard is grown or shrunk.
    pub bytes: Option<u64>,
}

/// Which system calls move the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoChoice {
    /// io_uring where it is allowed, else threads; the report says which, and why.
    #[default]
    Auto,
    /// io_uring, or the shard does not open.
    Uring,
    /// A thread pool with `pread` and `pwrite`.
    Threads,
}

/// How the tier is set up. [`Options::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's name; a shard of another node is refused.
    pub node: String,
    /// The shards, at most [`Options::MAX_SHARDS`].
    pub shards: Vec<ShardSpec>,
    /// How bytes are moved.
    pub io: IoChoice,
    /// Requests at one drive at a time (for threads: how many there are).
    pub queue_depth: u32,
    /// Requests of one shard that may wait or be at the drive; more are refused.
    pub max_pending: u32,
    /// A kernel thread polls the submission queue and sleeps after that much idleness.
    pub sqpoll_idle: Option<Duration>,
    /// Which segment is reclaimed first.
    pub policy: PolicyKind,
    /// Page bytes written per second over all shards; none is no limit.
    pub write_limit: Option<u64>,
    /// The size of a new shard's segments in bytes; a small shard has smaller ones, so that there
    /// are enough of them. Existing shards keep theirs.
    pub segment_bytes: u32,
    /// Whether a new shard's space is reserved when it is made.
    pub preallocate: bool,
    /// How long written blocks may wait before they are made durable.
    pub commit_interval: Duration,
    /// How many written bytes may wait before they are made durable.
    pub commit_bytes: u64,
    /// How long opening waits for drives that do not answer before the tier goes on without their
    /// shards, which join it once they do. Each of its steps (looking at the files, making and
    /// resizing them, reading their tables) may take so long.
    pub open_wait: Duration,
    /// A shard of which a request takes longer is degraded until the request ends.
    pub stall_limit: Duration,
    /// How long a shard whose requests fail is left alone before one is tried again.
    pub retry_after: Duration,
}

impl Options {
    /// The most shards of one tier.
    pub const MAX_SHARDS: usize = 64;
    /// The most pages of one block.
    pub const MAX_PAGES: usize = 128;

    /// io_uring if allowed, 32 requests at the drive and 256 pending, LRU, no write limit, segments
    /// of 64 MiB, durable within 200 ms or 256 MiB, 10 s for drives to answer when it opens,
    /// degraded after 2 s, tried again after 30 s.
    pub fn new(node: impl Into<String>, shards: Vec<ShardSpec>) -> Self {
        Self {
            node: node.into(),
            shards,
            io: IoChoice::Auto,
            queue_depth: 32,
            max_pending: 256,
            sqpoll_idle: None,
            policy: PolicyKind::Lru,
            write_limit: None,
            segment_bytes: 64 << 20,
            preallocate: true,
            commit_interval: Duration::from_millis(200),
            commit_bytes: 256 << 20,
            open_wait: Duration::from_secs(10),
            stall_limit: Duration::from_secs(2),
            retry_after: Duration::from_secs(30),
        }
    }
}
