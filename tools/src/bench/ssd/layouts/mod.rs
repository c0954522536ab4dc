//! The two layouts that a shard could have had: a log of segments, and slabs of pages that are each
//! written over when they are free. What each writes where, at the drive; and what each
//! keeps when blocks leave RAM in the order of a trace.

#![forbid(unsafe_code)]

mod keep;

use std::fs::File;

use pegaflow_ssd::{Options, PatternStep, run_pattern};
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::Serialize;
use serde_json::json;

use super::SsdArgs;
use super::memory::Memory;
use crate::error::ToolError;
use crate::output::{count, print_json, size, table};
use crate::replay::latency::median;

/// The unit of records on the drive.
const CHUNK: u32 = 4096;
/// Records of one chunk.
const RECORDS: usize = 42;
/// Where records of slabs go: those of a drive's slots are so many that two pages of one commit
/// seldom share a chunk.
const RECORD_BYTES: u64 = 64 << 20;
/// Commits of a slab take their records from there on, so that they do not meet.
const RECORDS_APART: usize = 4096;

/// One page size at the drive.
#[derive(Clone, Debug, Serialize)]
struct WriteRow {
    page_bytes: u64,
    /// Bytes of pages per second, all made durable; medians of the rounds.
    log: f64,
    slab: f64,
    /// The median of the rounds' ratios of slab to log.
    ratio: f64,
    /// Bytes written per byte of pages.
    log_amplification: f64,
    slab_amplification: f64,
}

/// `pegactl bench ssd --layouts`.
pub(super) fn command(args: &SsdArgs, as_json: bool) -> Result<(), ToolError> {
    let (mut written, mut kept) = (Vec::new(), Vec::new());
    for page in &args.page_bytes {
        written.push(writes(args, page.as_u64())?);
        if let Some(trace) = &args.trace {
            kept.extend(keep::keeps(trace, page.as_u64())?);
        }
    }
    if as_json {
        print_json(&json!({
            "depth": args.depth, "rounds": args.rounds, "bytes": args.size.as_u64(),
            "writes": written, "keeps": kept,
        }));
        return Ok(());
    }
    let header = [
        "page",
        "log GB/s",
        "slab GB/s",
        "slab / log",
        "log written",
        "slab written",
    ];
    let mut rows = table(&header, &[0, 1, 2, 3, 4, 5]);
    for row in written {
        rows.add_row([
            size(row.page_bytes),
            format!("{:.2}", row.log / 1e9),
            format!("{:.2}", row.slab / 1e9),
            format!("{:.2}", row.ratio),
            format!("{:.3}", row.log_amplification),
            format!("{:.3}", row.slab_amplification),
        ]);
    }
    println!("{rows}");
    if kept.is_empty() {
        return Ok(());
    }
    let header = [
        "page",
        "blocks on the drive",
        "of all",
        "log hits",
        "slab hits",
        "log writes",
        "slab writes",
    ];
    let mut rows = table(&header, &[0, 1, 2, 3, 4, 5, 6]);
    for row in kept {
        rows.add_row([
            size(row.page_bytes),
            count(u64::from(row.blocks)),
            format!("{:.0} %", row.part * 100.0),
            format!("{:.2} %", row.log_hits * 100.0),
            format!("{:.2} %", row.slab_hits * 100.0),
            count(row.log_writes),
            count(row.slab_writes),
        ]);
    }
    println!("{rows}");
    Ok(())
}

