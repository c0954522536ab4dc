//! What the lane asks of a copy thread, and what it gets back.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::bound::BoundLayout;
use super::error::CopyError;
use super::steps::Step;
use crate::device::AfterEvent;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the engine's blocks into pool pages.
    Save,
    /// From pool pages into the engine's blocks.
    Load,
}

/// One page and the block it is copied from or to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// Byte offset of the page in the pool.
    pub pool_offset: u64,
    /// The engine's block id.
    pub block: u32,
    /// Load: what the page's bytes must have, or [`NO_CHECKSUM`](super::NO_CHECKSUM). Save:
    /// anything else than that asks for it and is replaced by it once the page is copied.
    pub checksum: u64,
}

/// A list of pages to copy in one direction, between the pool and one registered group.
///
/// The lane owns `pages`' buffer and gets it back, still filled, in [`CopyDone`]: buffers go round
/// and the hot path allocates nothing per block. A list is run by one thread from its first page
/// to its last, so a long one is best cut into tasks of a few MiB to keep all threads busy and
/// cancellation quick.
#[derive(Debug)]
pub struct CopyTask {
    /// The session whose memory it is.
    pub session: u64,
    /// Which way the bytes go.
    pub direction: Direction,
    /// The group's layout and the memory it lies in, both kept alive until the copy is over.
    pub target: Arc<BoundLayout>,
    /// What to copy, in order.
    pub pages: Vec<PageCopy>,
    /// The caller's name for the task, handed back unread.
    pub tag: u64,
    /// Set by the caller to stop early; looked at between pages.
    pub cancelled: Arc<AtomicBool>,
    /// Device targets: the copy starts only after this, and a task that waits for it waits alone
    /// with its session's others. Host targets have none.
    pub after: Option<AfterEvent>,
    /// The step of its load that it belongs to, where that is told step by step.
    pub step: Option<Step>,
}

/// The end of one task, whatever became of it.
#[derive(Debug)]
pub struct CopyDone {
    /// The task's tag.
    pub tag: u64,
    /// Which way the bytes went.
    pub direction: Direction,
    /// Bytes copied when every page was, or why not every page was.
    pub result: Result<u64, CopyError>,
    /// The first `pages_done` pages are copied completely; the others hold old bytes, new bytes or
    /// a mixture.
    pub pages_done: u32,
    /// How long a copy thread was busy with it, in nanoseconds.
    pub busy_ns: u64,
    /// The task's list, for reuse.
    pub pages: Vec<PageCopy>,
}
