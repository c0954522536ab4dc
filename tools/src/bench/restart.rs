//! `bench restart`: from starting a daemon over the full pool of a killed one until it answers the
//! first query with a hit.

#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pegaflow_shm::BlockHash;
use pegaflow_shm::node::Counter;
use serde::Serialize;
use serde_json::json;

use super::{RestartArgs, identity};
use crate::daemon::{DaemonSpec, OwnDaemon};
use crate::error::ToolError;
use crate::node::{NodePlace, NodeView};
use crate::output::{count, nanos, print_json, size, table};
use crate::replay::kv::{KvShape, MemoryKind};
use crate::replay::latency::median;
use crate::replay::member::{Identity, Member, expect_ok};
use crate::replay::trace::block_hash;

/// Pools measured when no flag names one.
const USUAL_GIB: [u64; 3] = [1, 4, 8];
/// Bytes that the filling worker saves at a time.
const BATCH_BYTES: u64 = 64 << 20;
/// Blocks of the first query and load.
const FIRST_BLOCKS: u32 = 64;
const STYLE: &str = "{msg} {wide_bar} {pos} of {len} blocks, {eta}";

/// One pool size; seconds are medians of the restarts.
#[derive(Clone, Debug, Serialize)]
struct Row {
    pool_bytes: u64,
    page_bytes: u64,
    /// Blocks in the pool when the daemon was killed: all that fit.
    blocks: u64,
    /// Blocks that the next daemon took over; the least of all restarts.
    adopted_blocks: u64,
    restarts: usize,
    /// Start of a daemon without a pool, until its socket accepts.
    new_pool_s: f64,
    /// Start of the process until its socket accepts.
    socket_s: f64,
    /// Start of the process until a query is answered with a hit: connected, registered, asked.
    query_s: f64,
    /// The slowest of these.
    query_max_s: f64,
    /// `query_s` per GiB of the pool.
    query_s_per_gib: f64,
}

/// `pegactl bench restart`.
///
/// # Errors
/// A daemon does not start, or does not have what was saved.
pub fn command(
    args: &RestartArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    if let Some(socket) = socket {
        return Err(ToolError::Plan(format!(
            "bench restart kills its daemon, so it starts its own: leave --socket {} out",
            socket.display()
        )));
    }
    let page_bytes = args.page_bytes.as_u64();
    if page_bytes < 512 || !page_bytes.is_multiple_of(64) || page_bytes > BATCH_BYTES {
        return Err(ToolError::Plan(format!(
            "--page-bytes {page_bytes}: give a multiple of 64 from 512 to {BATCH_BYTES}"
        )));
    }
    let usual = USUAL_GIB.map(ByteSize::gib).to_vec();
    let sizes = if args.pool_size.is_empty() {
        usual
    } else {
        args.pool_size.clone()
    };
    let mut rows = Vec::new();
    for pool in sizes {
        rows.push(measure(
            pool.as_u64(),
            page_bytes,
            args.restarts.get(),
            place,
        )?);
    }
    if as_json {
        print_json(&json!({ "rows": rows }));
    } else {
        println!("{}", render(&rows));
    }
    Ok(())
}

fn render(rows: &[Row]) -> comfy_table::Table {
    let header = [
        "pool",
        "page",
        "blocks",
        "adopted",
        "restarts",
        "new pool",
        "exec to socket",
        "exec to first hit",
        "slowest",
        "per GiB",
    ];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    for row in rows {
        table.add_row([
            size(row.pool_bytes),
            size(row.page_bytes),
            count(row.blocks),
            count(row.adopted_blocks),
            row.restarts.to_string(),
            nanos(row.new_pool_s * 1e9),
            nanos(row.socket_s * 1e9),
            nanos(row.query_s * 1e9),
            nanos(row.query_max_s * 1e9),
            nanos(row.query_s_per_gib * 1e9),
        ]);
    }
    table
}

