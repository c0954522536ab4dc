//! How requests are refused and how they end.

#![forbid(unsafe_code)]

#[cfg(doc)]
use crate::block::NO_CHECKSUM;
use crate::stats::ShardFault;

/// Why a request was not taken. Nothing was queued and no completion follows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum Refused {
    #[error("the tier has no shard")]
    NoShard,
    #[error("the block is on SSD or on its way there")]
    Known,
    #[error("the block is not on SSD")]
    Unknown,
    #[error("every shard that could take the request has its queue full; try later")]
    QueueFull,
    #[error("the write limit is used up; try later")]
    RateLimited,
    #[error("space is being reclaimed; try later")]
    Reclaiming,
    #[error("the pages differ in number or length from those on SSD")]
    OtherPages,
    #[error("a page of {bytes} bytes does not fit a segment, which has {most}")]
    TooLarge { bytes: u32, most: u32 },
    #[error("a block of {bytes} bytes does not fit an SSD shard, which takes {most}")]
    BlockTooLarge { bytes: u64, most: u64 },
    #[error("page {page} does not lie in the pool, or is empty")]
    OutsidePool { page: usize },
    #[error("a block of {pages} pages; one to {most} can be stored")]
    PageCount { pages: usize, most: usize },
    #[error("degraded: {0}")]
    Degraded(ShardFault),
}

/// How a request ended. From here on its memory is the caller's again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The block is on SSD and can be read; it is durable after the next commit.
    Written,
    /// The pages are in memory, with the bytes that were written.
    Read,
    /// A page that was read does not have the bytes that were written: the block is gone, memory is
    /// undefined. Or a page to be written did not have its checksum: the block is not there.
    Bad,
    /// The drive failed. A block that was read is gone; memory is undefined.
    Failed(ShardFault),
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the caller named it.
    pub ticket: u64,
    /// The SSD shard, by its place in the options.
    pub shard: u16,
    /// How it ended.
    pub outcome: Outcome,
    /// Of a block that was read, the checksums that were asked for; [`NO_CHECKSUM`] for its other
    /// pages. Empty if there are none.
    pub checksums: Vec<u64>,
}
