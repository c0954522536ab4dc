//! Polling, waiting, and the descriptor for an event loop.
//!
//! Of the threads that wait, one leads: it spins, then sleeps on the session's bell, and collects
//! for all. The others sleep on a condition variable. When the leader has what it came for, one of
//! them takes over.
//!
//! The completion descriptor is an epoll set of the bell and a local event. A poll that finds
//! nothing takes the rings so far, announces a sleep, and looks once more; whatever comes after
//! makes the descriptor readable. Where a waiting thread collects a completion that nobody waits
//! for, it signals the local event in the bell's place.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::bell::BellError;
use pegaflow_shm::status::Status;
use rustix::event::{PollFd, PollFlags, poll};

use super::collect::Collector;
use crate::Error;
use crate::client::{Inner, Shared, Wakes};
use crate::completion::{Completion, RequestId};
use crate::session::Session;
use crate::shared::timespec;

/// Longest sleep without looking up.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Between looks at a bell that has no other side any more.
const PEER_GONE_PAUSE: Duration = Duration::from_millis(1);

impl Shared {
    pub(crate) fn poll(&self, out: &mut [Completion]) -> usize {
        let mut filled = 0;
        self.take_finished(out.len(), |completion| {
            out[filled] = completion;
            filled += 1;
        });
        self.resolve(&mut out[..filled]);
        filled
    }

    /// [`Self::poll`] for a caller that keeps a list.
    pub(crate) fn poll_list(&self, limit: usize, out: &mut Vec<Completion>) {
        self.take_finished(limit, |completion| out.push(completion));
        self.resolve(out);
    }

    /// Hands over at most `limit` completions, their bitmaps not yet copied.
    fn take_finished(&self, limit: usize, mut sink: impl FnMut(Completion)) {
        if self.check_process().is_err() {
            return;
        }
        let mut wakes = Wakes::default();
        let mut inner = self.lock();
        self.collect(&mut inner, Collector::Poller, &mut wakes);
        let mut taken = take_ready(&mut inner, limit, &mut sink);
        if taken == 0 && limit > 0 && self.fd_mode.load(Ordering::Relaxed) {
            inner = self.before_sleep(inner, &mut wakes);
            taken = take_ready(&mut inner, limit, &mut sink);
        }
        if taken > 0 && inner.fd_armed {
            inner.fd_armed = false;
            // A thread that leads may be asleep on the same announcement.
            if inner.leader.is_none()
                && let Some(live) = &mut inner.live
            {
                live.sleeper.disarm();
            }
        }
        drop(inner);
        self.deliver(wakes);
    }

