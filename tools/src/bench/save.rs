//! `bench save`: from submitting a save of new blocks until all are sealed, and the load of the
//! same blocks.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use pegaflow_shm::BlockHash;
use pegaflow_shm::node::{Counter, Gauge};
use rustix::fs::statvfs;
use serde::Serialize;
use serde_json::{Value, json};
use twox_hash::XxHash3_64;

use super::memcpy::Memcpy;
use super::{Checksum, SaveArgs, identity};
use crate::daemon::{DaemonInUse, DaemonSpec};
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::{count, nanos, print_json, size, table};
use crate::replay::kv::{KvCache, KvShape, MemoryKind};
use crate::replay::latency::{median, quantile};
use crate::replay::member::{Member, expect_ok};
use crate::replay::trace::block_hash;

/// Blocks and page bytes measured when no flag names them.
const USUAL: [(u32, u64); 2] = [(8192, 1 << 10), (64, 2 << 20)];
const MOST_ROUNDS: u64 = 20;
/// Largest pool for a bench.
const MOST_POOL_BYTES: u64 = 4 << 30;

/// Microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

/// One kind of memory, number of blocks and page size.
#[derive(Clone, Debug, Serialize)]
struct Row {
    memory: MemoryKind,
    blocks: u32,
    page_bytes: u64,
    rounds: usize,
    /// Save submitted to all blocks sealed.
    sealed_us: Quantiles,
    /// Rate of the median save.
    gbps: f64,
    /// Load submitted to all blocks in place.
    loaded_us: Quantiles,
    /// Rate of the median load.
    load_gbps: f64,
    /// `memcpy` between a memfd and a tmpfs file with as many threads, median around the saves.
    memcpy_gbps: f64,
    /// Copy threads of the daemon.
    copy_threads: u64,
    /// The daemon's `--checksum`.
    checksum: &'static str,
    /// The checksum alone, one thread.
    xxh3_gbps: f64,
    /// CPU of the daemon's copy threads per saved page, by its own counter.
    cpu_us_per_page: f64,
    /// CPU of the whole daemon per page, saved and loaded, by the scheduler's account.
    daemon_cpu_us_per_page: Option<f64>,
}

