//! The loop: poll rings, take copy results, do what is due, sleep when there is nothing.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pegaflow_shm::bell::relax;
use pegaflow_shm::desc::{MissReason, Op};
use pegaflow_shm::node::{Counter, NodeWriter};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use tokio::sync::mpsc::UnboundedSender;

use crate::cache::Cache;
use crate::cache::lease::{Ended, LeaseTable};
use crate::clock::Clock;
use crate::copy::{CopyThreads, PageCopy, Sampler};
use crate::lane::api::{LaneCommand, LaneEvent, Reply, SessionId};
use crate::lane::backlog::Backlog;
use crate::lane::load::SeenBlocks;
use crate::lane::machine::Machine;
use crate::lane::options::LaneOptions;
use crate::lane::session::{LaneSession, SessionFault};
use crate::lane::tally::Tally;
use crate::lane::tasks::TaskTable;
use crate::lane::tier::LaneTier;
use crate::lane::upkeep::{Clocks, NamespaceTable};
use crate::lane::wake::LaneWake;
use crate::registry::Registry;

/// Submissions taken from one session before the next one's turn.
const BATCH: usize = 32;
/// Blocks named by submissions after which the next session has its turn, so that one with long
/// lists does not hold the others up for longer than one with short ones.
const BATCH_BLOCKS: u32 = 2048;
/// A saved block counts as so many: it takes a place, a record and perhaps an eviction, where a
/// queried one takes a look.
const SAVED_BLOCK: u32 = 8;
/// Marks the lane's own wake-up among the bells; sessions have ids from 1.
pub(super) const LANE_WAKE: u64 = 0;
/// How long the lane polls while the copy threads need every CPU, or GPUs copy for long.
const CROWDED_SPIN: Duration = Duration::from_micros(2);
/// Idle rounds between two looks at the clock.
const CLOCK_ROUNDS: u32 = 8;

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// There was something to do.
    Worked,
    /// There was nothing.
    Idle,
    /// [`LaneCommand::Stop`] came, or nobody is left to send commands.
    Stopped,
}

/// What ended the lane's sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// The clock.
    Nobody,
    /// A copy thread or a command.
    Daemon,
    /// A client's bell.
    Client,
}

/// Everything the lane thread owns.
pub(super) struct Lane<M: Machine> {
    pub options: LaneOptions,
    pub node: NodeWriter,
    pub cache: Cache,
    pub leases: LeaseTable,
    pub registry: Registry,
    pub sessions: Vec<Option<Box<LaneSession>>>,
    pub by_id: HashMap<SessionId, usize>,
    pub clock: M::Clock,
    pub workers: M::Copies,
    /// Bytes of one copy task, at most; a page that is larger makes one of its own.
    pub task_bytes: u64,
    /// Tasks that wait for a copy thread.
    pub backlog: Backlog,
    pub tasks: TaskTable,
    pub tally: Tally,
    pub namespaces: NamespaceTable,
    pub clocks: Clocks,
    pub commands: mpsc::Receiver<LaneCommand>,
    pub events: UnboundedSender<LaneEvent>,
    pub wake: Arc<LaneWake>,
    pub epoll: OwnedFd,
    pub draining: Option<Vec<Reply<()>>>,
    /// There are no more CPUs than copy threads.
    pub crowded: bool,
    /// The last event was the end of a long copy of a GPU.
    pub ended_long: bool,
    /// A client rang without a submission to read: a ring may have a gap, so look by the clock.
    pub suspect_gap: bool,
    /// Private copy of the chunk at hand.
    pub chunk: Vec<u8>,
    pub blocks: Vec<u32>,
    pub seen_blocks: SeenBlocks,
    pub entry_lists: Vec<Vec<u32>>,
    pub page_lists: Vec<Vec<PageCopy>>,
    /// Says which saved pages get a checksum.
    pub sampler: Sampler,
    /// Pages of the request at hand, before they are cut into tasks.
    pub pages: Vec<PageCopy>,
    pub ended: Vec<Ended>,
    /// The tier below the pool.
    pub tier: Option<Box<LaneTier>>,
    /// Positions of a membership query that are not in the pool.
    pub missed: Vec<(u32, MissReason)>,
}

