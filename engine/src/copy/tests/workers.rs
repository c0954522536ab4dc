use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::support::*;
use crate::copy::*;
use crate::layout::MemoryRef;

/// Waits for the next result, at most 20 s.
pub fn next_done(workers: &CopyWorkers) -> CopyDone {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(done) = workers.pop_done() {
            return done;
        }
        assert!(Instant::now() < deadline, "no result");
        std::thread::yield_now();
    }
}

pub fn options(threads: usize, max_tasks: usize) -> CopyOptions {
    CopyOptions {
        threads,
        crew_threads: threads,
        max_tasks,
        ..CopyOptions::default()
    }
}

fn small_target() -> Arc<BoundLayout> {
    bind(
        4,
        segments(MemoryRef::Region(0), &[(0, 64, 64)]),
        &[region(256)],
        None,
    )
}

/// Bytes of the pool that the tasks of up to twenty tags in flight need.
const POOL_BYTES: u64 = 4096;

/// Saves into two pages of its own: the lane never has two saves into one page under way, and the
/// backend relies on it.
fn tagged(target: &Arc<BoundLayout>, tag: u64) -> CopyTask {
    let at = tag % 20 * 128;
    CopyTask {
        tag,
        ..task(Direction::Save, target, &[(at, 1), (at + 64, 2)])
    }
}

/// Waits at a gate, then does as the tag says: 13 panics, others count their pages.
struct Gated {
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    /// Tasks that reached the gate.
    begun: AtomicUsize,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl CopyBackend for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn copy(&mut self, task: &mut CopyTask, pages_done: &mut u32) -> Result<u64, CopyError> {
        self.gate.begun.fetch_add(1, Ordering::SeqCst);
        let shut = self.gate.open.lock().unwrap();
        drop(self.gate.changed.wait_while(shut, |open| !*open).unwrap());
        *pages_done = 1;
        assert_ne!(task.tag, 13, "unlucky {}", task.tag);
        *pages_done = task.pages.len() as u32;
        Ok(task.tag)
    }
}

fn gated(threads: usize, max_tasks: usize) -> (CopyWorkers, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let inner = gate.clone();
    let new_backend = move || Gated {
        gate: inner.clone(),
    };
    let workers = CopyWorkers::start_with(options(threads, max_tasks), new_backend, || ()).unwrap();
    (workers, gate)
}

