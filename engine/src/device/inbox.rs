//! The way of tasks to a device's thread.
//!
//! Not bounded here: what sessions may have unfinished bounds it. One lock, taken once per task and
//! once per turn of the thread: a task is megabytes.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::copy::CopyTask;

use super::error::DriverError;

/// Tasks that a device's thread has not taken in yet.
#[derive(Default)]
pub(super) struct Inbox {
    tasks: Mutex<VecDeque<CopyTask>>,
    /// Length of `tasks`, to be looked at without the lock.
    count: AtomicUsize,
    stopping: AtomicBool,
    /// What another thread met in the context with this number: its end.
    fault: Mutex<Option<(u64, DriverError)>>,
    /// Whether there is one, to be looked at without the lock.
    faulty: AtomicBool,
    wake: Condvar,
}

impl Inbox {
    pub(super) fn push(&self, task: CopyTask) {
        let mut tasks = self.lock();
        tasks.push_back(task);
        self.count.store(tasks.len(), Ordering::Relaxed);
        drop(tasks);
        self.wake.notify_one();
    }

    /// Moves all tasks into `out`.
    pub(super) fn take(&self, out: &mut VecDeque<CopyTask>) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut tasks = self.lock();
            out.append(&mut tasks);
            self.count.store(0, Ordering::Relaxed);
        }
    }

    /// Lets the thread end once it has nothing left.
    pub(super) fn stop(&self) {
        let tasks = self.lock();
        self.stopping.store(true, Ordering::Relaxed);
        drop(tasks);
        self.wake.notify_all();
    }

    /// Another thread has met an error after which the context with this number is of no use.
    pub(super) fn report(&self, generation: u64, error: DriverError) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some((generation, error));
        self.faulty.store(true, Ordering::Release);
        // Behind the lock that a sleeper holds while it looks.
        drop(self.lock());
        self.wake.notify_all();
    }

    /// Takes what was reported, if it is of the context with this number.
    pub(super) fn take_fault(&self, generation: u64) -> Option<DriverError> {
        if !self.faulty.load(Ordering::Relaxed) {
            return None;
        }
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        self.faulty.store(false, Ordering::Relaxed);
        let (of, error) = fault.take()?;
        (of == generation).then_some(error)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Waits until there is a task, a report or `limit` is over, or the thread is to stop.
    pub(super) fn wait(&self, limit: Option<Duration>) {
        let tasks = self.lock();
        if !tasks.is_empty() || self.is_stopping() || self.faulty.load(Ordering::Acquire) {
            return;
        }
        match limit {
            Some(limit) => drop(self.wake.wait_timeout(tasks, limit)),
            None => drop(self.wake.wait(tasks)),
        }
    }

    /// Looks for a task without sleeping, for `spin` at most; true when there is one.
    pub(super) fn look(&self, spin: Duration) -> bool {
        /// Looks between two readings of the clock.
        const LOOKS: u32 = 32;
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.count.load(Ordering::Relaxed) > 0 || self.is_stopping() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= spin {
                return false;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<CopyTask>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
