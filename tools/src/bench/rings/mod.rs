//! `bench rings`: the product's rings between two processes, against the machine's limits.
//!
//! The CPUs of a virtual machine move between near and far, so each case stands between two raw
//! ping-pongs and is judged against the median of both.

#![forbid(unsafe_code)]

pub mod case;
mod memory;
mod pair;
mod spin;

use std::time::Duration;

use pegaflow_shm::bell::DEFAULT_SPIN_NS;
use serde::Serialize;

pub use case::Case;
pub use pair::{PEER_ARGUMENT, Pair, peer_main, pin};

use crate::error::ToolError;
use crate::replay::latency::median;

/// Spinning round trips: batches and round trips in each.
const SPIN_BATCHES: u64 = 200;
const SPIN_PER_BATCH: u64 = 100;
/// Round trips through the kernel: each is its own batch.
const PARK_BATCHES: u64 = 1_000;
/// Round trips after an idle time.
const IDLE_BATCHES: u64 = 200;
/// Time for the answering side to fall asleep before the next message.
const PARK_GAP: Duration = Duration::from_micros(20);
/// Idle time after which the answering side's CPU sleeps too.
const IDLE_GAP: Duration = Duration::from_micros(400);
/// Messages of a one-way stream.
const STREAM_MESSAGES: u64 = 1_000_000;

/// Limits that the product sets itself, as ratios against what is measured in the same run.
pub const SPIN_LIMIT: f64 = 2.0;
/// One-way throughput against the textbook ring, at least.
pub const ONEWAY_LIMIT: f64 = 0.5;
/// Parked round trip against the eventfd ping-pong, at most.
pub const PARKED_LIMIT: f64 = 1.3;

/// A measurement between two raw ping-pongs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bracketed {
    /// The measurement, in its case's unit.
    pub value: f64,
    /// Median of the raw one-line ping-pongs before and after it, in nanoseconds.
    pub raw_rtt_ns: f64,
}

/// What `bench rings` reports.
#[derive(Clone, Debug, Serialize)]
pub struct RingsReport {
    /// Raw one-line ping-pong around the spinning round trips, in nanoseconds.
    pub raw_rtt_ns: f64,
    /// Raw ping-pong over two lines, each written by one side alone: the limit of any design in
    /// which the memory protection keeps each side from writing the other's. In nanoseconds.
    pub raw_two_lines_rtt_ns: f64,
    /// Empty descriptor there and back, both sides spinning as the product does, in nanoseconds.
    pub spin_rtt_ns: f64,
    /// `spin_rtt_ns / raw_rtt_ns`, each round against its own bracket; the limit is 2.
    pub spin_ratio: f64,
    /// The same with loops that look all the time, in nanoseconds.
    pub spin_tight_rtt_ns: f64,
    /// The answering side asleep at each message, the asking side waiting as the library does
    /// (spin, then sleep), in microseconds.
    pub parked_rtt_us: f64,
    /// Ping-pong of two blocking eventfds, in microseconds.
    pub eventfd_rtt_us: f64,
    /// `parked_rtt_us / eventfd_rtt_us`; the limit is 1.3.
    pub parked_ratio: f64,
    /// Both sides asleep at each message, in microseconds.
    pub both_parked_rtt_us: f64,
    /// As `parked_rtt_us`, after 0.4 ms without a message, in microseconds.
    pub parked_idle_rtt_us: f64,
    /// Eventfd ping-pong after the same idle time, in microseconds.
    pub eventfd_idle_rtt_us: f64,
    /// 64-byte descriptors one way, validated, in millions per second.
    pub oneway_mps: f64,
    /// The better textbook ring, in millions per second.
    pub textbook_mps: f64,
    /// `oneway_mps / textbook_mps`; the limit is 0.5.
    pub oneway_ratio: f64,
    /// Textbook ring with cached indices.
    pub textbook_cached_mps: f64,
    /// Textbook ring that loads the other side's index at each operation.
    pub textbook_indexed_mps: f64,
    /// An empty request through the client library and a daemon, in nanoseconds.
    pub daemon_nop_rtt_ns: Option<f64>,
    /// Rounds; each value is their median.
    pub rounds: usize,
    /// CPUs of the two processes, if there are two.
    pub cpus: Option<(usize, usize)>,
    /// Every bracketed measurement.
    pub cases: Vec<CaseReport>,
}

