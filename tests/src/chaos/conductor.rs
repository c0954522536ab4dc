//! One scene: a daemon, engines under load, kills and returns, and what is left at the end.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use pegaflow_shm::node::Counter;

use super::Settings;
use super::fleet::Fleet;
use super::leftovers::{Usage, check_empty, check_log};
use super::message::{EngineStart, Role, monotonic_ns};
use super::plan::{Mode, Plan, Round, Step};
use super::shape::{self, InstanceShape};
use super::summary::{SceneFigures, Summary};
use crate::daemon::{Config, Daemon};

/// Pool in which blocks are evicted.
const SMALL_POOL_MIB: u64 = 24;
/// Kills of the daemon in the run for each round of the scene that kills none.
const KILLS_PER_ENGINE_ROUND: u32 = 5;
/// Longest that all of service may take to come back, whatever the bound that is checked.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the conductor looks whether the daemon serves.
const LOOK: Duration = Duration::from_millis(1);
/// How long it listens to the engines at a time.
const LISTEN: Duration = Duration::from_millis(10);

/// A scene before and while it is played.
pub struct Scene {
    fleet: Fleet,
    daemon: Daemon,
    /// Where its SSD shards lie.
    _drives: tempfile::TempDir,
    plan: Plan,
    mode: Mode,
    kills: u32,
    engine_rounds: u32,
    service_bound: Duration,
    verbose: bool,
    seed: u64,
    figures: SceneFigures,
    first_usage: Usage,
}

impl Scene {
    /// A daemon that serves, and engines that are not started yet.
    ///
    /// # Errors
    /// The daemon cannot be looked at.
    pub fn new(settings: &Settings, mode: Mode, kills: u32) -> anyhow::Result<Scene> {
        let evicts = mode.evicts();
        let pool_mib = if evicts {
            SMALL_POOL_MIB
        } else {
            settings.pool_mib
        };
        let ttl = format!("{}s", shape::INCOMPLETE_TTL.as_secs());
        let mut options = vec!["--incomplete-ttl", &ttl, "--lease-ttl", "5s"];
        let drives = tempfile::tempdir().context("a folder for SSD shards")?;
        let shard = |name: &str| format!("{}:128MiB", drives.path().join(name).display());
        let shards = [shard("a"), shard("b")];
        if mode == Mode::BothTiers {
            options.extend(["--ssd-admit", "seal"]);
            options.extend(shards.iter().flat_map(|shard| ["--ssd", shard]));
        }
        let daemon = Daemon::start_with(Config {
            pool: format!("{pool_mib}MiB"),
            extent: if evicts { "1MiB" } else { "4MiB" }.into(),
            ..Config::with(&options)
        });
        let shapes = shape::instances(pool_mib << 20, mode);
        let starts = shapes
            .iter()
            .flat_map(|shape| engine_starts(settings, &daemon, shape, kills))
            .collect();
        let fleet = Fleet::new(&settings.program, starts);
        let first_usage = Usage::of(&daemon)?;
        Ok(Scene {
            plan: Plan::new(settings.seed, mode, fleet.len()),
            fleet,
            daemon,
            _drives: drives,
            mode,
            kills,
            engine_rounds: settings.kills.div_ceil(KILLS_PER_ENGINE_ROUND),
            service_bound: settings.service_bound,
            verbose: settings.verbose,
            seed: settings.seed,
            figures: SceneFigures::new(mode),
            first_usage,
        })
    }

    /// Plays it and adds its figures.
    ///
    /// # Errors
    /// The first fault, and where it showed.
    pub fn play(mut self, summary: &mut Summary) -> anyhow::Result<()> {
        let (mode, seed) = (self.mode.label(), self.seed);
        if let Err(error) = self.rounds() {
            let round = self.figures.rounds;
            let log = self.daemon.log();
            self.daemon.kill_if_running();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            return Err(error.context(format!(
                "seed {seed}, scene {mode}, round {round}\n{}",
                tail.join("\n")
            )));
        }
        self.end(summary)
            .with_context(|| format!("seed {seed}, end of scene {mode}"))
    }

