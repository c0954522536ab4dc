//! `make chaos`: see `pegaflow_tests::chaos`.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use pegaflow_tests::chaos::{self, Settings, engine, plan::Mode};

const HELP: &str = "\
Kills daemon and engines at random and checks that nothing is lost, wrong or hung.

  --json  print the summary as one JSON object

Environment:
  CHAOS_KILLS     kills of the daemon in all scenes together [200]
  CHAOS_SEED      of every random choice [the time]
  CHAOS_MODES     scenes: daemon,engines,both,stops,startup,small-pool,
                  both-tiers [all]
  CHAOS_BOUND_MS  longest time from the daemon's return to the first query with a hit [1000]
  CHAOS_SLACK_MS  what a call may take beyond its bound on a busy machine [2000]
  CHAOS_POOL_MIB  pool of the scenes that evict nothing [512]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some(engine::ENGINE_ARGUMENT) => engine::main(),
        Some("--json") => conduct(true),
        None => conduct(false),
        _ => {
            println!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn conduct(as_json: bool) -> anyhow::Result<()> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let settings = Settings {
        program: std::env::current_exe()?,
        seed: number("CHAOS_SEED", clock.as_secs())?,
        kills: u32::try_from(number("CHAOS_KILLS", 200)?)?,
        modes: modes()?,
        service_bound: Duration::from_millis(number("CHAOS_BOUND_MS", 1000)?),
        slack: Duration::from_millis(number("CHAOS_SLACK_MS", 2000)?),
        pool_mib: number("CHAOS_POOL_MIB", 512)?,
        verbose: true,
    };
    eprintln!(
        "CHAOS_SEED={} CHAOS_KILLS={}",
        settings.seed, settings.kills
    );
    let summary = chaos::run(&settings)?;
    if as_json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        println!("{}", summary.table());
    }
    if summary.late > 0 {
        bail!(
            "{} times an engine was not back in service within {:?}",
            summary.late,
            settings.service_bound
        );
    }
    Ok(())
}

fn number(variable: &str, default: u64) -> anyhow::Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{variable}={text} is no number")),
        Err(_) => Ok(default),
    }
}

fn modes() -> anyhow::Result<Vec<Mode>> {
    let Ok(text) = std::env::var("CHAOS_MODES") else {
        return Ok(Mode::ALL.to_vec());
    };
    let parse = |label: &str| {
        Mode::from_label(label).with_context(|| format!("CHAOS_MODES: `{label}` is no scene"))
    };
    text.split(',').map(parse).collect()
}
