//! Copies of process memory: each session's threads are its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::support::*;
use super::workers::{next_done, options};
use crate::copy::*;
use crate::layout::MemoryRef;

/// Sessions with this number and above are held up until the gate opens.
const HELD_UP: u64 = 100;

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// A backend whose copies of some sessions take until the gate opens.
struct Gated(Arc<Gate>);

impl CopyBackend for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn copy(&mut self, task: &mut CopyTask, pages_done: &mut u32) -> Result<u64, CopyError> {
        if task.session >= HELD_UP {
            let shut = self.0.open.lock().unwrap();
            drop(self.0.changed.wait_while(shut, |open| !*open).unwrap());
        }
        assert_ne!(task.tag, 13, "unlucky");
        *pages_done = task.pages.len() as u32;
        Ok(task.tag)
    }
}

fn gated(options: CopyOptions) -> (CopyWorkers, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let inner = gate.clone();
    let new_backend = move || Gated(inner.clone());
    let workers = CopyWorkers::start_with(options, new_backend, || ()).unwrap();
    (workers, gate)
}

fn own_memory() -> Arc<ProcessMemory> {
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    Arc::new(ProcessMemory::open(getpid().as_raw_nonzero().get(), pidfd, own_uid()).unwrap())
}

/// A block in the memory of this process.
fn in_process() -> Arc<BoundLayout> {
    let list = segments(MemoryRef::Process, &[(0x10_0000, 64, 64)]);
    bind(4, list, &[], Some(&own_memory()))
}

/// One part in a region, one in the memory of this process.
fn in_both() -> Arc<BoundLayout> {
    let mut list = segments(MemoryRef::Region(0), &[(0, 64, 64)]);
    list.extend(segments(MemoryRef::Process, &[(0x10_0000, 64, 64)]));
    bind(4, list, &[region(256)], Some(&own_memory()))
}

fn in_region() -> Arc<BoundLayout> {
    let list = segments(MemoryRef::Region(0), &[(0, 64, 64)]);
    bind(4, list, &[region(256)], None)
}

fn of_session(session: u64, target: &Arc<BoundLayout>, tag: u64) -> CopyTask {
    CopyTask {
        session,
        tag,
        ..task(Direction::Save, target, &[(0, 1)])
    }
}

fn stuck(workers: &CopyWorkers) -> Vec<StuckCopies> {
    let mut found = Vec::new();
    workers.stuck(Duration::ZERO, |copies| found.push(copies));
    found
}

/// Waits until it holds, at most 20 s.
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_session_that_is_held_up_holds_nobody_else_up() {
    // Fewer places than what is held up: those do not count.
    let (mut workers, gate) = gated(options(2, 4));
    let (process, both, region) = (in_process(), in_both(), in_region());
    for tag in 0..20 {
        let target = if tag % 2 == 0 { &process } else { &both };
        workers.submit(of_session(HELD_UP, target, tag)).unwrap();
    }
    for round in 0..50 {
        for (tag, target) in [&process, &both, &region].into_iter().enumerate() {
            let tag = 1000 + round * 10 + tag as u64;
            workers.submit(of_session(1, target, tag)).unwrap();
            assert_eq!(next_done(&workers).tag, tag);
        }
    }
    assert_eq!(workers.crew_threads(HELD_UP), 2);
    let (session, tasks) = (HELD_UP, 20);
    wait_until("nobody is named", || {
        stuck(&workers) == [StuckCopies { session, tasks }]
    });
    let mut never = 0;
    workers.stuck(Duration::from_secs(3600), |_| never += 1);
    assert_eq!(never, 0);
    gate.open();
    let mut tags: Vec<u64> = (0..20).map(|_| next_done(&workers).tag).collect();
    tags.sort_unstable();
    assert!(tags.into_iter().eq(0..20), "each comes back once");
    assert!(stuck(&workers).is_empty());
    assert!(workers.pop_done().is_none() && !workers.has_done());
}

#[test]
fn a_session_has_threads_as_it_needs_them_and_none_after_a_while() {
    let idle = Duration::from_millis(50);
    let (mut workers, gate) = gated(CopyOptions {
        crew_idle: idle,
        ..options(3, 4)
    });
    let process = in_process();
    assert_eq!(workers.crew_threads(1), 0);
    for tag in 0..2 {
        workers.submit(of_session(HELD_UP, &process, tag)).unwrap();
    }
    assert_eq!(workers.crew_threads(HELD_UP), 2, "one for each task");
    for tag in 2..9 {
        workers.submit(of_session(HELD_UP, &process, tag)).unwrap();
    }
    assert_eq!(workers.crew_threads(HELD_UP), 3, "the named maximum");
    gate.open();
    for _ in 0..9 {
        next_done(&workers);
    }
    wait_until("idle threads end", || workers.crew_threads(HELD_UP) == 0);
    workers.submit(of_session(HELD_UP, &process, 9)).unwrap();
    assert_eq!(next_done(&workers).tag, 9, "and come again");
}

