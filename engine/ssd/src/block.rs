//! What the tier stores: blocks of pages, under their full identity.

#![forbid(unsafe_code)]

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
