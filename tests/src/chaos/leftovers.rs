//! What a scene must not leave behind: sessions, leases, pins, memory, descriptors, threads, files.

#![forbid(unsafe_code)]

use anyhow::{bail, ensure};
use pegaflow_shm::node::{Counter, Gauge};

use crate::{Daemon, eventually, procfs};

/// Anonymous memory that a daemon may keep beyond a fresh one's over the same cache, in KiB: what
/// its allocator does not give back.
const MEMORY_SLACK_KIB: u64 = 16 << 10;

/// What a daemon uses while nobody is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Anonymous memory in KiB.
    pub memory_kib: u64,
    /// Descriptors.
    pub descriptors: usize,
    /// Threads of its own.
    pub threads: u64,
}

impl Usage {
    /// Of a running daemon, once its descriptors have settled.
    ///
    /// # Errors
    /// The process cannot be looked at.
    pub fn of(daemon: &Daemon) -> anyhow::Result<Usage> {
        let pid = daemon.pid();
        let descriptors = procfs::settled_descriptors(pid);
        let (memory, threads) = (procfs::status_kib(pid, "RssAnon"), procfs::own_threads(pid));
        let (Some(memory_kib), Some(threads)) = (memory, threads) else {
            bail!("process {pid} cannot be looked at");
        };
        Ok(Usage {
            memory_kib,
            descriptors,
            threads,
        })
    }

    /// [`Self::of`] once there are no more threads than `threads`: those of a session that ended
    /// go after it.
    ///
    /// # Errors
    /// The process cannot be looked at.
    pub fn settled(daemon: &Daemon, threads: u64) -> anyhow::Result<Usage> {
        let pid = daemon.pid();
        // What does not settle shows in the comparison.
        eventually(|| procfs::own_threads(pid).is_none_or(|now| now <= threads));
        Usage::of(daemon)
    }

    /// Compares with a fresh daemon over the same cache.
    ///
    /// # Errors
    /// There is more than a fresh one has.
    pub fn check(&self, fresh: &Usage) -> anyhow::Result<()> {
        ensure!(
            self.memory_kib <= fresh.memory_kib + MEMORY_SLACK_KIB
                && self.descriptors <= fresh.descriptors
                && self.threads <= fresh.threads,
            "the daemon keeps {self:?}, a fresh one over the same cache has {fresh:?}"
        );
        Ok(())
    }
}

/// Gauges that are 0 once all engines are gone.
const EMPTY: [Gauge; 10] = [
    Gauge::Sessions,
    Gauge::Instances,
    Gauge::Leases,
    Gauge::BlocksPinned,
    Gauge::BlocksUnfinished,
    Gauge::CopyTasks,
    Gauge::Requests,
    Gauge::Prefetches,
    Gauge::SsdReading,
    Gauge::SsdWriting,
];

/// Waits until nothing of the engines is left in the daemon.
///
/// # Errors
/// Something stays.
pub fn check_empty(daemon: &Daemon) -> anyhow::Result<()> {
    for gauge in EMPTY {
        if !daemon.gauge_becomes(gauge, 0) {
            let (left, labels) = (daemon.gauge(gauge), gauge.labels());
            bail!(
                "{} {labels:?} is {left} without engines\n{}",
                gauge.family(),
                daemon.log()
            );
        }
    }
    let granted = daemon.counter(Counter::LeasesGranted);
    let ended: u64 = [
        Counter::LeasesConsumed,
        Counter::LeasesReleased,
        Counter::LeasesExpired,
        Counter::LeasesReplaced,
        Counter::LeasesOwnerGone,
    ]
    .into_iter()
    .map(|counter| daemon.counter(counter))
    .sum();
    ensure!(
        granted == ended,
        "{granted} leases were granted, {ended} have ended"
    );
    let links = daemon.shm().join("sessions");
    // They go right after the session has left the gauge.
    let left = || std::fs::read_dir(&links).map_or(0, Iterator::count);
    if !eventually(|| left() == 0) {
        bail!("{} links are left in {}", left(), links.display());
    }
    Ok(())
}

/// Looks for what no log may have.
///
/// # Errors
/// A panic, or an error line.
pub fn check_log(daemon: &Daemon) -> anyhow::Result<()> {
    let log = daemon.log();
    let bad = |line: &&str| line.contains("panicked") || line.contains(" ERROR ");
    match log.lines().find(bad) {
        Some(line) => bail!("the daemon's log says: {line}"),
        None => Ok(()),
    }
}
