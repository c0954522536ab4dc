//! Copy tasks that wait for a copy thread which all sessions share, in an order that is fair to
//! their sessions.
//!
//! Copy threads run what they are given first come, first served. So that nobody's flood stands in
//! front of everybody, each session has few tasks with them at a time; the others wait here, and
//! sessions take turns. Within a session loads come first: an engine waits for those.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};

use crate::copy::{CopyTask, Direction};
use crate::lane::api::SessionId;

/// What decides when a task's turn is.
pub(super) trait Waiting {
    fn session(&self) -> SessionId;
    fn direction(&self) -> Direction;
}

impl Waiting for CopyTask {
    fn session(&self) -> SessionId {
        self.session
    }

    fn direction(&self) -> Direction {
        self.direction
    }
}

/// Tasks of one session.
struct Queue<T> {
    loads: VecDeque<T>,
    saves: VecDeque<T>,
    /// Handed out and not back yet.
    running: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            loads: VecDeque::new(),
            saves: VecDeque::new(),
            running: 0,
        }
    }
}

impl<T: Waiting> Queue<T> {
    fn of(&mut self, direction: Direction) -> &mut VecDeque<T> {
        match direction {
            Direction::Load => &mut self.loads,
            Direction::Save => &mut self.saves,
        }
    }

    fn pop(&mut self) -> Option<T> {
        self.loads.pop_front().or_else(|| self.saves.pop_front())
    }

    fn has_waiting(&self) -> bool {
        !self.loads.is_empty() || !self.saves.is_empty()
    }
}

/// Waiting copy tasks. What the sessions' unfinished requests can list bounds it.
pub(super) struct Backlog<T = CopyTask> {
    /// Most tasks of one session that the copy threads have at a time.
    window: usize,
    queues: HashMap<SessionId, Queue<T>>,
    /// Sessions that may hand out a task, next one first: each at most once.
    turns: VecDeque<SessionId>,
}

impl<T: Waiting> Backlog<T> {
    /// For this many copy threads.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            // Each thread has next tasks at hand while the lane is busy with something else.
            window: 4 * threads + 4,
            queues: HashMap::new(),
            turns: VecDeque::new(),
        }
    }

    /// Takes a task in.
    pub(super) fn push(&mut self, task: T) {
        let session = task.session();
        let queue = self.queues.entry(session).or_default();
        let had_turn = queue.has_waiting() && queue.running < self.window;
        queue.of(task.direction()).push_back(task);
        if !had_turn && queue.running < self.window {
            self.turns.push_back(session);
        }
    }

    /// The next task for the copy threads, which has [`Backlog::ended`] to follow, or
    /// [`Backlog::give_back`] if they have no room.
    pub(super) fn pop(&mut self) -> Option<T> {
        let session = self.turns.pop_front()?;
        let queue = self.queues.get_mut(&session)?;
        let task = queue.pop()?;
        queue.running += 1;
        if queue.has_waiting() && queue.running < self.window {
            self.turns.push_back(session);
        }
        Some(task)
    }

    /// Takes a task back that found no room: it is the next one again.
    pub(super) fn give_back(&mut self, task: T) {
        let session = task.session();
        let queue = self.queues.entry(session).or_default();
        queue.running -= 1;
        queue.of(task.direction()).push_front(task);
        self.turns.retain(|waiting| *waiting != session);
        self.turns.push_front(session);
    }

    /// A task of this session that was handed out has come back.
    pub(super) fn ended(&mut self, session: SessionId) {
        let Some(queue) = self.queues.get_mut(&session) else {
            return;
        };
        queue.running -= 1;
        if queue.has_waiting() {
            if queue.running + 1 == self.window {
                self.turns.push_back(session);
            }
        } else if queue.running == 0 {
            self.queues.remove(&session);
        }
    }

    /// Waiting tasks in no particular order but always the same.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let mut sessions: Vec<_> = self.queues.keys().copied().collect();
        sessions.sort_unstable();
        let queues = sessions.into_iter().map(|session| &self.queues[&session]);
        queues.flat_map(|queue| queue.loads.iter().chain(&queue.saves))
    }

    /// True when no session has a task waiting or handed out.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty() && self.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    struct Tagged {
        session: SessionId,
        direction: Direction,
        tag: u64,
    }

    impl Waiting for Tagged {
        fn session(&self) -> SessionId {
            self.session
        }

        fn direction(&self) -> Direction {
            self.direction
        }
    }

    fn task(session: SessionId, direction: Direction, tag: u64) -> Tagged {
        Tagged {
            session,
            direction,
            tag,
        }
    }

    fn pop_all(backlog: &mut Backlog<Tagged>) -> Vec<(SessionId, u64)> {
        std::iter::from_fn(|| backlog.pop())
            .map(|task| (task.session, task.tag))
            .collect()
    }

    #[test]
    fn a_flood_of_one_session_lets_the_next_one_through() {
        let mut backlog = Backlog::new(1);
        (0..100).for_each(|tag| backlog.push(task(1, Direction::Save, tag)));
        let first = pop_all(&mut backlog);
        assert_eq!(
            first,
            (0..8).map(|tag| (1, tag)).collect::<Vec<_>>(),
            "its window"
        );
        backlog.push(task(2, Direction::Load, 7));
        assert_eq!(pop_all(&mut backlog), [(2, 7)]);
        backlog.ended(1);
        assert_eq!(pop_all(&mut backlog), [(1, 8)]);
    }

    #[test]
    fn sessions_take_turns_and_loads_go_first_in_each() {
        let mut backlog = Backlog::new(1);
        for session in [1, 2] {
            backlog.push(task(session, Direction::Save, 0));
            backlog.push(task(session, Direction::Save, 1));
            backlog.push(task(session, Direction::Load, 2));
        }
        let order = pop_all(&mut backlog);
        assert_eq!(order, [(1, 2), (2, 2), (1, 0), (2, 0), (1, 1), (2, 1)]);
    }

    #[test]
    fn what_finds_no_room_is_next_again() {
        let mut backlog = Backlog::new(1);
        backlog.push(task(1, Direction::Save, 0));
        backlog.push(task(1, Direction::Save, 1));
        backlog.push(task(2, Direction::Save, 0));
        let refused = backlog.pop().unwrap();
        assert_eq!((refused.session, refused.tag), (1, 0));
        backlog.give_back(refused);
        assert_eq!(pop_all(&mut backlog), [(1, 0), (2, 0), (1, 1)]);
    }

    #[test]
    fn every_task_comes_out_once_and_nothing_stays_whatever_the_order() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        let mut backlog = Backlog::new(1);
        let (mut running, mut next, mut out) = (Vec::new(), 0, Vec::new());
        while next < 3000 || !running.is_empty() || backlog.iter().count() > 0 {
            match random(4) {
                0 | 1 if next < 3000 => {
                    let direction = [Direction::Save, Direction::Load][random(2) as usize];
                    backlog.push(task(random(5), direction, next));
                    next += 1;
                }
                2 => {
                    let Some(task) = backlog.pop() else { continue };
                    if random(4) == 0 {
                        backlog.give_back(task);
                    } else {
                        running.push(task.session);
                        out.push(task.tag);
                    }
                }
                _ if !running.is_empty() => {
                    let at = random(running.len() as u64) as usize;
                    backlog.ended(running.swap_remove(at));
                }
                _ => {}
            }
            for session in 0..5 {
                let tasks = running.iter().filter(|running| **running == session);
                assert!(tasks.count() <= backlog.window);
            }
        }
        out.sort_unstable();
        assert_eq!(out, (0..3000).collect::<Vec<_>>());
        assert!(backlog.is_empty());
    }
}
