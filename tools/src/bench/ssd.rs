//! `bench ssd`: pages to and from an SSD shard, against fio over the same file in the same run.

#![forbid(unsafe_code)]

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use pegaflow_ssd::{
    BlockKey, Completion, IoChoice, NO_CHECKSUM, Options, Outcome, PageRef, PoolMemory, Refused,
    ShardSpec, Tier,
};
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::ToolError;
use crate::output::{print_json, size, table};
use crate::replay::latency::median;

/// Nothing takes that long unless the drive is gone.
const PATIENCE: Duration = Duration::from_secs(120);
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
    /// Size of the file; so much is written and read in each round
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
    #[arg(long, default_value = "3")]
    pub rounds: NonZero<usize>,
    /// How the tier moves pages
    #[arg(long, value_enum, default_value = "auto")]
    pub io: SsdIo,
    /// Milliseconds of idleness before io_uring's polling kernel thread sleeps [default: no such
    /// thread]
    #[arg(long, value_name = "MS")]
    pub sqpoll_ms: Option<u64>,
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
    /// Seconds that a checksum of one GiB of such pages takes, alone and out of memory.
    checksum_cpu: f64,
}

/// Bytes per second, and seconds of CPU time per GiB.
#[derive(Clone, Copy, Debug)]
struct Figure {
    rate: f64,
    cpu: f64,
}

