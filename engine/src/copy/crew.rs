//! The copy threads of one session, which alone touch the memory of its process.
//!
//! A process decides what stands behind its addresses: with userfaultfd, or a file system of its
//! own, a copy from or to them takes as long as the process likes, and the thread that makes it can
//! be freed only by that process's end. So no thread that others wait for ever touches process
//! memory: each session has threads of its own for it, and an unbounded wait is its own.
//!
//! Tasks here wait under a lock: each makes system calls, beside which it does not count.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::backend::CopyBackend;
use super::error::CopyError;
use super::results::Results;
use super::task::CopyTask;
use super::workers::{CopyOptions, finished, run_task};

/// A crew's thread has little to keep: a backend's lists lie on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Makes a backend for a thread.
pub(super) type NewBackend = Arc<dyn Fn() -> Box<dyn CopyBackend> + Send + Sync>;

/// What all crews share: how they work, and where their results go.
pub(super) struct CrewOffice {
    pub(super) new_backend: NewBackend,
    /// Most threads of one crew.
    pub(super) threads: usize,
    /// How long a thread without work looks for some before it sleeps.
    pub(super) spin: Duration,
    /// How long it sleeps before it ends.
    pub(super) idle: Duration,
    results: Arc<Results>,
}

impl CrewOffice {
    pub(super) fn new(
        new_backend: NewBackend,
        options: &CopyOptions,
        results: Arc<Results>,
    ) -> Arc<Self> {
        Arc::new(Self {
            new_backend,
            threads: options.crew_threads,
            spin: options.spin,
            idle: options.crew_idle,
            results,
        })
    }
}

/// The threads of one session. Dropping it lets them end once their queue is empty; whoever must
/// know that they have ended asks [`Crew::ended_by`].
pub(super) struct Crew {
    inner: Arc<Inner>,
}

struct Inner {
    office: Arc<CrewOffice>,
    session: u64,
    state: Mutex<State>,
    /// There is a task, or the crew is to end.
    wake: Condvar,
    /// A thread has ended.
    gone: Condvar,
    /// Length of the queue, for threads that look for work without the lock.
    queued: AtomicUsize,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<CopyTask>,
    /// Threads there are, by number, and since when each has been running its task.
    threads: BTreeMap<usize, Option<Instant>>,
    /// Threads that wait for the condition. They are without a task, but not the only ones.
    asleep: usize,
    ending: bool,
}

impl State {
    fn without_task(&self) -> usize {
        self.threads.values().filter(|task| task.is_none()).count()
    }

    fn unfinished(&self) -> usize {
        self.tasks.len() + self.threads.len() - self.without_task()
    }
}

impl Crew {
    pub(super) fn new(office: Arc<CrewOffice>, session: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                office,
                session,
                state: Mutex::default(),
                wake: Condvar::new(),
                gone: Condvar::new(),
                queued: AtomicUsize::new(0),
            }),
        }
    }

    /// Queues a task. Not bounded here: a session's unfinished requests are.
    pub(super) fn submit(&self, task: CopyTask) {
        let mut state = self.inner.lock();
        state.tasks.push_back(task);
        self.inner.count(&state);
        if state.asleep > 0 {
            self.inner.wake.notify_one();
        }
        let wanted = state.tasks.len() > state.without_task();
        if wanted && state.threads.len() < self.inner.office.threads {
            self.inner.hire(state);
        }
    }

    /// Since when its longest copy has been running, and how many of its tasks are unfinished.
    pub(super) fn longest(&self) -> Option<(Instant, usize)> {
        let state = self.inner.lock();
        let since = state.threads.values().flatten().min().copied()?;
        Some((since, state.unfinished()))
    }

    /// Lets the threads end when the queue is empty.
    pub(super) fn end(&self) {
        self.inner.lock().ending = true;
        self.inner.wake.notify_all();
    }

    /// Waits until the threads have ended, or until `deadline`; returns the tasks still unfinished.
    pub(super) fn ended_by(&self, deadline: Instant) -> usize {
        let mut state = self.inner.lock();
        while !state.threads.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.inner.gone.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.unfinished()
    }

    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.inner.lock().threads.len()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.end();
    }
}

impl Inner {
    /// Starts one more thread. A crew that gets none at all fails its tasks.
    fn hire(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let number = (0..).find(|number| !state.threads.contains_key(number));
        let number = number.unwrap_or_default();
        state.threads.insert(number, None);
        // Starting a thread takes a while, and the others need the lock.
        drop(state);
        let inner = Arc::clone(self);
        let started = Builder::new()
            .name(format!("copy-{}.{number}", self.session))
            .stack_size(STACK_BYTES)
            .spawn(move || inner.work(number));
        if let Err(error) = started {
            self.fail(number, &error);
        }
    }

    fn fail(&self, number: usize, error: &io::Error) {
        let mut state = self.lock();
        state.threads.remove(&number);
        tracing::warn!(session = self.session, %error, "no thread for copies of process memory");
        if !state.threads.is_empty() {
            return;
        }
        let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
        let tasks = std::mem::take(&mut state.tasks);
        self.count(&state);
        drop(state);
        for task in tasks {
            let outcome = (Err(CopyError::NoThread { errno }), 0);
            self.office
                .results
                .put(finished(task, outcome, Duration::ZERO));
        }
    }

    fn work(&self, number: usize) {
        let mut backend = None;
        while let Some(task) = self.next_task(number) {
            let done = run_task(&mut backend, &*self.office.new_backend, task);
            // Before the result is out: whoever has it may count on an idle thread.
            self.lock().threads.insert(number, None);
            self.office.results.put(done);
        }
        self.gone.notify_all();
    }

    /// The next task, after waiting for it; `None` when the thread is to end, which then is no
    /// longer counted.
    fn next_task(&self, number: usize) -> Option<CopyTask> {
        let mut state = self.lock();
        let mut looked = false;
        loop {
            if let Some(task) = state.tasks.pop_front() {
                self.count(&state);
                state.threads.insert(number, Some(Instant::now()));
                return Some(task);
            }
            if state.ending {
                state.threads.remove(&number);
                return None;
            }
            if !looked {
                drop(state);
                self.look_for_task();
                state = self.lock();
                looked = true;
                continue;
            }
            state.asleep += 1;
            let waited = self.wake.wait_timeout(state, self.office.idle);
            let (woken, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.asleep -= 1;
            if waited.timed_out() && state.tasks.is_empty() {
                state.threads.remove(&number);
                return None;
            }
        }
    }

    /// Looks whether there is a task until there is, or `spin` is over.
    fn look_for_task(&self) {
        /// Looks between two readings of the clock.
        const LOOKS: u32 = 32;
        let start = Instant::now();
        while start.elapsed() < self.office.spin {
            for _ in 0..LOOKS {
                if self.queued.load(Ordering::Relaxed) > 0 {
                    return;
                }
                std::hint::spin_loop();
            }
        }
    }

    fn count(&self, state: &State) {
        self.queued.store(state.tasks.len(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