fn measure(
    pool_bytes: u64,
    page_bytes: u64,
    restarts: usize,
    place: &NodePlace,
) -> Result<Row, ToolError> {
    let mut spec = DaemonSpec::with_pool(pool_bytes);
    spec.max_blocks = Some((pool_bytes / page_bytes).max(65_536));
    let mut daemon = OwnDaemon::start(&spec, &place.shm_dir)?;
    let new_pool = daemon.started_in();
    let kv = KvShape {
        memory: MemoryKind::Shared,
        num_blocks: (BATCH_BYTES.min(pool_bytes / 4) / page_bytes) as u32,
        page_bytes: page_bytes as usize,
        segments: 1,
    };
    let identity = identity(daemon.socket(), "restart", kv);
    let blocks = fill(&daemon, &identity, pool_bytes)?;
    let (mut sockets, mut queries, mut adopted_blocks) = (Vec::new(), Vec::new(), u64::MAX);
    let progress = progress(
        "restarting",
        restarts as u64,
        "{msg} {wide_bar} {pos} of {len}",
    );
    for round in 0..restarts as u64 {
        daemon.kill()?;
        let started = daemon.start_again()?;
        sockets.push(daemon.started_in().as_secs_f64());
        let first = first_hit(&identity, round, blocks, started)?;
        queries.push(first.as_secs_f64());
        let view = NodeView::open(daemon.place())?;
        adopted_blocks = adopted_blocks.min(view.reader.counter(Counter::AdoptedBlocks));
        progress.inc(1);
    }
    progress.finish_and_clear();
    let query_s = median(&queries);
    Ok(Row {
        pool_bytes,
        page_bytes,
        blocks,
        adopted_blocks,
        restarts,
        new_pool_s: new_pool.as_secs_f64(),
        socket_s: median(&sockets),
        query_s,
        query_max_s: queries.iter().copied().fold(0.0, f64::max),
        query_s_per_gib: query_s / (pool_bytes as f64 / f64::from(1 << 30)),
    })
}

fn progress(what: &'static str, total: u64, style: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.with_message(what)
}

/// Saves different blocks until none more fits without eviction; returns how many.
fn fill(daemon: &OwnDaemon, identity: &Identity, pool_bytes: u64) -> Result<u64, ToolError> {
    let (member, mut kv) = Member::worker(identity, 0)?;
    member.wait_ready()?;
    let batch = u64::from(kv.shape().num_blocks);
    for block in 0..batch {
        kv.compute(block as u32, block)?;
    }
    let total = pool_bytes / identity.kv.page_bytes as u64;
    let bar = progress("filling", total, STYLE);
    let mut done = 0;
    while done < total {
        let now = batch.min(total - done);
        let hashes: Vec<BlockHash> = (done..done + now).map(block_hash).collect();
        let blocks: Vec<u32> = (0..now as u32).collect();
        let answer = expect_ok("save", member.save(&hashes, &blocks)?)?;
        if u64::from(answer.count) != now {
            return Err(daemon.failure(format!("stored {} of {now} blocks", answer.count)));
        }
        done += now;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    Ok(total)
}

/// Connects, registers, asks for blocks of the middle of the pool; then loads and checks them.
fn first_hit(
    identity: &Identity,
    round: u64,
    total: u64,
    started: Instant,
) -> Result<Duration, ToolError> {
    let batch = u64::from(identity.kv.num_blocks);
    let wanted = FIRST_BLOCKS.min(identity.kv.num_blocks);
    let small = Identity {
        kv: KvShape {
            num_blocks: wanted,
            ..identity.kv
        },
        ..identity.clone()
    };
    let (member, mut kv) = Member::worker(&small, 0)?;
    member.wait_ready()?;
    // Another batch each time, from its first block on.
    let first = (total / batch / 2 + round) % (total / batch) * batch;
    let hashes: Vec<BlockHash> = (first..first + u64::from(wanted)).map(block_hash).collect();
    let answer = expect_ok("query", member.query(1, &hashes)?)?;
    let took = started.elapsed();
    let wrong = |what: String| ToolError::Child {
        process: "the restarted daemon".into(),
        what,
    };
    if answer.count != wanted {
        return Err(wrong(format!("has {} of {wanted} blocks", answer.count)));
    }
    let blocks: Vec<u32> = (0..wanted).collect();
    for block in &blocks {
        kv.poison(*block, round)?;
    }
    expect_ok("load", member.load(answer.lease, &blocks)?)?;
    for block in &blocks {
        if let Err(mismatch) = kv.verify(*block, u64::from(*block))? {
            return Err(wrong(format!(
                "loaded wrong bytes into {block}: {mismatch:?}"
            )));
        }
    }
    Ok(took)
}
