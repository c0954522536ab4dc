//! What can keep a command from doing its work.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use pegaflow_shm::mapping::MappingError;
use pegaflow_shm::node::NodeFault;
use pegaflow_shm::paths::NodeNameFault;
use pegaflow_shm::seqpacket::PacketError;

use crate::replay::trace::TraceError;

/// A command that could not do its work; exit status 3.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// Nobody has started a daemon under this node name.
    #[error(
        "no node file at {}: no daemon runs as node `{node}` (or it stopped in an orderly way). \
         Nodes here: {}. Start pegaflowd, or name another node with --node",
        path.display(), if others.is_empty() { "none" } else { others.as_str() }
    )]
    NoNode {
        /// The node's name.
        node: String,
        /// The file that is missing.
        path: PathBuf,
        /// Names of nodes that do have a file.
        others: String,
    },
    /// The node name is not one.
    #[error(transparent)]
    NodeName(#[from] NodeNameFault),
    /// The node file cannot be read.
    #[error("{}: {source}", path.display())]
    Node {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: NodeFault,
    },
    /// A shared file cannot be opened or mapped.
    #[error("{}: {source}", path.display())]
    Mapping {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: MappingError,
    },
    /// Memory shared between the processes of a bench cannot be made or reached.
    #[error(transparent)]
    Memory(#[from] MappingError),
    /// A line of a trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A GPU of this process.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
    /// The library refused something.
    #[error("{what}: {source}")]
    Client {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: pegaflow::Error,
    },
    /// An SSD shard cannot be used.
    #[error(transparent)]
    Ssd(#[from] pegaflow_ssd::OpenError),
    /// A daemon of our own did not start or did not last.
    #[error("{message}\n--- last lines of the daemon's log ({}) ---\n{log}", log_path.display())]
    Daemon {
        /// What happened.
        message: String,
        /// End of its log.
        log: String,
        /// All of its log, until this program ends.
        log_path: PathBuf,
    },
    /// No daemon binary.
    #[error(
        "no pegaflowd: looked next to {}, in PATH and at PEGAFLOW_DAEMON. Build it \
         (cargo build -p pegaflow-engine), set PEGAFLOW_DAEMON, or use a running one with --socket",
        beside.display()
    )]
    NoDaemonBinary {
        /// Folder of this program.
        beside: PathBuf,
    },
    /// A process of this program ended early or said something unexpected.
    #[error("{process}: {what}")]
    Child {
        /// Which one.
        process: String,
        /// What happened.
        what: String,
    },
    /// A packet between the two processes of a bench.
    #[error("between the two processes: {0}")]
    Packet(#[from] PacketError),
    /// The requested sizes cannot work.
    #[error("{0}")]
    Plan(String),
    /// A request to the daemon failed.
    #[error("{what}: {status}: {}", status.text())]
    Request {
        /// The request.
        what: &'static str,
        /// Its answer.
        status: pegaflow_shm::status::Status,
    },
    /// A system call.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Its error.
        source: io::Error,
    },
}

impl ToolError {
    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> ToolError {
        let what = what.into();
        move |source| ToolError::Io { what, source }
    }

    /// Wraps a `rustix` error with what was being done.
    pub fn errno(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> ToolError {
        let what = what.into();
        move |errno| ToolError::Io {
            what,
            source: errno.into(),
        }
    }

    /// Wraps an answer of the client library with what was asked.
    pub fn client(what: &'static str) -> impl FnOnce(pegaflow::Error) -> ToolError {
        move |source| ToolError::Client { what, source }
    }
}