    /// Makes the completion descriptor unreadable until something new comes.
    fn before_sleep<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        wakes: &mut Wakes,
    ) -> MutexGuard<'a, Inner> {
        let bell = match &inner.live {
            Some(live) if inner.bell_dirty => Some(live.session.clone()),
            _ => None,
        };
        let clear = inner.local_signalled;
        if bell.is_some() || clear {
            drop(inner);
            if let Some(session) = bell {
                self.drain(&session);
            }
            let cleared = clear && self.events.local.clear();
            inner = self.lock();
            // Not cleared: the thread that set the flag has yet to signal. Try again next time.
            inner.local_signalled &= !cleared;
        }
        self.arm(&mut inner);
        inner.fd_armed = true;
        self.collect(&mut inner, Collector::Poller, wakes);
        inner
    }

    pub(crate) fn completion_fd(&self) -> BorrowedFd<'_> {
        if !self.fd_mode.swap(true, Ordering::Relaxed) {
            // What came before the mode was on was announced to nobody.
            let mut inner = self.lock();
            inner.local_signalled = true;
            drop(inner);
            self.events.local.signal();
        }
        self.events.epoll.as_fd()
    }

    pub(crate) fn wait(&self, request: RequestId, timeout: Duration) -> Result<Completion, Error> {
        self.check_process()?;
        let mut wakes = Wakes::default();
        let mut inner = self.lock();
        self.collect(&mut inner, Collector::Other, &mut wakes);
        let mut completion = match inner.table.take(request.0) {
            Some(completion) => completion,
            None if !inner.table.contains(request.0) => {
                drop(inner);
                self.deliver(wakes);
                return Err(Error::UnknownRequest(request.0));
            }
            None => {
                let waited = self.wait_longer(inner, request.0, timeout, &mut wakes);
                self.deliver(wakes);
                let mut completion = waited?;
                self.resolve(std::slice::from_mut(&mut completion));
                return Ok(completion);
            }
        };
        drop(inner);
        self.deliver(wakes);
        self.resolve(std::slice::from_mut(&mut completion));
        Ok(completion)
    }

    fn wait_longer<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        id: u64,
        timeout: Duration,
        wakes: &mut Wakes,
    ) -> Result<Completion, Error> {
        if timeout.is_zero() {
            return Err(Error::Timeout {
                what: "the request",
                bound: timeout,
            });
        }
        inner.table.set_waiting(id, true);
        let mut turn = Turn {
            shared: self,
            id,
            timeout,
            deadline: None,
            leads: false,
            spun: false,
            waits: true,
            over: false,
        };
        // The lock goes along, so that a panic has let go of it when `turn` is dropped.
        let (mut inner, outcome) = self.take_turns(inner, &mut turn, wakes);
        turn.waits = false;
        inner.table.set_waiting(id, false);
        if turn.leads {
            inner.leader = None;
            self.hand_over(&mut inner, wakes);
        } else if inner.leader.is_none() {
            wakes.followers |= inner.followers > 0;
        }
        turn.over = true;
        drop(inner);
        outcome
    }

    /// Leads or follows until there is an outcome.
    fn take_turns<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        turn: &mut Turn<'a>,
        wakes: &mut Wakes,
    ) -> (MutexGuard<'a, Inner>, Result<Completion, Error>) {
        let id = turn.id;
        let outcome = loop {
            if let Some(completion) = inner.table.take(id) {
                break Ok(completion);
            }
            if !inner.table.contains(id) {
                // Another thread waited for the same request and was faster.
                break Err(Error::UnknownRequest(id));
            }
            if turn.spun && turn.left().is_zero() {
                break Err(Error::Timeout {
                    what: "the request",
                    bound: turn.timeout,
                });
            }
            inner = match inner.leader {
                Some(_) if !turn.leads => self.follow(inner, turn, wakes),
                _ => self.lead(inner, turn, wakes),
            };
        };
        (inner, outcome)
    }

    fn follow<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        turn: &mut Turn<'a>,
        wakes: &mut Wakes,
    ) -> MutexGuard<'a, Inner> {
        turn.spun = true;
        let left = turn.left();
        if wakes.any() {
            drop(inner);
            self.deliver(std::mem::take(wakes));
            return self.lock();
        }
        inner.followers += 1;
        let waited = self.finished.wait_timeout(inner, left.min(LONGEST_SLEEP));
        inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        inner.followers -= 1;
        inner
    }

    fn lead<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        turn: &mut Turn<'a>,
        wakes: &mut Wakes,
    ) -> MutexGuard<'a, Inner> {
        turn.leads = true;
        inner.leader = Some(turn.id);
        let Some(session) = inner.live.as_ref().map(|live| live.session.clone()) else {
            // Losing the session finished every request, so there is nothing to wait for.
            turn.spun = true;
            return inner;
        };
        if turn.spun {
            self.arm(&mut inner);
            self.collect(&mut inner, Collector::Other, wakes);
            if inner.table.is_ready(turn.id) || !inner.table.contains(turn.id) {
                return inner;
            }
        }
        let deliveries = self.deliveries.load(Ordering::Relaxed);
        drop(inner);
        self.deliver(std::mem::take(wakes));
        if turn.spun {
            self.sleep(&session, turn.left());
        } else {
            turn.spun = true;
            self.spin(&session, deliveries, turn);
        }
        let mut inner = self.lock();
        self.collect(&mut inner, Collector::Other, wakes);
        inner
    }

    /// Looks for a completion for about as long as a sleep would cost.
    fn spin(&self, session: &Session, deliveries: u64, turn: &mut Turn<'_>) {
        let look = || {
            let there =
                session.has_completion() || self.deliveries.load(Ordering::Relaxed) != deliveries;
            there.then_some(())
        };
        if turn.timeout >= self.spinner.budget() {
            self.spinner.spin(look);
        }
        // The clock starts here, so that a quick answer costs no look at it; what a wait takes
        // longer than its bound is at most one spin.
    }

    fn sleep(&self, session: &Arc<Session>, left: Duration) {
        #[cfg(test)]
        tests::before_sleep();
        let mut fds = [
            PollFd::new(&session.pipe, PollFlags::IN),
            PollFd::new(&self.events.leader, PollFlags::IN),
        ];
        // Interrupted or not, the caller looks again.
        let _ = poll(&mut fds, Some(&timespec(left.min(LONGEST_SLEEP))));
        let (rung, called) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if rung {
            self.drain(session);
        }
        if called {
            self.events.leader.clear();
        }
    }

    /// Takes the bell's rings; a bell that nobody can ring any more ends the session.
    fn drain(&self, session: &Session) {
        if let Err(BellError::PeerGone) = session.pipe.drain() {
            if session.ending().is_none() && session.process.may_copy() {
                // The keeper ends the session once the process is gone.
                std::thread::sleep(PEER_GONE_PAUSE);
                return;
            }
            let reason = "the daemon closed the bell";
            self.lose(session.number, Status::Disconnected, reason);
        }
    }

    /// Announces a sleep on the bell.
    fn arm(&self, inner: &mut Inner) {
        if let Some(live) = &mut inner.live {
            live.sleeper.arm();
            inner.bell_dirty = true;
        }
    }

    /// The leader leaves: another waiting thread leads, or the descriptor's user is on its own.
    fn hand_over(&self, inner: &mut Inner, wakes: &mut Wakes) {
        wakes.followers |= inner.followers > 0;
        if inner.fd_armed {
            // The leader may have taken the ring that was meant for the descriptor.
            self.arm(inner);
            self.collect(inner, Collector::Other, wakes);
        } else if let Some(live) = &mut inner.live {
            live.sleeper.disarm();
        }
    }
}

