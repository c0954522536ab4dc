//! What the tier stores: blocks of pages, under their full identity.

#![forbid(unsafe_code)]

use twox_hash::XxHash3_64;

/// In [`PageRef::checksum`]: none is known, none is asked for.
pub const NO_CHECKSUM: u64 = 0;

/// The checksum that a page has in the pool: xxh3-64 of its bytes, and 1 where that is 0, which
/// stands for none. (On the drive it has another one, which also says which page it is.)
pub fn page_checksum(bytes: &[u8]) -> u64 {
    known(XxHash3_64::oneshot(bytes))
}

/// The checksum for an xxh3-64.
pub(crate) fn known(xxh3: u64) -> u64 {
    match xxh3 {
        NO_CHECKSUM => 1,
        checksum => checksum,
    }
}

/// The identity of a block. Two blocks are the same exactly if all of it is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey {
    /// Digest of isolation domain and namespace: another domain's blocks are never found.
    pub scope: [u8; 32],
    /// The cache group.
    pub group: u32,
    /// The block's hash.
    pub hash: [u8; 32],
}

/// A page in the pool's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef {
    /// Where the page starts, in bytes from the pool's first.
    pub offset: u64,
    /// The page's length in bytes, not zero.
    pub bytes: u32,
    /// To be written: what [`page_checksum`] must say of it, or [`NO_CHECKSUM`]. To be read:
    /// whether it is to be taken, by any other number than [`NO_CHECKSUM`].
    pub checksum: u64,
}

/// What the tier knows of a block it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// The SSD shard that holds it, by its place in [`Options::shards`](crate::Options::shards).
    pub shard: u16,
    /// How many pages it has: one per rank, or one.
    pub pages: u16,
    /// The length of the first page in bytes.
    pub page_bytes: u32,
    /// Whether all pages have that length; [`Tier::page_bytes`](crate::Tier::page_bytes) tells
    /// each.
    pub uniform: bool,
}
