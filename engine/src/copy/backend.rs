//! The trait behind which host and device copies look alike.
#![forbid(unsafe_code)]

use super::error::CopyError;
use super::task::CopyTask;

/// Copies one task's pages. Each copy thread owns one backend value, so a backend keeps its scratch
/// memory (and a device backend its stream) in `self`.
///
/// What must hold, for every implementation:
///
/// * `copy` returns only when nothing touches the pool pages or the engine's blocks of the task any
///   more, with an error as well as without. A backend that queues work on a device drains it
///   first.
/// * `*pages_done` counts a prefix of `task.pages` whose bytes are completely copied *and visible*
///   to every thread that learns of the count; it starts at 0 and never counts too much. On `Ok` it
///   equals the length of the list, and the value is that many times the page size.
/// * A load copies no page whose bytes have another checksum than `PageCopy::checksum` says, and
///   none behind it, and fails with [`CopyError::Checksum`]. A save puts the checksums that it was
///   asked for into the pages it counts as done.
/// * Every pool offset and block id is checked against the pool and the layout before it is used; a
///   bad one is an error and touches nothing.
/// * `task.cancelled` is looked at at least once per page or per MiB, whichever is more, and then
///   ends the task with [`CopyError::Cancelled`].
/// * An owner that dies, unmaps or forbids makes an error, never a signal and never a hang. Memory
///   of a living process may hold a copy up for as long as the process likes, shared memory never.
/// * No allocation per block.
pub trait CopyBackend {
    /// A short name for logs and metrics, such as `host`.
    fn name(&self) -> &'static str;

    /// Copies `task`'s pages in order and returns the bytes copied.
    fn copy(&mut self, task: &mut CopyTask, pages_done: &mut u32) -> Result<u64, CopyError>;
}

impl CopyBackend for Box<dyn CopyBackend> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn copy(&mut self, task: &mut CopyTask, pages_done: &mut u32) -> Result<u64, CopyError> {
        (**self).copy(task, pages_done)
    }
}
