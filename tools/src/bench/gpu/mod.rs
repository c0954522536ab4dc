//! `bench gpu`: saves and loads of GPU memory through daemon and library, by engines in processes
//! of their own, each figure beside one large copy of the same run.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod cache;
mod case;
mod compute;
mod curve;
mod engine;
mod interference;
mod raw;
mod report;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use bytesize::ByteSize;
use clap::Args;
use rustix::fs::statvfs;

pub use engine::{ENGINE_ARGUMENT, engine_main};

use self::case::{Case, Compute, cases};
use self::engine::{Answer, Figures, Limit, Measured, Order, Way};
use self::interference::Copier;
use self::report::Report;
use crate::daemon::{DaemonInUse, DaemonSpec};
use crate::error::ToolError;
use crate::gpu::{Gpu, GpuError};
use crate::node::NodePlace;
use crate::replay::pipe::{self, Started};

/// Flags of `bench gpu`.
#[derive(Clone, Debug, Args)]
pub struct GpuArgs {
    /// GPUs, by their numbers in this process; several are measured one by one and at once
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "0")]
    pub gpus: Vec<u32>,
    /// GPU memory of an engine
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub memory: ByteSize,
    /// Pool of the daemon [default: 12 GiB, or half of the shared memory that is free]
    #[arg(long, value_name = "SIZE")]
    pub pool_size: Option<ByteSize>,
    /// Saves and loads of each case; small cases take more
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub rounds: u8,
    /// Each two of the GPUs at once, too
    #[arg(long)]
    pub pairs: bool,
    /// Only cases whose name contains this, or one of these
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// What the copies cost an engine that computes meanwhile, and what those of a process without
    /// a daemon do (needs cuBLAS)
    #[arg(long)]
    pub interference: bool,
    /// Bandwidth and cost for such an engine with each way in which small segments can go, by a
    /// daemon of its own for each
    #[arg(long)]
    pub curve: bool,
    /// How long each computation, alone and beside copies, takes; there are five of each in turns
    #[arg(long, default_value_t = 400, value_name = "MS",
          value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub part_ms: u64,
    /// Further argument of the daemon, such as --daemon-arg=--pin=background
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub daemon_arg: Vec<String>,
}

const USUAL_POOL: u64 = 12 << 30;
/// Blocks of all cases together, with room.
const MAX_BLOCKS: u64 = 2 << 20;
/// The cases beside which computations are measured.
const INTERFERING: [&str; 2] = ["2-MiB pages", "16-KiB"];

/// An engine in a process of its own.
struct Engine {
    gpu: u32,
    process: Started,
}

impl Engine {
    fn start(gpu: u32) -> Result<Engine, ToolError> {
        let process = pipe::start(&format!("the engine on GPU {gpu}"), ENGINE_ARGUMENT)?;
        Ok(Engine { gpu, process })
    }

    fn tell(&mut self, order: &Order) -> Result<(), ToolError> {
        self.process.1.send(order)
    }

    fn answer(&mut self) -> Result<Answer, ToolError> {
        match self.process.2.expect()? {
            Answer::Failed(what) => Err(ToolError::Child {
                process: format!("the engine on GPU {}", self.gpu),
                what,
            }),
            answer => Ok(answer),
        }
    }

    fn ask(&mut self, order: &Order) -> Result<Answer, ToolError> {
        self.tell(order)?;
        self.answer()
    }

    fn unexpected(&self, answer: &Answer) -> ToolError {
        ToolError::Child {
            process: format!("the engine on GPU {}", self.gpu),
            what: format!("answers {answer:?}"),
        }
    }
}

