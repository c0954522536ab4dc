//! `bench ssd`: pages to and from an SSD shard, against fio over the same file in the same run.

#![forbid(unsafe_code)]

mod fio;
mod layouts;
mod memory;
mod rig;
mod row;
mod tables;

use std::num::NonZero;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use pegaflow_ssd::IoChoice;
use serde_json::json;

use crate::error::ToolError;
use crate::output::{print_json, size};

use fio::{Fio, Job};
use memory::Hugepages;
use rig::Rig;
use row::{Figure, Round, Row, row};
use tables::{cpu_times, rates};

/// fio's figure for CPU time needs no more than that.
const PSYNC_BYTES: u64 = 1 << 30;
/// fio moves what lies behind the superblock: the shard stays one.
const FIO_OFFSET: u64 = 2 << 20;

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
    /// Size of the file
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
    /// Rounds of ours and of fio's in turns; figures are their medians, ratios those of neighbours
    #[arg(long, default_value = "9")]
    pub rounds: NonZero<usize>,
    /// Most bytes of a round. Short ones let the changes of a drive's speed strike both alike
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub round_bytes: ByteSize,
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
        "{engine} against {fio} (io_uring, direct, registered), depth {}, file of {}, {} rounds of \
         at most {} in turns, {memory}",
        args.depth,
        size(args.size.as_u64()),
        args.rounds,
        size(args.round_bytes.as_u64()),
    );
    println!("{}\n{}", rates(&rows), cpu_times(&rows));
    Ok(())
}

/// One page size.
struct Measured {
    engine: &'static str,
    memory: String,
    rows: Vec<Row>,
}

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
    rig.write(rig.most_bytes)?;
    // What fio writes replaces the shard's pages: all of them are read before.
    let read = measure_reads(args, &path, &folder.path().join("verified"), &mut rig)?;
    let write = measure_writes(args, &path, &mut rig)?;
    Ok(Measured {
        engine: rig.engine,
        memory: rig.memory.words(),
        rows: vec![write, read],
    })
}

/// Rounds of all sides in turns, so short that a drive whose speed changes with time is alike for
/// them. fio checks only what it wrote itself, for which it has the file `verified`.
fn measure_reads(
    args: &SsdArgs,
    path: &Path,
    verified: &Path,
    rig: &mut Rig,
) -> Result<Row, ToolError> {
    let bytes = rig.whole_pages(args.round_bytes.as_u64());
    let job = Job {
        pattern: "randread",
        engine: "io_uring",
        bytes,
        span: (FIO_OFFSET, rig.most_bytes),
        verify: false,
    };
    let verifies = Job {
        verify: true,
        ..job
    };
    let writes = Job {
        pattern: "write",
        bytes: rig.most_bytes,
        ..verifies
    };
    Fio::of(args, verified, rig).measure(writes)?;
    let mut rounds: Vec<Round> = Vec::new();
    for round in 0..args.rounds.get() {
        // First ours, then fio twice, then ours twice.
        rounds.push(if round % 2 == 1 {
            let checked = Fio::of(args, verified, rig).measure(verifies)?;
            let plain = Fio::of(args, path, rig).measure(job)?;
            (rig.read(bytes)?, plain, Some(checked))
        } else {
            let ours = rig.read(bytes)?;
            let plain = Fio::of(args, path, rig).measure(job)?;
            let checked = Fio::of(args, verified, rig).measure(verifies)?;
            (ours, plain, Some(checked))
        });
    }
    let bytes = rig.whole_pages(PSYNC_BYTES);
    let psync = |job| Job {
        engine: "psync",
        bytes,
        ..job
    };
    let plain = Fio::of(args, path, rig).measure(psync(job))?;
    let checked = Fio::of(args, verified, rig).measure(psync(verifies))?;
    std::fs::remove_file(verified).map_err(ToolError::io(format!("{}", verified.display())))?;
    Ok(row(rig.page, "read", &rounds, plain.cpu, Some(checked.cpu)))
}

/// Rounds of both sides in turns.
fn measure_writes(args: &SsdArgs, path: &Path, rig: &mut Rig) -> Result<Row, ToolError> {
    let bytes = rig.whole_pages(args.round_bytes.as_u64());
    let parts = rig.most_bytes / bytes;
    let job = |round: u64, bytes| Job {
        pattern: "write",
        engine: "io_uring",
        bytes,
        // Not always the same part of the file: a log does not stay where it is, either.
        span: (FIO_OFFSET + round % parts * bytes, bytes),
        verify: false,
    };
    let mut rounds: Vec<Round> = Vec::new();
    for round in 0..args.rounds.get() {
        let theirs = |rig: &Rig| Fio::of(args, path, rig).measure(job(round as u64, bytes));
        rounds.push(if round % 2 == 1 {
            let theirs = theirs(rig)?;
            (rig.write(bytes)?, theirs, None)
        } else {
            (rig.write(bytes)?, theirs(rig)?, None)
        });
    }
    let psync = Job {
        engine: "psync",
        ..job(0, rig.whole_pages(PSYNC_BYTES))
    };
    let psync = Fio::of(args, path, rig).measure(psync)?;
    Ok(row(rig.page, "write", &rounds, psync.cpu, None))
}
