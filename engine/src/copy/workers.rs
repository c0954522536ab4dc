//! Copy threads: take tasks, run them, hand the results back.
//!
//! Shared regions are copied by threads that all sessions share; what touches the memory of a
//! process goes to the [`Crew`] of its session.
#![forbid(unsafe_code)]

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::backend::CopyBackend;
use super::crew::{Crew, CrewOffice};
use super::error::CopyError;
use super::host::HostBackend;
use super::memory::PoolMemory;
use super::results::Results;
use super::steps::Step;
use super::task::{CopyDone, CopyTask};
use crate::device::Devices;

/// How long [`CopyWorkers::stop`] waits for copies of process memory. They are short or, if their
/// process wants it so, endless.
const CREW_STOP_LIMIT: Duration = Duration::from_secs(2);

/// Numbers of copy threads and sizes of their queues.
#[derive(Debug, Clone, Copy)]
pub struct CopyOptions {
    /// Copy threads for shared regions, at least one.
    pub threads: usize,
    /// Most copy threads of one session for the memory of its process, at least one.
    pub crew_threads: usize,
    /// How long one of those sleeps without work before it ends.
    pub crew_idle: Duration,
    /// Most tasks between [`CopyWorkers::submit`] and [`CopyWorkers::pop_done`], waiting, running
    /// or done; at least one. Tasks of process memory do not count: only their own session waits
    /// for them, and its unfinished requests bound them.
    pub max_tasks: usize,
    /// How long a thread without work spins before it sleeps.
    pub spin: Duration,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            crew_threads: 2,
            crew_idle: Duration::from_secs(10),
            max_tasks: 1024,
            spin: Duration::from_micros(20),
        }
    }
}

/// A session whose copies have been waiting for its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StuckCopies {
    /// The session.
    pub session: u64,
    /// Its tasks that are not finished, queued ones included.
    pub tasks: usize,
}

/// The copy threads and their queues.
///
/// Every task that `submit` takes comes back exactly once from `pop_done`, but for those that
/// [`CopyWorkers::stop`] leaves behind. For one caller, the lane.
pub struct CopyWorkers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    office: Arc<CrewOffice>,
    /// By session.
    crews: HashMap<u64, Crew>,
    /// Results of crews and devices.
    results: Arc<Results>,
    devices: Devices,
}