/// `pegactl bench save`.
///
/// # Errors
/// A daemon or a process keeps it from finishing.
pub fn command(
    args: &SaveArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    let cases = cases(args)?;
    let kinds = args.memory.map_or_else(
        || vec![MemoryKind::Shared, MemoryKind::Process],
        |k| vec![k],
    );
    let mut rows = Vec::new();
    let modes = if args.checksum.is_empty() {
        vec![Checksum::Off]
    } else {
        args.checksum.clone()
    };
    for case in &cases {
        for memory in &kinds {
            for mode in &modes {
                rows.push(measure(args, socket, place, *case, *memory, *mode)?);
            }
        }
    }
    if as_json {
        print_json(&as_one_object(&rows, cases.len()));
        return Ok(());
    }
    let header = [
        "blocks",
        "page",
        "KV memory",
        "checksum",
        "rounds",
        "sealed p50",
        "save",
        "save / memcpy",
        "load",
        "load / memcpy",
        "memcpy",
        "CPU per page",
        "xxh3",
    ];
    let mut table = table(&header, &[0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    for row in &rows {
        table.add_row([
            count(u64::from(row.blocks)),
            size(row.page_bytes),
            format!("{:?}", row.memory).to_lowercase(),
            row.checksum.to_owned(),
            row.rounds.to_string(),
            nanos(row.sealed_us.p50 * 1e3),
            format!("{:.2} GB/s", row.gbps),
            format!("{:.2}", row.gbps / row.memcpy_gbps),
            format!("{:.2} GB/s", row.load_gbps),
            format!("{:.2}", row.load_gbps / row.memcpy_gbps),
            format!("{:.2} GB/s", row.memcpy_gbps),
            nanos(row.cpu_us_per_page * 1e3),
            format!("{:.1} GB/s", row.xxh3_gbps),
        ]);
    }
    let threads = rows.first().map_or(0, |row| row.copy_threads);
    println!(
        "new blocks in each round, {threads} copy threads; memcpy: memfd to tmpfs, as many \
         threads; xxh3: page by page over as much memory, one thread"
    );
    println!("{table}");
    Ok(())
}

fn cases(args: &SaveArgs) -> Result<Vec<(u32, u64)>, ToolError> {
    if let Some(page_bytes) = args.page_bytes {
        let bytes = page_bytes.as_u64();
        if bytes == 0 || !bytes.is_multiple_of(8) {
            return Err(ToolError::Plan(format!(
                "--page-bytes {bytes}: give a multiple of 8"
            )));
        }
    }
    Ok(match (args.blocks, args.page_bytes) {
        (None, None) => USUAL.to_vec(),
        (blocks, bytes) => {
            vec![(
                blocks.unwrap_or(USUAL[0].0),
                bytes.map_or(USUAL[0].1, |bytes| bytes.as_u64()),
            )]
        }
    })
}

/// The first row's figures on top, every row under `rows`.
fn as_one_object(rows: &[Row], cases: usize) -> Value {
    let mut value = match (rows.first(), cases) {
        (Some(first), 1) => json!(first),
        _ => json!({}),
    };
    value["rows"] = json!(rows);
    value
}

/// Rounds, and a pool in which all their blocks fit if the machine has the room.
fn plan_pool(place: &NodePlace, bytes: u64, wanted: Option<usize>) -> (u64, u64) {
    let folder = place.shm_dir.ancestors().find(|folder| folder.exists());
    let free = folder
        .and_then(|folder| statvfs(folder).ok())
        .map_or(MOST_POOL_BYTES, |space| space.f_bavail * space.f_frsize);
    // The KV memory and both sides of the memcpy are on tmpfs as well.
    let room = (free / 2).saturating_sub(3 * bytes).min(MOST_POOL_BYTES);
    let rounds = wanted.map_or_else(
        || (room / bytes).saturating_sub(1).clamp(3, MOST_ROUNDS),
        |n| n as u64,
    );
    let pool = ((rounds + 1) * bytes * 5 / 4)
        .min(room.max(2 * bytes))
        .max(64 << 20);
    (rounds, pool)
}

fn measure(
    args: &SaveArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    (blocks, page_bytes): (u32, u64),
    memory: MemoryKind,
    checksum: Checksum,
) -> Result<Row, ToolError> {
    let bytes = u64::from(blocks) * page_bytes;
    let (rounds, pool_bytes) = plan_pool(place, bytes, args.rounds.map(std::num::NonZero::get));
    let mut spec = DaemonSpec::with_pool(pool_bytes);
    spec.copy_threads = args.copy_threads.map(std::num::NonZero::get);
    spec.checksum = Some(checksum.name().to_owned());
    spec.max_blocks = Some((pool_bytes / page_bytes.max(512)).max(65_536));
    let mut daemon = DaemonInUse::new(socket, place, &spec)?;
    let kv = KvShape {
        memory,
        num_blocks: blocks,
        page_bytes: page_bytes as usize,
        segments: 1,
    };
    measure_with(&daemon, place, (kv, checksum), rounds as usize)
        .map_err(|error| daemon.explain(error))
}

/// Speed of the checksum alone, on one thread, over memory that is not in the cache when there is
/// much of it.
fn xxh3_gbps(bytes: u64, page_bytes: u64) -> f64 {
    let memory = vec![0x5A_u8; bytes as usize];
    let rounds: Vec<f64> = (0..5)
        .map(|_| {
            let start = Instant::now();
            for page in memory.chunks(page_bytes as usize) {
                std::hint::black_box(XxHash3_64::oneshot(std::hint::black_box(page)));
            }
            start.elapsed().as_nanos() as f64
        })
        .collect();
    bytes as f64 / median(&rounds)
}

/// CPU time of each thread of a process in nanoseconds, by the scheduler's account.
pub(super) struct ThreadTimes(BTreeMap<OsString, u64>);

impl ThreadTimes {
    /// As of now; `None` when the process is gone.
    pub(super) fn of(pid: u32) -> Option<ThreadTimes> {
        let mut times = BTreeMap::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .ok()?
            .flatten()
        {
            // Unless the thread has just ended.
            if let Ok(text) = std::fs::read_to_string(task.path().join("schedstat")) {
                times.insert(task.file_name(), text.split(' ').next()?.parse().ok()?);
            }
        }
        Some(ThreadTimes(times))
    }

    /// What has been used since an earlier moment, but for threads that have ended meanwhile.
    pub(super) fn since(&self, earlier: &ThreadTimes) -> u64 {
        let used = |(thread, ns): (&OsString, &u64)| {
            ns.saturating_sub(earlier.0.get(thread).copied().unwrap_or(0))
        };
        self.0.iter().map(used).sum()
    }
}

fn measure_with(
    daemon: &DaemonInUse,
    place: &NodePlace,
    (kv_shape, checksum): (KvShape, Checksum),
    rounds: usize,
) -> Result<Row, ToolError> {
    let (blocks, page_bytes) = (kv_shape.num_blocks, kv_shape.page_bytes as u64);
    let bytes = kv_shape.total_bytes();
    let view = daemon.view()?;
    let copy_threads = view.reader.gauge(Gauge::CopyThreads);
    let memcpy = Memcpy::new(&place.shm_dir, bytes, copy_threads as usize)?;
    let identity = identity(daemon.socket(), "save", kv_shape);
    let (member, mut kv) = Member::worker(&identity, 0)?;
    member.wait_ready()?;
    let block_ids: Vec<u32> = (0..blocks).collect();
    for block in &block_ids {
        kv.compute(*block, u64::from(*block))?;
    }
    let counter = |counter| view.reader.counter(counter);
    let copied_before = (
        counter(Counter::CopySaveNanos),
        counter(Counter::SaveStored),
    );
    let cpu_before = ThreadTimes::of(view.header.pid);
    let (mut saves, mut loads, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds as u64 {
        let first = round * u64::from(blocks);
        let hashes: Vec<BlockHash> = (first..first + u64::from(blocks)).map(block_hash).collect();
        copies.push(memcpy.gbps()?);
        saves.push(one_save(&member, &hashes, &block_ids)?);
        copies.push(memcpy.gbps()?);
        loads.push(one_load(&member, &mut kv, round + 1, &hashes, &block_ids)?);
    }
    let saved_pages = counter(Counter::SaveStored) - copied_before.1;
    let copy_ns = counter(Counter::CopySaveNanos) - copied_before.0;
    let moved_pages = 2 * saved_pages;
    let cpu = cpu_before.and_then(|before| Some(ThreadTimes::of(view.header.pid)?.since(&before)));
    let us = |nanos: &[f64]| Quantiles {
        p50: quantile(nanos, 0.5) / 1e3,
        p99: quantile(nanos, 0.99) / 1e3,
    };
    Ok(Row {
        memory: kv_shape.memory,
        blocks,
        page_bytes,
        rounds,
        sealed_us: us(&saves),
        gbps: bytes as f64 / median(&saves),
        loaded_us: us(&loads),
        load_gbps: bytes as f64 / median(&loads),
        memcpy_gbps: median(&copies),
        copy_threads,
        checksum: checksum.name(),
        xxh3_gbps: xxh3_gbps(bytes as u64, page_bytes),
        cpu_us_per_page: copy_ns as f64 / saved_pages.max(1) as f64 / 1e3,
        daemon_cpu_us_per_page: cpu.map(|ns| ns as f64 / moved_pages.max(1) as f64 / 1e3),
    })
}

fn one_save(member: &Member, hashes: &[BlockHash], blocks: &[u32]) -> Result<f64, ToolError> {
    let start = Instant::now();
    let answer = member.save(hashes, blocks)?;
    let elapsed = start.elapsed();
    let answer = expect_ok("save", answer)?;
    if answer.count as usize != hashes.len() {
        let (stored, all) = (answer.count, hashes.len());
        let what = format!("stored {stored} of {all} new blocks: is its pool too small?");
        return Err(ToolError::Child {
            process: "the daemon".into(),
            what,
        });
    }
    Ok(elapsed.as_nanos() as f64)
}

fn one_load(
    member: &Member,
    kv: &mut KvCache,
    round: u64,
    hashes: &[BlockHash],
    blocks: &[u32],
) -> Result<f64, ToolError> {
    let answer = expect_ok("query", member.query(round, hashes)?)?;
    if answer.count as usize != hashes.len() {
        let (hits, all) = (answer.count, hashes.len());
        let what = format!("holds {hits} of {all} blocks that it has just sealed");
        return Err(ToolError::Child {
            process: "the daemon".into(),
            what,
        });
    }
    for block in blocks {
        kv.poison(*block, round)?;
    }
    let start = Instant::now();
    let loaded = member.load(answer.lease, blocks)?;
    let elapsed = start.elapsed();
    expect_ok("load", loaded)?;
    for block in blocks {
        if let Err(mismatch) = kv.verify(*block, u64::from(*block))? {
            let what = format!("loaded wrong bytes into block {block}: {mismatch:?}");
            return Err(ToolError::Child {
                process: "the daemon".into(),
                what,
            });
        }
    }
    Ok(elapsed.as_nanos() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_ends_takes_no_time_from_the_others() {
        let times = |list: &[(&str, u64)]| {
            let entry = |(thread, ns): &(&str, u64)| (OsString::from(*thread), *ns);
            ThreadTimes(list.iter().map(entry).collect())
        };
        let before = times(&[("1", 100), ("2", 5000)]);
        let after = times(&[("1", 130), ("3", 7)]);
        assert_eq!(after.since(&before), 37);
        let own = ThreadTimes::of(std::process::id()).expect("this process lives");
        assert_eq!(own.since(&own), 0);
        assert!(ThreadTimes::of(u32::MAX).is_none());
    }
}
