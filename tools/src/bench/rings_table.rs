//! How `bench rings` looks.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use super::rings::{CaseReport, ONEWAY_LIMIT, PARKED_LIMIT, RingsReport, SPIN_LIMIT};
use crate::output::{nanos, table};

fn amount(value: f64, unit: &str) -> String {
    match unit {
        "ns" => nanos(value),
        "us" => nanos(value * 1e3),
        _ => format!("{value:.1} {unit}"),
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "NOT met" }
}

/// Rounds of a case with their own brackets in one line each.
fn case_rows(case: &CaseReport) -> [String; 4] {
    let over_raw = match case.unit {
        "ns" => format!("{:.2}", case.ratio()),
        "us" => format!("{:.1}", case.ratio() * 1e3),
        _ => "-".to_owned(),
    };
    [
        case.name.to_owned(),
        amount(case.value(), case.unit),
        nanos(case.raw()),
        over_raw,
    ]
}

/// The tables for a person.
pub fn render(report: &RingsReport) -> String {
    let mut text = String::new();
    let cpus = match report.cpus {
        Some((a, b)) => format!("two processes pinned to CPUs {a} and {b}"),
        None => "two processes on ONE CPU: nothing here says what two CPUs would do".to_owned(),
    };
    let _ = writeln!(text, "{cpus}, medians of {} rounds", report.rounds);
    let mut cases = table(
        &[
            "64-byte descriptors",
            "median",
            "raw ping-pong around it",
            "over raw",
        ],
        &[1, 2, 3],
    );
    for case in &report.cases {
        cases.add_row(case_rows(case));
    }
    if let Some(nop) = report.daemon_nop_rtt_ns {
        let name = "empty request, library and daemon".to_owned();
        cases.add_row([name, nanos(nop), "-".into(), "-".into()]);
    }
    let _ = writeln!(text, "{cases}");
    let mut limits = table(&["limit", "ratio", "must be", ""], &[1, 2]);
    limits.add_row([
        "spinning round trip / raw ping-pong".to_owned(),
        format!("{:.2}", report.spin_ratio),
        format!("<= {SPIN_LIMIT}"),
        verdict(report.spin_ratio <= SPIN_LIMIT).to_owned(),
    ]);
    limits.add_row([
        "one way / textbook".to_owned(),
        format!("{:.2}", report.oneway_ratio),
        format!(">= {ONEWAY_LIMIT}"),
        verdict(report.oneway_ratio >= ONEWAY_LIMIT).to_owned(),
    ]);
    limits.add_row([
        "parked round trip / eventfd ping-pong".to_owned(),
        format!("{:.2}", report.parked_ratio),
        format!("<= {PARKED_LIMIT}"),
        verdict(report.parked_ratio <= PARKED_LIMIT).to_owned(),
    ]);
    let _ = write!(
        text,
        "{limits}\n\
         spinning: validation and doorbell checks on both sides.\n\
         two lines: what each side writes alone, as the product's rings are; one line, written by\n\
         both, is the faster raw ping-pong around each case.\n\
         parked: the answering side sleeps at each message, the asking side waits as the library\n\
         does. idle time: 0.4 ms without a message, so that the CPU sleeps as well."
    );
    text
}
