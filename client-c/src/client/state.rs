//! What all threads of a client share, and the one lock around what changes.
//!
//! The lock is held for a few dozen instructions at a time: never across a system call, a wait or
//! the copy of a payload. What has to be done after it is let go of (waking somebody, taking a lost
//! session apart) is collected in [`Wakes`].

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use pegaflow_shm::bell::Spinner;
use pegaflow_shm::control::Welcome;
use pegaflow_shm::status::Status;

use super::Registered;
use super::events::Events;
use crate::Error;
use crate::memory::HostRegion;
use crate::options::Resolved;
use crate::requests::{Collector, Table, local_answer};
use crate::session::control::Control;
use crate::session::{Live, Session};
use crate::shared::process::HomeProcess;
use crate::stats::{State, Stats};

/// Shared by a client's callers, its keeper and its host memory.
pub(crate) struct Shared {
    pub(crate) resolved: Resolved,
    pub(crate) events: Events,
    pub(crate) control: Control,
    pub(crate) spinner: Spinner,
    /// Somebody asked for the completion descriptor: keep it truthful.
    pub(crate) fd_mode: AtomicBool,
    /// Raised whenever a thread that waits gets its completion from another one.
    pub(crate) deliveries: AtomicU64,
    /// Signalled when a completion that a thread waits for is there.
    pub(crate) finished: Condvar,
    /// Signalled when a registration changes or a session comes or goes.
    pub(crate) changed: Condvar,
    pub(crate) probes: AtomicU64,
    pub(crate) probed_blocks: AtomicU64,
    pub(crate) probe_hits: AtomicU64,
    pub(crate) weak: Weak<Shared>,
    inner: Mutex<Inner>,
    state: AtomicU32,
    closing: AtomicBool,
    home: HomeProcess,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Shared({}, {})",
            self.resolved.client_name,
            self.state().label()
        )
    }
}

/// What changes, under the lock.
pub(crate) struct Inner {
    pub(crate) live: Option<Live>,
    pub(crate) table: Table,
    /// Registration `id` is at `id - 1`; ids are not used twice.
    pub(crate) registrations: Vec<Option<Box<Registered>>>,
    pub(crate) regions: BTreeMap<u32, Weak<HostRegion>>,
    pub(crate) next_region: u32,
    pub(crate) stats: Stats,
    /// Why there is no session.
    pub(crate) reason: String,
    /// The request of the thread that spins or sleeps for all that wait.
    pub(crate) leader: Option<u64>,
    /// Threads that wait on the condition variable.
    pub(crate) followers: u32,
    /// The completion descriptor's user was told "nothing" and may be asleep on it.
    pub(crate) fd_armed: bool,
    /// The bell may have been rung since it was drained last.
    pub(crate) bell_dirty: bool,
    /// The local event was signalled, or is about to be.
    pub(crate) local_signalled: bool,
}

/// What to do once the lock is free.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Wakes {
    pub(crate) followers: bool,
    pub(crate) leader: bool,
    pub(crate) local: bool,
    pub(crate) lost: Option<Arc<Session>>,
}

impl Shared {
    pub(crate) fn new(resolved: Resolved, live: Live) -> Result<Arc<Shared>, Error> {
        let events = Events::new()?;
        events.watch(&live.session.pipe)?;
        let spin = u64::try_from(resolved.options.spin.as_nanos()).unwrap_or(u64::MAX);
        let table = Table::new(resolved.options.completion_slots);
        let inner = Inner {
            live: Some(live),
            table,
            registrations: Vec::new(),
            regions: BTreeMap::new(),
            next_region: 1,
            stats: Stats::default(),
            reason: String::new(),
            leader: None,
            followers: 0,
            fd_armed: false,
            bell_dirty: false,
            local_signalled: false,
        };
        Ok(Arc::new_cyclic(|weak| Shared {
            resolved,
            events,
            control: Control::default(),
            spinner: Spinner::new(spin),
            fd_mode: AtomicBool::new(false),
            deliveries: AtomicU64::new(0),
            finished: Condvar::new(),
            changed: Condvar::new(),
            probes: AtomicU64::new(0),
            probed_blocks: AtomicU64::new(0),
            probe_hits: AtomicU64::new(0),
            weak: weak.clone(),
            inner: Mutex::new(inner),
            state: AtomicU32::new(State::Connected as u32),
            closing: AtomicBool::new(false),
            home: HomeProcess::here(),
        }))
    }

