//! `bench ssd`: pages to and from an SSD shard, against fio over the same file in the same run.

#![forbid(unsafe_code)]

mod fio;
mod layouts;
mod memory;
mod rig;

use std::num::NonZero;
use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use pegaflow_ssd::IoChoice;
use serde::Serialize;
use serde_json::json;

use crate::error::ToolError;
use crate::output::{print_json, size, table};
use crate::replay::latency::median;

use fio::Fio;
use memory::Hugepages;
use rig::Rig;

/// fio's figure for CPU time needs no more than that.
const PSYNC_BYTES: u64 = 1 << 30;

/// How the tier moves pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SsdIo {
    /// io_uring where it is allowed, else threads.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// A thread pool.
    Threads,
}

impl From<SsdIo> for IoChoice {
    fn from(io: SsdIo) -> Self {
        match io {
            SsdIo::Auto => Self::Auto,
            SsdIo::Uring => Self::Uring,
            SsdIo::Threads => Self::Threads,
        }
    }
}

/// Flags of `bench ssd`.
#[derive(Clone, Debug, Args)]
pub struct SsdArgs {
    /// Folder on the drive; the file that is measured is made there and removed again
    #[arg(long, value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Size of the file; nearly so much is written and read in each round
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub size: ByteSize,
    /// Bytes of a page, several separated by commas
    #[arg(
        long,
        value_name = "BYTES",
        value_delimiter = ',',
        default_value = "2MiB,64KiB"
    )]
    pub page_bytes: Vec<ByteSize>,
    /// Pages at the drive at a time
    #[arg(long, value_name = "N", default_value = "32")]
    pub depth: NonZero<u32>,
    /// Rounds; figures are their medians
    #[arg(long, default_value = "5")]
    pub rounds: NonZero<usize>,
    /// Whether the pages lie in huge pages, for the tier and for fio
    #[arg(long, value_enum, default_value = "off")]
    pub hugepages: Hugepages,
    /// How the tier moves pages
    #[arg(long, value_enum, default_value = "auto")]
    pub io: SsdIo,
    /// Milliseconds of idleness before io_uring's polling kernel thread sleeps [default: no such
    /// thread]
    #[arg(long, value_name = "MS")]
    pub sqpoll_ms: Option<u64>,
    /// Compare the layouts that a shard could have had instead: a log of segments, as it is, and
    /// slabs whose slots are reclaimed one by one
    #[arg(long)]
    pub layouts: bool,
    /// A trace as `replay` takes it: what each layout keeps of it, on smaller and smaller drives
    #[arg(long, value_name = "FILE", requires = "layouts")]
    pub trace: Option<PathBuf>,
}

/// One page size in one direction.
#[derive(Clone, Debug, Serialize)]
struct Row {
    page_bytes: u64,
    direction: &'static str,
    /// Bytes per second; medians of the rounds.
    ours: f64,
    fio: f64,
    /// The median of the rounds' ratios.
    ratio: f64,
    /// Seconds of CPU time per GiB, checksums included.
    ours_cpu: f64,
    fio_cpu: f64,
    fio_psync_cpu: f64,
    /// Seconds per GiB of `ours_cpu` that went into checksums; fio takes none.
    checksum_cpu: f64,
}

/// Bytes per second, and seconds of CPU time and of checksums per GiB.
#[derive(Clone, Copy, Debug)]
struct Figure {
    rate: f64,
    cpu: f64,
    checksums: f64,
}

