//! The PegaFlow client library: what an inference engine links to use the node's KV-cache daemon.
//!
//! Everything goes through a [`Client`]. It keeps one session with the daemon, submits requests
//! through shared memory, collects their completions, and comes back by itself when the daemon was
//! away. The C ABI in [`ffi`] is a thin layer over it.
//!
//! ```no_run
//! use std::time::Duration;
//! use pegaflow::{Client, Options};
//!
//! # fn main() -> Result<(), pegaflow::Error> {
//! let client = Client::connect(Options::default())?;
//! let request = client.nop()?;
//! let done = client.wait(request, Duration::from_secs(1))?;
//! println!("{} after {} ns in the daemon", done.status, done.daemon_ns);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`client`] | the [`Client`]: its life, its state, registrations |
//! | `requests` | request table, arenas, submission, waiting |
//! | `session` | one connection: handshake, segments, control messages |
//! | `keeper` | the thread that notices the daemon's end and reconnects |
//! | `log` | lines about changes that an operator would ask about |
//! | [`memory`] | host memory shared with the daemon, layouts over it |
//! | `cuda` | GPU memory and events of the engine |
//! | [`autostart`] | starting a daemon where none listens |
//! | [`ffi`] | the C ABI |

pub mod autostart;
pub mod client;
mod completion;
mod cuda;
mod error;
#[cfg(test)]
#[path = "../tests/fake/mod.rs"]
mod fake;
pub mod ffi;
mod keeper;
mod log;
pub mod memory;
mod options;
mod query;
mod requests;
mod session;
mod shared;
mod stats;

pub use client::Client;
pub use completion::{Completion, RegistrationId, RequestId};
pub use cuda::{CudaError, Order};
pub use error::Error;
pub use log::{Log, LogLevel};
pub use memory::{GroupMemory, HostMemory, MemoryKind, Registration, SegmentMemory};
pub use options::Options;
pub use query::Fetch;
pub use stats::{Limits, State, Stats};

pub use pegaflow_shm::BlockHash;
pub use pegaflow_shm::control::Mode;
pub use pegaflow_shm::desc::{MissReason, Op};
pub use pegaflow_shm::namespace::NamespaceSpec;
pub use pegaflow_shm::status::Status;
