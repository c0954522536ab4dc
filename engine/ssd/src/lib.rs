//! The SSD tier: blocks on drives, spread over shards, one file each.
//!
//! The lane thread owns one [`Tier`]. No call of it waits for a drive: `write` and `read` queue,
//! `poll` brings what has ended. Each shard has a thread of its own that moves bytes between the
//! pool's memory and the shard's file.

mod block;
mod error;
mod file;
mod format;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod inspect;
mod io;
mod late;
mod limiter;
mod memory;
mod mover;
mod oldest;
mod open;
mod opening;
mod options;
mod outcome;
mod pattern;
mod port;
mod scan;
mod shard;
mod slab;
mod stats;
mod tier;

#[cfg(test)]
mod reopen;
#[cfg(test)]
mod simulated;

pub use block::{BlockInfo, BlockKey, NO_CHECKSUM, PageRef, page_checksum};
pub use error::OpenError;
pub use inspect::{BadPage, ShardFill, ShardLayout, ShardView, Verified};
pub use memory::PoolMemory;
pub use options::{IoChoice, Options, ShardSpec};
pub use outcome::{Completion, Outcome, Refused};
pub use pattern::{PatternStep, run_pattern};
pub use stats::{LatencyHistogram, ShardFault, ShardHealth, ShardStats};
pub use tier::{OpenReport, ShardReport, Tier};
