//! Copying pages between the pool and the engines' memory.
//!
//! The lane makes [`CopyTask`]s, [`CopyWorkers`] runs them on threads of their own through a
//! [`CopyBackend`], and each task comes back exactly once as a [`CopyDone`]. A `CopyDone` is the
//! promise that nothing touches the task's pages or blocks any more, whatever the result says: only
//! then may the lane reuse the memory.
//!
//! Copies between pool and shared regions run on threads that all sessions share. What touches the
//! memory of a process may take as long as that process likes, so each session has a crew of its
//! own for it, and nobody else waits.
//!
//! `unsafe` lives in `region` (mapping), `memory` (the pool's pointer), `bytes` (copy loops),
//! `process` (system calls), `bound`, `checksum`, `host` and `process_pass` (pointer
//! arithmetic); the rest
//! forbids it.

mod backend;
mod bound;
mod bytes;
mod checksum;
mod crew;
mod error;
mod host;
mod memory;
mod process;
mod process_pass;
mod region;
mod results;
mod steps;
mod task;
mod threads;
mod workers;

#[cfg(test)]
mod tests;

pub use backend::CopyBackend;
pub use bound::BoundLayout;
pub use bytes::ByteCopier;
pub use checksum::{ChecksumMode, NO_CHECKSUM, SAMPLE, Sampler, TAKE_CHECKSUM};
pub(crate) use checksum::{take as take_checksums, verify as verify_checksums};
pub use error::{BindError, CopyError, MemoryError};
pub use host::HostBackend;
pub(crate) use host::check_pages;
pub use memory::{ClientMemory, PoolMemory};
pub use process::ProcessMemory;
pub use region::RegionMapping;
pub(crate) use results::Results;
pub use steps::{Signal, Step, Steps};
pub use task::{CopyDone, CopyTask, Direction, PageCopy};
pub use threads::CopyThreads;
pub(crate) use workers::finished;
pub use workers::{CopyOptions, CopyWorkers, StuckCopies};
