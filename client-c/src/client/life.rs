//! Sessions that come and go: what changes when, and what is said about it.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pegaflow_shm::status::Status;

use super::{Inner, Shared, Wakes};
use crate::Error;
use crate::log::LogLevel;
use crate::memory::HostRegion;
use crate::requests::{Collector, local_answer};
use crate::session::{Live, Session};
use crate::stats::State;

/// Why there is no session, and since when.
#[derive(Debug, Default)]
pub(crate) struct Absence {
    /// Why the last session ended, or why there never was one.
    reason: String,
    /// Why the last attempt to get another one failed.
    trouble: Option<(Status, String)>,
    /// When the state stopped being `Connected`.
    since: Option<Instant>,
    /// Time without a session before that.
    before: Duration,
    /// A session was up at some time.
    was_up: bool,
}

impl Absence {
    /// Before the first session.
    pub(crate) fn from_the_start(reason: String) -> Absence {
        Absence {
            reason,
            since: Some(Instant::now()),
            ..Absence::default()
        }
    }

    /// Time without a session so far.
    pub(crate) fn total(&self) -> Duration {
        let now = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        self.before + now
    }
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        match &self.trouble {
            Some((_, text)) if *text != self.reason => write!(f, "; since then: {text}"),
            _ => Ok(()),
        }
    }
}

impl Inner {
    /// The error that says why there is no session.
    pub(crate) fn disconnected(&self) -> Error {
        let ending = self.live.as_ref().and_then(|live| live.session.ending());
        let reason = ending.map_or_else(|| self.absence.to_string(), str::to_owned);
        Error::Disconnected { reason }
    }

    /// The present session's number.
    fn number(&self) -> Option<u64> {
        self.live.as_ref().map(|live| live.session.number)
    }

    /// True while `session` is the present one: what an earlier one said counts no more.
    pub(super) fn is_present(&self, session: &Session) -> bool {
        self.number() == Some(session.number)
    }
}

impl Shared {
    /// Says that the client begins without a daemon.
    pub(crate) fn note_start(&self) {
        let inner = self.lock();
        match &inner.live {
            Some(live) => {
                let session = &live.session;
                self.journal
                    .note(LogLevel::Info, || format!("connected to {session}"));
            }
            None => self.journal.note(LogLevel::Warn, || {
                format!("no daemon yet, everything misses: {}", inner.absence)
            }),
        }
    }

    /// Puts a fresh session to use. The state stays as it is until [`Self::announce`].
    /// Returns the regions that this session has to be told of; later ones are told by their
    /// makers.
    pub(crate) fn install(&self, mut live: Live) -> Result<Vec<Weak<HostRegion>>, Error> {
        self.events.watch(&live.session.pipe)?;
        let mut inner = self.lock();
        if self.fd_mode.load(Ordering::Relaxed) {
            live.sleeper.arm();
            (inner.fd_armed, inner.bell_dirty) = (true, true);
        }
        inner.result_positions = live.results.max_positions();
        // A session that never heard of a region need not forget it.
        inner.removals.clear();
        inner.restoring = true;
        inner.live = Some(live);
        Ok(inner.regions.values().cloned().collect())
    }

