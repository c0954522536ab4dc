//! What the lane asks of a tier.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use pegaflow_ssd::ShardStats;

/// A block as the tier knows it, for as long as its bytes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreKey {
    /// Isolation domain and namespace, see [`pegaflow_shm::namespace::tier_scope`].
    pub scope: [u8; 32],
    /// Cache group.
    pub group: u16,
    /// The block's name.
    pub hash: BlockHash,
}

/// One shard's bytes in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// Where in the pool.
    pub offset: u64,
    /// How many.
    pub bytes: u32,
    /// To be written: what their checksum must be, or [`NO_CHECKSUM`](crate::copy::NO_CHECKSUM). To
    /// be filled: whether one is wanted, by any other number.
    pub checksum: u64,
}

/// Why the tier does not take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Too much is under way: try again after a completion.
    Busy,
    /// The limit for writing is reached: try again later.
    RateLimited,
    /// The part of the tier that it concerns is out of order.
    Degraded,
    /// Written before, or on its way.
    Known,
    /// Not held (any more), or cut into other pages.
    Absent,
    /// No tier of this kind can hold such a block.
    Unfit,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOutcome {
    /// Every page is on the medium.
    Written,
    /// Every page is in the pool, and its bytes are those that were written.
    Read,
    /// The bytes are not those that were written: the tier has forgotten the block. Or those to be
    /// written did not have their checksum: the tier has not taken the block.
    Bad,
    /// The medium failed.
    Failed,
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreDone {
    /// What the lane called it.
    pub ticket: u64,
    /// How it ended.
    pub outcome: StoreOutcome,
    /// The checksums of pages that were filled, as they were asked for; empty if none was.
    pub checksums: Vec<u64>,
}

/// A slower place for blocks. The lane alone calls it.
///
/// What MUST hold: no call waits for the medium. Each request that was taken is completed once.
/// From [`Self::write`] or [`Self::read`] until then the pages named belong to the tier: the lane
/// neither writes nor reuses them, however long it takes, and after it the tier touches them no
/// more. Whoever completes requests wakes the lane.
pub trait BlockStore: Send {
    /// Bytes of each shard of a block that can be read; `None` when it is not held.
    fn lookup(&self, key: &StoreKey) -> Option<Vec<u32>>;

    /// Whether the block can be read.
    fn holds(&self, key: &StoreKey) -> bool {
        self.lookup(key).is_some()
    }

    /// Takes the pages of a block, one for each shard, to be written.
    ///
    /// # Errors
    /// It is not taken; the pages stay the lane's.
    fn write(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused>;

    /// Takes free pages, of the sizes that [`Self::lookup`] named, to be filled.
    ///
    /// # Errors
    /// It is not taken; the pages stay the lane's.
    fn read(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused>;

    /// Has the requests begin that were taken since, and whatever [`Self::poll`] has brought about
    /// behind those that have ended: called for several at a time, and before the lane sleeps.
    fn start(&mut self) {}

    /// Appends the requests that have ended.
    fn poll(&mut self, now: Instant, done: &mut Vec<StoreDone>);

    /// When [`Self::poll`] wants to be called even if nothing woke the lane.
    fn next_deadline(&self) -> Option<Instant>;

    /// Forgets a block.
    fn remove(&mut self, key: &StoreKey);

    /// Notes that a block was used.
    fn touch(&mut self, key: &StoreKey);

    /// What each part of it has done and how it is.
    fn shards(&self) -> Vec<ShardStats>;

    /// Completes what it can within `limit` and lets go of the medium; true if nothing was left
    /// undone. Requests that have not ended by then keep the pool's memory mapped.
    fn close(self: Box<Self>, limit: Duration) -> bool;
}
