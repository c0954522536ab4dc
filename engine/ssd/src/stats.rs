//! Numbers and states for metrics and people.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// What is wrong with a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardFault {
    /// The file system has no space (`ENOSPC`, `EDQUOT`).
    NoSpace,
    /// The file system or the file is read-only (`EROFS`).
    ReadOnly,
    /// Another error of the system, by its number.
    Io(i32),
    /// A request has been at the drive for longer than the limit.
    Stalled,
    /// The file is shorter than it was.
    Truncated,
    /// The shard's thread has ended.
    Stopped,
    /// It is not open yet.
    Opening,
    /// It is not open yet, since another process has its file.
    InUse,
    /// It was late, and cannot be used, for this reason.
    Unusable(String),
}

impl fmt::Display for ShardFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSpace => f.write_str("no space left on the file system"),
            Self::ReadOnly => f.write_str("the file system is read-only"),
            Self::Io(number) => std::io::Error::from_raw_os_error(*number).fmt(f),
            Self::Stalled => f.write_str("the drive does not answer"),
            Self::Truncated => f.write_str("the file is shorter than it was"),
            Self::Stopped => f.write_str("the shard's thread has ended"),
            Self::Opening => {
                f.write_str("not open yet: it has not finished opening since the start")
            }
            Self::InUse => {
                f.write_str("not open yet: another process, or a killed one, has it still")
            }
            Self::Unusable(why) => f.write_str(why),
        }
    }
}

impl ShardFault {
    /// The fault that an error number stands for.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::EROFS => Self::ReadOnly,
            other => Self::Io(other),
        }
    }

    /// One word for a label or JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoSpace => "no_space",
            Self::ReadOnly => "read_only",
            Self::Io(_) => "io_error",
            Self::Stalled => "stalled",
            Self::Truncated => "truncated",
            Self::Stopped => "stopped",
            Self::Opening => "opening",
            Self::InUse => "in_use",
            Self::Unusable(_) => "unusable",
        }
    }
}

/// Whether a shard takes requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ShardHealth {
    /// Reads and writes.
    #[default]
    Healthy,
    /// Reads only.
    ReadsOnly(ShardFault),
    /// Neither.
    Degraded(ShardFault),
}

/// How long requests took, in buckets that double.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// Requests per bucket, not cumulative. Bucket `i` holds those of at most
    /// [`Self::bound`]`(i)`; the last one those above.
    pub buckets: [u64; Self::BUCKETS],
    /// The sum of all, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self {
            buckets: [0; Self::BUCKETS],
            sum_ns: 0,
        }
    }
}

impl LatencyHistogram {
    /// The number of buckets, with the one that has no bound.
    pub const BUCKETS: usize = 21;

    /// The longest time that bucket `index` counts (16 us times two to the `index`); none for the
    /// last.
    pub fn bound(index: usize) -> Option<Duration> {
        (index + 1 < Self::BUCKETS).then(|| Duration::from_micros(16 << index))
    }

    /// Counts one request.
    pub fn record(&mut self, took: Duration) {
        let bucket = (0..Self::BUCKETS)
            .find(|&index| Self::bound(index).is_none_or(|bound| took <= bound))
            .unwrap_or(Self::BUCKETS - 1);
        self.buckets[bucket] += 1;
        self.sum_ns = self
            .sum_ns
            .saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// What one shard did since it was opened, and how it is. Counters only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Its file.
    pub path: PathBuf,
    /// Whether it takes requests, and if not, why.
    pub health: ShardHealth,
    /// Bytes that can hold pages.
    pub capacity_bytes: u64,
    /// Bytes of pages that can be read.
    pub live_bytes: u64,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Bytes of pages written.
    pub page_bytes_written: u64,
    /// Bytes that went to the drive for it: pages, padding, tables. The ratio to
    /// `page_bytes_written` is the write amplification.
    pub device_bytes_written: u64,
    /// Bytes of pages read and found right.
    pub page_bytes_read: u64,
    /// Pages written, with how long each took from submission to completion.
    pub write_latency: LatencyHistogram,
    /// Pages read, likewise.
    pub read_latency: LatencyHistogram,
    /// Time that the checksums of pages took.
    pub checksum_time: Duration,
    /// Requests queued or at the drive now.
    pub pending: u32,
    /// Pages whose bytes were not those that were written.
    pub bad_pages: u64,
    /// Requests that the system failed while reading.
    pub read_errors: u64,
    /// Requests that the system failed while writing or syncing.
    pub write_errors: u64,
    /// Times that the shard became degraded.
    pub degradations: u64,
    /// Requests refused because the shard was degraded.
    pub refused_degraded: u64,
    /// Blocks that left to make room.
    pub evicted_blocks: u64,
    /// Segments that were emptied and used again.
    pub segments_reclaimed: u64,
    /// Commits: tables written and synced.
    pub commits: u64,
    /// Blocks written that a power loss now would lose.
    pub uncommitted_blocks: u64,
}

impl ShardStats {
    /// Bytes sent to the drive per byte of pages written; 1 before the first write.
    pub fn write_amplification(&self) -> f64 {
        if self.page_bytes_written == 0 {
            return 1.0;
        }
        self.device_bytes_written as f64 / self.page_bytes_written as f64
    }
}
