//! `bench`: latency and throughput, each beside the limit of the machine in the same run.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod c_scheduler;
pub mod gpu;
#[allow(unsafe_code)]
mod memcpy;
pub mod query;
pub mod restart;
pub mod rings;
pub mod rings_table;
pub mod save;
pub mod ssd;

use std::num::NonZero;
use std::path::Path;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget};

use crate::daemon::{DaemonInUse, DaemonSpec};
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::print_json;
use crate::replay::kv::{KvShape, MemoryKind};
use crate::replay::latency::median;
use crate::replay::member::{Identity, Member};

/// What to measure.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// Rings and doorbells between two processes, against the cache line's own round trip, eventfds
    /// and an unchecked textbook ring
    Rings(RingsArgs),
    /// Query (with lease), probe and release of a fully cached prefix, from another process than
    /// the one that saved it
    Query(QueryArgs),
    /// Save until sealed, and load, against memcpy with the daemon's number of copy threads
    Save(SaveArgs),
    /// Save and load of GPU memory, against one large copy of the same run (needs an NVIDIA GPU)
    Gpu(gpu::GpuArgs),
    /// Restart of a killed daemon over its full pool, until the first query is a hit
    Restart(RestartArgs),
    /// Pages to and from an SSD shard, against fio over the same file in the same run (needs fio)
    Ssd(ssd::SsdArgs),
}

/// Flags of `bench rings`.
#[derive(Clone, Debug, Args)]
pub struct RingsArgs {
    /// Rounds over all cases; each figure is the median of its rounds
    #[arg(long, default_value = "5")]
    pub rounds: NonZero<usize>,
    /// Leave out the round trip through a daemon and the client library
    #[arg(long)]
    pub no_daemon: bool,
}

/// Flags of `bench query`.
#[derive(Clone, Debug, Args)]
pub struct QueryArgs {
    /// Blocks of the prefix [default: 128, 1024, 8192 and 32768 in a table]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub blocks: Option<u32>,
    /// Rounds for each number of blocks [default: as many as fit into about two seconds]
    #[arg(long)]
    pub rounds: Option<NonZero<usize>>,
}

/// A daemon's `--checksum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Checksum {
    /// No page.
    Off,
    /// Every 16th saved page.
    Sampled,
    /// Every page.
    Always,
}

impl Checksum {
    fn name(self) -> &'static str {
        match self {
            Checksum::Off => "off",
            Checksum::Sampled => "sampled",
            Checksum::Always => "always",
        }
    }
}

/// Flags of `bench save`.
#[derive(Clone, Debug, Args)]
pub struct SaveArgs {
    /// Blocks of one save [default: 8192 of 1 KiB and 64 of 2 MiB]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub blocks: Option<u32>,
    /// Bytes of a block, such as 1KiB or 2MiB; a multiple of 8
    #[arg(long, value_name = "BYTES")]
    pub page_bytes: Option<ByteSize>,
    /// KV memory [default: both kinds; the main figures are those of shared memory]
    #[arg(long, value_enum)]
    pub memory: Option<MemoryKind>,
    /// Copy threads of the daemon [default: the daemon's]
    #[arg(long, value_name = "N")]
    pub copy_threads: Option<NonZero<u32>>,
    /// Checksum modes of the daemon, one after the other: off,sampled,always [default: off]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODE")]
    pub checksum: Vec<Checksum>,
    /// Rounds [default: as many as fit into the pool, at most 20]
    #[arg(long)]
    pub rounds: Option<NonZero<usize>>,
}

/// Flags of `bench restart`.
#[derive(Clone, Debug, Args)]
pub struct RestartArgs {
    /// Pools, such as 1GiB,4GiB,8GiB; each is filled, so shared memory must have room for it
    /// [default: 1GiB,4GiB,8GiB]
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    pub pool_size: Vec<ByteSize>,
    /// Bytes of a block; a multiple of 64
    #[arg(long, value_name = "BYTES", default_value = "64KiB")]
    pub page_bytes: ByteSize,
    /// Kills and restarts of each pool; figures are their medians
    #[arg(long, default_value = "5")]
    pub restarts: NonZero<usize>,
}

/// `pegactl bench`.
///
/// # Errors
/// A daemon or a process keeps it from finishing.
pub fn bench(
    command: &BenchCommand,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    match command {
        BenchCommand::Rings(args) => rings_command(args, socket, place, as_json),
        BenchCommand::Query(args) => query::command(args, socket, place, as_json),
        BenchCommand::Save(args) => save::command(args, socket, place, as_json),
        BenchCommand::Gpu(args) => gpu::command(args, socket, place, as_json),
        BenchCommand::Restart(args) => restart::command(args, socket, place, as_json),
        BenchCommand::Ssd(args) => ssd::command(args, as_json),
    }
}

/// Empty requests in one measurement through the daemon.
const NOP_BATCHES: usize = 200;
const NOPS_PER_BATCH: usize = 20;

fn rings_command(
    args: &RingsArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    let rounds = args.rounds.get();
    let bar = ProgressBar::with_draw_target(Some(rounds as u64), ProgressDrawTarget::stderr());
    let progress = |round| bar.set_position(round as u64);
    let report = if args.no_daemon {
        rings::run(rounds, None, progress)?
    } else {
        // Before the pinning: the daemon's threads would inherit it.
        let mut daemon = DaemonInUse::new(socket, place, &DaemonSpec::with_pool(16 << 20))?;
        let member = Member::scheduler(&identity(daemon.socket(), "rings", tiny_kv()))?;
        let measured = rings::run(rounds, Some(&mut || nop_median_ns(&member)), progress);
        measured.map_err(|error| daemon.explain(error))?
    };
    bar.finish_and_clear();
    if as_json {
        print_json(&report);
    } else {
        println!("{}", rings_table::render(&report));
    }
    Ok(())
}

fn nop_median_ns(member: &Member) -> Result<f64, ToolError> {
    let mut means = Vec::with_capacity(NOP_BATCHES);
    for _ in 0..NOP_BATCHES {
        let start = Instant::now();
        for _ in 0..NOPS_PER_BATCH {
            member.nop()?;
        }
        means.push(start.elapsed().as_nanos() as f64 / NOPS_PER_BATCH as f64);
    }
    Ok(median(&means))
}

fn tiny_kv() -> KvShape {
    KvShape {
        memory: MemoryKind::Shared,
        num_blocks: 1,
        page_bytes: 4096,
        segments: 1,
    }
}

/// An instance of one rank for a bench.
fn identity(socket: &Path, name: &str, kv: KvShape) -> Identity {
    let unique = format!("{}-{}", std::process::id(), crate::output::unix_now_ms());
    Identity {
        socket: socket.to_owned(),
        instance: format!("bench-{name}-{unique}"),
        salt: format!("bench {name} {unique}"),
        world_size: 1,
        kv,
    }
}

/// Rounds of about `each` that fit into `budget`, within bounds.
fn rounds_for(each: Duration, budget: Duration, least: usize, most: usize) -> usize {
    let fit = budget.as_nanos() / each.as_nanos().max(1);
    (fit as usize).clamp(least, most)
}
