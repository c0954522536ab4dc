//! How many lines about refused connections the log gets: a client that connects without pause must
//! not fill the disk.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Lines in one [`WINDOW`].
const LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(1);

/// Lines of one kind.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    /// Whether a line may be written now; if so, how many were left out before it.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        let over = self
            .since
            .is_none_or(|since| now.duration_since(since) >= WINDOW);
        if over {
            (self.since, self.lines) = (Some(now), 0);
        }
        if self.lines >= LINES {
            self.left_out += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gets_its_lines_and_the_next_line_says_how_many_were_left_out() {
        let (mut limit, now) = (LogLimit::default(), Instant::now());
        let written = (0..1000).filter(|_| limit.admit(now).is_some()).count();
        assert_eq!(written as u32, LINES);
        assert_eq!(limit.admit(now + WINDOW), Some(950));
        assert_eq!(limit.admit(now + WINDOW), Some(0));
    }
}
