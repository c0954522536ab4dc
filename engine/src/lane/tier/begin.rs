//! When requests that the tier has taken begin.
//!
//! To begin wakes the thread that moves a shard's bytes. That costs the lane a system call, and
//! where CPUs are few the thread takes one from the lane, or from a client whose answer is on its
//! way. So what nobody waits for, which is most of what is written, begins when the lane has
//! nothing else to do and is about to sleep, or when it has been held back for long enough.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::LaneTier;
use crate::cache::Cache;

/// How long clients that keep the lane awake hold back what nobody waits for: longer than most
/// requests take, shorter than anybody would notice a block on its way down.
const HELD_BACK: Duration = Duration::from_micros(500);

/// What has been taken and may not have begun.
#[derive(Debug, Default)]
pub(super) struct Unbegun {
    /// Since when there may be some.
    since: Option<Instant>,
    /// Somebody waits for some of it.
    pub(super) wanted: bool,
}

impl Unbegun {
    fn is_due(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        self.wanted || now.duration_since(since) >= HELD_BACK
    }
}

impl LaneTier {
    /// Has requests begin if somebody waits for one, or they were held back for long enough.
    pub(super) fn begin_if_due(&mut self, cache: &Cache, now: Instant) {
        // What is put off goes on when something ends, and so do saves that wait for the tier.
        let waits =
            self.blocked.is_some() || self.put_off.is_some() || self.holds_saves(cache, now);
        if self.unbegun.is_due(now) || waits {
            self.begin();
        }
    }

    /// Has all requests begin.
    pub(super) fn begin(&mut self) {
        self.unbegun = Unbegun::default();
        self.store.start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_waits_for_is_held_back_for_a_limited_time() {
        let (start, mut unbegun) = (Instant::now(), Unbegun::default());
        assert!(!unbegun.is_due(start));
        assert!(!unbegun.is_due(start + HELD_BACK - Duration::from_nanos(1)));
        assert!(unbegun.is_due(start + HELD_BACK));
    }

    #[test]
    fn what_somebody_waits_for_begins_at_once() {
        let mut unbegun = Unbegun {
            wanted: true,
            ..Unbegun::default()
        };
        assert!(unbegun.is_due(Instant::now()));
    }
}
