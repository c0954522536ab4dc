//! What a well-behaved client feels of each hostile neighbour: latency of its queries, saves and
//! loads alone, beside a process that only burns a CPU, and beside each attacker.
//!
//! The daemon is the workspace's own; attackers are processes of this program with the lowest
//! priority, so that on few CPUs they take the time that is left. `burns-cpu` is the control: what
//! is slower beside it is the CPU's share, not the daemon's.
//!
//! ```sh
//! make bench-hostile
//! cargo bench -p pegaflow-benches --bench hostile -- --seconds 5 scribble bells
//! ```

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pegaflow_tests::attack::Attack;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::worker::{Worker, WorkerSpec};

/// First argument of an attacker.
const ATTACK_ARGUMENT: &str = "__attack";
/// Time that an attacker has before it is measured.
const RUN_UP: Duration = Duration::from_millis(700);
/// Blocks of a query and a load, and of a save.
const QUERIED: usize = 64;
const SAVED: usize = 8;
/// Lowest priority.
const NICE: i32 = 19;

/// Latencies in ns of one case.
#[derive(Default)]
struct Latencies {
    query: Vec<u64>,
    load: Vec<u64>,
    save: Vec<u64>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [first, label, socket, seconds] if first == ATTACK_ARGUMENT => {
            attack(label, Path::new(socket), seconds)
        }
        _ => bench(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostile: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn attack(label: &str, socket: &Path, seconds: &str) -> anyhow::Result<()> {
    let attack = Attack::from_label(label).context("no such attack")?;
    rustix::process::nice(NICE)?;
    attack.run(socket, Duration::from_secs_f64(seconds.parse()?))?;
    Ok(())
}

fn bench(arguments: &[String]) -> anyhow::Result<()> {
    let mut seconds = 3.0;
    let mut attacks = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            // What `cargo bench` adds.
            "--bench" => {}
            "--seconds" => seconds = rest.next().context("--seconds N")?.parse()?,
            label => attacks.push(Attack::from_label(label).with_context(|| {
                let known: Vec<&str> = Attack::ALL.iter().map(|attack| attack.label()).collect();
                format!("`{label}` is none of {known:?}")
            })?),
        }
    }
    if attacks.is_empty() {
        attacks.extend(Attack::ALL);
    }
    let time = Duration::from_secs_f64(seconds);
    let daemon = Daemon::start_with(Config {
        pool: "256MiB".into(),
        extent: "4MiB".into(),
        ..Config::default()
    });
    let good = Worker::ready(daemon.options(), WorkerSpec::default().salt("good"));
    good.save(&hashes(1, QUERIED));
    let mut key = 0;
    let alone = measure(&good, &mut key, time);
    println!(
        "{:<20} {:>22} {:>22} {:>22}  {:>8}",
        "beside", "query p50 / p99", "load p50 / p99", "save p50 / p99", "requests"
    );
    print_row("nobody", &alone);
    let mut control = None;
    for attack in attacks {
        let mut attacker = start(attack, &daemon.socket(), time + 2 * RUN_UP)?;
        std::thread::sleep(RUN_UP);
        let beside = measure(&good, &mut key, time);
        end(&mut attacker)?;
        print_row(attack.label(), &beside);
        if attack == Attack::BurnsCpu {
            control = Some(beside);
            continue;
        }
        print_ratios("  p99 to nobody", &beside, &alone);
        if let Some(control) = &control {
            print_ratios("  p99 to burns-cpu", &beside, control);
        }
        if !daemon.is_alive() || good.client.stats().disconnects > 0 {
            bail!("{attack:?} ended somebody else:\n{}", daemon.log());
        }
    }
    Ok(())
}

fn start(attack: Attack, socket: &Path, time: Duration) -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([ATTACK_ARGUMENT, attack.label()])
        .arg(socket)
        .arg(time.as_secs_f64().to_string());
    Ok(command.spawn()?)
}

fn end(attacker: &mut Child) -> anyhow::Result<()> {
    // It may have ended by itself.
    let _ = attacker.kill();
    attacker.wait()?;
    std::thread::sleep(RUN_UP);
    Ok(())
}

fn measure(good: &Worker, key: &mut u64, time: Duration) -> Latencies {
    let names = hashes(1, QUERIED);
    let blocks: Vec<u32> = (0..QUERIED as u32).collect();
    let mut latencies = Latencies::default();
    let until = Instant::now() + time;
    while Instant::now() < until {
        *key += 1;
        let start = Instant::now();
        let answer = good.query(*key, &names);
        latencies.query.push(start.elapsed().as_nanos() as u64);
        let hits = answer.count as usize;
        if hits > 0 {
            let start = Instant::now();
            let done = good.load_in(0, answer.lease, 0, &blocks[..hits]);
            latencies.load.push(start.elapsed().as_nanos() as u64);
            assert!(done.is_ok(), "{done:?}");
        }
        if hits < QUERIED {
            // Evicted by the attacker's saves.
            good.save(&names);
        }
        let fresh = hashes(1_000_000 + *key * SAVED as u64, SAVED);
        let request = good
            .client
            .save(good.registration, 0, &fresh, &blocks[..SAVED]);
        let start = Instant::now();
        good.finish(request);
        latencies.save.push(start.elapsed().as_nanos() as u64);
    }
    latencies
}

fn quantile(nanos: &[u64], share: f64) -> f64 {
    let mut sorted = nanos.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len().saturating_sub(1)) as f64 * share;
    sorted
        .get(at.round() as usize)
        .map_or(0.0, |nanos| *nanos as f64 / 1e3)
}

fn print_row(name: &str, latencies: &Latencies) {
    let pair = |nanos: &[u64]| {
        let (p50, p99) = (quantile(nanos, 0.5), quantile(nanos, 0.99));
        format!("{p50:.1} / {p99:.1} us")
    };
    println!(
        "{name:<20} {:>22} {:>22} {:>22}  {:>8}",
        pair(&latencies.query),
        pair(&latencies.load),
        pair(&latencies.save),
        latencies.query.len()
    );
}

fn print_ratios(name: &str, beside: &Latencies, base: &Latencies) {
    let ratio = |with: &[u64], without: &[u64]| {
        let ratio = quantile(with, 0.99) / quantile(without, 0.99).max(0.001);
        format!("{ratio:.2}x")
    };
    println!(
        "{name:<20} {:>22} {:>22} {:>22}",
        ratio(&beside.query, &base.query),
        ratio(&beside.load, &base.load),
        ratio(&beside.save, &base.save),
    );
}