impl Wakes {
    fn any(&self) -> bool {
        self.followers || self.leader || self.local || self.lost.is_some()
    }
}

/// One thread's wait.
struct Turn<'a> {
    shared: &'a Shared,
    id: u64,
    timeout: Duration,
    deadline: Option<Instant>,
    leads: bool,
    spun: bool,
    /// The request's table entry counts this thread.
    waits: bool,
    /// The wait has ended as it should.
    over: bool,
}

impl Turn<'_> {
    /// Time that is left; the clock starts at the first call.
    fn left(&mut self) -> Duration {
        let now = Instant::now();
        let timeout = self.timeout.min(Duration::from_secs(u64::from(u32::MAX)));
        let deadline = *self.deadline.get_or_insert_with(|| now + timeout);
        deadline.saturating_duration_since(now)
    }
}

impl Drop for Turn<'_> {
    /// After a panic: otherwise the others would wait for ever for this thread to collect. Only
    /// what cannot panic is done here; whoever wakes up does the rest.
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut inner = self.shared.lock();
        if self.leads {
            inner.leader = None;
        }
        if self.waits {
            inner.table.set_waiting(self.id, false);
        }
        // The descriptor's user as well: this thread may have taken the ring that was meant for it.
        inner.local_signalled = true;
        drop(inner);
        self.shared.finished.notify_all();
        self.shared.events.local.signal();
    }
}

fn take_ready(inner: &mut Inner, limit: usize, sink: &mut impl FnMut(Completion)) -> usize {
    let mut taken = 0;
    while taken < limit {
        let Some(completion) = inner.table.take_next() else {
            break;
        };
        sink(completion);
        taken += 1;
    }
    taken
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::fake::Fake;
    use crate::{Client, Options};

    const LONG: Duration = Duration::from_secs(10);

    thread_local! {
        static BEFORE_SLEEP: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    }

    pub(super) fn before_sleep() {
        if let Some(act) = BEFORE_SLEEP.take() {
            act();
        }
    }

    #[test]
    fn a_leader_that_panics_is_succeeded() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("test.sock");
        let fake = Fake::start(&socket);
        let options = Options {
            socket: Some(socket),
            autostart: Some(false),
            ..Options::default()
        };
        let client = Client::connect(options).unwrap();
        fake.hold();
        let [led, followed] = [(); 2].map(|()| client.nop().unwrap());
        std::thread::scope(|scope| {
            let leader = scope.spawn(|| {
                let shared = client.shared().clone();
                BEFORE_SLEEP.set(Some(Box::new(move || {
                    while shared.lock().followers == 0 {
                        std::thread::yield_now();
                    }
                    panic!("on purpose");
                })));
                let wait = || client.wait(led, LONG);
                assert!(catch_unwind(AssertUnwindSafe(wait)).is_err());
            });
            while client.shared().lock().leader.is_none() {
                std::thread::yield_now();
            }
            let follower = scope.spawn(|| client.wait(followed, LONG).unwrap());
            leader.join().unwrap();
            fake.world.hold.store(false, Ordering::Relaxed);
            assert!(follower.join().unwrap().is_ok());
        });
        // The leader's own request is nobody's now: a poll finds it.
        let mut done = [Completion::default()];
        let deadline = Instant::now() + LONG;
        while client.poll(&mut done) == 0 {
            assert!(Instant::now() < deadline);
        }
        assert_eq!(done[0].request, led);
        let inner = client.shared().lock();
        assert_eq!((inner.leader, inner.followers), (None, 0));
    }
}
