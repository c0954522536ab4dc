//! What the conductor and the engine processes tell each other, one JSON object a line.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::shape::InstanceShape;

/// Which of an instance's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Queries and hands out work.
    Scheduler,
    /// All ranks.
    Ranks,
}

/// The one line that an engine process reads; it ends by itself at the end of its input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineStart {
    /// What it is.
    pub role: Role,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Where ledgers and the lines between schedulers and ranks lie.
    pub folder: PathBuf,
    /// Its instance.
    pub instance: InstanceShape,
    /// Of its random choices.
    pub seed: u64,
    /// What a call may take beyond its bound, in ms.
    pub slack_ms: u64,
    /// Seconds over which the instance's fresh blocks are spread.
    pub spread_s: u64,
}

/// What an engine process tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// First hit (scheduler) or first verified load (ranks) with the daemon of this boot id.
    Back {
        /// Boot id in hex.
        boot: String,
        /// Monotonic clock of the machine, in ns.
        at_ns: u64,
    },
    /// The whole ledger of the time before was asked for again, and all of it was hits.
    Swept {
        /// Boot id in hex.
        boot: String,
        /// Blocks asked for.
        blocks: u64,
    },
    /// What may never be.
    Fault {
        /// What it is.
        what: String,
    },
    /// Figures so far.
    Tally(Tally),
}

/// Figures of one process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Queries answered with a hit.
    pub hits: u64,
    /// Loads whose every byte was right.
    pub loads: u64,
    /// Bytes compared.
    pub verified_bytes: u64,
    /// Blocks seen sealed.
    pub sealed: u64,
    /// Answers by status.
    pub answers: BTreeMap<String, u64>,
    /// Longest time of each call in µs, and what it took beyond its bound.
    pub calls: BTreeMap<String, LongestCall>,
}

/// The longest of one kind of call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LongestCall {
    /// Calls.
    pub count: u64,
    /// The longest, in µs.
    pub us: u64,
    /// Most time beyond the bound, in µs.
    pub over_us: u64,
}

impl Tally {
    /// Adds another process's figures.
    pub fn add(&mut self, other: &Tally) {
        self.hits += other.hits;
        self.loads += other.loads;
        self.verified_bytes += other.verified_bytes;
        self.sealed += other.sealed;
        for (status, count) in &other.answers {
            *self.answers.entry(status.clone()).or_default() += count;
        }
        for (call, longest) in &other.calls {
            let entry = self.calls.entry(call.clone()).or_default();
            entry.count += longest.count;
            entry.us = entry.us.max(longest.us);
            entry.over_us = entry.over_us.max(longest.over_us);
        }
    }
}

/// Tells the conductor.
pub fn say(event: &Event) {
    let mut line = serde_json::to_vec(event).expect("an event can be written");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    // A conductor that is gone has closed the input, too, which ends this process.
    out.write_all(&line).and_then(|()| out.flush()).ok();
}

/// Tells the conductor what may never be, and ends this process.
pub fn fault(what: String) -> ! {
    say(&Event::Fault { what });
    std::process::exit(1);
}

/// The machine's monotonic clock in ns, the same for all processes.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
