//! The soak run: a daemon with a small pool, engines that come and go on all GPUs, some of them
//! killed in the middle of whatever they do.

#![forbid(unsafe_code)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::engine::{Engine, Task};
use super::rank::GpuSpec;
use super::soak::{Plan, Tally};
use crate::binaries;
use crate::content::Stream;
use crate::daemon::{Config, Daemon};
use crate::eventually;

/// What is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long.
    pub seconds: f64,
    /// Of all random choices.
    pub seed: u64,
    /// GPUs, by number.
    pub gpus: Vec<u32>,
    /// Engines at a time, on each GPU.
    pub engines: usize,
    /// GPU memory of an engine, about.
    pub budget: usize,
    /// Pool of the daemon.
    pub pool: String,
    /// Most bytes a second that the daemon's saves read from a GPU, such as 2GB.
    pub d2h_limit: Option<String>,
    /// Kill the daemon now and then, too.
    pub kill_daemon: bool,
    /// Some engines end by an illegal address of a kernel of theirs.
    pub break_contexts: bool,
    /// What the daemon may keep of a GPU's memory when its engines have gone.
    pub daemon_share: u64,
    /// Environment of all processes.
    pub environment: Vec<(String, String)>,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    /// Of the random choices.
    pub seed: u64,
    /// How long it took.
    pub seconds: f64,
    /// Engines that were started.
    pub engines: u64,
    /// Engines that were killed.
    pub killed: u64,
    /// Those of them that were to break their GPU context before.
    pub broken: u64,
    /// Restarts of a killed daemon.
    pub daemon_kills: u64,
    /// What the daemon kept of each GPU's memory when all engines had gone: context and staging.
    pub daemon_gpu_bytes: Vec<u64>,
    /// What those that were not killed have told.
    pub tally: Tally,
    /// Faults of any kind, in words: bytes that differ, an engine or daemon that ended by itself.
    pub faults: Vec<String>,
}

impl Summary {
    /// No fault, and something was done.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty() && self.tally.loads > 0
    }
}

fn number<T: std::str::FromStr>(name: &str, default: T) -> anyhow::Result<T> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .ok()
            .with_context(|| format!("{name}={text} is no number")),
        Err(_) => Ok(default),
    }
}

