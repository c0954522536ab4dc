//! Results of copies that wait for the lane, from threads whose number of tasks has no bound of its
//! own.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::task::CopyDone;

/// Where crews and the threads of GPUs put what is done.
pub(crate) struct Results {
    waiting: Mutex<VecDeque<CopyDone>>,
    /// Length of `waiting`, to be looked at without the lock.
    count: AtomicUsize,
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl Results {
    /// None yet; `notify` runs after each that is put.
    pub(crate) fn new(notify: Arc<dyn Fn() + Send + Sync>) -> Results {
        Results {
            waiting: Mutex::default(),
            count: AtomicUsize::new(0),
            notify,
        }
    }

    pub(crate) fn put(&self, done: CopyDone) {
        let mut waiting = self.lock();
        waiting.push_back(done);
        self.count.store(waiting.len(), Ordering::Relaxed);
        drop(waiting);
        // SYNC: copy-done. Pairs with the lane's fence between setting its parked flag and its
        // last `has_done`: either it sees the result, or `notify` sees the flag.
        fence(Ordering::SeqCst);
        (self.notify)();
    }

    /// The next result.
    #[inline]
    pub(crate) fn pop(&self) -> Option<CopyDone> {
        if !self.has_some() {
            return None;
        }
        let mut waiting = self.lock();
        let done = waiting.pop_front();
        self.count.store(waiting.len(), Ordering::Relaxed);
        done
    }

    #[inline]
    pub(crate) fn has_some(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<CopyDone>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