/// All rounds of one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Name.
    pub name: &'static str,
    /// Unit of the values.
    pub unit: &'static str,
    /// Rounds.
    pub rounds: Vec<Bracketed>,
}

impl CaseReport {
    /// Median of the values.
    pub fn value(&self) -> f64 {
        median(
            &self
                .rounds
                .iter()
                .map(|round| round.value)
                .collect::<Vec<_>>(),
        )
    }

    /// Median of the brackets.
    pub fn raw(&self) -> f64 {
        median(
            &self
                .rounds
                .iter()
                .map(|round| round.raw_rtt_ns)
                .collect::<Vec<_>>(),
        )
    }

    /// Median of each round's value over its own bracket.
    pub fn ratio(&self) -> f64 {
        median(
            &self
                .rounds
                .iter()
                .map(|round| round.value / round.raw_rtt_ns)
                .collect::<Vec<_>>(),
        )
    }
}

impl Pair {
    /// One raw ping-pong, in nanoseconds.
    ///
    /// # Errors
    /// The other process failed or is gone.
    pub fn raw(&mut self) -> Result<f64, ToolError> {
        Ok(median(&self.round_trips(
            Case::RawOneLine,
            SPIN_BATCHES,
            SPIN_PER_BATCH,
            None,
        )?))
    }

    /// Takes a measurement between two raw ping-pongs.
    ///
    /// # Errors
    /// What the measurement fails with.
    pub fn bracket(
        &mut self,
        measure: impl FnOnce(&mut Pair) -> Result<f64, ToolError>,
    ) -> Result<Bracketed, ToolError> {
        let before = self.raw()?;
        let value = measure(self)?;
        let after = self.raw()?;
        Ok(Bracketed {
            value,
            raw_rtt_ns: median(&[before, after]),
        })
    }

    /// Measures one case in its unit: nanoseconds, microseconds or millions per second.
    ///
    /// # Errors
    /// The other process failed or is gone.
    pub fn measure(&mut self, case: Case, gap: Option<Duration>) -> Result<f64, ToolError> {
        match case {
            Case::RawOneLine | Case::RawTwoLines | Case::SpinRoundTrip { .. } => Ok(median(
                &self.round_trips(case, SPIN_BATCHES, SPIN_PER_BATCH, gap)?,
            )),
            Case::Park { .. } | Case::Eventfd => {
                let batches = if gap == Some(IDLE_GAP) {
                    IDLE_BATCHES
                } else {
                    PARK_BATCHES
                };
                Ok(median(&self.round_trips(case, batches, 1, gap)?) / 1e3)
            }
            Case::OneWay | Case::TextbookCached | Case::TextbookIndexed => {
                self.one_way(case, STREAM_MESSAGES)
            }
        }
    }
}

const SPIN: Case = Case::SpinRoundTrip { pause: true };
const SPIN_TIGHT: Case = Case::SpinRoundTrip { pause: false };
const PARKED: Case = Case::Park {
    spin_ns: DEFAULT_SPIN_NS,
};
const BOTH_PARKED: Case = Case::Park { spin_ns: 0 };

/// Name, unit, case, and the pause before each round trip.
type Row = (&'static str, &'static str, Case, Option<Duration>);