/// `pegactl bench gpu`.
///
/// # Errors
/// There is no GPU, or a daemon or a process keeps it from finishing.
pub fn command(
    args: &GpuArgs,
    socket: Option<&Path>,
    place: &NodePlace,
    as_json: bool,
) -> Result<(), ToolError> {
    let count = Gpu::count()?;
    if let Some(ordinal) = args.gpus.iter().copied().find(|gpu| *gpu >= count) {
        return Err(GpuError::NoDevice { ordinal, count }.into());
    }
    let mut spec = DaemonSpec::with_pool(pool_bytes(args, place));
    spec.max_blocks = Some(MAX_BLOCKS);
    spec.further.clone_from(&args.daemon_arg);
    say("the daemon starts");
    let mut daemon = DaemonInUse::new(socket, place, &spec)?;
    let mut report = run(args, &daemon).map_err(|error| daemon.explain(error))?;
    drop(daemon);
    if args.curve {
        report.set_curve(curve::draw(args, place)?);
    }
    if as_json {
        crate::output::print_json(&report);
    } else {
        println!("{}", report.render());
    }
    Ok(())
}

fn pool_bytes(args: &GpuArgs, place: &NodePlace) -> u64 {
    if let Some(size) = args.pool_size {
        return size.as_u64();
    }
    let folder = place.shm_dir.ancestors().find(|folder| folder.exists());
    let free = folder.and_then(|folder| statvfs(folder).ok());
    let free = free.map_or(USUAL_POOL, |space| space.f_bavail * space.f_frsize);
    USUAL_POOL.min(free / 2)
}

fn run(args: &GpuArgs, daemon: &DaemonInUse) -> Result<Report, ToolError> {
    let mut report = Report::default();
    let mut engines = Vec::new();
    for gpu in &args.gpus {
        let mut engine = Engine::start(*gpu)?;
        match engine.ask(&Order::Open { gpu: *gpu })? {
            Answer::Opened { name } => {
                let limit = take_limit(&mut [&mut engine])?;
                report.add_gpu(*gpu, name, limit);
            }
            other => return Err(engine.unexpected(&other)),
        }
        engines.push(engine);
    }
    let sets = sets(engines.len(), args.pairs);
    for set in &sets {
        let mut chosen = choose(&mut engines, set);
        let gpus = chosen.iter().map(|engine| engine.gpu).collect();
        report.add_joint_limit(gpus, take_limit(&mut chosen)?);
    }
    let wanted = |case: &Case| {
        let named = |text: &String| case.name.contains(text.as_str());
        args.only.is_empty() || args.only.iter().any(named)
    };
    let all = cases(args.memory.as_u64() as usize, usize::from(args.rounds));
    for case in all.iter().filter(|case| wanted(case)) {
        for engine in &mut engines {
            let gpu = engine.gpu;
            let figures = measure(&mut [&mut *engine], daemon, case)?;
            report.add_case(case, &figures);
            if args.interference && INTERFERING.iter().any(|name| case.name.contains(name)) {
                let (mut copier, computes) = match case.shape.is_of_pages() {
                    true => (Some(Copier::start(gpu)?), &Compute::ALL[..]),
                    false => (None, &Compute::OF_MODELS[..]),
                };
                for compute in computes.iter().copied() {
                    let (slowdown, raws) =
                        interference::measure(engine, copier.as_mut(), compute, args.part_ms)?;
                    report.add_slowdown(gpu, case, compute, (&slowdown, &raws));
                    report.add_raws(raws);
                }
            }
        }
        for set in &sets {
            let mut chosen = choose(&mut engines, set);
            report.add_case(case, &measure(&mut chosen, daemon, case)?);
        }
    }
    Ok(report)
}

/// Which of so many engines copy at once: all of them, and each two of them if wished.
fn sets(engines: usize, pairs: bool) -> Vec<Vec<usize>> {
    let mut sets = Vec::new();
    if engines > 1 {
        sets.push((0..engines).collect());
    }
    if pairs && engines > 2 {
        let pairs = (0..engines).flat_map(|a| (a + 1..engines).map(move |b| vec![a, b]));
        sets.extend(pairs);
    }
    sets
}

fn choose<'a>(engines: &'a mut [Engine], set: &[usize]) -> Vec<&'a mut Engine> {
    let numbered = engines.iter_mut().enumerate();
    let chosen = numbered.filter(|(number, _)| set.contains(number));
    chosen.map(|(_, engine)| engine).collect()
}

