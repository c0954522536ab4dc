//! What the whole-system tests are made of: a real daemon on a private node, engine workers in this
//! process or in processes of their own, and clients that break every rule.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`binaries`] | builds and finds `pegaflowd` and `pegactl` |
//! | [`daemon`] | a daemon with private node, socket and folder; checks what it leaves behind |
//! | [`content`] | block hashes and the bytes that belong to them |
//! | [`gpu`] | GPUs of a test's own: emulated ones, or those of the machine |
//! | [`layout`] | arrangements of KV memory |
//! | [`memory`] | KV memory of both kinds |
//! | [`withheld`] | memory that makes whoever touches it wait |
//! | [`worker`] | one rank (or scheduler) of an engine, with its KV memory |
//! | [`process`] | a worker in a process of its own, driven by commands |
//! | [`chaos`] | daemon and engines killed at random under load |
//! | [`dying`] | processes that die, each in its own way |
//! | [`attack`] | what no client should do, as often as it can |
//! | [`raw`] | a client without the library, free to lie |
//! | [`procfs`] | memory and CPU time of a process |
//! | [`skip`](mod@skip) | saying that a test could not run here |

pub mod attack;
pub mod binaries;
pub mod chaos;
pub mod content;
pub mod daemon;
pub mod dying;
pub mod gpu;
pub mod layout;
pub mod memory;
pub mod process;
pub mod procfs;
pub mod raw;
pub mod skip;
pub mod withheld;
pub mod worker;

pub use daemon::Daemon;
pub use process::WorkerProcess;
pub use skip::skip;
pub use worker::{Worker, WorkerSpec};

use std::time::{Duration, Instant};

/// Bound for whatever should happen soon; long enough for a loaded machine of two cores.
pub const SOON: Duration = Duration::from_secs(20);

/// Asks until it holds, for [`SOON`] at most; tells whether it came to hold.
pub fn eventually(mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + SOON;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A number from the environment: how often a test repeats what it does at random.
pub fn trials(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
