//! Bandwidth against interference: what each way in which small segments can go gives, and what it
//! costs an engine that computes meanwhile.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Compute, cases};
use super::engine::{Answer, Order};
use super::interference::{self, Slowdown};
use super::{Engine, GpuArgs, MAX_BLOCKS, measure, say};
use crate::daemon::{DaemonInUse, DaemonSpec};
use crate::error::ToolError;
use crate::node::NodePlace;
use crate::output::table;

/// The case that is measured, by a part of its name.
const CASE: &str = "16-KiB";
/// Pools of the daemons, in times of the engine's memory.
const POOL_TIMES: u64 = 3;

/// The planner's alternatives, as arguments of the daemon.
const WAYS: [(&str, &[&str]); 6] = [
    ("as it comes", &[]),
    ("a copy for each segment", &["--device-staging=0"]),
    ("gathered, 4 slots of 8 MiB", &["--device-staging=32MiB"]),
    ("gathered, 4 slots of 64 MiB", &["--device-staging=256MiB"]),
    ("saves capped at 20 GB/s", &["--d2h-limit=20GB"]),
    ("saves capped at 5 GB/s", &["--d2h-limit=5GB"]),
];

/// One way.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// What the table calls it.
    way: &'static str,
    /// How the daemon was told.
    arguments: &'static [&'static str],
    /// Saves with an idle engine, GB/s.
    save_gbps: f64,
    /// Loads with an idle engine, GB/s.
    load_gbps: f64,
    /// While the engine computes.
    beside: BTreeMap<&'static str, Slowdown>,
}

/// Measures all of them on the first GPU.
pub(super) fn draw(args: &GpuArgs, place: &NodePlace) -> Result<Vec<Point>, ToolError> {
    let all = cases(args.memory.as_u64() as usize, usize::from(args.rounds));
    let case = all.into_iter().find(|case| case.name.contains(CASE));
    let case = case.ok_or_else(|| ToolError::Plan(format!("no case is called {CASE}")))?;
    let mut points = Vec::new();
    for (way, arguments) in WAYS {
        let mut spec = DaemonSpec::with_pool(POOL_TIMES * args.memory.as_u64());
        spec.max_blocks = Some(MAX_BLOCKS);
        spec.further.clone_from(&args.daemon_arg);
        spec.further
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        say(&format!("{way}: the daemon starts"));
        let mut daemon = DaemonInUse::new(None, place, &spec)?;
        let point = point(args, &daemon, &case, (way, arguments));
        points.push(point.map_err(|error| daemon.explain(error))?);
    }
    Ok(points)
}

fn point(
    args: &GpuArgs,
    daemon: &DaemonInUse,
    case: &Case,
    (way, arguments): (&'static str, &'static [&'static str]),
) -> Result<Point, ToolError> {
    let gpu = args.gpus.first().copied().unwrap_or(0);
    let mut engine = Engine::start(gpu)?;
    match engine.ask(&Order::Open { gpu })? {
        Answer::Opened { .. } => {}
        other => return Err(engine.unexpected(&other)),
    }
    let figures = measure(&mut [&mut engine], daemon, case)?;
    let figures = figures.values().next();
    let figures = figures.ok_or_else(|| ToolError::Plan("an engine gave no figures".into()))?;
    let bytes = case.shape.total_bytes() as f64;
    let (save_gbps, load_gbps) = (bytes / figures.save_ns, bytes / figures.load_ns);
    let mut beside = BTreeMap::new();
    for compute in Compute::OF_MODELS {
        let (slowdown, _) = interference::measure(&mut engine, None, compute, args.part_ms)?;
        beside.insert(compute.name(), slowdown);
    }
    Ok(Point {
        way,
        arguments,
        save_gbps,
        load_gbps,
        beside,
    })
}

/// As a table.
pub(super) fn render(points: &[Point]) -> String {
    let header = [
        "way",
        "engine",
        "save",
        "load",
        "slow-down by saves (mean)",
        "by loads (mean)",
    ];
    let mut rows = table(&header, &[2, 3, 4, 5]);
    let rate = |gbps: f64| format!("{gbps:.1} GB/s");
    for point in points {
        rows.add_row([
            point.way.to_owned(),
            "idle".to_owned(),
            rate(point.save_gbps),
            rate(point.load_gbps),
            String::new(),
            String::new(),
        ]);
        for (compute, slow) in &point.beside {
            rows.add_row([
                point.way.to_owned(),
                (*compute).to_owned(),
                rate(slow.save_gbps),
                rate(slow.load_gbps),
                slow.saving.times(slow.alone).to_string(),
                slow.loading.times(slow.alone).to_string(),
            ]);
        }
    }
    format!("{CASE} segments, each way they can go\n{rows}")
}