    /// The lock. A panic of another thread left no half-done change that matters: at worst a
    /// request that never finishes, whose waiter has a bound.
    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(crate) fn check_process(&self) -> Result<(), Error> {
        if self.home.is_here() {
            return Ok(());
        }
        Err(Error::Forked {
            owner: self.home.pid(),
            here: std::process::id(),
        })
    }

    #[inline]
    pub(crate) fn state(&self) -> State {
        State::from_code(self.state.load(Ordering::Relaxed))
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Asks the keeper to end the session and itself.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        self.events.keeper.signal();
    }

    pub(crate) fn stats(&self) -> Stats {
        let inner = self.lock();
        Stats {
            probes: self.probes.load(Ordering::Relaxed),
            probed_blocks: self.probed_blocks.load(Ordering::Relaxed),
            probe_hits: self.probe_hits.load(Ordering::Relaxed),
            outstanding: inner.table.outstanding() as u64,
            ..inner.stats
        }
    }

    pub(crate) fn session_info(&self) -> Option<Welcome> {
        self.lock()
            .live
            .as_ref()
            .map(|live| live.session.welcome.clone())
    }

    /// The present session.
    pub(crate) fn session(&self) -> Result<Arc<Session>, Error> {
        let inner = self.lock();
        match &inner.live {
            Some(live) => Ok(live.session.clone()),
            None => Err(inner.disconnected()),
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
        inner.live = Some(live);
        Ok(inner.regions.values().cloned().collect())
    }

    /// Says that the session is up, once every registration was answered; true if it did.
    pub(crate) fn announce(&self, number: u64) -> bool {
        let mut inner = self.lock();
        let present = inner
            .live
            .as_ref()
            .is_some_and(|live| live.session.number == number);
        if !present || self.state() == State::Connected {
            return false;
        }
        inner.stats.reconnects += 1;
        inner.reason.clear();
        self.state.store(State::Connected as u32, Ordering::Relaxed);
        drop(inner);
        self.changed.notify_all();
        true
    }

    /// Takes in what the daemon posted before it went.
    pub(crate) fn collect_last(&self) {
        let mut wakes = Wakes::default();
        self.collect(&mut self.lock(), Collector::Other, &mut wakes);
        self.deliver(wakes);
    }

    /// Ends session `number`, if it is still the present one: every unfinished request completes
    /// with [`Status::Disconnected`].
    pub(crate) fn lose(&self, number: u64, reason: &str) {
        let mut wakes = Wakes::default();
        self.lose_locked(&mut self.lock(), number, reason, &mut wakes);
        self.deliver(wakes);
    }

    /// [`Self::lose`] under the lock.
    pub(crate) fn lose_locked(
        &self,
        inner: &mut Inner,
        number: u64,
        reason: &str,
        wakes: &mut Wakes,
    ) {
        let Some(live) = inner.live.take_if(|live| live.session.number == number) else {
            return;
        };
        live.session.mark_lost();
        reason.clone_into(&mut inner.reason);
        inner.stats.disconnects += 1;
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
        for id in inner.table.unfinished() {
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

    /// Does what was put off until the lock was free.
    #[inline]
    pub(crate) fn deliver(&self, wakes: Wakes) {
        let Wakes {
            followers,
            leader,
            local,
            lost,
        } = wakes;
        if followers {
            self.finished.notify_all();
        }
        if leader {
            self.events.leader.signal();
        }
        if local {
            self.events.local.signal();
        }
        if let Some(session) = lost {
            self.take_apart(&session);
        }
    }

    #[cold]
    fn take_apart(&self, session: &Session) {
        self.events.unwatch(&session.pipe);
        session.channel.shut_down();
        self.control.fail_all();
        self.changed.notify_all();
        self.events.keeper.signal();
    }
}

impl Inner {
    /// The error that says why there is no session.
    pub(crate) fn disconnected(&self) -> Error {
        Error::Disconnected {
            reason: self.reason.clone(),
        }
    }
}