    /// The session has been told of every region: registrations that name them can follow.
    pub(crate) fn regions_told(&self, session: &Session) {
        let mut inner = self.lock();
        if inner.is_present(session) {
            inner.restoring = false;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Says that the session is up, once every registration was answered; true if it did.
    pub(crate) fn announce(&self, session: &Session) -> bool {
        let mut inner = self.lock();
        if !inner.is_present(session) || self.state() == State::Connected {
            return false;
        }
        let absence = &mut inner.absence;
        let away = absence
            .since
            .take()
            .map_or(Duration::ZERO, |since| since.elapsed());
        absence.before += away;
        absence.trouble = None;
        absence.reason.clear();
        let again = std::mem::replace(&mut absence.was_up, true);
        inner.stats.reconnects += u64::from(again);
        self.state.store(State::Connected as u32, Ordering::Relaxed);
        drop(inner);
        self.journal.note(LogLevel::Warn, || {
            let away = away.as_secs_f64();
            format!("connected to {session} after {away:.3} s without a daemon")
        });
        self.changed.notify_all();
        true
    }

    /// An attempt to get a session failed. Said once for each kind of failure.
    pub(crate) fn note_failure(&self, error: &Error) {
        let mut inner = self.lock();
        inner.stats.failed_attempts += 1;
        self.note_trouble(&mut inner, error.status(), error.to_string());
    }

    fn note_trouble(&self, inner: &mut Inner, status: Status, text: String) {
        let absence = &mut inner.absence;
        let news = absence
            .trouble
            .as_ref()
            .is_none_or(|(known, _)| *known != status);
        if news {
            // Nobody listening is what being away means; anything else somebody has to mend.
            let level = match status {
                Status::NoDaemon => LogLevel::Info,
                _ => LogLevel::Warn,
            };
            self.journal
                .note(level, || format!("cannot connect, trying on: {text}"));
        }
        absence.trouble = Some((status, text));
    }

    /// Ends session `number`, if it is still the present one: what the daemon had posted before
    /// counts, every other unfinished request completes with [`Status::Disconnected`].
    pub(crate) fn lose(&self, number: u64, status: Status, reason: &str) {
        let mut wakes = Wakes::default();
        let mut inner = self.lock();
        if inner.number() == Some(number) {
            self.collect(&mut inner, Collector::Other, &mut wakes);
            self.lose_locked(&mut inner, number, status, reason, &mut wakes);
        }
        drop(inner);
        self.deliver(wakes);
    }

    /// [`Self::lose`] under the lock, after the completion ring was emptied.
    pub(crate) fn lose_locked(
        &self,
        inner: &mut Inner,
        number: u64,
        status: Status,
        reason: &str,
        wakes: &mut Wakes,
    ) {
        let Some(live) = inner.live.take_if(|live| live.session.number == number) else {
            return;
        };
        live.session.mark_lost();
        inner.restoring = false;
        let unfinished = inner.table.unfinished();
        self.note_loss(inner, status, reason, unfinished.len());
        for registered in inner.registrations.iter_mut().flatten() {
            registered.forget_daemon();
        }
        let reconnects = self.resolved.options.reconnect && !self.is_closing();
        let state = if reconnects {
            State::Disconnected
        } else {
            State::Closed
        };
        self.state.store(state as u32, Ordering::Relaxed);
        for id in unfinished {
            let Some(held) = inner.table.in_flight(id) else {
                continue;
            };
            if let Some(source) = &mut held.source {
                source.session = None;
            }
            let answer = local_answer(held.op, id, Status::Disconnected);
            self.finish(inner, id, answer, Collector::Other, wakes);
        }
        wakes.followers = true;
        wakes.leader = true;
        wakes.lost = Some(live.session);
    }

    fn note_loss(&self, inner: &mut Inner, status: Status, reason: &str, unfinished: usize) {
        if self.state() != State::Connected {
            // It never came to be up.
            inner.stats.failed_attempts += 1;
            return self.note_trouble(inner, status, reason.to_owned());
        }
        inner.stats.disconnects += 1;
        let absence = &mut inner.absence;
        reason.clone_into(&mut absence.reason);
        absence.trouble = None;
        absence.since = Some(Instant::now());
        absence.was_up = true;
        if self.is_closing() {
            return self
                .journal
                .note(LogLevel::Info, || format!("disconnected: {reason}"));
        }
        let goes_on = if self.resolved.options.reconnect {
            "everything misses until it is back"
        } else {
            "this client does not reconnect"
        };
        self.journal.note(LogLevel::Warn, || {
            format!("the daemon is away: {reason}; {unfinished} requests unfinished; {goes_on}")
        });
    }

    /// Takes in what the daemon has posted so far.
    pub(crate) fn collect_now(&self) {
        let mut wakes = Wakes::default();
        self.collect(&mut self.lock(), Collector::Other, &mut wakes);
        self.deliver(wakes);
    }

    #[cold]
    pub(super) fn take_apart(&self, session: &Session) {
        self.events.unwatch(&session.pipe);
        session.channel.shut_down();
        self.control.fail_all(session.number);
        self.changed.notify_all();
        self.events.keeper.signal();
    }
}
