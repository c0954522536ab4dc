//! Requests over the socket of a running session: who waits for which answer.
//!
//! Callers send by themselves; the keeper, which alone reads the socket, hands the answers out.
//! What the keeper sends on its own account (regions and registrations after a reconnect) has
//! nobody that waits for it.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::control::ClientMessage;
use pegaflow_shm::status::Status;

use super::{Bound, Session};
use crate::Error;

/// The daemon's answer.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Done,
    /// The registration's id at the daemon.
    Registered(u32),
    Failed {
        status: Status,
        message: String,
    },
    /// The session ended before the answer.
    Lost,
}

/// What a request is about, for the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Adds this region.
    AddRegion(u32),
    /// Registers this registration of ours.
    Register(u32),
    /// Brings a region of device memory or events.
    Device,
    /// Takes something back.
    Removal,
}

/// Who waits for an answer.
#[derive(Debug)]
enum Asker {
    /// A call of the engine; here is its reply, once there is one.
    Caller(Option<Reply>),
    /// A call of the engine whose bound ran out: a late success is undone.
    GaveUp,
    /// The keeper, for whom the message itself is enough.
    Keeper,
}

#[derive(Debug)]
struct Pending {
    /// Number of the session that it was sent in.
    session: u64,
    purpose: Purpose,
    asker: Asker,
}

#[derive(Debug, Default)]
struct Book {
    last_seq: u64,
    pending: HashMap<u64, Pending>,
}

/// The unanswered requests of a client's sessions: of the present one, and of one that is just
/// being taken apart.
#[derive(Debug, Default)]
pub(crate) struct Control {
    book: Mutex<Book>,
    answered: Condvar,
}

impl Control {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, session: &Session, purpose: Purpose, asker: Asker) -> u64 {
        if purpose == Purpose::Device {
            session.process.reaches_gpu();
        }
        self.note(session.number, purpose, asker)
    }

    fn note(&self, session: u64, purpose: Purpose, asker: Asker) -> u64 {
        let mut book = self.book();
        book.last_seq += 1;
        let seq = book.last_seq;
        let pending = Pending {
            session,
            purpose,
            asker,
        };
        book.pending.insert(seq, pending);
        seq
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn call(
        &self,
        session: &Session,
        purpose: Purpose,
        fds: &[BorrowedFd<'_>],
        bound: Duration,
        message: impl FnOnce(u64) -> ClientMessage,
    ) -> Result<Reply, Error> {
        let deadline = Instant::now() + bound;
        let seq = self.begin(session, purpose, Asker::Caller(None));
        let until = Bound::until(deadline);
        if let Err(error) = session.channel.send(&message(seq), fds, until) {
            self.book().pending.remove(&seq);
            return Err(error);
        }
        let mut book = self.book();
        loop {
            let Some(pending) = book.pending.get_mut(&seq) else {
                return Ok(Reply::Lost);
            };
            if let Asker::Caller(place) = &mut pending.asker
                && let Some(reply) = place.take()
            {
                book.pending.remove(&seq);
                return Ok(reply);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                pending.asker = Asker::GaveUp;
                return Err(Error::Timeout {
                    what: "the daemon's answer",
                    bound,
                });
            }
            let waited = self.answered.wait_timeout(book, left);
            book = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a request for whose answer nobody waits.
    pub(crate) fn send(
        &self,
        session: &Session,
        purpose: Purpose,
        fds: &[BorrowedFd<'_>],
        bound: Bound<'_>,
        message: impl FnOnce(u64) -> ClientMessage,
    ) -> Result<(), Error> {
        let seq = self.begin(session, purpose, Asker::Keeper);
        let sent = session.channel.send(&message(seq), fds, bound);
        if sent.is_err() {
            self.book().pending.remove(&seq);
        }
        sent
    }

    /// What request `seq` is about, and whether it is the keeper's own.
    pub(crate) fn purpose(&self, seq: u64) -> Option<(Purpose, bool)> {
        let book = self.book();
        let pending = book.pending.get(&seq)?;
        Some((pending.purpose, matches!(pending.asker, Asker::Keeper)))
    }

    /// True while something that the keeper sent is unanswered.
    pub(crate) fn has_background(&self) -> bool {
        self.book()
            .pending
            .values()
            .any(|pending| matches!(pending.asker, Asker::Keeper))
    }

    /// Hands an answer out.
    pub(crate) fn answer(&self, seq: u64, reply: Reply) {
        let mut book = self.book();
        match book.pending.get_mut(&seq) {
            Some(Pending {
                asker: Asker::Caller(place),
                ..
            }) => *place = Some(reply),
            _ => {
                book.pending.remove(&seq);
            }
        }
        drop(book);
        self.answered.notify_all();
    }

    /// This session is over: so is every request that was sent in it. The thread that lost it may
    /// be late, and the next session's requests be under way.
    pub(crate) fn fail_all(&self, session: u64) {
        let mut book = self.book();
        book.pending.retain(|_, pending| match &mut pending.asker {
            _ if pending.session > session => true,
            Asker::Caller(place) => {
                // An answer that came before the end still counts.
                place.get_or_insert(Reply::Lost);
                true
            }
            Asker::GaveUp | Asker::Keeper => false,
        });
        drop(book);
        self.answered.notify_all();
    }
}

impl Reply {
    /// The answer of a request that has no result.
    pub(crate) fn done(self) -> Result<(), Error> {
        match self {
            Reply::Done => Ok(()),
            Reply::Failed { status, message } => Err(Error::Refused { status, message }),
            Reply::Lost => Err(lost()),
            Reply::Registered(_) => Err(Error::Protocol("a Registered for another request".into())),
        }
    }

    /// The answer to a registration.
    pub(crate) fn registered(self) -> Result<u32, Error> {
        match self {
            Reply::Registered(remote) => Ok(remote),
            Reply::Done => Err(Error::Protocol("a Done for a Register".into())),
            other => other.done().map(|()| 0),
        }
    }
}

fn lost() -> Error {
    Error::Disconnected {
        reason: "the session ended before the daemon's answer".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_session_leaves_the_requests_of_the_next_one_alone() {
        let control = Control::default();
        let old = control.note(1, Purpose::Register(1), Asker::Keeper);
        let kept = control.note(2, Purpose::Register(1), Asker::Keeper);
        let called = control.note(2, Purpose::AddRegion(3), Asker::Caller(None));
        control.fail_all(1);
        assert_eq!(control.purpose(old), None);
        assert_eq!(control.purpose(kept), Some((Purpose::Register(1), true)));
        assert_eq!(
            control.purpose(called),
            Some((Purpose::AddRegion(3), false))
        );
        let place = |seq| match &control.book().pending[&seq].asker {
            Asker::Caller(place) => place.is_some(),
            _ => false,
        };
        assert!(!place(called), "it is still waited for");
        control.fail_all(2);
        assert!(place(called) && !control.has_background());
    }
}
