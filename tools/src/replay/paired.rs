//! The same workload with and without the SSD tier, in turns: what the tier costs queries that need
//! nothing of it.
//!
//! Two runs one after the other compare two states of a machine as well. Here both daemons are
//! there, and a few hundred requests go to one and then to the other, who is first in turns. Of the
//! latencies those of the same requests are compared.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use comfy_table::Table;
use serde_json::{Value, json};

use super::latency::Latency;
use super::plan::{Plan, ReplayArgs};
use super::report::Report;
use super::scheduler::RequestDone;
use super::trace::Request;
use super::worker::Said;
use super::{Engine, MadeFiles, engine_failed, expect_ready, progress_bar, start_engine};
use crate::daemon::DaemonInUse;
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::{count, facts, nanos, print_json};

/// Requests of one side before it is the other's turn.
const TURN: usize = 500;
/// Rest between turns, in which a tier makes durable what it has: longer than its interval.
const REST: Duration = Duration::from_millis(300);

/// A daemon, its engine, and what they came to.
struct Side {
    engine: Engine,
    report: Report,
    daemon: DaemonInUse,
    cpu_before: Option<f64>,
    took: Duration,
    _made: MadeFiles,
}

impl Side {
    fn start(
        args: &ReplayArgs,
        requests: &[Request],
        place: &NodePlace,
    ) -> Result<Side, ToolError> {
        let plan = Plan::new(args, requests, false)?;
        let made = MadeFiles(plan.new_files());
        let mut daemon = DaemonInUse::new(None, place, &plan.daemon)?;
        let engine = start_engine(&plan, &daemon, 0, args.seed).and_then(|mut engine| {
            expect_ready(&mut engine)?;
            Ok(engine)
        });
        Ok(Side {
            engine: engine.map_err(|error| daemon.explain(error))?,
            report: Report::new(&plan, &daemon, requests),
            cpu_before: daemon.cpu_seconds(),
            daemon,
            took: Duration::ZERO,
            _made: made,
        })
    }

    /// Has these requests done, and tells of each how long its query took if it needed nothing from
    /// below the pool.
    fn turn(&mut self, requests: &[Request]) -> Result<Vec<Option<u64>>, ToolError> {
        let started = Instant::now();
        let done = do_all(&mut self.engine, requests);
        self.took += started.elapsed();
        let done = done.map_err(|error| self.daemon.explain(error))?;
        let queries = done
            .iter()
            .map(|done| done.fetch_ns.is_none().then_some(done.query_ns));
        let queries = queries.collect();
        done.into_iter().for_each(|done| self.report.add(done));
        Ok(queries)
    }

    fn finish(mut self) -> Result<Report, ToolError> {
        self.report.finish(self.took, self.cpu_before, &self.daemon);
        drop(self.engine.requests);
        self.engine.process.finish()?;
        Ok(self.report)
    }
}

/// Sends requests from a thread of its own: the pipe takes only some before there are answers.
fn do_all(engine: &mut Engine, requests: &[Request]) -> Result<Vec<RequestDone>, ToolError> {
    let Engine {
        requests: to,
        answers: from,
        ..
    } = engine;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| requests.iter().try_for_each(|request| to.send(request)));
        let done: Result<Vec<RequestDone>, ToolError> = requests
            .iter()
            .map(|_| match from.expect::<Said<RequestDone>>()? {
                Said::Done(done) => Ok(done),
                Said::Failed(what) => Err(engine_failed(what)),
                Said::Ready => Err(engine_failed("is ready twice".to_owned())),
            })
            .collect();
        // An engine that ends early says why before its pipe breaks.
        let done = done?;
        match sender.join() {
            Ok(sent) => sent.map(|()| done),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Latencies of queries that needed nothing from below the pool on either side.
#[derive(Default)]
struct Same {
    without: Latency,
    with: Latency,
}

impl Same {
    fn add(&mut self, without: &[Option<u64>], with: &[Option<u64>]) {
        for pair in without.iter().zip(with) {
            if let (Some(without), Some(with)) = pair {
                self.without.record_ns(*without);
                self.with.record_ns(*with);
            }
        }
    }

    fn ratio(&self, quantile: f64) -> f64 {
        self.with.quantile_us(quantile) / self.without.quantile_us(quantile)
    }

    fn json(&self) -> Value {
        json!({
            "requests": self.with.count(),
            "query_us_without_ssd": self.without.json(),
            "query_us_with_ssd": self.with.json(),
            "p50_ratio": self.ratio(0.5),
            "p99_ratio": self.ratio(0.99),
        })
    }

    fn table(&self) -> Table {
        let line = |quantile: f64| {
            let time = |latency: &Latency| nanos(latency.quantile_us(quantile) * 1e3);
            format!(
                "{} without SSD, {} with it: {:.2} times",
                time(&self.without),
                time(&self.with),
                self.ratio(quantile)
            )
        };
        facts([
            (
                "same requests",
                format!("{} that need nothing from SSD", count(self.with.count())),
            ),
            ("query p50", line(0.5)),
            ("query p99", line(0.99)),
        ])
    }
}

/// `pegactl replay --beside-ram`; true when every byte was right and every request was done.
///
/// # Errors
/// As a replay's.
pub(super) fn replay(
    args: &ReplayArgs,
    requests: &[Request],
    place: &NodePlace,
    as_json: bool,
) -> Result<bool, ToolError> {
    if args.engines.get() != 1 {
        return Err(ToolError::Plan(
            "--beside-ram: with several --engines no two runs have the same hits; leave them out"
                .into(),
        ));
    }
    let mut ram = args.clone();
    (ram.ssd, ram.ssd_admit) = (Vec::new(), None);
    let mut without = Side::start(&ram, requests, place)?;
    let mut with = Side::start(args, requests, place)?;
    let bar = progress_bar(requests.len() as u64 * 2);
    let mut same = Same::default();
    for (number, share) in requests.chunks(TURN).enumerate() {
        let turn = |side: &mut Side| {
            std::thread::sleep(REST);
            let queries = side.turn(share);
            bar.inc(share.len() as u64);
            queries
        };
        let (ram, ssd) = if number % 2 == 0 {
            let ram = turn(&mut without)?;
            (ram, turn(&mut with)?)
        } else {
            let ssd = turn(&mut with)?;
            (turn(&mut without)?, ssd)
        };
        same.add(&ram, &ssd);
    }
    bar.finish_and_clear();
    let reports = [without.finish()?, with.finish()?];
    let [without, with] = &reports;
    if as_json {
        print_json(&json!({
            "without_ssd": without.json(), "with_ssd": with.json(), "same_requests": same.json(),
        }));
    } else {
        println!("{}\n{}\n{}", without.table(), with.table(), same.table());
    }
    for line in reports.iter().flat_map(Report::complaints) {
        eprintln!("{line}");
    }
    Ok(reports.iter().all(Report::is_clean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_that_need_nothing_from_below_on_either_side_are_compared() {
        let mut same = Same::default();
        same.add(
            &[Some(1_000), Some(2_000), None, Some(4_000)],
            &[Some(3_000), None, Some(1), Some(8_000)],
        );
        assert_eq!((same.without.count(), same.with.count()), (2, 2));
        assert!((same.ratio(0.5) - 3.0).abs() < 0.01);
        assert!((same.ratio(0.99) - 2.0).abs() < 0.01);
    }
}
