//! What a call can fail with; each kind has one [`Status`] that the C ABI returns.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use pegaflow_shm::desc::Op;
use pegaflow_shm::mapping::MappingError;
use pegaflow_shm::status::Status;

use crate::cuda::CudaError;

/// Why a call did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument cannot be accepted.
    #[error("{name} = `{value}`: {way_out}")]
    Argument {
        /// Name of the argument.
        name: &'static str,
        /// The value that was given.
        value: String,
        /// What would be accepted.
        way_out: String,
    },
    /// The list is longer than any state of the arena, the ring or the result arena can take.
    #[error("{op:?} of {count} items: {limit_name} allows {limit}; split the list")]
    TooMany {
        /// The operation.
        op: Op,
        /// Items given.
        count: usize,
        /// Which size sets the limit.
        limit_name: &'static str,
        /// Most items.
        limit: usize,
    },
    /// No room at the moment.
    #[error("the {0} has no room now: poll completions, then submit again")]
    Again(&'static str),
    /// No daemon at the moment.
    #[error("disconnected: {reason}")]
    Disconnected {
        /// Why the last session ended.
        reason: String,
    },
    /// The registration is not accepted by the present daemon yet.
    #[error("registration {0} is not back at the daemon yet: retry, or wait_ready")]
    NotReady(u32),
    /// No such registration.
    #[error("no registration {0} in this client: register first")]
    UnknownRegistration(u32),
    /// No such request.
    #[error("no request {0:#x}: its completion was consumed, or it was never submitted here")]
    UnknownRequest(u64),
    /// A bound ran out.
    #[error("{what} took longer than {bound:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The bound.
        bound: Duration,
    },
    /// The instance did not become complete in time.
    #[error("registration {registration} is not ready after {bound:?}: {state}")]
    NotReadyInTime {
        /// The registration.
        registration: u32,
        /// The bound.
        bound: Duration,
        /// What it waits for.
        state: String,
    },
    /// The block list of a load is not kept.
    #[error(
        "no block list of request {0:#x}: it is no load, has not failed, its completion was not \
         consumed, or more recent failures took its place"
    )]
    NoBlockList(u64),
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// Kind of refusal.
        status: Status,
        /// The daemon's words.
        message: String,
    },
    /// Nobody listens.
    #[error("no daemon answers on {socket}: {detail}", socket = socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// What was tried.
        detail: String,
    },
    /// The daemon said something that no correct daemon says.
    #[error("the daemon broke the protocol: {0}")]
    Protocol(String),
    /// A system call failed.
    #[error("{operation}: {source}")]
    System {
        /// What was being done.
        operation: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// A registration that no daemon could take as it lies in memory.
    #[error("{value}: {way_out}")]
    BadLayout {
        /// What was given.
        value: String,
        /// What would be accepted.
        way_out: String,
    },
    /// A call of the CUDA driver failed.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The CUDA driver of this process cannot be used.
    #[error("GPU memory: {0}")]
    Driver(String),
    /// Shared memory could not be made, mapped or reached.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The client belongs to the parent of this forked process.
    #[error(
        "this client belongs to process {owner}, this is its fork {here}: connect a new client here"
    )]
    Forked {
        /// Process that connected.
        owner: u32,
        /// This process.
        here: u32,
    },
}

impl Error {
    pub(crate) fn argument(
        name: &'static str,
        value: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Error {
        Error::Argument {
            name,
            value: value.into(),
            way_out: way_out.into(),
        }
    }

    pub(crate) fn bad_layout(value: impl Into<String>, way_out: impl Into<String>) -> Error {
        Error::BadLayout {
            value: value.into(),
            way_out: way_out.into(),
        }
    }

    pub(crate) fn system(operation: &'static str, source: impl Into<std::io::Error>) -> Error {
        Error::System {
            operation,
            source: source.into(),
        }
    }

    /// The kind of failure as the code that C callers and metrics see.
    pub fn status(&self) -> Status {
        match self {
            Error::Argument { .. } | Error::Forked { .. } => Status::InvalidArgument,
            Error::TooMany { .. } => Status::TooMany,
            Error::Again(_) => Status::Again,
            Error::Disconnected { .. } => Status::Disconnected,
            Error::NotReady(_) => Status::NotReady,
            Error::UnknownRegistration(_) => Status::UnknownRegistration,
            Error::UnknownRequest(_) | Error::NoBlockList(_) => Status::UnknownRequest,
            Error::Timeout { .. } | Error::NotReadyInTime { .. } => Status::Timeout,
            Error::Refused { status, .. } => *status,
            Error::NoDaemon { .. } => Status::NoDaemon,
            Error::Protocol(_) => Status::ProtocolError,
            Error::BadLayout { .. } => Status::BadLayout,
            Error::System { .. } | Error::Mapping(_) => Status::SystemError,
            Error::Cuda(_) | Error::Driver(_) => Status::SystemError,
        }
    }
}