    fn rounds(&mut self) -> anyhow::Result<()> {
        self.fleet.start_missing()?;
        self.await_service(None, &[])?;
        while !self.is_over() {
            let left = self.kills.saturating_sub(self.figures.daemon_kills);
            let round = self.plan.next(left);
            self.figures.rounds += 1;
            self.round(&round)?;
            if self.verbose {
                self.figures.progress(self.kills);
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        if self.mode == Mode::Engines {
            return self.figures.rounds >= self.engine_rounds;
        }
        self.figures.daemon_kills >= self.kills
    }

    fn round(&mut self, round: &Round) -> anyhow::Result<()> {
        let mut killed = Vec::new();
        for step in &round.steps {
            match *step {
                Step::Work { us } => self.fleet.listen(Duration::from_micros(us))?,
                Step::KillDaemon => {
                    self.check_daemon()?;
                    self.figures.ssd_hits += self.daemon.counter(Counter::QueryHitSsd);
                    self.daemon.kill();
                    self.figures.daemon_kills += 1;
                }
                Step::StopDaemon { us } => {
                    self.daemon.signal(Signal::SIGSTOP);
                    self.figures.stops += 1;
                    self.fleet.listen(Duration::from_micros(us))?;
                }
                Step::ContinueDaemon => self.daemon.signal(Signal::SIGCONT),
                Step::KillEngine { engine } => {
                    if self.fleet.kill(engine)? {
                        self.figures.engine_kills += 1;
                        killed.push(engine);
                    }
                }
                Step::StillbornDaemon { us } => {
                    self.daemon.spawn();
                    self.fleet.listen(Duration::from_micros(us))?;
                    self.check_daemon()?;
                    self.daemon.kill();
                    self.figures.daemon_kills += 1;
                    self.figures.startup_kills += 1;
                }
            }
        }
        let returned = match self.daemon.is_started() {
            true => None,
            false => Some(self.bring_back()?),
        };
        self.fleet.start_missing()?;
        if round.hasty {
            return Ok(());
        }
        self.await_service(returned, &killed)
    }

    /// The daemon ends only when it is killed.
    fn check_daemon(&self) -> anyhow::Result<()> {
        ensure!(
            self.daemon.is_alive(),
            "the daemon ended by itself:\n{}",
            self.daemon.log()
        );
        Ok(())
    }

    /// Starts the daemon; returns when it came to serve.
    fn bring_back(&mut self) -> anyhow::Result<u64> {
        let started = Instant::now();
        self.daemon.spawn();
        while !self.daemon.is_serving() {
            self.check_daemon()?;
            ensure!(
                started.elapsed() < PATIENCE,
                "the daemon does not come to serve within {PATIENCE:?}"
            );
            std::thread::sleep(LOOK);
        }
        let now = monotonic_ns();
        self.figures.starts.push(started.elapsed());
        Ok(now)
    }

    /// Waits until every engine is of service again and every ledger has been gone through. The
    /// time counts for the schedulers of instances of which nothing was killed.
    fn await_service(&mut self, returned: Option<u64>, killed: &[usize]) -> anyhow::Result<()> {
        let boot = self.daemon.boot_id();
        let begun = Instant::now();
        loop {
            let waits_for: Vec<String> = (0..self.fleet.len())
                .filter(|engine| !self.is_back(*engine, &boot))
                .map(|engine| self.fleet.name(engine))
                .collect();
            if waits_for.is_empty() {
                break;
            }
            if begun.elapsed() > PATIENCE {
                bail!("not back in service after {PATIENCE:?}: {waits_for:?}");
            }
            self.check_daemon()?;
            self.fleet.listen(LISTEN)?;
        }
        for engine in 0..self.fleet.len() {
            if self.fleet.role(engine) == Role::Scheduler {
                let blocks = self.fleet.swept(engine, &boot).unwrap_or(0);
                self.figures.swept_blocks += blocks;
            }
            let instance = [engine / 2 * 2, engine / 2 * 2 + 1];
            // A query over a pool that evicts may have to wait for blocks to be saved again.
            let measured = !self.mode.evicts();
            let whole = measured && !killed.iter().any(|engine| instance.contains(engine));
            if let (true, Some(returned), Some(back)) =
                (whole, returned, self.fleet.back(engine, &boot))
            {
                let took = Duration::from_nanos(back.saturating_sub(returned));
                match self.fleet.role(engine) {
                    Role::Scheduler => self.figures.note_service(took, self.service_bound),
                    Role::Ranks => self.figures.first_loads.push(took),
                }
            }
        }
        Ok(())
    }

    fn is_back(&self, engine: usize, boot: &str) -> bool {
        self.fleet.back(engine, boot).is_some()
            && (self.fleet.role(engine) == Role::Ranks || self.fleet.swept(engine, boot).is_some())
    }

    /// Lets the engines end, and looks at what is left.
    fn end(self, summary: &mut Summary) -> anyhow::Result<()> {
        let Scene {
            fleet,
            mut daemon,
            mut figures,
            first_usage,
            ..
        } = self;
        figures.tally = fleet.finish()?;
        check_empty(&daemon)?;
        figures.ssd_hits += daemon.counter(Counter::QueryHitSsd);
        ensure!(
            figures.mode != Mode::BothTiers || figures.ssd_hits > 0,
            "nothing came back from the SSD tier"
        );
        let used = Usage::settled(&daemon, first_usage.threads)?;
        ensure!(
            daemon.stop().success(),
            "the daemon fails at its end:\n{}",
            daemon.log()
        );
        daemon.launch();
        let fresh = Usage::settled(&daemon, first_usage.threads)?;
        used.check(&fresh)?;
        // The index of the one user came with its first session.
        ensure!(
            used.descriptors <= first_usage.descriptors + 1 && used.threads <= first_usage.threads,
            "at the start {first_usage:?}, at the end {used:?}"
        );
        check_log(&daemon)?;
        daemon.stop();
        let left = daemon.leftovers();
        ensure!(left.is_empty(), "left behind: {left:?}");
        summary.add(figures, used, fresh);
        Ok(())
    }
}

fn engine_starts(
    settings: &Settings,
    daemon: &Daemon,
    shape: &InstanceShape,
    kills: u32,
) -> Vec<EngineStart> {
    [Role::Scheduler, Role::Ranks]
        .into_iter()
        .map(|role| EngineStart {
            role,
            socket: daemon.socket(),
            folder: daemon.folder().to_owned(),
            instance: shape.clone(),
            seed: settings.seed,
            slack_ms: settings.slack.as_millis() as u64,
            spread_s: u64::from(kills.max(20)),
        })
        .collect()
}
