//! A machine whose time and copies go as the input says, and which minds what the lane asks of it.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::copy::{
    CopyBackend, CopyDone, CopyError, CopyTask, CopyThreads, Direction, HostBackend, PageCopy,
    PoolMemory, StuckCopies,
};
use crate::lane::machine::Machine;

/// Tasks that wait at most; the lane keeps the others back.
const MAX_TASKS: usize = 3;

pub(super) struct FuzzMachine;

impl Machine for FuzzMachine {
    type Clock = FuzzClock;
    type Copies = FuzzCopies;
}

/// Goes on only when told to.
#[derive(Clone)]
pub(super) struct FuzzClock {
    start: Instant,
    passed_ms: Arc<AtomicU64>,
}

impl FuzzClock {
    pub(super) fn new() -> FuzzClock {
        FuzzClock {
            start: Instant::now(),
            passed_ms: Arc::default(),
        }
    }

    pub(super) fn advance(&self, ms: u64) {
        self.passed_ms.fetch_add(ms, Ordering::Relaxed);
    }
}

impl Clock for FuzzClock {
    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.passed_ms.load(Ordering::Relaxed))
    }

    fn unix_ms(&self) -> u64 {
        self.passed_ms.load(Ordering::Relaxed)
    }
}

/// Runs tasks when told to, in the order told, with the real backend.
#[derive(Clone)]
pub(super) struct FuzzCopies(Arc<Mutex<Copies>>);

struct Copies {
    pool: PoolMemory,
    waiting: VecDeque<CopyTask>,
    done: VecDeque<CopyDone>,
}

impl FuzzCopies {
    pub(super) fn new(pool: PoolMemory) -> FuzzCopies {
        FuzzCopies(Arc::new(Mutex::new(Copies {
            pool,
            waiting: VecDeque::new(),
            done: VecDeque::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Copies> {
        self.0.lock().expect("one thread")
    }

    /// Runs one of the waiting tasks, all its pages or only the first `pages`.
    pub(super) fn run_one(&self, which: usize, pages: Option<usize>) -> bool {
        let copies = &mut *self.lock();
        if copies.waiting.is_empty() {
            return false;
        }
        let which = which % copies.waiting.len();
        let Some(mut task) = copies.waiting.remove(which) else {
            return false;
        };
        let mut backend = HostBackend::new(copies.pool.clone());
        let mut pages_done = 0;
        let result = if task.cancelled.load(Ordering::Relaxed) {
            Err(CopyError::Cancelled)
        } else if let Some(pages) = pages.filter(|pages| *pages < task.pages.len()) {
            let rest = task.pages.split_off(pages);
            let copied = backend.copy(&mut task, &mut pages_done);
            assert!(copied.is_ok(), "{copied:?}");
            task.pages.extend(rest);
            Err(CopyError::OwnerGone { pid: 1 })
        } else {
            let copied = backend.copy(&mut task, &mut pages_done);
            assert!(copied.is_ok(), "{copied:?}");
            copied
        };
        copies.done.push_back(CopyDone {
            tag: task.tag,
            direction: task.direction,
            result,
            pages_done,
            busy_ns: 1,
            pages: task.pages,
        });
        true
    }
}

impl CopyThreads for FuzzCopies {
    /// A page is written by one task alone, and by none while another reads it.
    fn submit(&mut self, task: CopyTask) -> Result<(), CopyTask> {
        let copies = &mut *self.lock();
        if copies.waiting.len() + copies.done.len() >= MAX_TASKS {
            return Err(task);
        }
        let is_save = task.direction == Direction::Save;
        let bytes = |task: &CopyTask| task.target.layout().page_bytes();
        for other in &copies.waiting {
            if !is_save && other.direction == Direction::Load {
                continue;
            }
            for page in &task.pages {
                let meets = |other_page: &PageCopy| {
                    page.pool_offset < other_page.pool_offset + bytes(other)
                        && other_page.pool_offset < page.pool_offset + bytes(&task)
                };
                assert!(
                    !other.pages.iter().any(meets),
                    "two copies touch the page at {}",
                    page.pool_offset
                );
            }
        }
        copies.waiting.push_back(task);
        Ok(())
    }

    fn pop_done(&self) -> Option<CopyDone> {
        self.lock().done.pop_front()
    }

    fn has_done(&self) -> bool {
        !self.lock().done.is_empty()
    }

    fn end_session(&mut self, session: u64) {
        let left = self
            .lock()
            .waiting
            .iter()
            .any(|task| task.session == session);
        assert!(!left, "session {session} ended with copies under way");
    }

    fn stuck(&self, _: Duration, _: impl FnMut(StuckCopies)) {}

    fn stop(&mut self) {
        while self.run_one(0, None) {}
    }
}
