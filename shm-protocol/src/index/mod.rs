//! The block index: which blocks the daemon holds, readable by clients without asking it.
//!
//! One writer (the daemon's lane) and any number of readers in other processes share one file:
//! a header page, bucket lines, then entries. Readers map it read-only and take no lock.
//!
//! ```text
//! +--------------+---------------------------------+----------------------------------+
//! | header 4 KiB | bucket lines, 64 B each         | entries, 64 B each, sparse       |
//! |              | 7 x [tag:32 | id+1:32], count   | version+state, ns, group, hash   |
//! +--------------+---------------------------------+----------------------------------+
//! ```
//!
//! A key's home line comes from the upper bits of its seeded hash, its tag from the lower ones.
//! A key that finds its home line full goes to one of the next lines, and each line it passes
//! counts it, so that a look-up stops at the first line that nobody passed. Keys never move.
//!
//! What holds, also when the writer is killed at any instruction:
//!
//! * Bucket lines are hints. A hit is decided by the entry alone: its state word must read
//!   "sealed" with the same version before and after its full key was compared. Versions never
//!   repeat, hence **no false hit**: if the key's unsealing happened before a look-up began, or
//!   its sealing had not begun when it ended, the look-up misses.
//! * A look-up misses a sealed key only if that very key is inserted, sealed, unsealed or
//!   removed meanwhile. Other keys coming and going cannot hide it.
//! * Readers check every id against the number of entries that have storage, every probe has
//!   a bound, and arbitrary bytes in place of an index give misses or an [`OpenError`].

pub use crate::BlockHash;

mod batch;
mod entry;
mod key;
mod layout;
mod memory;
mod raw;
mod reader;
mod table;
mod writer;

#[cfg(all(test, not(loom)))]
mod tests_layout;
#[cfg(all(test, not(loom)))]
mod tests_model;
#[cfg(all(test, not(loom)))]
mod tests_reader;
#[cfg(all(test, not(loom)))]
mod tests_util;
#[cfg(all(test, not(loom)))]
mod tests_writer;

pub use key::{BlockKey, EntryId};
pub use layout::{
    ENTRY_BYTES, HEADER_BYTES, IndexHeader, IndexLayout, LAYOUT_MAJOR, LAYOUT_MINOR, LINE_BYTES,
    LayoutError, MAGIC, MAX_ENTRIES, MAX_PROBE_LINES, OpenError, SLOTS_PER_LINE,
};
pub use memory::{HeapMemory, IndexMemory, WritableIndexMemory};
pub use raw::prefetch_read;
#[cfg(not(loom))]
pub use raw::{RawMemory, RawReadMemory};
pub use reader::IndexReader;
pub use writer::{CreateError, EntryError, IndexWriter, InsertError};

/// The entry's protocol by itself, for the loom models of torn reads.
#[cfg(loom)]
pub mod model {
    pub use super::entry::is_sealed_match;
    pub use super::entry::{EntryWords, KeyWords, publish, seal, unseal, vacate};
}
