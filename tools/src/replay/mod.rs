//! `replay`: a workload through real engine processes, every loaded byte checked.
//!
//! ```text
//! pegactl replay ── one scheduler process per engine ── one worker process per rank
//!    requests →        probe, query → lease       →        load, verify, compute, save
//! ```
//!
//! All processes are this program with a hidden argument and talk by JSON lines over pipes; with
//! the daemon they talk through the client library, as an engine does.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod kv;
pub mod latency;
pub mod member;
mod paired;
mod pattern;
pub mod pipe;
pub mod plan;
mod report;
pub mod scheduler;
pub mod trace;
pub mod worker;
mod workload;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use self::pipe::{ChildProcess, LineReader, LineWriter};
use self::plan::{Plan, ReplayArgs};
use self::report::Report;
use self::scheduler::{RequestDone, SCHEDULER_ARGUMENT, SchedulerStart};
use self::trace::Request;
use self::worker::Said;
use crate::daemon::DaemonInUse;
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::print_json;

/// What reaches the collecting thread.
type Event = Result<RequestDone, ToolError>;

/// `pegactl replay`; true when every byte was right and every request was done.
///
/// # Errors
/// The trace, the daemon or a process keeps it from finishing.
pub fn replay(
    args: &ReplayArgs,
    socket: Option<&std::path::Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<bool, ToolError> {
    let requests = load_workload(args)?;
    if args.beside_ram && socket.is_none() {
        return paired::replay(args, &requests, place, as_json);
    }
    let plan = Plan::new(args, &requests, socket.is_some())?;
    let _made = MadeFiles(plan.new_files());
    let mut daemon = DaemonInUse::new(socket, place, &plan.daemon)?;
    let report = run(args, &plan, &daemon, requests).map_err(|error| daemon.explain(error))?;
    if as_json {
        print_json(&report.json());
    } else {
        println!("{}", report.table());
    }
    for line in report.complaints() {
        eprintln!("{line}");
    }
    Ok(report.is_clean())
}

/// Files that the daemon of this run makes; they go with it.
struct MadeFiles(Vec<PathBuf>);

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => eprintln!("pegactl: {} stays: {error}", path.display()),
            }
        }
    }
}

fn load_workload(args: &ReplayArgs) -> Result<Vec<Request>, ToolError> {
    let limit = args.requests.map_or(usize::MAX, std::num::NonZero::get);
    match &args.trace {
        Some(path) => Ok(trace::read_trace(path, limit)?),
        None => {
            let requests = args
                .requests
                .map_or(workload::DEFAULT_REQUESTS, std::num::NonZero::get);
            Ok(workload::generate(args.seed, requests))
        }
    }
}

struct Engine {
    process: ChildProcess,
    requests: LineWriter<std::process::ChildStdin>,
    answers: LineReader<std::process::ChildStdout>,
}

fn start_engine(
    plan: &Plan,
    daemon: &DaemonInUse,
    engine: usize,
    seed: u64,
) -> Result<Engine, ToolError> {
    let identity = plan.identity(daemon.socket(), engine);
    let (process, mut requests, answers) = pipe::start(&identity.instance, SCHEDULER_ARGUMENT)?;
    let seed = seed.wrapping_add(engine as u64);
    requests.send(&SchedulerStart {
        identity,
        engine: engine as u64,
        seed,
    })?;
    Ok(Engine {
        process,
        requests,
        answers,
    })
}

fn expect_ready(engine: &mut Engine) -> Result<(), ToolError> {
    match engine.answers.expect::<Said<RequestDone>>()? {
        Said::Ready => Ok(()),
        Said::Failed(what) => Err(engine_failed(what)),
        Said::Done(_) => Err(engine_failed("answered before it was asked".to_owned())),
    }
}

fn engine_failed(what: String) -> ToolError {
    ToolError::Child {
        process: "an engine".into(),
        what,
    }
}

fn run(
    args: &ReplayArgs,
    plan: &Plan,
    daemon: &DaemonInUse,
    requests: Vec<Request>,
) -> Result<Report, ToolError> {
    let total = requests.len() as u64;
    let bar = progress_bar(total);
    let engines: Result<Vec<Engine>, ToolError> = (0..plan.engines)
        .map(|engine| start_engine(plan, daemon, engine, args.seed))
        .collect();
    let mut engines = engines?;
    for engine in &mut engines {
        expect_ready(engine)?;
    }
    let mut report = Report::new(plan, daemon, &requests);
    let cpu_before = daemon.cpu_seconds();
    let started = Instant::now();
    let (sender, events) = mpsc::channel::<Event>();
    let mut processes = Vec::new();
    for (engine, share) in engines
        .into_iter()
        .zip(workload::deal(requests, plan.engines))
    {
        let expected = share.len();
        feed(engine.requests, share, sender.clone());
        collect(engine.answers, expected, sender.clone());
        processes.push(engine.process);
    }
    drop(sender);
    for event in events {
        report.add(event?);
        bar.inc(1);
        if report.requests.is_multiple_of(64) {
            bar.set_message(report.progress());
        }
    }
    bar.finish_and_clear();
    report.finish(started.elapsed(), cpu_before, daemon);
    if report.requests != total {
        let what = format!("answered {} of {total} requests", report.requests);
        return Err(ToolError::Child {
            process: "the engines".into(),
            what,
        });
    }
    for process in processes {
        process.finish()?;
    }
    Ok(report)
}

/// Sends an engine its requests; the pipe holds back what it has not come to yet.
fn feed(
    mut writer: LineWriter<std::process::ChildStdin>,
    requests: Vec<Request>,
    events: mpsc::Sender<Event>,
) {
    std::thread::spawn(move || {
        for request in requests {
            if let Err(error) = writer.send(&request) {
                // The collecting thread may have stopped listening because of an earlier error.
                let _ = events.send(Err(error));
                return;
            }
        }
    });
}

/// Passes an engine's answers on.
fn collect(
    mut reader: LineReader<std::process::ChildStdout>,
    expected: usize,
    events: mpsc::Sender<Event>,
) {
    std::thread::spawn(move || {
        for _ in 0..expected {
            let event = match reader.expect::<Said<RequestDone>>() {
                Ok(Said::Done(done)) => Ok(done),
                Ok(Said::Ready) => continue,
                Ok(Said::Failed(what)) => Err(engine_failed(what)),
                Err(error) => Err(error),
            };
            let ends = event.is_err();
            if events.send(event).is_err() || ends {
                return;
            }
        }
    });
}

fn progress_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(
        "{bar:32} {human_pos}/{human_len} requests, {per_sec}, {eta} left  {msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}