#[test]
fn the_threads_of_a_session_end_with_it() {
    let (mut workers, gate) = gated(options(2, 4));
    let process = in_process();
    let before = Arc::strong_count(&gate);
    for session in 1..20 {
        workers
            .submit(of_session(session, &process, session))
            .unwrap();
        assert_eq!(next_done(&workers).tag, session);
        workers.end_session(session);
        assert_eq!(workers.crew_threads(session), 0);
    }
    // Each thread's backend holds the gate.
    wait_until("threads outlive their session", || {
        Arc::strong_count(&gate) == before
    });
    assert_eq!(Arc::strong_count(&process), 1);
}

#[test]
fn stop_runs_what_is_queued_and_leaves_only_what_is_held_up_behind() {
    let (mut workers, gate) = gated(options(2, 100));
    let process = in_process();
    for tag in 0..50 {
        workers
            .submit(of_session(1 + tag % 3, &process, 1000 + tag))
            .unwrap();
    }
    workers.submit(of_session(HELD_UP, &process, 1)).unwrap();
    let started = Instant::now();
    workers.stop();
    assert!(started.elapsed() < Duration::from_secs(20), "stop hangs");
    assert!(workers.submit(of_session(1, &process, 2)).is_err());
    let mut tags: Vec<u64> = std::iter::from_fn(|| workers.pop_done())
        .map(|done| done.tag)
        .collect();
    tags.sort_unstable();
    assert!(tags.into_iter().eq(1000..1050));
    gate.open();
    drop(workers);
    // What was left behind ends by itself and lets go of everything.
    wait_until("the last copy holds on", || {
        Arc::strong_count(&process) == 1 && Arc::strong_count(&gate) == 1
    });
}

#[test]
fn queued_copies_of_a_closed_session_are_cancelled_without_running() {
    let (mut workers, gate) = gated(options(1, 4));
    let process = in_process();
    let cancelled = Arc::new(AtomicBool::new(false));
    for tag in 0..5 {
        let task = CopyTask {
            cancelled: cancelled.clone(),
            ..of_session(HELD_UP, &process, tag)
        };
        workers.submit(task).unwrap();
    }
    wait_until("nothing runs", || !stuck(&workers).is_empty());
    cancelled.store(true, Ordering::Relaxed);
    gate.open();
    assert_eq!(next_done(&workers).result, Ok(0), "it had begun");
    for tag in 1..5 {
        let done = next_done(&workers);
        assert_eq!((done.tag, done.result), (tag, Err(CopyError::Cancelled)));
    }
}

#[test]
fn a_panic_in_a_crew_is_a_result_and_the_thread_goes_on() {
    let (mut workers, _gate) = gated(options(1, 4));
    let process = in_process();
    for tag in [13, 7, 13, 8] {
        workers.submit(of_session(1, &process, tag)).unwrap();
        let done = next_done(&workers);
        assert_eq!(done.tag, tag);
        assert_eq!(
            matches!(done.result, Err(CopyError::Panicked { .. })),
            tag == 13
        );
    }
    assert_eq!(workers.crew_threads(1), 1);
}

#[test]
fn many_sessions_get_every_result_once_while_threads_come_and_go() {
    let (mut workers, _gate) = gated(CopyOptions {
        crew_idle: Duration::from_millis(1),
        spin: Duration::ZERO,
        ..options(3, 16)
    });
    let process = in_process();
    let mut seen = vec![0u32; 5000];
    let mut take = |workers: &CopyWorkers| {
        while let Some(done) = workers.pop_done() {
            seen[done.tag as usize - 100_000] += 1;
        }
        seen.iter().all(|count| *count > 0)
    };
    for next in 0..5000 {
        let session = 1 + next % 7;
        let task = of_session(session, &process, 100_000 + next);
        workers.submit(task).unwrap();
        if next % 37 == 0 {
            // Long enough for threads to end.
            std::thread::sleep(Duration::from_millis(2));
            take(&workers);
        }
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while !take(&workers) {
        assert!(Instant::now() < deadline, "results are missing");
        std::thread::yield_now();
    }
    assert!(seen.iter().all(|count| *count == 1));
}

#[test]
fn a_sleeping_lane_is_never_forgotten_by_a_crew() {
    let bell = Arc::new((AtomicBool::new(false), Mutex::new(false), Condvar::new()));
    let ring = bell.clone();
    let notify = move || {
        if ring.0.load(Ordering::Relaxed) {
            *ring.1.lock().unwrap() = true;
            ring.2.notify_one();
        }
    };
    let gate = Arc::new(Gate::default());
    let backend = move || Gated(gate.clone());
    let mut workers = CopyWorkers::start_with(options(2, 4), backend, notify).unwrap();
    let process = in_process();
    for tag in 1000..3000 {
        workers.submit(of_session(1, &process, tag)).unwrap();
        bell.0.store(true, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
        while workers.pop_done().is_none() {
            let rung = bell.1.lock().unwrap();
            let limit = Duration::from_secs(20);
            let (mut rung, timeout) = bell.2.wait_timeout_while(rung, limit, |r| !*r).unwrap();
            assert!(!timeout.timed_out(), "result {tag} rang no bell");
            *rung = false;
        }
        bell.0.store(false, Ordering::Relaxed);
    }
}