#[test]
fn tasks_come_back_once_with_their_list_and_no_handle_left() {
    let target = small_target();
    let pool_map = region(POOL_BYTES);
    let notified = Arc::new(AtomicUsize::new(0));
    let count = notified.clone();
    let notify = move || {
        count.fetch_add(1, Ordering::SeqCst);
    };
    let mut workers = CopyWorkers::start(options(3, 64), pool(&pool_map), notify).unwrap();
    for round in 0..50 {
        for tag in 0..20 {
            workers.submit(tagged(&target, round * 20 + tag)).unwrap();
        }
        let mut tags = Vec::new();
        for _ in 0..20 {
            let done = next_done(&workers);
            assert_eq!((done.result, done.pages_done), (Ok(128), 2));
            assert_eq!(
                done.pages[1],
                PageCopy {
                    pool_offset: done.tag % 20 * 128 + 64,
                    block: 2,
                    checksum: NO_CHECKSUM,
                }
            );
            tags.push(done.tag);
        }
        tags.sort_unstable();
        assert!(tags.into_iter().eq(round * 20..round * 20 + 20));
        assert_eq!(
            Arc::strong_count(&target),
            1,
            "a result means that the thread let go"
        );
        assert_eq!(workers.unfinished(), 0);
        if round % 10 == 0 {
            // Long enough for every thread to fall asleep.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    workers.stop();
    assert_eq!(notified.load(Ordering::SeqCst), 1000);
    assert!(workers.pop_done().is_none());
}

#[test]
fn a_full_queue_gives_the_task_back_until_a_result_is_taken() {
    let target = small_target();
    let (mut workers, gate) = gated(1, 3);
    for tag in 0..3 {
        workers.submit(tagged(&target, tag)).unwrap();
    }
    let back = workers.submit(tagged(&target, 3)).unwrap_err();
    assert_eq!((back.tag, back.pages.len()), (3, 2));
    gate.open();
    while workers.shared_done_len() < 3 {
        std::thread::yield_now();
    }
    let back = workers.submit(back).unwrap_err();
    assert_eq!(next_done(&workers).tag, 0);
    workers.submit(back).unwrap();
    for tag in 1..4 {
        assert_eq!(next_done(&workers).tag, tag);
    }
}

#[test]
fn a_panic_is_a_result_and_the_thread_goes_on() {
    let target = small_target();
    let (mut workers, gate) = gated(1, 8);
    gate.open();
    for tag in [13, 7, 13, 8] {
        workers.submit(tagged(&target, tag)).unwrap();
    }
    for tag in [13, 7, 13, 8] {
        let done = next_done(&workers);
        assert_eq!((done.tag, done.pages.len()), (tag, 2));
        match done.result {
            Err(CopyError::Panicked { message }) if tag == 13 => {
                assert!(message.contains("unlucky 13"), "{message}");
                assert_eq!(done.pages_done, 1);
            }
            result => assert_eq!((result, done.pages_done), (Ok(tag), 2)),
        }
    }
}

#[test]
fn stop_runs_what_is_queued_and_refuses_more() {
    let target = small_target();
    let (mut workers, gate) = gated(2, 100);
    for tag in 100..200 {
        workers.submit(tagged(&target, tag)).unwrap();
    }
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        gate.open();
    });
    workers.stop();
    opener.join().unwrap();
    assert!(workers.submit(tagged(&target, 1)).is_err());
    let mut tags: Vec<u64> = std::iter::from_fn(|| workers.pop_done())
        .map(|d| d.tag)
        .collect();
    tags.sort_unstable();
    assert!(tags.into_iter().eq(100..200));
    workers.stop();
}

#[test]
fn dropping_the_workers_waits_for_queued_copies() {
    let target = small_target();
    let (mut workers, gate) = gated(1, 10);
    gate.open();
    for tag in 0..10 {
        workers.submit(tagged(&target, tag)).unwrap();
    }
    drop(workers);
    assert_eq!(Arc::strong_count(&target), 1);
}

#[test]
fn cancelling_ends_queued_tasks_without_running_them() {
    let target = small_target();
    let (mut workers, gate) = gated(1, 10);
    let cancelled = Arc::new(AtomicBool::new(false));
    for tag in 0..3 {
        let task = CopyTask {
            cancelled: cancelled.clone(),
            ..tagged(&target, tag)
        };
        workers.submit(task).unwrap();
    }
    while gate.begun.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    cancelled.store(true, Ordering::Relaxed);
    gate.open();
    let results: Vec<_> = (0..3).map(|_| next_done(&workers)).collect();
    assert_eq!(
        results[0].pages_done, 2,
        "the gated backend had begun the first"
    );
    for done in &results[1..] {
        assert_eq!(
            (&done.result, done.pages_done),
            (&Err(CopyError::Cancelled), 0)
        );
    }
}

#[test]
fn a_sleeping_lane_is_never_forgotten() {
    // The lane's protocol with a condvar for its eventfd: flag, fence, look again, sleep.
    let target = small_target();
    let pool_map = region(POOL_BYTES);
    let bell = Arc::new((AtomicBool::new(false), Mutex::new(false), Condvar::new()));
    let ring = bell.clone();
    let notify = move || {
        if ring.0.load(Ordering::Relaxed) {
            *ring.1.lock().unwrap() = true;
            ring.2.notify_one();
        }
    };
    let mut workers = CopyWorkers::start(options(2, 4), pool(&pool_map), notify).unwrap();
    for tag in 0..3000 {
        workers.submit(tagged(&target, tag)).unwrap();
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
