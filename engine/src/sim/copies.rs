//! Copy threads without threads: the simulation says which task goes on, how far, and how it ends.
//! The bytes move by the daemon's own copy backend.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::copy::{
    BoundLayout, CopyBackend, CopyDone, CopyError, CopyTask, CopyThreads, Direction, HostBackend,
    NO_CHECKSUM, PageCopy, PoolMemory, StuckCopies,
};
use crate::lane::{LaneWake, Machine};
use crate::pool::MIN_PAGE_BYTES;
use crate::sim::kv::{Content, KvMemory};
use crate::sim::time::SimClock;

/// The simulated machine.
pub struct SimMachine;

impl Machine for SimMachine {
    type Clock = SimClock;
    type Copies = SimCopies;
}

/// What happened to pages and blocks, in order.
pub enum CopyEvent {
    /// The lane handed a task out.
    Started(u64, TaskView),
    /// Pages of it were copied.
    Copied(TaskView),
}

/// A task between `submit` and `pop_done`.
pub struct Running {
    pub task: CopyTask,
    /// Pages whose bytes are copied.
    pub pages_done: usize,
}

/// A task's pages, for the checks.
pub struct TaskView {
    pub direction: Direction,
    pub target: Arc<BoundLayout>,
    pub pages: Vec<PageCopy>,
}

impl TaskView {
    fn of(task: &CopyTask) -> TaskView {
        TaskView {
            direction: task.direction,
            target: task.target.clone(),
            pages: task.pages.clone(),
        }
    }
}

struct Shared {
    pool: PoolMemory,
    running: BTreeMap<u64, Running>,
    /// Results with the target that they touched, for the checks.
    done: VecDeque<(CopyDone, Arc<BoundLayout>)>,
    events: Vec<CopyEvent>,
    next: u64,
    max_tasks: usize,
    stopped: bool,
}

impl Shared {
    fn advance(&mut self, number: u64, pages: usize) {
        let Some(running) = self.running.get_mut(&number) else {
            return;
        };
        let end = (running.pages_done + pages).min(running.task.pages.len());
        let mut task = CopyTask {
            session: running.task.session,
            direction: running.task.direction,
            target: running.task.target.clone(),
            pages: running.task.pages[running.pages_done..end].to_vec(),
            tag: 0,
            cancelled: Arc::new(AtomicBool::new(false)),
            after: None,
            step: None,
        };
        let mut done = 0;
        let copied = HostBackend::new(self.pool.clone()).copy(&mut task, &mut done);
        assert!(
            copied.is_ok() && done as usize == task.pages.len(),
            "copying between two mappings failed: {copied:?}"
        );
        // With the checksums that a save was asked for.
        running.task.pages[running.pages_done..end].copy_from_slice(&task.pages);
        running.pages_done = end;
        self.events.push(CopyEvent::Copied(TaskView::of(&task)));
    }

    fn finish(&mut self, number: u64, error: Option<CopyError>) {
        let Some(Running { task, pages_done }) = self.running.remove(&number) else {
            return;
        };
        let bytes = pages_done as u64 * task.target.layout().page_bytes();
        assert!(
            error.is_some() || pages_done == task.pages.len(),
            "a task ends well with all of its pages"
        );
        let done = CopyDone {
            tag: task.tag,
            direction: task.direction,
            result: error.map_or(Ok(bytes), Err),
            pages_done: pages_done as u32,
            busy_ns: 1000,
            pages: task.pages,
        };
        self.done.push_back((done, task.target));
    }
}

fn done_view((done, target): &(CopyDone, Arc<BoundLayout>)) -> TaskView {
    TaskView {
        direction: done.direction,
        target: target.clone(),
        pages: done.pages.clone(),
    }
}

/// Shared by the lane, which submits, and the simulation, which runs.
#[derive(Clone)]
pub struct SimCopies {
    shared: Arc<Mutex<Shared>>,
    wake: Arc<LaneWake>,
}

