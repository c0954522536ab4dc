//! The write limit.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// What may be written at once after a pause.
const BURST: Duration = Duration::from_millis(250);

/// Lets so many bytes per second pass, in the long run.
#[derive(Debug)]
pub(crate) struct Limiter {
    per_second: u64,
    /// Bytes that may be written now; below zero after a block larger than what was left.
    left: i128,
    filled: Instant,
}

impl Limiter {
    pub fn new(per_second: u64, now: Instant) -> Self {
        let mut limiter = Self {
            per_second: per_second.max(1),
            left: 0,
            filled: now,
        };
        limiter.left = limiter.burst();
        limiter
    }

    fn burst(&self) -> i128 {
        (u128::from(self.per_second) * BURST.as_millis() / 1000).max(1) as i128
    }

    /// Whether anything may be written now.
    pub fn is_open(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.filled);
        let gained = u128::from(self.per_second) * since.as_nanos() / 1_000_000_000;
        if gained > 0 {
            self.left = (self.left + gained as i128).min(self.burst());
            self.filled = now;
        }
        self.left > 0
    }

    /// Notes what was written.
    pub fn spend(&mut self, bytes: u64) {
        self.left -= i128::from(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_the_long_run_no_more_than_the_limit_passes() {
        let start = Instant::now();
        let mut limiter = Limiter::new(10_000_000, start);
        let (mut passed, block) = (0, 2 << 20);
        for millisecond in 0..60_000 {
            let now = start + Duration::from_millis(millisecond);
            while limiter.is_open(now) {
                limiter.spend(block);
                passed += block;
            }
        }
        let most = 10_000_000 * 60 + 2_500_000 + block;
        assert!(passed <= most, "{passed} of {most}");
        assert!(
            passed >= 10_000_000 * 59,
            "{passed}: the limit can be used up"
        );
    }
}
