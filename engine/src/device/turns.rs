//! Whose turn it is: sessions take turns, each with its oldest job first.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// Jobs of one direction that have chunks to start, by session.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// None of them without jobs.
    sessions: VecDeque<(u64, VecDeque<usize>)>,
}

/// What to do with the oldest job of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    /// It may go on.
    Ready,
    /// It waits; so does what its session has behind it.
    Waits,
    /// It has nothing left to start: the next one is the oldest.
    Over,
}

impl Turns {
    /// A job joins behind those of its session.
    pub(super) fn add(&mut self, session: u64, job: usize) {
        match self.sessions.iter_mut().find(|(id, _)| *id == session) {
            Some((_, jobs)) => jobs.push_back(job),
            None => self.sessions.push_back((session, VecDeque::from([job]))),
        }
    }

    /// A job has ended: its number may be another job's next, of the other direction even.
    pub(super) fn leave(&mut self, session: u64, job: usize) {
        if let Some(place) = self.sessions.iter().position(|(id, _)| *id == session) {
            let jobs = &mut self.sessions[place].1;
            jobs.retain(|number| *number != job);
            if jobs.is_empty() {
                self.sessions.remove(place);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Sessions with jobs.
    pub(super) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Looks at every session's oldest jobs: lets go of those that are over, and returns the first
    /// session's that may go on. That session is the last one the next time.
    pub(super) fn next(&mut self, mut look: impl FnMut(usize) -> Head) -> Option<usize> {
        let mut found = None;
        let mut place = 0;
        while place < self.sessions.len() {
            let jobs = &mut self.sessions[place].1;
            let Some(job) = jobs.front().copied() else {
                self.sessions.remove(place);
                continue;
            };
            match look(job) {
                Head::Over => {
                    jobs.pop_front();
                }
                Head::Ready if found.is_none() => {
                    found = Some((place, job));
                    place += 1;
                }
                Head::Ready | Head::Waits => place += 1,
            }
        }
        let (place, job) = found?;
        // A session before it may have gone, but none behind it moved to before it.
        if let Some(session) = self.sessions.remove(place) {
            self.sessions.push_back(session);
        }
        Some(job)
    }

    /// The session's jobs, those behind the oldest included.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (u64, &VecDeque<usize>)> {
        self.sessions.iter().map(|(session, jobs)| (*session, jobs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_take_turns_whatever_they_have_queued() {
        let mut turns = Turns::default();
        for job in [10, 11, 12] {
            turns.add(1, job);
        }
        turns.add(2, 20);
        let mut order = Vec::new();
        let mut over = Vec::new();
        while let Some(job) = turns.next(|job| match over.contains(&job) {
            true => Head::Over,
            false => Head::Ready,
        }) {
            order.push(job);
            over.push(job);
        }
        assert_eq!(order, [10, 20, 11, 12]);
        assert!(turns.is_empty());
    }

    #[test]
    fn a_job_that_leaves_is_gone_and_the_others_go_on() {
        let mut turns = Turns::default();
        for (session, job) in [(1, 10), (1, 11), (2, 20)] {
            turns.add(session, job);
        }
        turns.leave(1, 10);
        turns.leave(2, 20);
        turns.leave(3, 30);
        assert_eq!(turns.sessions(), 1);
        assert_eq!(turns.next(|_| Head::Ready), Some(11));
        turns.leave(1, 11);
        assert!(turns.is_empty());
    }

    #[test]
    fn who_waits_holds_up_its_own_session_alone() {
        let mut turns = Turns::default();
        turns.add(1, 10);
        turns.add(1, 11);
        turns.add(2, 20);
        for _ in 0..3 {
            let next = turns.next(|job| match job {
                10 => Head::Waits,
                _ => Head::Ready,
            });
            assert_eq!(next, Some(20));
        }
        let next = turns.next(|job| match job {
            10 => Head::Over,
            20 => Head::Waits,
            _ => Head::Ready,
        });
        assert_eq!(next, Some(11), "what stood behind it goes on");
    }
}