impl<M: Machine> Lane<M> {
    /// Runs until [`LaneCommand::Stop`].
    pub(super) fn run(mut self) {
        let mut idle_rounds = 0u32;
        let mut idle_since: Option<Instant> = None;
        loop {
            match self.round() {
                Round::Worked => {
                    idle_since = None;
                    idle_rounds = 0;
                    self.upkeep(self.clock.now());
                    continue;
                }
                Round::Idle => idle_rounds += 1,
                Round::Stopped => break,
            }
            if !idle_rounds.is_multiple_of(CLOCK_ROUNDS) {
                relax();
                continue;
            }
            let now = self.clock.now();
            self.upkeep(now);
            if now.duration_since(*idle_since.get_or_insert(now)) >= self.patience() {
                self.sleep();
                idle_since = None;
            }
        }
        self.finish();
    }

    /// One look at everything that may hold work: rings, finished copies, commands.
    pub(super) fn round(&mut self) -> Round {
        let mut worked = self.poll_sessions();
        worked |= self.take_done();
        worked |= self.pump_tier();
        match self.take_commands() {
            Some(any) => worked |= any,
            None => return Round::Stopped,
        }
        if worked { Round::Worked } else { Round::Idle }
    }

    /// The end of the lane: copies drain, the last figures are published.
    pub(super) fn finish(&mut self) {
        self.workers.stop();
        while self.take_done() {}
        self.close_tier();
        self.publish(self.clock.now());
    }

    /// How long to poll without work. While long copies run on every CPU there is, polling would
    /// take the time from them, and beside those of a GPU it is most of what they cost; a copy's
    /// end wakes the lane. Behind a long one of a GPU a wake-up is of no weight.
    fn patience(&self) -> Duration {
        let is_behind_long = self.ended_long && self.tasks.is_empty();
        let on_device = self.tasks.runs_long_on_device() || is_behind_long;
        if on_device || (self.crowded && self.tasks.runs_long()) {
            CROWDED_SPIN.min(self.options.spin)
        } else {
            self.options.spin
        }
    }