/// Writes as many pages as the file holds half of, in both ways by turns.
fn writes(args: &SsdArgs, page_bytes: u64) -> Result<WriteRow, ToolError> {
    let page = u32::try_from(page_bytes)
        .ok()
        .filter(|page| page.is_multiple_of(CHUNK) && *page > 0 && *page <= 64 << 20)
        .ok_or_else(|| ToolError::Plan("--page-bytes: give multiples of 4 KiB".to_owned()))?;
    let folder = tempfile::tempdir_in(&args.folder)
        .map_err(ToolError::io(format!("{}", args.folder.display())))?;
    let path = folder.path().join("file");
    let io = |source| ToolError::io(format!("{}", path.display()))(source);
    let slots = args.size.as_u64().saturating_sub(RECORD_BYTES) / page_bytes;
    if slots < 2 {
        return Err(ToolError::Plan("--size: it holds no two pages".to_owned()));
    }
    let file = File::create(&path).map_err(io)?;
    file.set_len(RECORD_BYTES + slots * page_bytes)
        .map_err(io)?;
    drop(file);
    let depth = args.depth.get();
    let (pool, _memory) = Memory::new(args.hugepages, page as usize * 2 * depth as usize)?;
    // The first time space is written costs more, for everybody.
    let all: Vec<u64> = (0..slots).collect();
    let (first, _) = log_steps(&all, page, args.size.as_u64());
    run_pattern(&path, &pool, depth, &first).map_err(io)?;
    let mut rates: Vec<[f64; 2]> = Vec::new();
    let mut amplification = [1.0; 2];
    for round in 0..args.rounds.get() {
        let mut free = all.clone();
        free.shuffle(&mut rand::rng());
        free.truncate(all.len() / 2);
        let start = rand::rng().random_range(0..=all.len() - free.len());
        let row = &all[start..start + free.len()];
        let commit = Options::new("", Vec::new()).commit_bytes;
        let plans = [
            log_steps(row, page, commit),
            slab_steps(&free, page, commit),
        ];
        let mut rate = [0.0; 2];
        for which in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let (steps, bytes) = &plans[which];
            let took = run_pattern(&path, &pool, depth, steps).map_err(io)?;
            let pages = free.len() as u64 * page_bytes;
            rate[which] = pages as f64 / took.as_secs_f64();
            amplification[which] = *bytes as f64 / pages as f64;
        }
        rates.push(rate);
    }
    let of =
        |pick: &dyn Fn(&[f64; 2]) -> f64| median(&rates.iter().map(pick).collect::<Vec<f64>>());
    Ok(WriteRow {
        page_bytes,
        log: of(&|rate| rate[0]),
        slab: of(&|rate| rate[1]),
        ratio: of(&|rate| rate[1] / rate[0]),
        log_amplification: amplification[0],
        slab_amplification: amplification[1],
    })
}

struct Steps {
    steps: Vec<PatternStep>,
    bytes: u64,
}

impl Steps {
    fn write(&mut self, offset: u64, bytes: u32) {
        self.steps.push(PatternStep::Write { offset, bytes });
        self.bytes += u64::from(bytes);
    }

    fn pages(&mut self, slots: &[u64], page: u32) {
        for slot in slots {
            self.write(RECORD_BYTES + slot * u64::from(page), page);
        }
        self.steps.push(PatternStep::Sync);
    }

    fn chunks(&mut self, places: impl Iterator<Item = u64>) {
        for place in places {
            self.write(place * u64::from(CHUNK), CHUNK);
        }
        self.steps.push(PatternStep::Sync);
    }
}

/// A log's commits: the pages, then the chunks that name them.
fn log_steps(slots: &[u64], page: u32, commit: u64) -> (Vec<PatternStep>, u64) {
    let mut plan = Steps {
        steps: Vec::new(),
        bytes: 0,
    };
    let mut chunk = 0;
    for slots in slots.chunks((commit / u64::from(page)).max(1) as usize) {
        plan.pages(slots, page);
        let chunks = slots.len().div_ceil(RECORDS) as u64;
        let places = RECORD_BYTES / u64::from(CHUNK);
        plan.chunks((chunk..chunk + chunks).map(|chunk| chunk % places));
        chunk += chunks;
    }
    (plan.steps, plan.bytes)
}

/// A slab's: each slot's old record is made void, then the pages are written, then their records.
fn slab_steps(slots: &[u64], page: u32, commit: u64) -> (Vec<PatternStep>, u64) {
    let mut plan = Steps {
        steps: Vec::new(),
        bytes: 0,
    };
    let mut places: Vec<u64> = (0..RECORD_BYTES / u64::from(CHUNK)).collect();
    places.shuffle(&mut rand::rng());
    for (at, slots) in slots
        .chunks((commit / u64::from(page)).max(1) as usize)
        .enumerate()
    {
        let records = || {
            let from = at * RECORDS_APART;
            (from..from + slots.len()).map(|at| places[at % places.len()])
        };
        plan.chunks(records());
        plan.pages(slots, page);
        plan.chunks(records());
    }
    (plan.steps, plan.bytes)
}
