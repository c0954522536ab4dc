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
use pegaflow_shm::desc::Op;
use pegaflow_shm::payload::items_per_chunk;
use pegaflow_shm::segment::SegmentShape;

use super::Registered;
use super::events::Events;
use super::life::Absence;
use crate::Error;
use crate::completion::RequestId;
use crate::cuda::Cuda;
use crate::log::Journal;
use crate::memory::HostRegion;
use crate::options::Resolved;
use crate::requests::{Table, Unloaded};
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
    pub(crate) journal: Journal,
    /// GPU memory of this process.
    pub(crate) cuda: Cuda,
    /// Blocks of failed loads; a lock of its own, which no other one is taken under.
    unloaded: Mutex<Unloaded>,
    inner: Mutex<Inner>,
    pub(super) state: AtomicU32,
    /// A registration waits for the keeper that no session has been told of.
    pub(crate) register_soon: AtomicBool,
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
    /// Why there is no session, and for how long.
    pub(super) absence: Absence,
    /// Longest bitmap that the present or last session's result arena takes, in positions.
    pub(crate) result_positions: usize,
    /// The keeper is still telling the present session of regions.
    pub(super) restoring: bool,
    /// Regions that the present session has yet to be told to forget.
    pub(crate) removals: Vec<u32>,
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
    /// A client with its first session, or with the reason why it has none yet.
    pub(crate) fn new(
        resolved: Resolved,
        first: Option<Live>,
        reason: String,
    ) -> Result<Arc<Shared>, Error> {
        let events = Events::new()?;
        let (state, absence, result_positions) = match &first {
            Some(live) => {
                events.watch(&live.session.pipe)?;
                let positions = live.results.max_positions();
                (State::Connected, Absence::default(), positions)
            }
            None => {
                // What a daemon of this version gives.
                let positions = SegmentShape::DEFAULT_D2C.arena_bytes() * 8;
                let absence = Absence::from_the_start(reason);
                (State::Disconnected, absence, positions)
            }
        };
        let spin = u64::try_from(resolved.options.spin.as_nanos()).unwrap_or(u64::MAX);
        let slots = resolved.options.completion_slots;
        let table = Table::new(slots);
        let most_blocks = resolved.shape.arena_chunks as usize * items_per_chunk(Op::Load);
        let unloaded = Mutex::new(Unloaded::new(slots as usize, most_blocks));
        let journal = Journal::new(
            resolved.client_name.clone(),
            resolved.log_level,
            resolved.options.log.clone(),
        );
        let inner = Inner {
            live: first,
            table,
            registrations: Vec::new(),
            regions: BTreeMap::new(),
            next_region: 1,
            stats: Stats::default(),
            absence,
            result_positions,
            restoring: false,
            removals: Vec::new(),
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
            journal,
            cuda: Cuda::default(),
            unloaded,
            inner: Mutex::new(inner),
            state: AtomicU32::new(state as u32),
            register_soon: AtomicBool::new(false),
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
        self.events.stop.signal();
        self.events.keeper.signal();
    }

    pub(crate) fn stats(&self) -> Stats {
        if self.check_process().is_err() {
            // The lock may be held for ever by a thread that this fork does not have.
            return Stats::default();
        }
        let inner = self.lock();
        let registrations = inner.registrations.iter().flatten();
        let refused = registrations.filter(|registered| registered.refusal.is_some());
        Stats {
            away_ms: inner.absence.total().as_millis() as u64,
            refused_registrations: refused.count() as u64,
            probes: self.probes.load(Ordering::Relaxed),
            probed_blocks: self.probed_blocks.load(Ordering::Relaxed),
            probe_hits: self.probe_hits.load(Ordering::Relaxed),
            outstanding: inner.table.outstanding() as u64,
            ..inner.stats
        }
    }

    pub(crate) fn session_info(&self) -> Option<Welcome> {
        self.check_process().ok()?;
        self.lock()
            .live
            .as_ref()
            .map(|live| live.session.welcome.clone())
    }

    /// Blocks of failed loads.
    pub(crate) fn unloaded(&self) -> MutexGuard<'_, Unloaded> {
        self.unloaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The blocks that a failed load was to fill.
    pub(crate) fn unloaded_blocks<T>(
        &self,
        request: RequestId,
        read: impl FnOnce(&[u32]) -> T,
    ) -> Result<T, Error> {
        self.check_process()?;
        let unloaded = self.unloaded();
        let blocks = unloaded.get(request.0);
        blocks.map(read).ok_or(Error::NoBlockList(request.0))
    }

    /// The present session.
    pub(crate) fn session(&self) -> Result<Arc<Session>, Error> {
        let inner = self.lock();
        match &inner.live {
            Some(live) => Ok(live.session.clone()),
            None => Err(inner.disconnected()),
        }
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
}