    fn take_commands(&mut self) -> Option<bool> {
        let mut any = false;
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    any = true;
                    if !self.command(command) {
                        return None;
                    }
                }
                Err(mpsc::TryRecvError::Empty) => return Some(any),
                Err(mpsc::TryRecvError::Disconnected) => return None,
            }
        }
    }

    fn poll_sessions(&mut self) -> bool {
        let mut worked = false;
        for position in 0..self.sessions.len() {
            let ready = self.sessions[position]
                .as_ref()
                .is_some_and(|s| s.has_submission());
            if !ready {
                continue;
            }
            let Some(mut session) = self.sessions[position].take() else {
                continue;
            };
            worked = true;
            self.ended_long = false;
            if let Err(fault) = self.poll_session(&mut session) {
                self.fault(&mut session, &fault);
            }
            self.ring(&mut session);
            self.sessions[position] = Some(session);
        }
        worked
    }

    fn poll_session(&mut self, session: &mut LaneSession) -> Result<(), SessionFault> {
        let now = self.clock.now();
        self.tell_time(now);
        let mut blocks = 0u32;
        for _ in 0..BATCH {
            let Some(submission) = session.next_submission()? else {
                break;
            };
            self.tally.add(Counter::Descriptors, 1);
            let weight = if submission.op == Op::Save as u8 {
                SAVED_BLOCK
            } else {
                1
            };
            blocks = blocks.saturating_add(submission.count.saturating_mul(weight));
            self.submit(session, &submission, now)?;
            if blocks >= BATCH_BLOCKS {
                break;
            }
        }
        Ok(())
    }

    /// Lets `work` act on a session and on the lane at once; a fault ends the session. Then settles
    /// what the work may have brought to an end.
    pub(super) fn with_session(
        &mut self,
        id: SessionId,
        work: impl FnOnce(&mut Lane<M>, &mut LaneSession) -> Result<(), SessionFault>,
    ) {
        let Some(position) = self.by_id.get(&id).copied() else {
            return;
        };
        let Some(mut session) = self.sessions[position].take() else {
            return;
        };
        let outcome = work(self, &mut session);
        if let Err(fault) = outcome {
            self.fault(&mut session, &fault);
        }
        self.ring(&mut session);
        let waiting =
            session.closing.is_some() || session.registrations.iter().any(|r| r.leaving.is_some());
        self.sessions[position] = Some(session);
        if waiting {
            self.settle_session(id);
        }
    }

    pub(super) fn ring(&mut self, session: &mut LaneSession) {
        if session.ring() {
            self.tally.add(Counter::BellsRung, 1);
        }
    }

    /// Stops reading a session's ring and has the control thread close it.
    fn fault(&mut self, session: &mut LaneSession, fault: &SessionFault) {
        if session.closing.is_some() || std::mem::replace(&mut session.faulted, true) {
            return;
        }
        tracing::warn!(session = session.id, %fault, "the session broke the protocol");
        let message = fault.to_string();
        self.tell(LaneEvent::Fault {
            session: session.id,
            message,
        });
    }

    /// Watches a session's bell. Edge-triggered, so that the bell need not be read, which a client
    /// could make block.
    pub(super) fn watch(&self, session: &LaneSession) -> Result<(), Errno> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(session.id);
        epoll::add(&self.epoll, &session.lane_bell, data, flags)
    }

    pub(super) fn unwatch(&self, session: &LaneSession) {
        if let Err(error) = epoll::delete(&self.epoll, &session.lane_bell) {
            let fd = session.lane_bell.as_fd().as_raw_fd();
            tracing::error!(session = session.id, fd, %error, "a bell cannot be unwatched");
        }
    }

    /// Sleeps until a client, a copy thread, a command or the clock has something.
    fn sleep(&mut self) {
        if self.fall_asleep() {
            let limit = self.sleep_limit(self.clock.now());
            let woken = self.wait(limit);
            self.wake_up(woken == Woken::Client);
        } else {
            self.wake_up(false);
        }
    }

    /// Tells everybody that from now on the lane must be woken, and looks once more: true when
    /// there is still nothing to do. [`Lane::wake_up`] must follow either way.
    pub(super) fn fall_asleep(&mut self) -> bool {
        self.settle_drain();
        // A running copy will wake the lane: what it has gathered can wait until then.
        if !self.tasks.runs_long() {
            self.publish(self.clock.now());
        }
        self.wake.park();
        for session in self.sessions.iter_mut().flatten() {
            session.arm();
        }
        let waiting = self
            .sessions
            .iter()
            .flatten()
            .any(|session| session.has_submission())
            || self.workers.has_done()
            || self.tier_has_done();
        if !waiting {
            self.tally.add(Counter::LaneParks, 1);
        }
        !waiting
    }

    /// The lane is awake; `rung` when a client's bell ended its sleep.
    pub(super) fn wake_up(&mut self, rung: bool) {
        self.suspect_gap |= rung
            && !self
                .sessions
                .iter()
                .flatten()
                .any(|session| session.has_submission());
        for session in self.sessions.iter_mut().flatten() {
            session.disarm();
        }
        self.wake.unpark();
    }

    /// Waits on the bells.
    pub(super) fn wait(&self, limit: Option<Duration>) -> Woken {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let mut events = Vec::with_capacity(16);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "the lane cannot wait");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        match events.iter().map(|event| event.data.u64()).max() {
            None => Woken::Nobody,
            Some(LANE_WAKE) => Woken::Daemon,
            Some(_) => Woken::Client,
        }
    }
}
