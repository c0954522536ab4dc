//! The command line of `pegactl`.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pegaflow_shm::paths;

use crate::bench::gpu::{ENGINE_ARGUMENT, engine_main};
use crate::bench::rings::{PEER_ARGUMENT, peer_main};
use crate::bench::{self, BenchCommand};
use crate::children;
use crate::daemon::{RUN_ARGUMENT, run_daemon};
use crate::doctor::doctor;
use crate::error::ToolError;
use crate::node::{NodePlace, NodeView};
use crate::replay::plan::ReplayArgs;
use crate::replay::replay;
use crate::replay::scheduler::{SCHEDULER_ARGUMENT, scheduler_main};
use crate::replay::worker::{WORKER_ARGUMENT, worker_main};
use crate::ssd::{SsdArgs, ssd};
use crate::top::{TopArgs, top};
use crate::{metrics, rings, status};

/// The work was done, but what it looked at is not as it should be.
const EXIT_BAD: u8 = 1;
/// The work could not be done.
const EXIT_FAILED: u8 = 3;

const AFTER: &str = "\
Exit status:
  0  done
  1  doctor: a check failed; replay: a loaded byte was wrong or a request failed; ssd: a shard
     is damaged or out of order
  2  the command line is wrong
  3  it could not be done (no such node, no daemon, a system call failed): see the message
  128 + N  ended by signal N; own daemons and processes are gone

status, sessions, rings, cache, leases, metrics and top read shared memory only: they work \
while the daemon is busy, and show the last state of a daemon that died. Sizes take units \
(4096, 4KiB, 1GB), times too (500ms, 2s).";

/// Look at a PegaFlow node, measure it, exercise it
#[derive(Debug, Parser)]
#[command(name = "pegactl", version, after_help = AFTER, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Global {
    /// Node to look at
    #[arg(long, global = true, value_name = "NAME", env = "PEGAFLOW_NODE", default_value = paths::DEFAULT_NODE)]
    node: String,
    /// Session socket of a running daemon. bench and replay use that daemon instead of one of their
    /// own
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Folder that holds one folder of shared files per node; on tmpfs
    #[arg(long, global = true, value_name = "DIR", env = "PEGAFLOW_SHM_DIR", default_value = paths::SHM_ROOT)]
    shm_dir: PathBuf,
    /// Print one JSON object instead of tables (top: one per interval)
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Whether the daemon is alive, busy or dead, and what it holds
    Status,
    /// Connected processes
    Sessions,
    /// Rings of each session: positions, what waits, who sleeps
    Rings,
    /// Pool, namespaces, what became of queried and saved blocks
    Cache,
    /// Live leases
    Leases,
    /// Every counter, gauge and latency
    Metrics {
        /// Print the Prometheus text format, as the daemon's /metrics does
        #[arg(long, conflicts_with = "json")]
        prometheus: bool,
    },
    /// SSD shards on their drives: layout, fill, damage; a daemon may use them meanwhile
    Ssd(SsdArgs),
    /// Check this machine: shared memory, limits, huge pages, io_uring, CUDA, kernel, CPUs, daemons
    Doctor,
    /// Live screen: rates, hit ratio, pool, latencies, sessions
    Top(TopArgs),
    /// Replay a workload through real engine processes and verify every loaded byte
    Replay(Box<ReplayArgs>),
    /// Measure latency and throughput against this machine's limits
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if let Some(first) = arguments.next() {
        let rest: Vec<OsString> = arguments.collect();
        let hidden = match first.to_str() {
            Some(PEER_ARGUMENT) => Some(peer_main()),
            Some(SCHEDULER_ARGUMENT) => Some(scheduler_main()),
            Some(WORKER_ARGUMENT) => Some(worker_main()),
            Some(ENGINE_ARGUMENT) => Some(engine_main()),
            Some(RUN_ARGUMENT) => Some(run_daemon(&rest)),
            _ => None,
        };
        if let Some(outcome) = hidden {
            return exit_code(outcome.map(|()| true));
        }
    }
    let cli = Cli::parse();
    exit_code(run(&cli))
}

fn exit_code(outcome: Result<bool, ToolError>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_BAD),
        Err(error) => {
            eprintln!("pegactl: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn run(cli: &Cli) -> Result<bool, ToolError> {
    let Global {
        node,
        socket,
        shm_dir,
        json,
    } = &cli.global;
    let place = NodePlace {
        node: node.clone(),
        shm_dir: shm_dir.clone(),
    };
    let view = || NodeView::open(&place);
    match &cli.command {
        Command::Status => status::status(&view()?, *json),
        Command::Sessions => status::sessions(&view()?, *json),
        Command::Rings => rings::rings(&view()?, *json),
        Command::Cache => status::cache(&view()?, *json),
        Command::Leases => status::leases(&view()?, *json),
        Command::Metrics { prometheus: true } => print!("{}", metrics::prometheus(&view()?)),
        Command::Metrics { prometheus: false } => metrics::metrics(&view()?, *json),
        Command::Doctor => {
            let socket = socket.clone().unwrap_or_else(|| paths::socket_path(node));
            return Ok(doctor(&place, &socket, *json));
        }
        Command::Ssd(args) => return ssd(args, &place, *json),
        Command::Top(args) => top(args, &place, *json)?,
        Command::Replay(args) => {
            children::clean_up_on_signals();
            return replay(args, socket.as_deref(), &place, *json);
        }
        Command::Bench(command) => {
            children::clean_up_on_signals();
            bench::bench(command, socket.as_deref(), &place, *json)?;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn unknown_flags_and_values_are_refused() {
        for bad in [
            vec!["pegactl"],
            vec!["pegactl", "dance"],
            vec!["pegactl", "replay", "--engines", "0"],
            vec!["pegactl", "replay", "--ranks", "0"],
            vec!["pegactl", "replay", "--page-bytes", "much"],
            vec![
                "pegactl",
                "replay",
                "--pool-size",
                "1GiB",
                "--capacity-blocks",
                "7",
            ],
            vec!["pegactl", "replay", "--ssd-admit", "seal"],
            vec!["pegactl", "replay", "--policy", "fifo"],
            vec!["pegactl", "top", "--interval", "soon"],
            vec!["pegactl", "bench"],
            vec!["pegactl", "bench", "query", "--blocks", "0"],
            vec!["pegactl", "metrics", "--prometheus", "--json"],
        ] {
            let refused = Cli::try_parse_from(&bad);
            assert!(refused.is_err(), "{bad:?}");
        }
        let good = [
            "pegactl",
            "replay",
            "--policy",
            "s3-fifo",
            "--page-bytes",
            "4KiB",
            "--json",
        ];
        assert!(Cli::try_parse_from(good).is_ok());
    }
}
