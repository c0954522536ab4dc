//! A tier over one shard, driven as the lane drives it.

#![forbid(unsafe_code)]

use std::path::Path;
use std::thread::Thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use pegaflow_ssd::{
    BlockKey, Completion, NO_CHECKSUM, Options, Outcome, PageRef, Refused, ShardSpec, Tier,
};
use rand::seq::SliceRandom;

use super::memory::Memory;
use super::{Figure, SsdArgs};
use crate::error::ToolError;

/// Nothing takes that long unless the drive is gone.
const PATIENCE: Duration = Duration::from_secs(120);
/// Segments that a round leaves free: those that are kept empty, that are being emptied, and two
/// that are not full.
const EMPTY_SEGMENTS: u32 = 11;
/// Pages begin at multiples of this in the file.
const PLACE_BYTES: u32 = 4096;

/// A tier over one shard, driven as the lane drives it.
pub(super) struct Rig {
    tier: Tier,
    pub(super) engine: &'static str,
    /// What the pages lie in, and fio's in the same.
    pub(super) memory: Memory,
    pub(super) page: u32,
    slots: usize,
    /// The shard has room for that many bytes besides the segments that it empties.
    pub(super) most_bytes: u64,
    /// The blocks of the last write.
    written: Vec<BlockKey>,
    next_block: u64,
}

/// How long a drive may take to make the file.
const OPEN_WAIT: Duration = Duration::from_secs(600);

impl Rig {
    pub(super) fn open(args: &SsdArgs, path: &Path, page: u32) -> Result<Self, ToolError> {
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
        options.open_wait = OPEN_WAIT;
        // Some wait in the tier, so that the drive is never short of them.
        let slots = 2 * depth as usize;
        let (pool, memory) = Memory::new(args.hugepages, page as usize * slots)?;
        let owner: Thread = std::thread::current();
        let (tier, report) = Tier::open(options, pool, move || owner.unpark())?;
        let Some(shard) = report.shards.first() else {
            let path = path.display();
            return Err(ToolError::Plan(format!(
                "{path}: the drive does not answer"
            )));
        };
        for note in &shard.notes {
            eprintln!("{}: {note}", path.display());
        }
        let segments = u64::from(shard.segments.saturating_sub(EMPTY_SEGMENTS));
        let place_bytes = page.next_multiple_of(PLACE_BYTES);
        let segment_pages = (shard.segment_bytes / place_bytes).min(shard.segment_pages);
        let most_bytes = segments * u64::from(segment_pages) * u64::from(page);
        if most_bytes < u64::from(page) {
            return Err(ToolError::Plan(
                "--size: the file is too small for a page".to_owned(),
            ));
        }
        Ok(Self {
            tier,
            engine: shard.io,
            memory,
            page,
            slots,
            most_bytes,
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

    fn checksum_time(&self) -> Duration {
        self.tier.stats()[0].checksum_time
    }

    /// So many bytes or fewer, in pages, one at least.
    pub(super) fn whole_pages(&self, bytes: u64) -> u64 {
        let page = u64::from(self.page);
        (bytes.min(self.most_bytes) / page).max(1) * page
    }

    /// Writes so many bytes in blocks of one page each, and waits until all are durable.
    pub(super) fn write(&mut self, bytes: u64) -> Result<Figure, ToolError> {
        let total = bytes / u64::from(self.page);
        self.written.clear();
        let meter = Meter::start(self.checksum_time());
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
        Ok(meter.stop(bytes, self.checksum_time()))
    }

    /// Reads so many bytes of blocks of the last write, in random order, none twice.
    pub(super) fn read(&mut self, bytes: u64) -> Result<Figure, ToolError> {
        let mut keys = self.written.clone();
        keys.shuffle(&mut rand::rng());
        keys.truncate((bytes / u64::from(self.page)) as usize);
        let meter = Meter::start(self.checksum_time());
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
        Ok(meter.stop(bytes, self.checksum_time()))
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
    checksums: Duration,
}

impl Meter {
    fn cpu_now() -> f64 {
        getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
            (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
        })
    }

    fn start(checksums: Duration) -> Self {
        Self {
            started: Instant::now(),
            cpu: Self::cpu_now(),
            checksums,
        }
    }

    fn stop(self, bytes: u64, checksums: Duration) -> Figure {
        let per_gib = f64::from(1 << 30) / bytes as f64;
        Figure {
            rate: bytes as f64 / self.started.elapsed().as_secs_f64(),
            cpu: (Self::cpu_now() - self.cpu) * per_gib,
            checksums: (checksums - self.checksums).as_secs_f64() * per_gib,
        }
    }
}
