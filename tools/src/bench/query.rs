//! `bench query`: a worker process saves a prefix, this one probes, queries and releases it through
//! through the C interface.

#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow::ffi::pega_completion;
use pegaflow_shm::BlockHash;
use pegaflow_shm::status::Status;
use serde::Serialize;
use serde_json::json;

use super::c_scheduler::CScheduler;
use super::{QueryArgs, identity, rounds_for};
use crate::daemon::{DaemonInUse, DaemonSpec};
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::{count, nanos, print_json, table};
use crate::replay::kv::{KvShape, MemoryKind};
use crate::replay::latency::quantile;
use crate::replay::scheduler::WorkerProcess;
use crate::replay::trace::block_hash;
use crate::replay::worker::Task;

const PAGE_BYTES: u64 = 1024;
/// Sizes of the table.
const SIZES: [u32; 4] = [128, 1024, 8192, 32_768];
/// Time that one number of blocks may take.
const BUDGET: Duration = Duration::from_secs(2);

/// Microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

impl Quantiles {
    fn of(nanos: &[f64]) -> Quantiles {
        Quantiles {
            p50: quantile(nanos, 0.5) / 1e3,
            p99: quantile(nanos, 0.99) / 1e3,
        }
    }
}

/// One number of blocks.
#[derive(Clone, Copy, Debug, Serialize)]
struct Row {
    blocks: u32,
    rounds: usize,
    /// Query to lease.
    query_us: Quantiles,
    /// Time that the daemon says it took of it.
    daemon_us: Quantiles,
    /// Pure memory read.
    probe_us: Quantiles,
    /// Giving the lease back.
    release_us: Quantiles,
}

/// `pegactl bench query`.
///
/// # Errors
/// A daemon or a process keeps it from finishing.
pub fn command(
    args: &QueryArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    let sizes = args
        .blocks
        .map_or_else(|| SIZES.to_vec(), |blocks| vec![blocks]);
    let most = sizes.iter().copied().max().unwrap_or(1);
    let pool_bytes = (u64::from(most) * PAGE_BYTES * 2).max(16 << 20);
    let mut daemon = DaemonInUse::new(socket, place, &DaemonSpec::with_pool(pool_bytes))?;
    let rows = measure(&daemon, &sizes, most, args).map_err(|error| daemon.explain(error))?;
    if as_json {
        match (args.blocks, rows.as_slice()) {
            (Some(_), [row]) => print_json(row),
            _ => print_json(&json!({ "sizes": rows })),
        }
        return Ok(());
    }
    let header = [
        "blocks",
        "rounds",
        "query p50",
        "query p99",
        "per block",
        "in daemon",
        "probe p50",
        "probe p99",
        "per block",
        "release p50",
    ];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    for row in &rows {
        let each = |us: f64| format!("{:.1} ns", us * 1e3 / f64::from(row.blocks));
        let text = |us: f64| nanos(us * 1e3);
        table.add_row([
            count(u64::from(row.blocks)),
            row.rounds.to_string(),
            text(row.query_us.p50),
            text(row.query_us.p99),
            each(row.query_us.p50),
            text(row.daemon_us.p50),
            text(row.probe_us.p50),
            text(row.probe_us.p99),
            each(row.probe_us.p50),
            text(row.release_us.p50),
        ]);
    }
    println!("fully cached prefix, fresh request key each time, saved by another process\n{table}");
    Ok(())
}

fn measure(
    daemon: &DaemonInUse,
    sizes: &[u32],
    most: u32,
    args: &QueryArgs,
) -> Result<Vec<Row>, ToolError> {
    let kv = KvShape {
        memory: MemoryKind::Shared,
        num_blocks: most,
        page_bytes: PAGE_BYTES as usize,
        segments: 1,
    };
    let identity = identity(daemon.socket(), "query", kv);
    let mut worker = WorkerProcess::start(&identity, 0)?;
    worker.answer()?;
    let scheduler = CScheduler::connect(&identity)?;
    let hash_ids: Vec<u64> = (0..u64::from(most)).collect();
    let hashes: Vec<BlockHash> = hash_ids.iter().map(|id| block_hash(*id)).collect();
    let blocks = (0..most).collect();
    worker.send(&Task {
        number: 1,
        hash_ids,
        blocks,
        hits: 0,
        lease: 0,
    })?;
    let saved = worker.answer()?.map_or(0, |done| done.stored);
    if saved != u64::from(most) {
        let what = format!("saved {saved} of {most} blocks: is the daemon's pool too small?");
        return Err(ToolError::Child {
            process: "the worker".into(),
            what,
        });
    }
    let mut key = 0;
    let rows: Result<Vec<Row>, ToolError> = sizes
        .iter()
        .map(|size| one_size(&scheduler, &hashes[..*size as usize], args, &mut key))
        .collect();
    let rows = rows?;
    worker.finish()?;
    Ok(rows)
}

fn one_size(
    scheduler: &CScheduler,
    hashes: &[BlockHash],
    args: &QueryArgs,
    key: &mut u64,
) -> Result<Row, ToolError> {
    let mut once = || -> Result<[f64; 4], ToolError> {
        *key += 1;
        let start = Instant::now();
        let probed = scheduler.probe(hashes)?;
        let probe = start.elapsed();
        let start = Instant::now();
        let answer = scheduler.query(*key, hashes)?;
        let query = start.elapsed();
        expect_ok("query", &answer)?;
        if probed as usize != hashes.len() || answer.count as usize != hashes.len() {
            let (probe, query, all) = (probed, answer.count, hashes.len());
            let what = format!("of {all} cached blocks, probe found {probe} and query {query}");
            return Err(ToolError::Child {
                process: "the daemon".into(),
                what,
            });
        }
        let start = Instant::now();
        let released = scheduler.release(answer.lease)?;
        let release = start.elapsed();
        expect_ok("release", &released)?;
        let nanos = |elapsed: Duration| elapsed.as_nanos() as f64;
        Ok([
            nanos(query),
            answer.daemon_ns as f64,
            nanos(probe),
            nanos(release),
        ])
    };
    let start = Instant::now();
    for _ in 0..5 {
        once()?;
    }
    let each = start.elapsed() / 5;
    let rounds = args.rounds.map_or_else(
        || rounds_for(each, BUDGET, 50, 5_000),
        std::num::NonZero::get,
    );
    let samples: Result<Vec<[f64; 4]>, ToolError> = (0..rounds).map(|_| once()).collect();
    let samples = samples?;
    let column =
        |at: usize| Quantiles::of(&samples.iter().map(|sample| sample[at]).collect::<Vec<_>>());
    Ok(Row {
        blocks: hashes.len() as u32,
        rounds,
        query_us: column(0),
        daemon_us: column(1),
        probe_us: column(2),
        release_us: column(3),
    })
}

fn expect_ok(what: &str, answer: &pega_completion) -> Result<(), ToolError> {
    if answer.status == Status::Ok as u32 {
        return Ok(());
    }
    let status = u8::try_from(answer.status).ok().and_then(Status::from_code);
    Err(ToolError::Child {
        process: "the daemon".into(),
        what: format!("{what} was answered with {status:?} ({})", answer.status),
    })
}
