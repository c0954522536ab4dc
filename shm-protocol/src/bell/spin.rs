//! Spinning for about as long as a park would cost, before parking.

#![forbid(unsafe_code)]

use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::sync::hint;

/// Default spin: about the price of one park and wake-up (25–40 us round trip).
pub const DEFAULT_SPIN_NS: u64 = 40_000;

/// Looks between two readings of the clock (about 25 ns each).
const LOOKS_PER_CLOCK: u32 = 8;

/// Pause hints between two looks of [`relax`].
const PAUSES_PER_LOOK: u32 = 6;

/// Lets some time pass between two looks at a word that a peer is about to write.
///
/// Each look drags the cache line over, and the peer's store then has to fetch it back first:
/// looking less often makes messages faster. Round trips through a ring between two cores of one
/// machine, `pause` 1, 2, 3, 4, 6, 8 times between looks: 264, 250, 241, 242, 205, 222 ns.
#[inline]
pub fn relax() {
    for _ in 0..PAUSES_PER_LOOK {
        hint::spin_loop();
    }
}

/// Spins for a bounded time.
#[derive(Clone, Copy, Debug)]
pub struct Spinner {
    budget: Duration,
}

impl Default for Spinner {
    fn default() -> Self {
        Self::new(DEFAULT_SPIN_NS)
    }
}

impl Spinner {
    /// Spins for up to `budget_ns`; not at all if this process has one CPU only (by affinity or by
    /// cgroup quota), since there the peer runs only when the spinner does not.
    #[must_use]
    pub fn new(budget_ns: u64) -> Self {
        let cpus = available_parallelism().map_or(1, NonZero::get);
        Self::with_cpus(budget_ns, cpus)
    }

    /// [`Self::new`] for a known number of CPUs.
    #[must_use]
    pub fn with_cpus(budget_ns: u64, cpus: usize) -> Self {
        let budget_ns = if cpus <= 1 { 0 } else { budget_ns };
        Self {
            budget: Duration::from_nanos(budget_ns),
        }
    }

    /// The time it spins at most.
    #[must_use]
    pub fn budget(&self) -> Duration {
        self.budget
    }

    /// Calls `ready` until it answers `Some`, for the budget at most and once at least.
    #[inline]
    pub fn spin<T>(&self, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
        if let Some(value) = ready() {
            return Some(value);
        }
        if self.budget.is_zero() {
            return None;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                relax();
                if let Some(value) = ready() {
                    return Some(value);
                }
            }
            if start.elapsed() >= self.budget {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_looks_once_and_does_not_spin() {
        let mut looks = 0;
        let found: Option<()> = Spinner::with_cpus(DEFAULT_SPIN_NS, 1).spin(|| {
            looks += 1;
            None
        });
        assert_eq!((found, looks), (None, 1));
    }

    #[test]
    fn spin_returns_what_it_waited_for() {
        let mut looks = 0;
        let found = Spinner::with_cpus(1_000_000_000, 2).spin(|| {
            looks += 1;
            (looks == 40).then_some("there")
        });
        assert_eq!(found, Some("there"));
    }

    #[test]
    fn spin_ends_at_its_budget() {
        let spinner = Spinner::with_cpus(2_000_000, 2);
        let start = Instant::now();
        assert_eq!(spinner.spin(|| None::<()>), None);
        assert!(start.elapsed() >= spinner.budget());
    }
}