impl SimCopies {
    pub fn new(pool: PoolMemory, max_tasks: usize, wake: Arc<LaneWake>) -> SimCopies {
        let shared = Shared {
            pool,
            running: BTreeMap::new(),
            done: VecDeque::new(),
            events: Vec::new(),
            next: 0,
            max_tasks,
            stopped: false,
        };
        SimCopies {
            shared: Arc::new(Mutex::new(shared)),
            wake,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unfinished tasks by number, oldest first.
    pub fn numbers(&self) -> Vec<u64> {
        self.lock().running.keys().copied().collect()
    }

    /// What happened since the last time this was asked.
    pub fn take_events(&self) -> Vec<CopyEvent> {
        std::mem::take(&mut self.lock().events)
    }

    /// Every task that the lane has not heard the end of.
    pub fn views(&self) -> Vec<TaskView> {
        let shared = self.lock();
        let running = shared.running.values();
        let running = running.map(|running| TaskView::of(&running.task));
        let done = shared.done.iter().map(done_view);
        running.chain(done).collect()
    }

    /// Every task but this one that the lane has not heard the end of.
    pub fn views_but(&self, number: u64) -> Vec<TaskView> {
        let shared = self.lock();
        let others = shared.running.iter().filter(|(other, _)| **other != number);
        let others = others.map(|(_, running)| TaskView::of(&running.task));
        let done = shared.done.iter().map(done_view);
        others.chain(done).collect()
    }

    /// Copies up to `pages` more pages of a task.
    pub fn advance(&self, number: u64, pages: usize) {
        self.lock().advance(number, pages);
    }

    /// The page that a task is at.
    pub fn page_at(&self, number: u64) -> Option<(Direction, Arc<BoundLayout>, PageCopy)> {
        let shared = self.lock();
        let running = shared.running.get(&number)?;
        let page = running.task.pages.get(running.pages_done)?;
        Some((running.task.direction, running.task.target.clone(), *page))
    }

    pub fn is_cancelled(&self, number: u64) -> bool {
        let shared = self.lock();
        shared
            .running
            .get(&number)
            .is_some_and(|running| running.task.cancelled.load(Ordering::Relaxed))
    }

    /// Ends a task with what it has copied; `error` when that is not all.
    pub fn finish(&self, number: u64, error: Option<CopyError>) {
        self.lock().finish(number, error);
        self.wake.wake_if_parked();
    }

    /// Overwrites the beginning of a page, as a copy does that fails half-way.
    pub fn scribble(&self, pool_offset: u64, noise: u64) {
        let memory = KvMemory::new(noise, 1, &[(0, u64::from(MIN_PAGE_BYTES))]);
        self.copy_aside(Direction::Save, &memory, pool_offset);
    }

    /// True when a page holds exactly this.
    pub fn page_holds(&self, pool_offset: u64, page_bytes: u64, content: Content) -> bool {
        let mut memory = KvMemory::new(0, 1, &[(0, page_bytes)]);
        self.copy_aside(Direction::Load, &memory, pool_offset);
        memory.groups[0].content[0] = Some(content);
        memory.is_intact(0, 0)
    }

    fn copy_aside(&self, direction: Direction, memory: &KvMemory, pool_offset: u64) {
        let mut task = CopyTask {
            session: 0,
            direction,
            target: memory.groups[0].bound.clone(),
            pages: vec![PageCopy {
                pool_offset,
                block: 0,
                checksum: NO_CHECKSUM,
            }],
            tag: 0,
            cancelled: Arc::new(AtomicBool::new(false)),
            after: None,
            step: None,
        };
        let mut backend = HostBackend::new(self.lock().pool.clone());
        let copied = backend.copy(&mut task, &mut 0);
        assert!(copied.is_ok(), "{copied:?}");
    }
}

impl CopyThreads for SimCopies {
    fn submit(&mut self, task: CopyTask) -> Result<(), CopyTask> {
        let mut shared = self.lock();
        if shared.stopped || shared.running.len() + shared.done.len() >= shared.max_tasks {
            return Err(task);
        }
        let number = shared.next;
        shared.next += 1;
        let view = TaskView::of(&task);
        shared.events.push(CopyEvent::Started(number, view));
        let running = Running {
            task,
            pages_done: 0,
        };
        shared.running.insert(number, running);
        Ok(())
    }

    fn pop_done(&self) -> Option<CopyDone> {
        self.lock().done.pop_front().map(|(done, _)| done)
    }

    fn has_done(&self) -> bool {
        !self.lock().done.is_empty()
    }

    fn end_session(&mut self, session: u64) {
        let shared = self.lock();
        let mut running = shared.running.values();
        assert!(
            running.all(|running| running.task.session != session),
            "session {session} ends while its copies run"
        );
    }

    /// Simulated processes hold nothing up.
    fn stuck(&self, _bound: Duration, _tell: impl FnMut(StuckCopies)) {}

    /// Runs what is left, as real threads do.
    fn stop(&mut self) {
        let numbers = self.numbers();
        let mut shared = self.lock();
        shared.stopped = true;
        for number in numbers {
            shared.advance(number, usize::MAX / 2);
            shared.finish(number, None);
        }
    }
}
