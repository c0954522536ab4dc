//! What the lane needs of the copy threads.
#![forbid(unsafe_code)]

use super::task::{CopyDone, CopyTask};
use super::workers::CopyWorkers;

/// Somebody who runs copy tasks and hands the results back. [`CopyWorkers`] does it with threads; a
/// simulation decides itself when each task runs, how far it comes and how it ends.
///
/// What must hold, for every implementation: each task that `submit` takes comes back exactly once
/// from `pop_done`, and from then on nothing touches its pages and blocks any more.
pub trait CopyThreads: Send + 'static {
    /// Queues `task`, or gives it back when there is no room.
    fn submit(&self, task: CopyTask) -> Result<(), CopyTask>;

    /// The next finished task, if any.
    fn pop_done(&self) -> Option<CopyDone>;

    /// Whether [`CopyThreads::pop_done`] has something.
    fn has_done(&self) -> bool;

    /// Takes no new task and returns when all those taken have run. Their results still wait in
    /// `pop_done`.
    fn stop(&mut self);
}

impl CopyThreads for CopyWorkers {
    #[inline]
    fn submit(&self, task: CopyTask) -> Result<(), CopyTask> {
        CopyWorkers::submit(self, task)
    }

    #[inline]
    fn pop_done(&self) -> Option<CopyDone> {
        CopyWorkers::pop_done(self)
    }

    #[inline]
    fn has_done(&self) -> bool {
        CopyWorkers::has_done(self)
    }

    fn stop(&mut self) {
        CopyWorkers::stop(self);
    }
}
