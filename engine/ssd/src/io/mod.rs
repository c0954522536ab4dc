//! Moving bytes between memory and a file, many requests at a time.
//!
//! One trait, [`Engine`], with two implementations: io_uring, and threads that call `pread` and
//! `pwrite`. Both pass the same suite (`conformance.rs`). An engine belongs to one thread, its
//! [`Bell`] to everybody.

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod disk;
mod threads;
mod uring;

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use threads::Threads;
pub(crate) use uring::Uring;

/// What a piece does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
    /// Makes durable whatever ended before; offset, address and length mean nothing.
    Sync,
}

/// One system call's worth of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Comes back with the result.
    pub id: u64,
    /// What to do.
    pub kind: Kind,
    /// Where in the file.
    pub offset: u64,
    /// Where in memory. The memory stays mapped and nobody else's until the piece has ended.
    pub address: NonNull<u8>,
    /// How many bytes.
    pub bytes: u32,
}

// SAFETY: the address is a number to this type; whoever follows it relies on what its maker
// promised about the memory, which does not depend on the thread.
unsafe impl Send for Piece {}

/// The end of a piece: how many bytes were moved, perhaps fewer than asked for, or an error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// The piece's id.
    pub id: u64,
    /// Bytes, or `errno`.
    pub result: Result<u32, i32>,
}

/// Wakes the thread that waits in [`Engine::wait`].
pub(crate) trait Bell: Send + Sync {
    /// May be called from any thread; a ring before the wait counts.
    fn ring(&self);
}

/// Moves pieces.
///
/// What MUST hold for every implementation (`conformance.rs` tries to break each line):
///
/// * Every piece that `submit` took ends exactly once, in any order, with its own id.
/// * `submit` never waits. It gives a piece back when [`Engine::depth`] pieces have not ended.
/// * A read or write ends with at most the bytes asked for; a read at the file's end with 0.
/// * What was written is read by every piece submitted after its end.
/// * A sync that ends well covers every write that ended before the sync was submitted.
/// * `wait` returns when a piece has ended, the bell rang, or the time is over, whichever comes
///   first; at once if a piece had ended before. With many pieces under way it may take half a
///   millisecond longer, to bring several.
/// * Dropping an engine does not return before no piece touches its memory any more.
pub(crate) trait Engine: Send {
    /// The name in reports.
    fn name(&self) -> &'static str;

    /// The most pieces at a time.
    fn depth(&self) -> u32;

    /// Takes a piece, or gives it back.
    fn submit(&mut self, piece: Piece) -> Result<(), Piece>;

    /// Starts what was submitted, waits, and appends what has ended. No time is no wait.
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()>;

    /// What ends a wait.
    fn bell(&self) -> Arc<dyn Bell>;
}
