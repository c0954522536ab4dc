//! Ranges and contradictions, each reported with option, value and the way out.

#![forbid(unsafe_code)]

use std::time::Duration;

use bytesize::ByteSize;
use pegaflow_shm::index;
use pegaflow_shm::node::SESSION_ROWS;
use pegaflow_shm::paths;

use super::options::Config;
use super::ssd::check_ssd;
use crate::policy::MAX_CAPACITY;
use crate::pool::{EXTENT_GRANULE_BYTES, MAX_EXTENT_BYTES};

/// Smallest pool.
pub const MIN_POOL_BYTES: u64 = 1 << 20;
/// Smallest extent.
const MIN_EXTENT_BYTES: u64 = 64 << 10;
/// A pool has at least this many extents.
const MIN_EXTENTS: u64 = 4;
/// Most copy threads.
pub const MAX_COPY_THREADS: u32 = 64;
/// Most leases.
pub const MAX_LEASES: u32 = 1 << 24;
/// Most instances.
pub const MAX_INSTANCES: u32 = 4096;
/// Most blocks: the index and the eviction policy each have a limit.
pub(super) const MAX_BLOCKS: u32 = if index::MAX_ENTRIES < MAX_CAPACITY {
    index::MAX_ENTRIES
} else {
    MAX_CAPACITY
};
/// Longest path that a Unix socket address holds, without the closing zero.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Less would be no room for a page of many layers in each slot.
const MIN_STAGING_BYTES: u64 = 16 << 20;
/// A slot's places have 31 bits.
const MAX_STAGING_BYTES: u64 = 4 << 30;
/// Slowest copying, in bytes a second.
const MIN_RATE: u64 = 1 << 20;
const SHORTEST_TTL: Duration = Duration::from_millis(100);
const LONGEST_TTL: Duration = Duration::from_secs(24 * 3600);
const LONGEST_DRAIN: Duration = Duration::from_secs(3600);
const LONGEST_SPIN_US: u32 = 10_000;

/// An option that contradicts a limit or another option.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) option: &'static str,
    pub(super) text: String,
}

/// Checks everything and adjusts what is only rounded; a note tells of each adjustment.
pub(super) fn check(config: &mut Config) -> (Vec<Problem>, Vec<String>) {
    let mut problems = Problems(Vec::new());
    let mut notes = Vec::new();
    check_names(config, &mut problems);
    check_pool(config, &mut problems, &mut notes);
    check_counts(config, &mut problems);
    check_times(config, &mut problems);
    check_http(config, &mut problems);
    check_devices(config, &mut problems);
    check_ssd(config, &mut problems);
    (problems.0, notes)
}

pub(super) struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, option: &'static str, text: String) {
        self.0.push(Problem { option, text });
    }

    pub(super) fn range<T: PartialOrd>(
        &mut self,
        option: &'static str,
        value: T,
        low: T,
        high: T,
        way_out: &str,
    ) {
        if value < low || value > high {
            self.add(option, way_out.to_owned());
        }
    }
}

fn check_names(config: &Config, problems: &mut Problems) {
    if let Err(fault) = paths::check_node_name(&config.node) {
        problems.add("node", fault.to_string());
    }
    let length = config.socket.as_os_str().len();
    if !config.socket.is_absolute() {
        problems.add(
            "socket",
            "give an absolute path, or clients look elsewhere".into(),
        );
    } else if length > MAX_SOCKET_PATH_BYTES {
        let text = format!(
            "the path has {length} bytes, a Unix socket's at most {MAX_SOCKET_PATH_BYTES}: \
             choose a shorter one"
        );
        problems.add("socket", text);
    } else if config.socket.file_name().is_none() {
        problems.add("socket", "the path names a folder: add a file name".into());
    }
    if config.socket_mode & 0o600 != 0o600 {
        problems.add(
            "socket-mode",
            "the owner needs read and write: give 0600 or more".into(),
        );
    }
}

