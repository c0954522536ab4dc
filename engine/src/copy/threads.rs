//! What the lane needs of the copy threads.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::task::{CopyDone, CopyTask};
use super::workers::{CopyWorkers, StuckCopies};

/// Somebody who runs copy tasks and hands the results back. [`CopyWorkers`] does it with threads; a
/// simulation decides itself when each task runs, how far it comes and how it ends.
///
/// What must hold, for every implementation: each task that `submit` takes comes back exactly once
/// from `pop_done`, and from then on nothing touches its pages and blocks any more.
pub trait CopyThreads: Send + 'static {
    /// Queues `task`, or gives it back when there is no room. A task of process memory always finds
    /// room: it waits for its own session's tasks only.
    fn submit(&mut self, task: CopyTask) -> Result<(), CopyTask>;

    /// The next finished task, if any.
    fn pop_done(&self) -> Option<CopyDone>;

    /// Whether [`CopyThreads::pop_done`] has something.
    fn has_done(&self) -> bool;

    /// A session has ended: all its tasks have come back, and there will be no more.
    fn end_session(&mut self, session: u64);

    /// Tells of each session that has had one copy running for longer than `bound`.
    fn stuck(&self, bound: Duration, tell: impl FnMut(StuckCopies));

    /// Takes no new task and returns when all those taken have run, but for copies that a client's
    /// process holds up. Their results still wait in `pop_done`.
    fn stop(&mut self);
}

impl CopyThreads for CopyWorkers {
    #[inline]
    fn submit(&mut self, task: CopyTask) -> Result<(), CopyTask> {
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

    fn end_session(&mut self, session: u64) {
        CopyWorkers::end_session(self, session);
    }

    fn stuck(&self, bound: Duration, tell: impl FnMut(StuckCopies)) {
        CopyWorkers::stuck(self, bound, tell);
    }

    fn stop(&mut self) {
        CopyWorkers::stop(self);
    }
}
