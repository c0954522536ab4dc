//! KV layouts: where the bytes of one block lie in an engine's memory, and what its page looks
//! like.
//!
//! A worker registers one [`GroupLayout`] per cache group. Block `b`'s part `s` lies at
//! `base + b * block_stride .. + bytes` of segment `s`; the *page* is the segments' bytes packed
//! contiguously in the order given. Nothing is guessed: a layout that this description cannot say
//! is refused by [`ValidLayout::new`] with the segment and the values that broke the rule.
//!
//! [`ValidLayout`] is the only form that the copy backends accept.
#![forbid(unsafe_code)]

mod error;
mod overlap;
mod valid;

#[cfg(test)]
mod exhaustive;
#[cfg(test)]
mod tests;

pub use error::{LayoutError, MemoryName};
pub use pegaflow_shm::control::{GroupLayout, MAX_SEGMENTS, MemoryRef, SegmentLayout};
pub use valid::{Part, ValidLayout};

/// Largest page, in bytes.
pub const MAX_PAGE_BYTES: u64 = 1 << 30;
/// Most blocks of a group: the daemon keeps a bit for each to find block ids given twice.
pub const MAX_BLOCKS: u32 = 1 << 24;
/// First address that no process has without asking for five-level paging.
pub const PROCESS_ADDRESS_END: u64 = 1 << 47;
/// Addresses below this one are never mapped: a base there is a null pointer plus an offset.
pub const PROCESS_ADDRESS_START: u64 = 4096;
