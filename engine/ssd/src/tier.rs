//! The set of shards and the index of what is on them.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::block::{BlockInfo, BlockKey, PageRef};
use crate::error::OpenError;
use crate::memory::PoolMemory;
use crate::options::Options;
use crate::outcome::{Completion, Refused};
use crate::stats::ShardStats;

/// What opening found, for the log.
#[derive(Clone, Debug, Default)]
pub struct OpenReport {
    /// One line of facts per shard, in the order of the options.
    pub shards: Vec<ShardReport>,
    /// Shards that belong to the set and were not named: their blocks are missing.
    pub missing_shards: u32,
    /// How long it took.
    pub took: Duration,
}

/// What opening one shard found.
#[derive(Clone, Debug, Default)]
pub struct ShardReport {
    /// Its file.
    pub path: PathBuf,
    /// Whether the file was made now.
    pub created: bool,
    /// `io_uring` or `threads`.
    pub io: &'static str,
    /// What is not as wished (no io_uring, no direct I/O, memory not registered, space not
    /// reserved), in words for the log.
    pub notes: Vec<String>,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Blocks of which a page is missing, or that a newer copy replaces: forgotten.
    pub dropped_blocks: u64,
    /// Table chunks that were written but are not valid.
    pub bad_chunks: u64,
}

/// The tier. One thread owns it; it never waits for a drive.
#[derive(Debug)]
pub struct Tier {
    stats: Vec<ShardStats>,
}

impl Tier {
    /// Opens the shards of `options`. `wake` is called on a shard's thread whenever
    /// [`Tier::poll`] has something to do.
    ///
    /// # Errors
    /// Names the first shard that cannot be used; none is changed then.
    pub fn open(
        options: Options,
        _pool: PoolMemory,
        _wake: impl Fn() + Send + Sync + 'static,
    ) -> Result<(Self, OpenReport), OpenError> {
        if options.shards.len() > Options::MAX_SHARDS {
            return Err(OpenError::TooManyShards {
                count: options.shards.len(),
                most: Options::MAX_SHARDS,
            });
        }
        Ok((Self { stats: Vec::new() }, OpenReport::default()))
    }

    /// What is known of a block that can be read now; none if it is not held, still on its way, or
    /// on a shard that does not take reads.
    pub fn lookup(&self, _key: &BlockKey) -> Option<BlockInfo> {
        None
    }

    /// The length of page `page` of a block, in bytes.
    pub fn page_bytes(&self, _key: &BlockKey, _page: u16) -> Option<u32> {
        None
    }

    /// Queues the writing of a block from the pool. Its memory must not change until the
    /// completion of `ticket`.
    ///
    /// # Errors
    /// Why the block is not taken; nothing follows then.
    pub fn write(
        &mut self,
        _now: Instant,
        _ticket: u64,
        _key: &BlockKey,
        _pages: &[PageRef],
    ) -> Result<(), Refused> {
        Err(Refused::NoShard)
    }

    /// Queues the reading of a block into the pool. Its memory must not be looked at or changed
    /// until the completion of `ticket`, however long the drive takes.
    ///
    /// # Errors
    /// Why the block is not read; nothing follows then.
    pub fn read(
        &mut self,
        _now: Instant,
        _ticket: u64,
        _key: &BlockKey,
        _pages: &[PageRef],
    ) -> Result<(), Refused> {
        Err(Refused::Unknown)
    }

    /// Brings what has ended, and moves on what has to happen behind it (commits, reclaiming).
    /// Never waits.
    pub fn poll(&mut self, _now: Instant, _out: &mut Vec<Completion>) {}

    /// When [`Tier::poll`] wants to be called even if nothing wakes: none is never.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Forgets a block. One that is being read stays until the read has ended.
    pub fn remove(&mut self, _key: &BlockKey) {}

    /// Notes a use of a block.
    pub fn touch(&mut self, _key: &BlockKey) {}

    /// Every block that can be read.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockKey, BlockInfo)> + '_ {
        std::iter::empty()
    }

    /// How many requests have no completion yet.
    pub fn in_flight(&self) -> usize {
        0
    }

    /// Numbers and states, one per shard in the order of the options.
    pub fn stats(&self) -> &[ShardStats] {
        &self.stats
    }

    /// Ends all requests and makes everything durable, but waits no longer than `limit`. True if
    /// nothing was left undone. Threads that a drive holds up keep the pool's memory alive.
    pub fn close(self, _limit: Duration) -> bool {
        true
    }
}
