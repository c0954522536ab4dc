//! Runs: a few in each test run, many by `make sim`, one with a trace by its seed.
//!
//! `SIM_SEED=N` replays one run and prints its steps; `SIM_SEEDS=N` runs that many fresh seeds,
//! from `SIM_FIRST` on if that is given.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::fault::Crash;
use crate::sim::seeds::FOUND;
use crate::sim::truth::{Checked, Violation};
use crate::sim::world::World;

/// Seeds that every test run starts with.
const FIXED: std::ops::Range<u64> = 1..41;
/// Fresh seeds of a test run, and for how long at most they are started.
const FRESH: u64 = 40;
const FRESH_TIME: Duration = Duration::from_secs(10);

type Counts = BTreeMap<&'static str, u64>;

/// Crashes that are asked for are no news.
fn keep_crashes_silent() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<Crash>().is_none() {
                before(info);
            }
        }));
    });
}

fn play(world: &mut World) -> Checked {
    for _ in 0..world.plan.steps {
        world.run_step()?;
    }
    world.quiet()
}

/// Runs a seed to its end; panics with everything that a reader needs when an invariant breaks.
fn run(seed: u64, verbose: bool) -> Counts {
    keep_crashes_silent();
    let mut world = World::new(seed, verbose);
    let played = catch_unwind(AssertUnwindSafe(|| play(&mut world)));
    let violation = match played {
        Ok(Ok(())) => return std::mem::take(&mut world.counts),
        Ok(Err(violation)) => violation,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Violation {
                invariant: "no_panic",
                what: text.unwrap_or("no message").to_owned(),
            }
        }
    };
    let steps: Vec<&str> = world.trace.iter().map(String::as_str).collect();
    panic!(
        "seed {seed}, step {}: {} is broken: {}\nthe last steps:\n{}\nreplay: make sim SIM_SEED={seed}",
        world.step,
        violation.invariant,
        violation.what,
        steps.join("\n")
    );
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    match text.parse() {
        Ok(number) => Some(number),
        Err(error) => panic!("{name}={text}: {error}"),
    }
}

fn add(all: &mut Counts, one: Counts) {
    for (what, count) in one {
        *all.entry(what).or_default() += count;
    }
}

/// A seed that nobody has tried, most likely.
fn fresh_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(1, |since| since.as_millis() as u64 % 1_000_000_000)
}

#[test]
fn no_seed_breaks_an_invariant() {
    if let Some(seed) = number("SIM_SEED") {
        let counts = run(seed, true);
        eprintln!("seed {seed} holds: {counts:?}");
        return;
    }
    let mut all = Counts::new();
    let started = Instant::now();
    let (first, count, limit) = match number("SIM_SEEDS") {
        Some(count) => {
            let first = number("SIM_FIRST").unwrap_or_else(fresh_seed);
            (first, count, Duration::MAX)
        }
        None => {
            for seed in FIXED.chain(FOUND.iter().map(|(seed, _)| *seed)) {
                add(&mut all, run(seed, false));
            }
            (fresh_seed(), FRESH, FRESH_TIME)
        }
    };
    let begun = Instant::now();
    let mut ran = 0;
    while ran < count && begun.elapsed() < limit {
        add(&mut all, run(first + ran, false));
        ran += 1;
    }
    eprintln!(
        "{ran} fresh seeds from {first} in {:.1?}: {all:?}",
        started.elapsed()
    );
}

#[test]
fn a_seed_decides_everything() {
    let trace = |seed| {
        keep_crashes_silent();
        let mut world = World::new(seed, false);
        assert!(play(&mut world).is_ok(), "seed {seed}");
        (world.trace, world.counts)
    };
    for seed in [3, 4, 11] {
        assert_eq!(trace(seed), trace(seed));
    }
}
