//! Chunks under way between GPUs and pinned memory of the pool.
//!
//! The context of one device holds the pinned pages for all. When that context must end, the pages
//! are withdrawn from the map of pinned memory first, and then the other devices' chunks that were
//! planned before must have drained: otherwise a device would write to memory that the kernel has
//! given to somebody else's use.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

/// Chunks under way, by the number of their device.
#[derive(Debug)]
pub(crate) struct Flights {
    by_device: Box<[AtomicUsize]>,
}

impl Flights {
    pub(crate) fn new(devices: usize) -> Flights {
        Flights {
            by_device: (0..devices).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// A chunk is about to be planned: what it finds pinned stays so until [`Flights::end`].
    pub(super) fn begin(&self, device: usize) {
        self.by_device[device].fetch_add(1, Ordering::Relaxed);
        // SYNC: pin-flight. Pairs with `drained`: either the plan finds the memory withdrawn, or
        // whoever withdrew it finds the chunk counted.
        fence(Ordering::SeqCst);
    }

    /// A chunk is done.
    pub(super) fn end(&self, device: usize) {
        // SYNC: pin-flight. Its copies come before what `drained` allows.
        self.by_device[device].fetch_sub(1, Ordering::Release);
    }

    /// The device's context is gone, and all its chunks with it.
    pub(super) fn end_all(&self, device: usize) {
        // SYNC: pin-flight. As in `end`.
        self.by_device[device].store(0, Ordering::Release);
    }

    /// Waits, after memory was withdrawn, until no other device's chunk uses it; false when one
    /// still does after `limit`.
    pub(super) fn drained(&self, but: usize, limit: Duration) -> bool {
        const PAUSE: Duration = Duration::from_micros(100);
        // SYNC: pin-flight. See `begin`.
        fence(Ordering::SeqCst);
        let deadline = Instant::now() + limit;
        let others = || self.by_device.iter().enumerate().filter(|(n, _)| *n != but);
        // A chunk that began since may keep the count above zero without using what was withdrawn:
        // seen at zero once is enough, for each on its own.
        for (_, flights) in others() {
            while flights.load(Ordering::Acquire) > 0 {
                if Instant::now() >= deadline {
                    return false;
                }
                std::thread::sleep(PAUSE);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_ends_only_when_the_other_devices_have_drained() {
        let flights = Flights::new(2);
        flights.begin(0);
        flights.begin(1);
        let limit = Duration::from_millis(5);
        assert!(!flights.drained(0, limit) && !flights.drained(1, limit));
        flights.end(1);
        assert!(flights.drained(0, limit) && !flights.drained(1, limit));
        flights.end_all(0);
        assert!(flights.drained(1, limit));
    }
}
