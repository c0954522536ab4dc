//! What a query does about blocks that are in a tier below the daemon's pool.

#![forbid(unsafe_code)]

use std::time::Duration;

use pegaflow_shm::desc::{Submission, flags};

/// What a query does about blocks below the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fetch {
    /// They are fetched, and the query completes at once with `Loading`; it is repeated until it
    /// completes with another status.
    #[default]
    Poll,
    /// They are left where they are: the query takes what is in the pool. That also ends the
    /// fetching that an earlier query of the same key began.
    Never,
    /// They are fetched, and the query completes when they are in the pool; or, with a limit, when
    /// that has passed, with those that are. Where one does not come, the daemon gives up within
    /// its `--prefetch-timeout`.
    Wait(Option<Duration>),
}

impl Fetch {
    /// Marks a query. The daemon must speak protocol 4.
    pub(crate) fn apply(self, query: &mut Submission) {
        match self {
            Fetch::Poll => {}
            Fetch::Never => query.flags |= flags::NOW,
            Fetch::Wait(limit) => {
                let half = |value: u64| value.min(u64::from(u32::MAX));
                // A limit of less than a millisecond is one all the same.
                let limit = limit.map_or(0, |limit| (limit.as_millis() as u64).max(1));
                query.flags |= flags::WAIT;
                query.arg2 = half(query.arg2) | half(limit) << 32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;

    #[test]
    fn a_wait_shares_its_word_with_the_time_to_live() {
        let marked = |fetch: Fetch, ttl_ms| {
            let mut query = Submission {
                arg2: ttl_ms,
                ..Submission::zeroed()
            };
            fetch.apply(&mut query);
            (query.flags, query.arg2)
        };
        assert_eq!(marked(Fetch::Poll, u64::MAX), (0, u64::MAX));
        assert_eq!(marked(Fetch::Never, 7), (flags::NOW, 7));
        assert_eq!(
            marked(Fetch::Wait(None), u64::MAX),
            (flags::WAIT, 0xffff_ffff)
        );
        let wait = Fetch::Wait(Some(Duration::from_millis(5)));
        assert_eq!(marked(wait, 7), (flags::WAIT, 5 << 32 | 7));
        let short = Fetch::Wait(Some(Duration::from_micros(5)));
        assert_eq!(marked(short, 0), (flags::WAIT, 1 << 32));
    }
}
