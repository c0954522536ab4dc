//! The product's rings, the machine's limits and peers, in one run.
//!
//! `cargo bench -p pegaflow-benches --bench rings --features peers`; `PEGAFLOW_BENCH_ROUNDS` sets
//! the rounds (5). Peers without a process boundary (crossbeam, rtrb) run between two threads,
//! which can only flatter them.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use pegaflow_benches::Outcome;
use pegaflow_tools::bench::rings::{self, PEER_ARGUMENT, peer_main};
use pegaflow_tools::bench::rings_table::render;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some(PEER_ARGUMENT) => peer_main().map_err(Into::into),
        #[cfg(feature = "peers")]
        Some(pegaflow_benches::iceoryx::PEER_ARGUMENT) => {
            pegaflow_benches::iceoryx::peer_main(&arguments[1..])
        }
        // `cargo test` runs benches as well, to see that they build and start.
        Some("--test") => Ok(()),
        _ => run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rings: {error}");
            ExitCode::FAILURE
        }
    }
}

fn rounds() -> usize {
    std::env::var("PEGAFLOW_BENCH_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(5)
}

fn run() -> Outcome<()> {
    let report = rings::run(rounds(), None, |_| ())?;
    println!("{}", render(&report));
    peers(&report)
}

#[cfg(not(feature = "peers"))]
fn peers(_: &rings::RingsReport) -> Outcome<()> {
    println!("peers are left out: run with --features peers");
    Ok(())
}

#[cfg(feature = "peers")]
fn peers(ours: &rings::RingsReport) -> Outcome<()> {
    use pegaflow_benches::{Measured, iceoryx, threads};
    use pegaflow_tools::bench::rings::{Case, Pair};
    use pegaflow_tools::output::{nanos, table};
    use pegaflow_tools::replay::latency::median;

    type Measure = fn(Option<usize>) -> Outcome<Measured>;
    const PEERS: [(&str, Measure); 3] = [
        (
            "iceoryx2 publish-subscribe, polled (processes)",
            iceoryx::measure,
        ),
        ("crossbeam ArrayQueue (threads)", threads::crossbeam),
        ("rtrb (threads)", threads::rtrb),
    ];
    /// Rounds of one ring: round trip over its bracket, and what it came to.
    #[derive(Default)]
    struct Rounds {
        rtt: Vec<f64>,
        over_raw: Vec<f64>,
        mps: Vec<f64>,
    }
    let mut pair = Pair::start()?;
    let peer_cpu = pair.pinned.map(|(_, theirs)| theirs);
    let mut all: Vec<(&str, Rounds)> = vec![("ours (processes)", Rounds::default())];
    all.extend(PEERS.iter().map(|(name, _)| (*name, Rounds::default())));
    for _ in 0..rounds() {
        for (at, (_, rounds)) in all.iter_mut().enumerate() {
            let before = pair.raw()?;
            let measured = if at == 0 {
                Measured {
                    rtt_ns: pair.measure(Case::SpinRoundTrip { pause: true }, None)?,
                    oneway_mps: pair.measure(Case::OneWay, None)?,
                }
            } else {
                PEERS[at - 1].1(peer_cpu)?
            };
            let raw = median(&[before, pair.raw()?]);
            rounds.rtt.push(measured.rtt_ns);
            rounds.over_raw.push(measured.rtt_ns / raw);
            rounds.mps.push(measured.oneway_mps);
        }
    }
    let header = [
        "64-byte messages, loops with pause",
        "round trip",
        "over raw",
        "over ours",
        "one way",
        "over ours",
    ];
    let mut rows = table(&header, &[1, 2, 3, 4, 5]);
    let (our_rtt, our_mps) = (median(&all[0].1.rtt), median(&all[0].1.mps));
    for (name, rounds) in &all {
        let (rtt, mps) = (median(&rounds.rtt), median(&rounds.mps));
        rows.add_row([
            (*name).to_owned(),
            nanos(rtt),
            format!("{:.2}", median(&rounds.over_raw)),
            format!("{:.2}", rtt / our_rtt),
            format!("{mps:.1} M/s"),
            format!("{:.2}", mps / our_mps),
        ]);
    }
    println!("{rows}");
    println!(
        "textbook ring of the run above: {:.1} M/s one way",
        ours.textbook_mps
    );
    Ok(())
}
