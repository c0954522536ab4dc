//! How many messages a session is served: a burst, then so many a second. More wait in its socket,
//! which holds up nobody else.

#![forbid(unsafe_code)]

use std::time::Duration;

use tokio::time::Instant;

/// Messages in a burst: more than all regions and registrations that a session may have.
pub const MESSAGE_BURST: u32 = 512;
/// Messages a second after it.
pub const MESSAGES_PER_SECOND: u32 = 128;

/// What a session may still send.
#[derive(Debug)]
pub(super) struct Pace {
    left: u32,
    /// Until when `left` is reckoned.
    at: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Pace {
        Pace {
            left: MESSAGE_BURST,
            at: now,
        }
    }

    /// Counts a message.
    pub(super) fn took(&mut self, now: Instant) {
        let gained = now.duration_since(self.at).as_nanos() / step().as_nanos();
        let gained = u32::try_from(gained).unwrap_or(u32::MAX);
        if gained >= MESSAGE_BURST - self.left {
            (self.left, self.at) = (MESSAGE_BURST, now);
        } else {
            self.left += gained;
            self.at += step() * gained;
        }
        self.left = self.left.saturating_sub(1);
    }

    /// When the next message may be taken; in the past when it may be at once.
    pub(super) fn next(&self) -> Instant {
        if self.left > 0 {
            self.at
        } else {
            self.at + step()
        }
    }
}

fn step() -> Duration {
    Duration::from_secs(1) / MESSAGES_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of a sender without pause that are taken within a time.
    fn taken(within: Duration) -> u32 {
        let start = Instant::now();
        let (mut pace, mut now, mut count) = (Pace::new(start), start, 0);
        loop {
            now = now.max(pace.next());
            if now > start + within {
                return count;
            }
            pace.took(now);
            count += 1;
        }
    }

    #[test]
    fn a_flood_gets_its_burst_and_then_its_rate() {
        assert_eq!(taken(Duration::ZERO), MESSAGE_BURST);
        let ten = taken(Duration::from_secs(10));
        let most = MESSAGE_BURST + 10 * MESSAGES_PER_SECOND;
        assert!((most - 1..=most + 1).contains(&ten), "{ten}");
    }

    #[test]
    fn a_session_that_paused_has_its_burst_again() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 0..MESSAGE_BURST {
            pace.took(start);
        }
        assert!(pace.next() > start);
        let later = start + Duration::from_secs(60);
        pace.took(later);
        assert_eq!(pace.left, MESSAGE_BURST - 1);
        assert!(pace.next() <= later);
    }
}