struct Shared {
    tasks: ArrayQueue<CopyTask>,
    done: ArrayQueue<CopyDone>,
    /// Tasks between `submit` and `pop_done`. Never above the capacity of either queue, so that
    /// neither queue can refuse a push.
    unfinished: AtomicUsize,
    max_tasks: usize,
    stopping: AtomicBool,
    /// Threads that sleep or are about to. Changed only under `sleep`.
    sleepers: AtomicU32,
    sleep: Mutex<()>,
    wake: Condvar,
    spin: Duration,
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl CopyWorkers {
    /// Starts copy threads for host memory. See [`CopyWorkers::start_with`].
    pub fn start(
        options: CopyOptions,
        pool: PoolMemory,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::start_with(options, move || HostBackend::new(pool.clone()), notify)
    }

    /// Starts `options.threads` threads named `copy-N`, each with a backend of its own from
    /// `new_backend` (called again after a panic, whose backend is dropped).
    ///
    /// `notify` runs on a copy thread after each [`CopyDone`] became visible to `pop_done` and
    /// after a full fence. It must not block: load the lane's "parked" flag, and ring its eventfd
    /// when set. The lane's side is: set the flag, full fence, `pop_done` once more, park.
    pub fn start_with<B: CopyBackend + 'static>(
        options: CopyOptions,
        new_backend: impl Fn() -> B + Send + Sync + 'static,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        assert!(
            options.threads > 0 && options.crew_threads > 0 && options.max_tasks > 0,
            "at least one thread and one task"
        );
        let notify: Arc<dyn Fn() + Send + Sync> = Arc::new(notify);
        let shared = Arc::new(Shared {
            tasks: ArrayQueue::new(options.max_tasks),
            done: ArrayQueue::new(options.max_tasks),
            unfinished: AtomicUsize::new(0),
            max_tasks: options.max_tasks,
            stopping: AtomicBool::new(false),
            sleepers: AtomicU32::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            spin: options.spin,
            notify: notify.clone(),
        });
        let new_backend = Arc::new(new_backend);
        let for_crews = Arc::clone(&new_backend);
        let results = Arc::new(Results::new(notify));
        let for_crews = Arc::new(move || Box::new(for_crews()) as Box<dyn CopyBackend>);
        let mut workers = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            office: CrewOffice::new(for_crews, &options, Arc::clone(&results)),
            crews: HashMap::new(),
            results,
            devices: Devices::none(),
        };
        for number in 0..options.threads {
            let (shared, new_backend) = (Arc::clone(&shared), Arc::clone(&new_backend));
            let thread = Builder::new()
                .name(format!("copy-{number}"))
                .spawn(move || shared.run_thread(&*new_backend))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Serves the memory of these devices, too, each by a thread of its own, between them and
    /// `pool`.
    pub fn serve_devices(&mut self, devices: Devices, pool: PoolMemory) {
        devices.serve(pool, Arc::clone(&self.results));
        self.devices = devices;
    }

    /// Queues `task`, or gives it back when `max_tasks` are unfinished or the threads were stopped.
    /// A task of process or GPU memory always finds room.
    pub fn submit(&mut self, task: CopyTask) -> Result<(), CopyTask> {
        let shared = &*self.shared;
        if shared.stopping.load(Ordering::Relaxed) {
            return Err(task);
        }
        if task.target.is_in_process() {
            let office = &self.office;
            let crew = self.crews.entry(task.session);
            crew.or_insert_with_key(|session| Crew::new(Arc::clone(office), *session))
                .submit(task);
            return Ok(());
        }
        if let Some(target) = task.target.device() {
            let card = Arc::clone(target.card());
            if let Err(task) = card.submit(task) {
                let device = card.info().uuid;
                let outcome = (Err(CopyError::DeviceReset { device }), 0);
                self.results.put(finished(task, outcome, Duration::ZERO));
            }
            return Ok(());
        }
        // SYNC: copy-room. See `pop_done`.
        let claimed = shared
            .unfinished
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| {
                (n < shared.max_tasks).then_some(n + 1)
            });
        if claimed.is_err() {
            return Err(task);
        }
        if let Err(task) = shared.tasks.push(task) {
            shared.unfinished.fetch_sub(1, Ordering::Relaxed);
            return Err(task);
        }
        shared.wake_one();
        Ok(())
    }

    /// The next finished task, if any.
    pub fn pop_done(&self) -> Option<CopyDone> {
        let Some(done) = self.shared.done.pop() else {
            return self.results.pop();
        };
        // SYNC: copy-room. Pairs with `submit`: its push finds the place that this pop made.
        self.shared.unfinished.fetch_sub(1, Ordering::Release);
        Some(done)
    }

    /// Whether [`CopyWorkers::pop_done`] has something.
    pub fn has_done(&self) -> bool {
        !self.shared.done.is_empty() || self.results.has_some()
    }

    /// Tasks of shared regions between `submit` and `pop_done`.
    pub fn unfinished(&self) -> usize {
        self.shared.unfinished.load(Ordering::Relaxed)
    }

    /// Lets the threads of a session that has ended go. All its tasks have come back.
    pub fn end_session(&mut self, session: u64) {
        self.crews.remove(&session);
    }

    /// Tells of each session one of whose copies has been running for longer than `bound`: what it
    /// waits for is up to the session's process. Those that wait for an event of a GPU are told of
    /// after a bound of the device's own.
    pub fn stuck(&self, bound: Duration, mut tell: impl FnMut(StuckCopies)) {
        for (session, crew) in &self.crews {
            if let Some((since, tasks)) = crew.longest()
                && since.elapsed() > bound
            {
                let session = *session;
                tell(StuckCopies { session, tasks });
            }
        }
        for card in self.devices.cards() {
            card.stuck().into_iter().for_each(&mut tell);
        }
    }

    /// Refuses new tasks, waits until all queued ones have run, and ends the threads. The results
    /// still wait in `pop_done`. To be quick, set the tasks' `cancelled` first.
    ///
    /// A copy that its session's process holds up is left behind, with its thread, after 2 s: it
    /// keeps the pool mapped, and ends with the daemon's process or its own.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        drop(self.shared.lock_sleep());
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a copy thread ended by a panic");
            }
        }
        let deadline = Instant::now() + CREW_STOP_LIMIT;
        for card in self.devices.cards() {
            card.stop();
        }
        for crew in self.crews.values() {
            crew.end();
        }
        for (session, crew) in self.crews.drain() {
            let tasks = crew.ended_by(deadline);
            if tasks > 0 {
                tracing::warn!(
                    session,
                    tasks,
                    "copies that their process holds up are left behind"
                );
            }
        }
        for card in self.devices.cards() {
            if !card.ended_by(deadline) {
                let device = card.info().uuid;
                tracing::warn!(%device, "copies that a GPU does not end are left behind");
            }
        }
    }
}

