//! The one door to atomics, fences and spin hints.
//!
//! Everything that two threads or two processes synchronise on is spelled through this module, so
//! that `--cfg loom` swaps in loom's models and the very same algorithm text is explored
//! exhaustively.
//!
//! Under loom an atomic is a heap object with a history, not four or eight bytes in a mapping. Code
//! that lays atomics over mapped memory (`mapping`, `ring::RawRing`) is therefore compiled only
//! without loom; the algorithms reach their words through traits and do not notice.
//!
//! Convention: each release store and the acquire load that pairs with it carry the same `SYNC:
//! <name>` label in a comment, so that either side leads to the other by a text search.

#![forbid(unsafe_code)]

#[cfg(not(loom))]
pub use core::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(not(loom))]
pub use std::sync::Arc;

#[cfg(loom)]
pub use loom::sync::Arc;
#[cfg(loom)]
pub use loom::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

/// CPU hints. Under loom a spin is a yield, since only another thread's progress can end it.
pub mod hint {
    #[cfg(not(loom))]
    pub use core::hint::spin_loop;
    #[cfg(loom)]
    pub use loom::hint::spin_loop;
}

/// Scheduling.
pub mod thread {
    #[cfg(loom)]
    pub use loom::thread::yield_now;
    #[cfg(not(loom))]
    pub use std::thread::yield_now;
}