/// What is measured, in the order of the table.
const ROWS: [Row; 11] = [
    ("raw ping-pong, two lines", "ns", Case::RawTwoLines, None),
    ("spinning round trip", "ns", SPIN, None),
    (
        "spinning round trip, looking all the time",
        "ns",
        SPIN_TIGHT,
        None,
    ),
    ("parked round trip", "us", PARKED, Some(PARK_GAP)),
    ("eventfd ping-pong", "us", Case::Eventfd, Some(PARK_GAP)),
    ("round trip, both parked", "us", BOTH_PARKED, Some(PARK_GAP)),
    (
        "parked round trip after an idle time",
        "us",
        PARKED,
        Some(IDLE_GAP),
    ),
    (
        "eventfd ping-pong after an idle time",
        "us",
        Case::Eventfd,
        Some(IDLE_GAP),
    ),
    ("one way, product", "M/s", Case::OneWay, None),
    (
        "one way, textbook, cached indices",
        "M/s",
        Case::TextbookCached,
        None,
    ),
    (
        "one way, textbook, index per message",
        "M/s",
        Case::TextbookIndexed,
        None,
    ),
];

/// Runs every case `rounds` times. `daemon_nop` measures one median round trip through a real
/// daemon.
///
/// # Errors
/// The second process cannot be started, failed or is gone.
pub fn run(
    rounds: usize,
    mut daemon_nop: Option<&mut dyn FnMut() -> Result<f64, ToolError>>,
    mut progress: impl FnMut(usize),
) -> Result<RingsReport, ToolError> {
    let mut pair = Pair::start()?;
    let mut cases: Vec<CaseReport> = ROWS
        .iter()
        .map(|(name, unit, ..)| CaseReport {
            name,
            unit,
            rounds: Vec::new(),
        })
        .collect();
    let mut nops = Vec::new();
    for round in 0..rounds {
        for (report, (_, _, case, gap)) in cases.iter_mut().zip(&ROWS) {
            report
                .rounds
                .push(pair.bracket(|pair| pair.measure(*case, *gap))?);
        }
        if let Some(measure) = &mut daemon_nop {
            nops.push(measure()?);
        }
        progress(round + 1);
    }
    Ok(summarise(cases, nops, rounds, pair.pinned))
}

fn summarise(
    cases: Vec<CaseReport>,
    nops: Vec<f64>,
    rounds: usize,
    cpus: Option<(usize, usize)>,
) -> RingsReport {
    let of = |case: Case, gap: Option<Duration>| {
        let row = ROWS.iter().position(|row| row.2 == case && row.3 == gap);
        &cases[row.expect("every case asked for is in the table")]
    };
    let value = |case| of(case, None).value();
    let parked = |case, gap| of(case, Some(gap)).value();
    let textbook_cached_mps = value(Case::TextbookCached);
    let textbook_indexed_mps = value(Case::TextbookIndexed);
    let textbook_mps = textbook_cached_mps.max(textbook_indexed_mps);
    RingsReport {
        raw_rtt_ns: of(SPIN, None).raw(),
        raw_two_lines_rtt_ns: value(Case::RawTwoLines),
        spin_rtt_ns: value(SPIN),
        spin_ratio: of(SPIN, None).ratio(),
        spin_tight_rtt_ns: value(SPIN_TIGHT),
        parked_rtt_us: parked(PARKED, PARK_GAP),
        eventfd_rtt_us: parked(Case::Eventfd, PARK_GAP),
        parked_ratio: parked(PARKED, PARK_GAP) / parked(Case::Eventfd, PARK_GAP),
        both_parked_rtt_us: parked(BOTH_PARKED, PARK_GAP),
        parked_idle_rtt_us: parked(PARKED, IDLE_GAP),
        eventfd_idle_rtt_us: parked(Case::Eventfd, IDLE_GAP),
        oneway_mps: value(Case::OneWay),
        textbook_mps,
        oneway_ratio: value(Case::OneWay) / textbook_mps,
        textbook_cached_mps,
        textbook_indexed_mps,
        daemon_nop_rtt_ns: (!nops.is_empty()).then(|| median(&nops)),
        rounds,
        cpus,
        cases,
    }
}
