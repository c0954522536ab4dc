//! Doorbells: how a side that sleeps is woken, and how a busy one costs its peer no system call.
//!
//! The sleeper owns a word, `sleep_epoch`, in its own segment: 0 while it is awake, else the number
//! of this sleep. The waker reads it after publishing and rings a descriptor, once per sleep.
//!
//! ```text
//! sleeper                                  waker
//! S1 epoch := e        (relaxed)           W1 publish message (release)
//! S2 fence SeqCst                          W2 fence SeqCst
//! S3 re-check the ring                     W3 load epoch      (relaxed)
//! S4 nothing there: sleep on the fd        W4 e, not 0, not rung for: ring the fd
//! S5 epoch := 0        (relaxed)
//! ```
//!
//! No wake-up is lost. Sequentially consistent fences are totally ordered. If S2 comes before W2,
//! then W3 sees S1's store or a later one; if W2 comes before S2, then S3 sees W1's message. So the
//! waker rings, or the sleeper does not sleep (or both: an idle wake-up). With release and acquire
//! alone, both sides could read the old value. A descriptor that was rung stays readable until the
//! sleeper comes round, so one ring per epoch is enough, and the next sleep has another epoch.
//! (`SYNC: bell`)
//!
//! The fence costs the waker 11–37 ns per message in a stream, so publish a batch, then ask once.
//!
//! The epoch has 32 bits and skips 0. A waker that did not ring for exactly 2^32 - 1 sleeps would
//! take the next one for the one it rang last; sleepers must anyway wake up on a bounded timeout,
//! because a peer may die.
//!
//! When an owner dies: a dead sleeper leaves an epoch, and the waker rings it once; a dead waker
//! leaves the sleeper to its timeout and to the end of the session's socket. A hostile epoch makes
//! the waker ring at most once per call.

#![forbid(unsafe_code)]

#[cfg(not(loom))]
mod fd;
#[cfg(not(loom))]
mod spin;

#[cfg(not(loom))]
pub use fd::{BellError, BellFd, BellListener, Rung};
#[cfg(not(loom))]
pub use spin::{DEFAULT_SPIN_NS, Spinner, relax};

use core::ops::Deref;

use crate::sync::{AtomicU32, Ordering, fence};

/// `sleep_epoch` of a side that is awake.
pub const AWAKE: u32 = 0;

/// The side that sleeps. `W` leads to its own `sleep_epoch` word.
#[derive(Debug)]
pub struct Sleeper<W> {
    word: W,
    epoch: u32,
}

impl<W: Deref<Target = AtomicU32>> Sleeper<W> {
    /// A sleeper that is awake.
    #[must_use]
    pub fn new(word: W) -> Self {
        word.store(AWAKE, Ordering::Relaxed);
        Self { word, epoch: AWAKE }
    }

    /// Announces a sleep and returns its epoch. Between this and the sleep, look at every ring once
    /// more; if there is anything, do not sleep. In any case [`Self::disarm`] afterwards.
    #[inline]
    pub fn arm(&mut self) -> u32 {
        self.epoch = self.epoch.checked_add(1).unwrap_or(AWAKE + 1);
        self.word.store(self.epoch, Ordering::Relaxed);
        fence(Ordering::SeqCst); // SYNC: bell
        self.epoch
    }

    /// Says that this side is awake again, so that nobody rings.
    #[inline]
    pub fn disarm(&mut self) {
        self.word.store(AWAKE, Ordering::Relaxed);
    }

    /// Number of the latest sleep; 0 before the first.
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }
}

/// The side that wakes, for one thread. `W` leads to the peer's `sleep_epoch` word.
#[derive(Debug)]
pub struct Waker<W> {
    word: W,
    rung: u32,
}

impl<W: Deref<Target = AtomicU32>> Waker<W> {
    /// A waker that has not rung yet.
    #[must_use]
    pub fn new(word: W) -> Self {
        Self { word, rung: AWAKE }
    }

    /// After publishing (a batch of) messages: true if the caller must ring the descriptor now.
    #[inline]
    pub fn should_ring(&mut self) -> bool {
        fence(Ordering::SeqCst); // SYNC: bell
        let epoch = self.word.load(Ordering::Relaxed);
        if epoch == AWAKE || epoch == self.rung {
            return false;
        }
        self.rung = epoch;
        true
    }
}

/// The side that wakes, for several threads of one process.
///
/// The thread that gets `true` rings for all who published before the sleeper's epoch was seen; at
/// worst two threads ring for one sleep.
#[derive(Debug)]
pub struct SharedWaker<W> {
    word: W,
    rung: AtomicU32,
}

impl<W: Deref<Target = AtomicU32>> SharedWaker<W> {
    /// A waker that has not rung yet.
    #[must_use]
    pub fn new(word: W) -> Self {
        Self {
            word,
            rung: AtomicU32::new(AWAKE),
        }
    }

    /// After publishing (a batch of) messages: true if the caller must ring the descriptor now.
    #[inline]
    pub fn should_ring(&self) -> bool {
        fence(Ordering::SeqCst); // SYNC: bell
        let epoch = self.word.load(Ordering::Relaxed);
        if epoch == AWAKE || self.rung.load(Ordering::Relaxed) == epoch {
            return false;
        }
        // Whoever finds the epoch there already leaves the ringing to the thread that put it there.
        self.rung.swap(epoch, Ordering::Relaxed) != epoch
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn waker_rings_once_per_sleep() {
        let word = AtomicU32::new(7);
        let mut sleeper = Sleeper::new(&word);
        let mut waker = Waker::new(&word);
        let shared = SharedWaker::new(&word);
        assert!(!waker.should_ring(), "an awake peer is not rung");
        for epoch in 1..4 {
            assert_eq!(sleeper.arm(), epoch);
            assert!(waker.should_ring());
            assert!(!waker.should_ring());
            assert!(shared.should_ring());
            assert!(!shared.should_ring());
            sleeper.disarm();
            assert!(!waker.should_ring());
            assert!(!shared.should_ring());
        }
    }

    #[test]
    fn epoch_wraps_without_ever_saying_awake() {
        let word = AtomicU32::new(0);
        let mut sleeper = Sleeper {
            word: &word,
            epoch: u32::MAX,
        };
        assert_eq!(sleeper.arm(), 1);
        assert_eq!(word.load(Ordering::Relaxed), 1);
    }
}
