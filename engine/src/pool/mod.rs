//! The RAM tier: one large file in shared memory, cut into extents, cut into pages.
//!
//! [`Pool`] is the bookkeeping and knows offsets only; [`PoolFile`] is the memory and knows
//! nothing about pages. They meet in the caller, who turns a [`PageAddr`] into a pointer by
//! [`PoolFile::range`].

mod allocator;
mod error;
mod extent;
mod file;
mod hugepages;
mod mapping;
mod memory;
mod nodes;
mod populate;
mod slots;
mod stats;

#[cfg(test)]
mod tests;

pub use allocator::{Allocation, Freed, Pool, round_page};
pub use error::{PoolError, PoolFileError, PoolUnusable};
pub use file::{NearCpus, OpenedPool, PoolFile, PoolIdentity, PopulateOptions};
pub use hugepages::HugepageReport;
pub use memory::pool_memory;
pub use nodes::{MemoryNodes, NodePart};
pub use stats::{ClassStats, PoolStats};

use std::fmt;

/// The smallest page that the pool hands out, in bytes. The catalog keeps one record per page at a
/// fixed place, so this bounds its sparse size to an eighth of the pool's.
pub const MIN_PAGE_BYTES: u32 = 512;

/// Page sizes are multiples of this, in bytes: a cache line, so that neighbours never share one.
pub const PAGE_ALIGN_BYTES: u32 = 64;

/// The largest extent, in bytes, so that every page size fits in 32 bits.
pub const MAX_EXTENT_BYTES: u64 = 2 << 30;

/// The granule of extent and pool sizes, in bytes: a memory page.
pub const EXTENT_GRANULE_BYTES: u64 = 4096;

/// The number of an extent: its offset in the pool divided by the extent size.
pub type ExtentId = u32;

/// Where a page begins: its byte offset in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageAddr(u64);

impl PageAddr {
    /// The address at `offset` bytes from the pool's start. Any value may be made; the pool checks
    /// each address that it is given.
    pub const fn from_offset(offset: u64) -> Self {
        Self(offset)
    }

    /// Bytes from the pool's start.
    pub const fn offset(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