#[cfg(test)]
impl CopyWorkers {
    /// Threads that a session has for the memory of its process.
    pub(super) fn crew_threads(&self, session: u64) -> usize {
        self.crews.get(&session).map_or(0, Crew::threads)
    }

    /// Results that wait in `pop_done`.
    pub(super) fn shared_done_len(&self) -> usize {
        self.shared.done.len()
    }
}

impl Drop for CopyWorkers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run_thread<B: CopyBackend>(&self, new_backend: &impl Fn() -> B) {
        let mut backend: Option<B> = None;
        while let Some(task) = self.next_task() {
            let done = run_task(&mut backend, new_backend, task);
            let pushed = self.done.push(done);
            assert!(
                pushed.is_ok(),
                "there are never more results than unfinished tasks"
            );
            // SYNC: copy-done. Pairs with the lane's fence between setting its parked flag and its
            // last `pop_done`: either it sees the result, or `notify` sees the flag.
            fence(Ordering::SeqCst);
            (self.notify)();
        }
    }

    /// The next task, after waiting for it; `None` when the threads stop and the queue is empty.
    fn next_task(&self) -> Option<CopyTask> {
        loop {
            if let Some(task) = self.spin_for_task() {
                return Some(task);
            }
            let mut guard = self.lock_sleep();
            self.sleepers.fetch_add(1, Ordering::Relaxed);
            // SYNC: copy-task. Pairs with the fence in `wake_one`: either this thread sees the
            // task, or the submitter sees the sleeper and then needs the lock that `wait` lets go.
            fence(Ordering::SeqCst);
            let stopping = self.stopping.load(Ordering::SeqCst);
            if self.tasks.is_empty() && !stopping {
                guard = self
                    .wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, Ordering::Relaxed);
            drop(guard);
            if stopping && self.tasks.is_empty() {
                return None;
            }
        }
    }

    /// Looks for a task until `spin` is over.
    fn spin_for_task(&self) -> Option<CopyTask> {
        /// Looks between two readings of the clock.
        const LOOKS: u32 = 32;
        if let Some(task) = self.tasks.pop() {
            return Some(task);
        }
        let start = Instant::now();
        while start.elapsed() < self.spin && !self.stopping.load(Ordering::Relaxed) {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if !self.tasks.is_empty()
                    && let Some(task) = self.tasks.pop()
                {
                    return Some(task);
                }
            }
        }
        None
    }

    /// Wakes one sleeping thread, if there is one. Costs a fence and a load when there is none.
    fn wake_one(&self) {
        // SYNC: copy-task. See `next_task`.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            drop(self.lock_sleep());
            self.wake.notify_one();
        }
    }

    fn lock_sleep(&self) -> std::sync::MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs one task to its end, a panic included.
pub(super) fn run_task<B: CopyBackend>(
    backend: &mut Option<B>,
    new_backend: &(impl Fn() -> B + ?Sized),
    mut task: CopyTask,
) -> CopyDone {
    let started = Instant::now();
    let mut pages_done = 0;
    let ran = catch_unwind(AssertUnwindSafe(|| {
        if task.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        backend
            .get_or_insert_with(new_backend)
            .copy(&mut task, &mut pages_done)
    }));
    let result = ran.unwrap_or_else(|payload| {
        // Its scratch state may be half changed: the next task gets a new one.
        *backend = None;
        Err(CopyError::Panicked {
            message: panic_message(&*payload),
        })
    });
    finished(task, (result, pages_done), started.elapsed())
}

/// The result of a task that is over.
pub(crate) fn finished(
    task: CopyTask,
    (result, pages_done): (Result<u64, CopyError>, u32),
    busy: Duration,
) -> CopyDone {
    // Before the result is visible, so that the lane's handles are the last ones.
    let CopyTask {
        session: _,
        direction,
        target,
        pages,
        tag,
        cancelled,
        after,
        step,
    } = task;
    if let (Some(Step { steps, step }), Ok(_)) = (&step, &result) {
        steps.task_done(*step);
    }
    drop((target, cancelled, after, step));
    CopyDone {
        tag,
        direction,
        result,
        pages_done,
        busy_ns: busy.as_nanos() as u64,
        pages,
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
