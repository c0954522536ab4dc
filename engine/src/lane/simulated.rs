//! The lane as the simulation holds it: turned by hand, and open for its checks.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedReceiver;

use crate::cache::Cache;
use crate::cache::adopt::open_cache;
use crate::cache::lease::LeaseTable;
use crate::clock::Clock;
use crate::copy::{Direction, PageCopy, PoolMemory};
use crate::lane::api::{LaneEvent, LaneHandle};
use crate::lane::machine::Machine;
use crate::lane::options::LaneOptions;
use crate::lane::prefetch::PieceState;
use crate::lane::request::Request;
use crate::lane::run::{Lane, Round, Woken};
use crate::lane::start::{BuiltLane, LaneStartError, MachineParts, build};
use crate::lane::wake::LaneWake;
use crate::tier::BlockStore;

/// A lane without a thread.
pub(crate) struct SimLane<M: Machine> {
    lane: Lane<M>,
    /// For commands.
    pub handle: LaneHandle,
    /// What it tells.
    pub events: UnboundedReceiver<LaneEvent>,
    asleep: bool,
    wake_at: Option<Instant>,
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turned {
    /// It sleeps and nobody woke it.
    Asleep,
    /// There was something to do.
    Worked,
    /// There was nothing to do.
    Idle,
    /// It has ended.
    Stopped,
}

/// A session in figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionFigures {
    pub requests: usize,
    pub completion_slots: u32,
    pub listed_blocks: usize,
    pub copies: u32,
}

impl<M: Machine> SimLane<M> {
    /// Brings the cache up over the files that are there.
    pub(crate) fn open(
        options: LaneOptions,
        clock: M::Clock,
        wake: Arc<LaneWake>,
        task_bytes: u64,
        machine: impl FnOnce(PoolMemory) -> (M::Copies, Option<Box<dyn BlockStore>>),
    ) -> Result<SimLane<M>, LaneStartError> {
        let opened = open_cache(&options, std::num::NonZeroUsize::MIN, &|_| {})?;
        let (workers, store) = machine(opened.pool_memory.clone());
        let parts = MachineParts {
            clock,
            workers,
            wake,
            store,
            crowded: false,
        };
        let BuiltLane {
            mut lane,
            handle,
            events,
        } = build(options, opened, parts)?;
        lane.task_bytes = task_bytes;
        Ok(SimLane {
            lane,
            handle,
            events,
            asleep: false,
            wake_at: None,
        })
    }

    /// One turn at this moment: wakes up if there is a reason, looks at everything once, does what
    /// is due.
    pub(crate) fn turn(&mut self) -> Turned {
        let now = self.lane.clock.now();
        if self.asleep {
            let woken = self.lane.wait(Some(Duration::ZERO));
            if woken == Woken::Nobody && self.wake_at.is_none_or(|at| now < at) {
                return Turned::Asleep;
            }
            self.asleep = false;
            self.lane.wake_up(woken == Woken::Client);
        }
        let round = self.lane.round();
        if round == Round::Stopped {
            self.lane.finish();
            return Turned::Stopped;
        }
        self.lane.upkeep(self.lane.clock.now());
        if round == Round::Worked {
            Turned::Worked
        } else {
            Turned::Idle
        }
    }

    /// Goes to sleep, as after a while without work; false when it finds work instead.
    pub(crate) fn fall_asleep(&mut self) -> bool {
        if self.asleep {
            return true;
        }
        self.asleep = self.lane.fall_asleep();
        if self.asleep {
            let now = self.lane.clock.now();
            self.wake_at = self.lane.sleep_limit(now).map(|limit| now + limit);
        } else {
            self.lane.wake_up(false);
        }
        self.asleep
    }

    /// True when a submission waits in a ring.
    pub(crate) fn has_submission(&self) -> bool {
        let mut sessions = self.lane.sessions.iter().flatten();
        sessions.any(|session| session.has_submission())
    }

    /// Publishes gauges and tables.
    pub(crate) fn publish(&mut self) {
        self.lane.publish(self.lane.clock.now());
    }

    pub(crate) fn cache(&self) -> &Cache {
        &self.lane.cache
    }

    pub(crate) fn leases(&self) -> &LeaseTable {
        &self.lane.leases
    }

    /// Instances that processes have registered for.
    pub(crate) fn instances(&self) -> usize {
        self.lane.registry.iter().count()
    }

    /// Copy tasks handed out, those that wait for a place included.
    pub(crate) fn tasks(&self) -> usize {
        self.lane.tasks.len()
    }

    /// Copy tasks that wait for a place.
    pub(crate) fn waiting_tasks(&self) -> Vec<(Direction, Vec<PageCopy>)> {
        let tasks = self.lane.backlog.iter();
        tasks
            .map(|task| (task.direction, task.pages.clone()))
            .collect()
    }

    /// What it calls the requests that the tier below the pool has not ended, as far as it knows.
    pub(crate) fn tickets(&self) -> Vec<u64> {
        self.lane.tier.as_ref().map_or(Vec::new(), |t| t.tickets())
    }

    /// Queries and saves that wait for the tier although their time had passed by then.
    pub(crate) fn overdue(&self, by: Instant) -> usize {
        self.lane.tier.as_ref().map_or(0, |tier| tier.overdue(by))
    }

    /// Fetches that count no more towards the maximum.
    pub(crate) fn late_fetches(&self) -> usize {
        self.lane.tier.as_ref().map_or(0, |tier| tier.late())
    }

    /// Queries whose blocks are on their way up.
    pub(crate) fn prefetches(&self) -> usize {
        let tier = self.lane.tier.as_ref();
        tier.map_or(0, |tier| tier.prefetches.len())
    }

    /// Lists kept for reuse: of entries, of pages.
    pub(crate) fn spare_lists(&self) -> (usize, usize) {
        (self.lane.entry_lists.len(), self.lane.page_lists.len())
    }

    pub(crate) fn sessions(&self) -> Vec<SessionFigures> {
        let sessions = self.lane.sessions.iter().flatten();
        sessions
            .map(|session| SessionFigures {
                requests: session.requests.len(),
                completion_slots: session.completion_slots(),
                listed_blocks: session.listed_blocks,
                copies: session.copies,
            })
            .collect()
    }

    /// Blocks that unfinished queries hold, with repetitions.
    pub(crate) fn pins_of_queries(&self) -> Vec<(usize, u32)> {
        let sessions = self.lane.sessions.iter().flatten();
        let requests = sessions.flat_map(|session| session.requests.values());
        requests
            .filter_map(|request| match request {
                Request::Query(query) => query.scope.map(|scope| (scope.domain, query)),
                Request::Load(_) | Request::Save(_) => None,
            })
            .flat_map(|(domain, query)| {
                let held = query.pieces.iter().filter_map(|piece| match piece.state {
                    PieceState::Held { entry, .. } => Some(entry),
                    _ => None,
                });
                let entries = query.entries.iter().copied().chain(held);
                entries.map(move |entry| (domain, entry))
            })
            .chain(self.lane.tier.iter().flat_map(|tier| tier.pins()))
            .collect()
    }
}
