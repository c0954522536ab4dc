//! What the control thread asks of the lane, and what the lane tells it.
//!
//! The lane owns all cache state and is never called into: commands go through a channel and wake
//! it, answers come back through one-shot channels, and events go the other way.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};

use pegaflow_shm::bell::BellFd;
use pegaflow_shm::control::RegisterSpec;
use pegaflow_shm::mapping::Mapping;
use pegaflow_shm::segment::SegmentShape;
use pegaflow_shm::status::Status;
use tokio::sync::oneshot;

use crate::copy::{BoundLayout, RegionMapping};
use crate::device::DeviceEvents;
use crate::isolation::IsolationDomain;
use crate::lane::LaneWake;

/// Session ids count up from 1 and are never used twice by one daemon.
pub type SessionId = u64;

/// A request of the control thread was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Kind of refusal.
    pub status: Status,
    /// What, with which value, and the way out.
    pub message: String,
}

impl Refusal {
    /// A refusal with a text that names the thing, the value and the way out.
    pub fn new(status: Status, message: impl Into<String>) -> Refusal {
        Refusal {
            status,
            message: message.into(),
        }
    }
}

/// A session whose segments are mapped and checked.
pub struct NewSession {
    /// Its id.
    pub id: SessionId,
    /// User of the client.
    pub uid: u32,
    /// Isolation domain of the client.
    pub domain: Arc<IsolationDomain>,
    /// Process of the client.
    pub pid: u32,
    /// Name of the client in tables.
    pub client_name: String,
    /// Client-to-daemon segment, mapped read-only.
    pub c2d: Arc<Mapping>,
    /// Its checked shape.
    pub c2d_shape: SegmentShape,
    /// Daemon-to-client segment, header already written.
    pub d2c: Arc<Mapping>,
    /// Its shape.
    pub d2c_shape: SegmentShape,
    /// Rung by the client to wake the lane; watched edge-triggered and never read.
    pub lane_bell: OwnedFd,
    /// Rings the client: the only write end of its pipe (`BellFd::pipe`).
    pub client_bell: BellFd,
}

/// What a new session needs beyond its segments.
#[derive(Debug)]
pub struct SessionOpened {
    /// Read-only descriptor of the index of the session's isolation domain.
    pub index: OwnedFd,
    /// Its size.
    pub index_bytes: u64,
}

/// One group of a registration, validated, bound to memory.
pub struct RegisteredGroup {
    /// Cache group.
    pub group: u16,
    /// Layout, bound to the memory that it lies in.
    pub target: Arc<BoundLayout>,
}

/// A registration whose layouts were validated.
pub struct NewRegistration {
    /// The client's words.
    pub spec: RegisterSpec,
    /// Its groups; empty for a scheduler.
    pub groups: Vec<RegisteredGroup>,
    /// The session's events on the device of its groups, if it shared any; more may join them
    /// later.
    pub events: Option<Arc<DeviceEvents>>,
    /// Words that its loads raise, if it has shared any.
    pub signals: Option<Arc<RegionMapping>>,
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client closed its socket while its process lives on.
    Left,
    /// The client's process is gone.
    Died,
    /// The daemon ends it for breaking the protocol.
    Faulted,
    /// The daemon is stopping.
    Stopping,
}

/// Answer to a command.
pub type Reply<T> = oneshot::Sender<T>;

/// Commands to the lane.
pub enum LaneCommand {
    /// Starts serving a session.
    OpenSession(Box<NewSession>, Reply<Result<SessionOpened, Refusal>>),
    /// Registers a rank or a scheduler; answers with the registration's id.
    Register(SessionId, Box<NewRegistration>, Reply<Result<u32, Refusal>>),
    /// Ends a registration; answers when no copy touches its memory any more.
    Unregister(SessionId, u32, Reply<Result<(), Refusal>>),
    /// Ends a session; answers when no copy touches its memory any more.
    CloseSession(SessionId, CloseReason, Reply<()>),
    /// Takes no new work from now on and answers when everything taken is completed.
    Drain(Reply<()>),
    /// Answers: the lane still turns.
    Ping(Reply<()>),
    /// Ends the lane thread; the cache stays in shared memory for the next daemon.
    Stop,
}

/// Events from the lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaneEvent {
    /// All ranks of a registration's instance are there.
    Ready {
        /// Whom to tell.
        session: SessionId,
        /// Which of its registrations.
        registration: u32,
        /// Index key of the namespace.
        namespace: u32,
    },
    /// A rank left the instance.
    NotReady {
        /// Whom to tell.
        session: SessionId,
        /// Which of its registrations.
        registration: u32,
    },
    /// A session broke the protocol: send `Closing`, close it.
    Fault {
        /// The session.
        session: SessionId,
        /// What it did.
        message: String,
    },
}

/// The control thread's hold on the lane.
#[derive(Clone)]
pub struct LaneHandle {
    commands: mpsc::Sender<LaneCommand>,
    wake: Arc<LaneWake>,
}

impl LaneHandle {
    /// Pairs a command channel with the lane's wake-up.
    pub fn new(commands: mpsc::Sender<LaneCommand>, wake: Arc<LaneWake>) -> LaneHandle {
        LaneHandle { commands, wake }
    }

    fn send(&self, command: LaneCommand) -> Result<(), Refusal> {
        self.commands.send(command).map_err(|_| lane_gone())?;
        self.wake.wake();
        Ok(())
    }

    async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> LaneCommand) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(make(reply))?;
        answer.await.map_err(|_| lane_gone())
    }

    /// Starts serving a session.
    ///
    /// # Errors
    /// A named maximum is reached, or the domain's index cannot be made.
    pub async fn open_session(&self, session: NewSession) -> Result<SessionOpened, Refusal> {
        self.ask(|reply| LaneCommand::OpenSession(Box::new(session), reply))
            .await?
    }

    /// Registers a rank or a scheduler and returns the registration's id.
    ///
    /// # Errors
    /// The registration contradicts its instance, or a named maximum is reached.
    pub async fn register(
        &self,
        session: SessionId,
        registration: NewRegistration,
    ) -> Result<u32, Refusal> {
        self.ask(|reply| LaneCommand::Register(session, Box::new(registration), reply))
            .await?
    }

    /// Ends a registration and waits until no copy touches its memory.
    ///
    /// # Errors
    /// No such registration.
    pub async fn unregister(&self, session: SessionId, registration: u32) -> Result<(), Refusal> {
        self.ask(|reply| LaneCommand::Unregister(session, registration, reply))
            .await?
    }

    /// Ends a session and waits until no copy touches its memory.
    ///
    /// # Errors
    /// The lane has stopped.
    pub async fn close_session(
        &self,
        session: SessionId,
        reason: CloseReason,
    ) -> Result<(), Refusal> {
        self.ask(|reply| LaneCommand::CloseSession(session, reason, reply))
            .await
    }

    /// Stops taking work and waits until what was taken is completed.
    ///
    /// # Errors
    /// The lane has stopped.
    pub async fn drain(&self) -> Result<(), Refusal> {
        self.ask(LaneCommand::Drain).await
    }

    /// Waits for a sign of life.
    ///
    /// # Errors
    /// The lane has stopped.
    pub async fn ping(&self) -> Result<(), Refusal> {
        self.ask(LaneCommand::Ping).await
    }

    /// Ends the lane thread.
    ///
    /// # Errors
    /// The lane has stopped already.
    pub fn stop(&self) -> Result<(), Refusal> {
        self.send(LaneCommand::Stop)
    }
}

fn lane_gone() -> Refusal {
    Refusal::new(
        Status::Internal,
        "the lane thread has ended: see the daemon's log",
    )
}
