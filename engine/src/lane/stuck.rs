//! Copies that the process whose memory they touch holds up: nobody else waits for them, and the
//! operator is told whose they are.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::copy::CopyThreads;
use crate::lane::machine::Machine;
use crate::lane::run::Lane;

/// A copy that takes longer is waiting for its process: a task has 512 KiB or one page, and the
/// largest page takes a second.
const STUCK_AFTER: Duration = Duration::from_secs(5);

impl<M: Machine> Lane<M> {
    /// Looks for sessions whose process holds their copies up, and says so once for each.
    pub(super) fn check_stuck(&mut self) {
        let mut stuck = Vec::new();
        self.workers.stuck(STUCK_AFTER, |found| stuck.push(found));
        for session in self.sessions.iter_mut().flatten() {
            let found = stuck.iter().find(|found| found.session == session.id);
            let tasks = found.map_or(0, |found| found.tasks as u32);
            let before = std::mem::replace(&mut session.stuck_copies, tasks);
            let (session, pid) = (session.id, session.pid());
            match (before, tasks) {
                (0, 0) | (1.., 1..) => {}
                (0, _) => tracing::warn!(
                    session,
                    pid,
                    tasks,
                    "the process holds up copies of its memory (userfaultfd, or a file system \
                     that does not answer): its session waits for it, nobody else does; end it \
                     to free the session"
                ),
                (_, 0) => tracing::info!(session, pid, "copies of the process go on"),
            }
        }
        let tasks = stuck.iter().map(|found| found.tasks).sum();
        self.tasks.note_held_up(tasks);
    }

    /// Tasks that are held up.
    pub(super) fn stuck_tasks(&self) -> u64 {
        let sessions = self.sessions.iter().flatten();
        sessions
            .map(|session| u64::from(session.stuck_copies))
            .sum()
    }
}
