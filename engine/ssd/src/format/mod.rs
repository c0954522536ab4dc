//! What a shard's file contains.
//!
//! ```text
//! 0        superblock, slot 0 and slot 1 (4 KiB each), the rest of 1 MiB empty
//! 1 MiB    segment 0: table, then data
//!          segment 1: table, then data
//!          ...
//! ```
//!
//! A segment's data is written once, from its start to its end, page by page at multiples of 4 KiB,
//! and never again before the whole segment is given up. Its table is a row of 4-KiB chunks of
//! [`Record`]s, one record per page. `docs/ssd.md` has the argument why a crash leaves a shard that
//! can be trusted.

#![forbid(unsafe_code)]

mod chunk;
mod geometry;
mod record;
mod superblock;

#[cfg(test)]
mod tests;

pub(crate) use chunk::{Chunk, ChunkError, RECORDS_PER_CHUNK};
pub(crate) use geometry::{ALIGNMENT, Geometry, align_up};
pub(crate) use record::{Place, Record};
pub(crate) use superblock::{MEMBERS_MAX, SUPERBLOCK_SLOTS, Superblock, SuperblockError};

/// A version of the layout; raised by every change that an older program would misread.
pub(crate) const LAYOUT_VERSION: u32 = 1;
/// The unit of tables and superblocks, in bytes.
pub(crate) const CHUNK_BYTES: usize = 4096;

/// Random bits that name a set of shards or one of them.
pub(crate) type Id = [u8; 16];
