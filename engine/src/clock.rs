//! The time, as the lane asks for it.
//!
//! The lane never reads the machine's clock itself, so that a simulation can decide what time it
//! is. The clock is a type parameter: in the daemon a reading is a reading and nothing more.

#![forbid(unsafe_code)]

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A source of time.
pub trait Clock: Send + 'static {
    /// Now, on a scale that never goes back.
    fn now(&self) -> Instant;

    /// Milliseconds since 1970, for people and tables only: it may jump.
    fn unix_ms(&self) -> u64;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn unix_ms(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64)
    }
}