/// `pegactl bench ssd`.
///
/// # Errors
/// fio is not there, or the file cannot be made.
pub fn command(args: &SsdArgs, as_json: bool) -> Result<(), ToolError> {
    let fio = fio_version()?;
    let mut rows = Vec::new();
    let mut engine = "";
    for page in &args.page_bytes {
        let (name, measured) = measure(args, page.as_u64())?;
        engine = name;
        rows.extend(measured);
    }
    if as_json {
        print_json(&json!({
            "engine": engine, "fio": fio, "depth": args.depth, "rounds": args.rounds,
            "bytes": args.size.as_u64(), "rows": rows,
        }));
        return Ok(());
    }
    println!(
        "{engine} against {fio} (io_uring, direct, registered), depth {}, {} per round, {} rounds",
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
        "checksum alone",
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

fn measure(args: &SsdArgs, page_bytes: u64) -> Result<(&'static str, Vec<Row>), ToolError> {
    let page = u32::try_from(page_bytes)
        .ok()
        .filter(|&page| page > 0 && page <= 64 << 20)
        .ok_or_else(|| ToolError::Plan("--page-bytes: give at most 64MiB".to_owned()))?;
    let folder = tempfile::tempdir_in(&args.folder)
        .map_err(ToolError::io(format!("{}", args.folder.display())))?;
    let path = folder.path().join("shard");
    let mut rig = Rig::open(args, &path, page)?;
    // Space that was never written is slower to write the first time, for everybody.
    rig.write(&args.size)?;
    let (mut writes, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds.get() {
        let ours = rig.write(&args.size)?;
        let ours_read = rig.read()?;
        let run = Fio {
            args,
            path: &path,
            page,
        };
        let read = run.measure("randread", "io_uring", args.size.as_u64())?;
        let sync_read = run.measure("randread", "psync", PSYNC_BYTES)?;
        // From here on the shard's pages are gone, and the next round writes them anew.
        let write = run.measure("write", "io_uring", args.size.as_u64())?;
        let sync_write = run.measure("write", "psync", PSYNC_BYTES)?;
        writes.push([ours, write, sync_write]);
        reads.push([ours_read, read, sync_read]);
    }
    let engine = rig.engine;
    let checksum_cpu = rig.checksum_cpu();
    drop(rig);
    let row = |direction, rounds: &[[Figure; 3]]| {
        let of = |pick: &dyn Fn(&[Figure; 3]) -> f64| {
            median(&rounds.iter().map(pick).collect::<Vec<f64>>())
        };
        Row {
            page_bytes,
            direction,
            ours: of(&|round| round[0].rate),
            fio: of(&|round| round[1].rate),
            ratio: of(&|round| round[0].rate / round[1].rate),
            ours_cpu: of(&|round| round[0].cpu),
            fio_cpu: of(&|round| round[1].cpu),
            fio_psync_cpu: of(&|round| round[2].cpu),
            checksum_cpu,
        }
    };
    Ok((engine, vec![row("write", &writes), row("read", &reads)]))
}

/// A tier over one shard, driven as the lane drives it.
struct Rig {
    tier: Tier,
    engine: &'static str,
    page: u32,
    slots: usize,
    content: Vec<u8>,
    /// The blocks of the last round.
    written: Vec<BlockKey>,
    next_block: u64,
}

impl Rig {
    fn open(args: &SsdArgs, path: &Path, page: u32) -> Result<Self, ToolError> {
        let depth = args.depth.get();
        let mut options = Options::new(
            "bench",
            vec![ShardSpec {
                path: path.to_owned(),
                bytes: Some(args.size.as_u64()),
            }],
        );
        options.io = args.io.into();
        options.queue_depth = depth;
        options.sqpoll_idle = args.sqpoll_ms.map(Duration::from_millis);
        // Some wait in the tier, so that the drive is never short of them.
        let slots = 2 * depth as usize;
        let mut content = vec![0; page as usize * slots];
        rand::rng().fill(&mut content[..]);
        let owner: Thread = std::thread::current();
        let pool = PoolMemory::with_content(&content);
        let (tier, report) = Tier::open(options, pool, move || owner.unpark())?;
        for note in &report.shards[0].notes {
            eprintln!("{}: {note}", path.display());
        }
        Ok(Self {
            tier,
            engine: report.shards[0].io,
            page,
            slots,
            content,
            written: Vec::new(),
            next_block: 0,
        })
    }

    fn slot(&self, slot: u64) -> PageRef {
        PageRef {
            offset: slot * u64::from(self.page),
            bytes: self.page,
            checksum: NO_CHECKSUM,
        }
    }

    /// Runs `total` requests, so many at a time; `ask` queues one for a slot of memory, or says
    /// that there is no room now.
    fn run(
        &mut self,
        total: u64,
        mut ask: impl FnMut(&mut Self, u64, u64) -> Result<bool, ToolError>,
    ) -> Result<(), ToolError> {
        let mut free: Vec<u64> = (0..self.slots as u64).collect();
        let (mut asked, mut ended, mut out) = (0, 0, Vec::new());
        let mut last = Instant::now();
        while ended < total {
            while asked < total
                && let Some(&slot) = free.last()
                && ask(self, asked, slot)?
            {
                free.pop();
                asked += 1;
            }
            self.tier.poll(Instant::now(), &mut out);
            if out.is_empty() {
                if last.elapsed() > PATIENCE {
                    return Err(ToolError::Plan("the drive does not answer".to_owned()));
                }
                std::thread::park_timeout(Duration::from_millis(20));
            } else {
                last = Instant::now();
            }
            for Completion {
                ticket, outcome, ..
            } in out.drain(..)
            {
                if !matches!(outcome, Outcome::Written | Outcome::Read) {
                    return Err(ToolError::Plan(format!("a page ended with {outcome:?}")));
                }
                free.push(ticket);
                ended += 1;
            }
        }
        Ok(())
    }

    /// Writes blocks of one page each until the shard is full, and waits until all are durable.
    fn write(&mut self, bytes: &ByteSize) -> Result<Figure, ToolError> {
        // What is read afterwards must not have been given up: some segments are being emptied.
        let total = bytes.as_u64() * 7 / 8 / u64::from(self.page);
        self.written.clear();
        let meter = Meter::start();
        self.run(total, |rig, _, slot| {
            let key = key(rig.next_block);
            let page = rig.slot(slot);
            match rig.tier.write(Instant::now(), slot, &key, &[page]) {
                Ok(()) => {
                    rig.next_block += 1;
                    rig.written.push(key);
                    Ok(true)
                }
                Err(Refused::QueueFull | Refused::Reclaiming) => Ok(false),
                Err(why) => Err(ToolError::Plan(format!("a block is refused: {why}"))),
            }
        })?;
        while self.tier.stats()[0].uncommitted_blocks > 0 {
            self.tier.flush(Instant::now());
            self.tier.poll(Instant::now(), &mut Vec::new());
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(meter.stop(total * u64::from(self.page)))
    }

    /// Reads all blocks of the last round, in random order.
    fn read(&mut self) -> Result<Figure, ToolError> {
        let mut keys = self.written.clone();
        keys.shuffle(&mut rand::rng());
        let meter = Meter::start();
        self.run(keys.len() as u64, |rig, index, slot| {
            let page = rig.slot(slot);
            match rig
                .tier
                .read(Instant::now(), slot, &keys[index as usize], &[page])
            {
                Ok(()) => Ok(true),
                Err(Refused::QueueFull) => Ok(false),
                Err(why) => Err(ToolError::Plan(format!("a block is refused: {why}"))),
            }
        })?;
        Ok(meter.stop(keys.len() as u64 * u64::from(self.page)))
    }

    /// Seconds for the checksums of one GiB of pages that are not in the processor's caches.
    fn checksum_cpu(&self) -> f64 {
        let large = self.content.repeat((256 << 20) / self.content.len() + 1);
        let started = Instant::now();
        let mut sum = 0;
        for page in large.chunks_exact(self.page as usize) {
            sum ^= twox_hash::XxHash3_64::oneshot(page);
        }
        std::hint::black_box(sum);
        started.elapsed().as_secs_f64() * f64::from(1 << 30) / large.len() as f64
    }
}

fn key(block: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey {
        scope: [1; 32],
        group: 0,
        hash,
    }
}

/// Time and CPU time of this process.
struct Meter {
    started: Instant,
    cpu: f64,
}

impl Meter {
    fn cpu_now() -> f64 {
        getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
            (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
        })
    }

    fn start() -> Self {
        Self {
            started: Instant::now(),
            cpu: Self::cpu_now(),
        }
    }

    fn stop(self, bytes: u64) -> Figure {
        Figure {
            rate: bytes as f64 / self.started.elapsed().as_secs_f64(),
            cpu: (Self::cpu_now() - self.cpu) * f64::from(1 << 30) / bytes as f64,
        }
    }
}

fn fio_version() -> Result<String, ToolError> {
    let output = Command::new("fio").arg("--version").output();
    match output {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        _ => Err(ToolError::Plan(
            "fio is not installed: it is what the figures are compared with (apt-get install fio)"
                .to_owned(),
        )),
    }
}

/// fio over the shard's file.
struct Fio<'a> {
    args: &'a SsdArgs,
    path: &'a Path,
    page: u32,
}

impl Fio<'_> {
    fn measure(&self, pattern: &str, engine: &str, bytes: u64) -> Result<Figure, ToolError> {
        // Behind the superblock: the shard stays one.
        let offset = 2 << 20;
        let size = (self.args.size.as_u64() - (4 << 20)).min(bytes);
        let mut command = Command::new("fio");
        command.args([
            "--name=bench",
            "--direct=1",
            "--output-format=json",
            "--end_fsync=1",
        ]);
        command.arg(format!("--filename={}", self.path.display()));
        command.arg(format!("--rw={pattern}"));
        command.arg(format!("--bs={}", self.page));
        command.arg(format!("--offset={offset}"));
        command.arg(format!("--size={size}"));
        command.arg(format!("--ioengine={engine}"));
        if engine == "io_uring" {
            command.arg(format!("--iodepth={}", self.args.depth));
            command.args(["--fixedbufs=1", "--registerfiles=1"]);
        }
        let output = command.output().map_err(ToolError::io("fio"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let parsed = text
            .find('{')
            .and_then(|start| serde_json::from_str::<Value>(&text[start..]).ok());
        let job = parsed.as_ref().map(|report| &report["jobs"][0]);
        let figure = job.and_then(|job| {
            let side = &job[if pattern == "write" { "write" } else { "read" }];
            let moved = side["io_bytes"].as_f64().filter(|&moved| moved > 0.0)?;
            // fio's own figures: its start is not part of them.
            let seconds = job["job_runtime"].as_f64()? / 1e3;
            let busy = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0 * seconds;
            Some(Figure {
                rate: moved / seconds,
                cpu: busy * f64::from(1 << 30) / moved,
            })
        });
        figure.ok_or_else(|| {
            ToolError::Plan(format!(
                "fio failed: {}{}",
                String::from_utf8_lossy(&output.stderr),
                text.lines().take(5).collect::<Vec<_>>().join("\n")
            ))
        })
    }
}