/// Says on standard error what is done now: a run takes minutes.
fn say(what: &str) {
    static STARTED: OnceLock<Instant> = OnceLock::new();
    let seconds = STARTED.get_or_init(Instant::now).elapsed().as_secs_f64();
    eprintln!("{seconds:6.1} s  {what}");
}

/// Has several engines do the same at once; gives what they answer.
fn all_at_once(engines: &mut [&mut Engine], order: &Order) -> Result<Vec<Answer>, ToolError> {
    for engine in engines.iter_mut() {
        engine.tell(order)?;
    }
    engines.iter_mut().map(|engine| engine.answer()).collect()
}

/// What large copies on all these GPUs at once do together.
fn take_limit(engines: &mut [&mut Engine]) -> Result<Limit, ToolError> {
    say(&format!("the limit of {} GPUs at once", engines.len()));
    all_at_once(engines, &Order::PrepareLimit)?;
    let mut rate = |way| {
        let answers = all_at_once(engines, &Order::Limit { way })?;
        let mut sum = 0.0;
        for (engine, answer) in engines.iter().zip(&answers) {
            match answer {
                Answer::Rate(gbps) => sum += gbps,
                other => return Err(engine.unexpected(other)),
            }
        }
        Ok(sum)
    };
    Ok(Limit {
        out_gbps: rate(Way::Out)?,
        in_gbps: rate(Way::In)?,
        both_gbps: rate(Way::Both)?,
    })
}

/// Measures a case on several GPUs at once.
fn measure(
    engines: &mut [&mut Engine],
    daemon: &DaemonInUse,
    case: &Case,
) -> Result<BTreeMap<u32, Figures>, ToolError> {
    let gpus: Vec<u32> = engines.iter().map(|engine| engine.gpu).collect();
    say(&format!("{}: GPU memory of {gpus:?}", case.name));
    for engine in engines.iter_mut() {
        let salt = format!("{}-{}", engine.gpu, crate::output::unix_now_ms());
        let order = Order::Prepare {
            socket: daemon.socket().to_owned(),
            salt,
            case: case.clone(),
        };
        match engine.ask(&order)? {
            Answer::Ready {
                fill_ms,
                register_ms,
            } => say(&format!(
                "filled in {fill_ms:.0} ms, registered in {register_ms:.0} ms"
            )),
            other => return Err(engine.unexpected(&other)),
        }
    }
    say(&format!("{}: saves and loads", case.name));
    let daemon = daemon.view()?.header.pid;
    all_at_once(engines, &Order::WarmUp)?;
    let mut all = BTreeMap::<u32, Figures>::new();
    for way in [Way::Out, Way::In, Way::Both] {
        let answers = all_at_once(engines, &Order::Measure { way, daemon })?;
        for (engine, answer) in engines.iter().zip(answers) {
            let figures = all.entry(engine.gpu).or_default();
            match (way, answer) {
                (Way::Out, Answer::Measured(Some(Measured { ns, cpu }))) => {
                    (figures.save_ns, figures.save_cpu) = (ns, cpu);
                }
                (Way::In, Answer::Measured(Some(Measured { ns, cpu }))) => {
                    (figures.load_ns, figures.load_cpu) = (ns, cpu);
                }
                (Way::Both, Answer::Measured(both)) => figures.both_ns = both.map(|both| both.ns),
                (_, other) => return Err(engine.unexpected(&other)),
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_gpus_copy_all_at_once_and_each_pair_of_more_than_two_if_wished() {
        assert!(sets(0, true).is_empty() && sets(1, true).is_empty());
        assert_eq!(sets(2, true), [[0, 1]], "the pair is all of them");
        assert_eq!(sets(3, false), [[0, 1, 2]]);
        let expected: [&[usize]; 4] = [&[0, 1, 2], &[0, 1], &[0, 2], &[1, 2]];
        assert_eq!(sets(3, true), expected);
    }
}