impl Settings {
    /// As `GPU_SOAK_SECONDS`, `_SEED`, `_GPUS` (0,1), `_ENGINES`, `_BUDGET_MIB`, `_POOL`,
    /// `_D2H_LIMIT`, `_KILL_DAEMON` and `_BREAK_CONTEXTS` say.
    ///
    /// # Errors
    /// One of them is no number.
    pub fn from_environment() -> anyhow::Result<Settings> {
        let gpus = std::env::var("GPU_SOAK_GPUS").unwrap_or_else(|_| "0".into());
        let gpus = gpus.split(',').map(|gpu| gpu.trim().parse());
        Ok(Settings {
            seconds: number("GPU_SOAK_SECONDS", 60.0)?,
            seed: number("GPU_SOAK_SEED", u64::from(std::process::id()))?,
            gpus: gpus.collect::<Result<_, _>>().context("GPU_SOAK_GPUS")?,
            engines: number("GPU_SOAK_ENGINES", 3)?,
            budget: number("GPU_SOAK_BUDGET_MIB", 64_usize)? << 20,
            pool: std::env::var("GPU_SOAK_POOL").unwrap_or_else(|_| "256MiB".into()),
            d2h_limit: std::env::var("GPU_SOAK_D2H_LIMIT").ok(),
            kill_daemon: number("GPU_SOAK_KILL_DAEMON", 0_u8)? != 0,
            break_contexts: number("GPU_SOAK_BREAK_CONTEXTS", 0_u8)? != 0,
            daemon_share: MOST_DAEMON_SHARE,
            environment: Vec::new(),
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(binaries::folder().join("gpu-engine"));
        command.envs(self.environment.iter().cloned());
        command
    }
}

/// What the daemon may keep of a GPU: context and staging.
const MOST_DAEMON_SHARE: u64 = 700 << 20;

/// An engine and when it is killed, if it is.
struct Seat {
    engine: Engine,
    gpu: u32,
    ends: Instant,
    killed: bool,
    broken: bool,
}

/// Looks at a GPU's free memory, from a process of its own that was there before the daemon.
struct Watch {
    engine: Engine,
    gpu: u32,
    free: u64,
}

impl Watch {
    fn new(settings: &Settings, gpu: u32) -> anyhow::Result<Watch> {
        let mut engine = Engine::spawn(settings.command());
        let free = free(&mut engine, gpu)?;
        Ok(Watch { engine, gpu, free })
    }

    /// What others hold of the GPU since, once that has come down to `most`, or after a while.
    fn held_by_others(&mut self, most: u64) -> anyhow::Result<u64> {
        let mut held = u64::MAX;
        let mut failed = None;
        eventually(|| match free(&mut self.engine, self.gpu) {
            Ok(free) => {
                held = self.free.saturating_sub(free);
                held <= most
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        failed.map_or(Ok(held), Err)
    }
}

fn free(engine: &mut Engine, gpu: u32) -> anyhow::Result<u64> {
    engine.tell(&Task::FreeMemory { gpu })?;
    let reply = engine.hear()?;
    anyhow::ensure!(reply.is_ok(), "the memory of GPU {gpu}: {}", reply.error);
    Ok(reply.bytes)
}

struct Conductor<'a> {
    settings: &'a Settings,
    daemon: Daemon,
    random: Stream,
    summary: Summary,
    until: Instant,
}

/// Does it.
///
/// # Errors
/// An engine cannot be started.
pub fn run(settings: &Settings) -> anyhow::Result<Summary> {
    let config = Config {
        pool: settings.pool.clone(),
        arguments: settings
            .d2h_limit
            .iter()
            .map(|limit| format!("--d2h-limit={limit}"))
            .collect(),
        environment: settings.environment.clone(),
        ..Config::default()
    };
    let mut watches = Vec::new();
    for gpu in &settings.gpus {
        watches.push(Watch::new(settings, *gpu)?);
    }
    let started = Instant::now();
    let mut conductor = Conductor {
        settings,
        daemon: Daemon::start_with(config),
        random: Stream::new(&[settings.seed]),
        summary: Summary {
            seed: settings.seed,
            ..Summary::default()
        },
        until: started + Duration::from_secs_f64(settings.seconds),
    };
    let mut seats = Vec::new();
    for gpu in &settings.gpus {
        for _ in 0..settings.engines {
            seats.push(conductor.seat(*gpu)?);
        }
    }
    let mut next_daemon_kill = Instant::now() + Duration::from_secs(3);
    while !seats.is_empty() {
        std::thread::sleep(Duration::from_millis(5));
        let now = Instant::now();
        if settings.kill_daemon && now > next_daemon_kill && now < conductor.until {
            conductor.daemon.kill();
            conductor.daemon.launch();
            conductor.summary.daemon_kills += 1;
            next_daemon_kill = now + Duration::from_millis(2000 + conductor.random.below(3000));
        }
        if let Some(at) = seats.iter().position(|seat| seat.ends <= now) {
            let seat = seats.swap_remove(at);
            let gpu = seat.gpu;
            conductor.end(seat);
            if now < conductor.until && conductor.summary.faults.is_empty() {
                seats.push(conductor.seat(gpu)?);
            }
        }
    }
    if !conductor.daemon.is_alive() {
        let log = conductor.daemon.log();
        conductor
            .summary
            .faults
            .push(format!("the daemon ended: {log}"));
    }
    let Conductor { summary, .. } = &mut conductor;
    for watch in &mut watches {
        let held = watch.held_by_others(settings.daemon_share)?;
        summary.daemon_gpu_bytes.push(held);
        if held > settings.daemon_share {
            let (gpu, most) = (watch.gpu, settings.daemon_share);
            let what = "bytes are held when all engines have gone, which may be";
            summary
                .faults
                .push(format!("GPU {gpu}: {held} {what} {most}"));
        }
    }
    summary.seconds = started.elapsed().as_secs_f64();
    Ok(conductor.summary)
}

/// Seeds of sizes that engines share, so that they load what others have saved.
const SIZES: u64 = 14;
const HASHES: u64 = 400;

impl Conductor<'_> {
    fn seat(&mut self, gpu: u32) -> anyhow::Result<Seat> {
        let number = self.summary.engines;
        self.summary.engines += 1;
        let left = self.until.saturating_duration_since(Instant::now());
        let ms = 500 + self.random.below(6000);
        let seconds = (ms as f64 / 1e3).min(left.as_secs_f64().max(0.2));
        let killed = self.random.below(2) == 0;
        let broken = self.settings.break_contexts && killed && self.random.below(3) == 0;
        let sizes = self.random.below(SIZES);
        let plan = Plan {
            socket: self.daemon.socket(),
            spec: GpuSpec {
                gpu,
                instance: format!("soak-{number}"),
                salt: format!("sizes {sizes}"),
                sizes,
                arrangement: self.random.next(),
                budget: self.settings.budget,
                mapped: self.random.below(4) == 0,
                ..GpuSpec::default()
            },
            seed: self.random.next() >> 32,
            // One that is killed does not end by itself before; one that is broken lingers.
            seconds: match (broken, killed) {
                (true, _) => seconds * 0.7,
                (false, true) => seconds + 30.0,
                (false, false) => seconds,
            },
            hashes: HASHES,
            breaks: broken,
        };
        let mut engine = Engine::spawn(self.settings.command());
        engine.tell(&Task::Soak(plan))?;
        Ok(Seat {
            engine,
            gpu,
            ends: Instant::now() + Duration::from_secs_f64(seconds),
            killed,
            broken,
        })
    }

    fn end(&mut self, mut seat: Seat) {
        if seat.killed && seat.engine.is_running() {
            seat.engine.kill();
            self.summary.killed += 1;
            self.summary.broken += u64::from(seat.broken);
            return;
        }
        match seat.engine.hear() {
            Ok(reply) if reply.is_ok() => {
                self.summary.tally.add(&reply.tally.unwrap_or_default());
            }
            Ok(reply) => self.summary.faults.push(reply.error),
            Err(error) => self.summary.faults.push(format!("{error:#}")),
        }
    }
}