fn check_pool(config: &mut Config, problems: &mut Problems, notes: &mut Vec<String>) {
    let before = problems.0.len();
    if config.pool_bytes < MIN_POOL_BYTES {
        problems.add("pool-size", "the smallest pool is 1MiB: give more".into());
    }
    let extent = config.extent_bytes;
    if !(MIN_EXTENT_BYTES..=MAX_EXTENT_BYTES).contains(&extent)
        || !extent.is_multiple_of(EXTENT_GRANULE_BYTES)
    {
        let text = format!(
            "give 64KiB to {}, a multiple of 4KiB",
            ByteSize(MAX_EXTENT_BYTES)
        );
        problems.add("extent-size", text);
    }
    if problems.0.len() > before {
        return;
    }
    if config.pool_bytes / extent < MIN_EXTENTS {
        let fitting = config.pool_bytes / MIN_EXTENTS / EXTENT_GRANULE_BYTES * EXTENT_GRANULE_BYTES;
        notes.push(format!(
            "extent-size is made smaller, {} instead of {}, so that a pool of {} has {MIN_EXTENTS} \
             extents; pages can be no larger",
            ByteSize(fitting),
            ByteSize(extent),
            ByteSize(config.pool_bytes)
        ));
        config.extent_bytes = fitting;
    }
    let whole = config.pool_bytes / config.extent_bytes * config.extent_bytes;
    if whole != config.pool_bytes {
        notes.push(format!(
            "pool-size is rounded down from {} to {} bytes, whole extents of {}",
            config.pool_bytes,
            whole,
            ByteSize(config.extent_bytes)
        ));
        config.pool_bytes = whole;
    }
    check_room(config, problems);
}

/// The pool must be able to fit the file system at all; what is free now is asked when it is made.
fn check_room(config: &Config, problems: &mut Problems) {
    let mut dir = paths::node_dir(&config.node);
    while !dir.exists() && dir.pop() {}
    let Ok(room) = rustix::fs::statvfs(&dir) else {
        return;
    };
    let total_bytes = room.f_blocks.saturating_mul(room.f_frsize);
    if config.pool_bytes > total_bytes {
        let text = format!(
            "the file system at {} has {} in all: give less, or remount it with a larger size",
            dir.display(),
            ByteSize(total_bytes)
        );
        problems.add("pool-size", text);
    }
}

fn check_counts(config: &Config, problems: &mut Problems) {
    let sessions = SESSION_ROWS as u32;
    let counts = [
        ("max-blocks", config.max_blocks, 1, MAX_BLOCKS),
        ("copy-threads", config.copy_threads, 1, MAX_COPY_THREADS),
        ("max-sessions", config.max_sessions, 1, sessions),
        ("max-leases", config.max_leases, 1, MAX_LEASES),
        ("max-instances", config.max_instances, 1, MAX_INSTANCES),
        ("spin-us", config.spin_us, 0, LONGEST_SPIN_US),
    ];
    for (option, value, low, high) in counts {
        problems.range(option, value, low, high, &format!("give {low} to {high}"));
    }
}

fn check_times(config: &Config, problems: &mut Problems) {
    for (option, value) in [
        ("lease-ttl", config.lease_ttl),
        ("lease-ttl-max", config.lease_ttl_max),
        ("incomplete-ttl", config.incomplete_ttl),
    ] {
        problems.range(
            option,
            value,
            SHORTEST_TTL,
            LONGEST_TTL,
            "give 100ms to 24h",
        );
    }
    problems.range(
        "drain-timeout",
        config.drain_timeout,
        Duration::ZERO,
        LONGEST_DRAIN,
        "give 0s to 1h",
    );
    if config.lease_ttl > config.lease_ttl_max {
        let text = format!(
            "it is longer than lease-ttl-max, {}: lower it, or raise --lease-ttl-max",
            humantime::format_duration(config.lease_ttl_max)
        );
        problems.add("lease-ttl", text);
    }
}

fn check_devices(config: &Config, problems: &mut Problems) {
    let staging = config.device_staging;
    if staging != 0 && !(MIN_STAGING_BYTES..=MAX_STAGING_BYTES).contains(&staging) {
        let text = format!(
            "give 0, or {} to {}",
            ByteSize(MIN_STAGING_BYTES),
            ByteSize(MAX_STAGING_BYTES)
        );
        problems.add("device-staging", text);
    }
    if config.d2h_limit.is_some_and(|limit| limit < MIN_RATE) {
        let text = format!(
            "saves would hardly move: give off, or at least {} a second",
            ByteSize(MIN_RATE)
        );
        problems.add("d2h-limit", text);
    }
}

fn check_http(config: &Config, problems: &mut Problems) {
    if let Some(address) = config.http
        && !address.ip().is_loopback()
        && !config.http_allow_remote
    {
        let text = "other hosts could reach the unprotected pages: listen on 127.0.0.1, or say \
                    --http-allow-remote";
        problems.add("http", text.into());
    }
}