/// `pegactl bench ssd`.
///
/// # Errors
/// fio is not there, or the file cannot be made.
pub fn command(args: &SsdArgs, as_json: bool) -> Result<(), ToolError> {
    if args.layouts {
        return layouts::command(args, as_json);
    }
    let fio = fio::version()?;
    let mut rows = Vec::new();
    let (mut engine, mut memory) = ("", String::new());
    for page in &args.page_bytes {
        let measured = measure(args, page.as_u64())?;
        (engine, memory) = (measured.engine, measured.memory);
        rows.extend(measured.rows);
    }
    if as_json {
        print_json(&json!({
            "engine": engine, "fio": fio, "memory": memory, "depth": args.depth, "rounds": args.rounds,
            "bytes": args.size.as_u64(), "rows": rows,
        }));
        return Ok(());
    }
    println!(
        "{engine} against {fio} (io_uring, direct, registered), depth {}, file of {}, {} rounds, \
         {memory}",
        args.depth,
        size(args.size.as_u64()),
        args.rounds
    );
    let header = [
        "page",
        "",
        "ours GB/s",
        "fio GB/s",
        "ratio",
        "ours CPU s/GiB",
        "fio",
        "fio psync",
        "of ours checksums",
    ];
    let mut table = table(&header, &[0, 2, 3, 4, 5, 6, 7, 8]);
    for row in rows {
        table.add_row([
            size(row.page_bytes),
            row.direction.to_owned(),
            format!("{:.2}", row.ours / 1e9),
            format!("{:.2}", row.fio / 1e9),
            format!("{:.2}", row.ratio),
            format!("{:.3}", row.ours_cpu),
            format!("{:.3}", row.fio_cpu),
            format!("{:.3}", row.fio_psync_cpu),
            format!("{:.3}", row.checksum_cpu),
        ]);
    }
    println!("{table}");
    Ok(())
}

/// One page size.
struct Measured {
    engine: &'static str,
    memory: String,
    rows: Vec<Row>,
}

/// The figures of one round: ours, fio's and fio's with psync.
type Round = [Figure; 3];

fn measure(args: &SsdArgs, page_bytes: u64) -> Result<Measured, ToolError> {
    let page = u32::try_from(page_bytes)
        .ok()
        .filter(|&page| page > 0 && page <= 64 << 20)
        .ok_or_else(|| ToolError::Plan("--page-bytes: give at most 64MiB".to_owned()))?;
    let folder = tempfile::tempdir_in(&args.folder)
        .map_err(ToolError::io(format!("{}", args.folder.display())))?;
    let path = folder.path().join("shard");
    let mut rig = Rig::open(args, &path, page)?;
    // Space that was never written is slower to write the first time, for everybody.
    rig.write()?;
    let (mut writes, mut reads): (Vec<Round>, Vec<Round>) = Default::default();
    for round in 0..args.rounds.get() {
        let (write, read) = measure_round(args, &path, page, &mut rig, round % 2 == 1)?;
        writes.push(write);
        reads.push(read);
    }
    let row = |direction, rounds: &[Round]| {
        let of =
            |pick: &dyn Fn(&Round) -> f64| median(&rounds.iter().map(pick).collect::<Vec<f64>>());
        Row {
            page_bytes,
            direction,
            ours: of(&|round| round[0].rate),
            fio: of(&|round| round[1].rate),
            ratio: of(&|round| round[0].rate / round[1].rate),
            ours_cpu: of(&|round| round[0].cpu),
            fio_cpu: of(&|round| round[1].cpu),
            fio_psync_cpu: of(&|round| round[2].cpu),
            checksum_cpu: of(&|round| round[0].checksums),
        }
    };
    Ok(Measured {
        engine: rig.engine,
        memory: rig.memory.words(),
        rows: vec![row("write", &writes), row("read", &reads)],
    })
}

/// Writes and reads, both sides as many bytes. Who is first changes from round to round.
fn measure_round(
    args: &SsdArgs,
    path: &std::path::Path,
    page: u32,
    rig: &mut Rig,
    fio_first: bool,
) -> Result<(Round, Round), ToolError> {
    let bytes = rig.round_bytes;
    let fio = |rig: &Rig, pattern: &str| -> Result<[Figure; 2], ToolError> {
        let fio = Fio {
            args,
            path,
            memory: &rig.memory,
            page,
        };
        Ok([
            fio.measure(pattern, "io_uring", bytes)?,
            fio.measure(pattern, "psync", bytes.min(PSYNC_BYTES))?,
        ])
    };
    // What fio writes replaces the shard's pages: ours are written before they are read.
    let (ours, theirs, ours_read, theirs_read);
    if fio_first {
        theirs = fio(rig, "write")?;
        ours = rig.write()?;
        theirs_read = fio(rig, "randread")?;
        ours_read = rig.read()?;
    } else {
        ours = rig.write()?;
        ours_read = rig.read()?;
        theirs_read = fio(rig, "randread")?;
        theirs = fio(rig, "write")?;
    }
    Ok((
        [ours, theirs[0], theirs[1]],
        [ours_read, theirs_read[0], theirs_read[1]],
    ))
}
