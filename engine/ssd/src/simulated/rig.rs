//! The tier, its drives, and a model of what was written.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::block::{BlockKey, NO_CHECKSUM, PageRef, page_checksum};
use crate::format::Geometry;
use crate::io::disk::{Dice, Disk, DiskEngine, SharedDisk};
use crate::memory::{Area, aligned};
use crate::mover::{Alignment, Command, Done, Mover, bounce_area};
use crate::open::take_in;
use crate::options::{Options, ShardSpec};
use crate::outcome::{Completion, Refused};
use crate::port::Port;
use crate::scan::scan;
use crate::shard::{Found, Parts, Shard};
use crate::stats::ShardStats;
use crate::tier::{ShardReport, Tier};

/// Room for one page in the pool.
const SLOT: u64 = 8192;
const SLOTS: usize = 64;
const DEPTH: u32 = 8;

/// A port whose other side works when it is asked for news.
struct InlinePort {
    mover: SharedMover,
    done: VecDeque<Done>,
}

type SharedMover = Arc<Mutex<Mover<DiskEngine>>>;

fn lock(mover: &SharedMover) -> std::sync::MutexGuard<'_, Mover<DiskEngine>> {
    mover.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port for InlinePort {
    fn send(&mut self, command: Command) {
        lock(&self.mover).take(command);
    }

    fn receive(&mut self) -> Option<Done> {
        if self.done.is_empty() {
            let mut done = Vec::new();
            lock(&self.mover)
                .turn(None, &mut done)
                .expect("a drive in memory can always be waited for");
            self.done.extend(done);
        }
        self.done.pop_front()
    }

    fn oldest(&self) -> Option<Instant> {
        // As for the stall limit of `Rig::open`.
        None
    }

    fn stop(&mut self) {}

    fn has_stopped(&self) -> bool {
        true
    }
}

/// How the drives are.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub shards: usize,
    pub segments: u32,
    pub alignment: u32,
    /// Pages of the pool have checksums.
    pub checksums: bool,
}

/// The tier with its drives.
pub(super) struct Rig {
    pub tier: Tier,
    pub now: Instant,
    pub disks: Vec<SharedDisk>,
    pub reports: Vec<ShardReport>,
    pub pool: Area,
    movers: Vec<SharedMover>,
    setup: Setup,
    free: Vec<usize>,
    /// Pages' slots by ticket.
    used: HashMap<u64, Vec<usize>>,
    next_ticket: u64,
}

pub(super) fn geometry(setup: &Setup) -> Geometry {
    Geometry {
        segments: setup.segments,
        ..Geometry::for_file(0, Geometry::MIN_SEGMENT_BYTES)
    }
}

impl Rig {
    /// A tier over empty drives.
    pub fn new(setup: Setup, seed: u64) -> Self {
        let bytes = geometry(&setup).file_bytes() as usize;
        let disks = (0..setup.shards as u64)
            .map(|shard| Disk::new(bytes, seed.wrapping_mul(31).wrapping_add(shard)))
            .collect();
        Self::open(setup, disks, Instant::now(), 1)
    }

    /// A tier over what the drives have.
    fn open(setup: Setup, disks: Vec<SharedDisk>, now: Instant, next_write_id: u64) -> Self {
        let specs = (0..setup.shards).map(|shard| ShardSpec {
            path: format!("disk{shard}").into(),
            bytes: None,
        });
        let mut options = Options::new("simulated", specs.collect());
        // The drives' time is not the clock's: they work when they are asked for news, while time
        // passes at random.
        options.stall_limit = Duration::from_secs(3600);
        let geometry = geometry(&setup);
        let pool = aligned(SLOT as usize * SLOTS);
        let alignment = Alignment {
            memory: setup.alignment,
            offset: setup.alignment,
        };
        let (mut shards, mut movers, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for (index, disk) in disks.iter().enumerate() {
            let id = [index as u8 + 1; 16];
            found.push(scan(disk, id, &geometry).expect("a drive in memory can be read"));
            let engine = DiskEngine::new(Arc::clone(disk), DEPTH);
            let mover = Mover::new(engine, pool.clone(), bounce_area(DEPTH), alignment);
            let mover = Arc::new(Mutex::new(mover));
            movers.push(Arc::clone(&mover));
            let parts = Parts {
                index: index as u16,
                id,
                geometry,
                port: Box::new(InlinePort {
                    mover,
                    done: VecDeque::new(),
                }),
                policy: pegaflow_policy::build(options.policy, geometry.segments),
                stats: ShardStats::default(),
            };
            shards.push(Shard::new(now, &options, parts));
        }
        let mut reports = vec![ShardReport::default(); setup.shards];
        let index = take_in(&mut shards, &found, &mut reports);
        let last = found.iter().map(Found::last_write_id).max().unwrap_or(0);
        let next = next_write_id.max(last + 1);
        let tier = Tier::assemble(now, &options, &pool.clone().into(), shards, index, next);
        Self {
            tier,
            now,
            disks,
            reports,
            pool,
            movers,
            setup,
            free: (0..SLOTS).collect(),
            used: HashMap::new(),
            next_ticket: 0,
        }
    }

    pub fn has_checksums(&self) -> bool {
        self.setup.checksums
    }

    /// The power goes, and comes back.
    pub fn lose_power(self) -> Self {
        for mover in &self.movers {
            lock(mover).engine_mut().lose_power();
        }
        Self::open(self.setup, self.disks, self.now, 1)
    }

    fn take_slots(&mut self, lengths: &[u32], dice: &mut Dice) -> Option<(u64, Vec<PageRef>)> {
        if self.free.len() < lengths.len() {
            return None;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let slots = self.free.split_off(self.free.len() - lengths.len());
        let pages = slots.iter().zip(lengths).map(|(&slot, &bytes)| {
            // Half of the pages do not lie as direct I/O wants them.
            let shift = dice.below(2) * dice.below(SLOT - u64::from(bytes) + 1);
            PageRef {
                offset: slot as u64 * SLOT + shift,
                bytes,
                checksum: NO_CHECKSUM,
            }
        });
        let pages = pages.collect();
        self.used.insert(ticket, slots);
        Some((ticket, pages))
    }

    fn give_slots(&mut self, ticket: u64) {
        let slots = self.used.remove(&ticket).expect("a ticket ends once");
        self.free.extend(slots);
    }

    /// Writes a block of that content, of which one bit has changed in the pool if it is `damaged`.
    /// None if the pool is full.
    pub fn write(
        &mut self,
        key: &BlockKey,
        content: &[Vec<u8>],
        damaged: bool,
        dice: &mut Dice,
    ) -> Option<Result<u64, Refused>> {
        let lengths: Vec<u32> = content.iter().map(|page| page.len() as u32).collect();
        let (ticket, mut pages) = self.take_slots(&lengths, dice)?;
        for (page, content) in pages.iter_mut().zip(content) {
            self.pool.fill(page.offset, content);
            if self.setup.checksums {
                page.checksum = page_checksum(content);
            }
        }
        if damaged {
            let at = dice.below(content.len() as u64) as usize;
            let byte = dice.below(u64::from(lengths[at])) as usize;
            let wrong = [content[at][byte] ^ 1 << dice.below(8)];
            self.pool.fill(pages[at].offset + byte as u64, &wrong);
        }
        let taken = self.tier.write(self.now, ticket, key, &pages);
        if taken.is_err() {
            self.give_slots(ticket);
        }
        Some(taken.map(|()| ticket))
    }

    /// Reads a block. None if the pool is full or it is not there.
    pub fn read(
        &mut self,
        key: &BlockKey,
        dice: &mut Dice,
    ) -> Option<Result<(u64, Vec<PageRef>), Refused>> {
        let info = self.tier.lookup(key)?;
        let lengths: Vec<u32> = (0..info.pages)
            .map(|page| self.tier.page_bytes(key, page).expect("it has that page"))
            .collect();
        let (ticket, mut pages) = self.take_slots(&lengths, dice)?;
        for page in pages.iter_mut().filter(|_| self.setup.checksums) {
            page.checksum = 1;
        }
        let taken = self.tier.read(self.now, ticket, key, &pages);
        if taken.is_err() {
            self.give_slots(ticket);
        }
        Some(taken.map(|()| (ticket, pages)))
    }

    /// Lets the drives work for a moment and takes in what has ended. The pages of a completion
    /// are valid until the next write or read.
    pub fn poll(&mut self) -> Vec<Completion> {
        let mut out = Vec::new();
        self.tier.poll(self.now, &mut out);
        for completion in &out {
            self.give_slots(completion.ticket);
        }
        out
    }

    /// Time passes.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Lets everything end and be durable.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            self.tier.flush(self.now);
            self.poll();
            let clean = self
                .tier
                .stats()
                .iter()
                .all(|shard| shard.uncommitted_blocks == 0);
            if clean && self.tier.in_flight() == 0 {
                return;
            }
        }
        panic!("it does not settle: {:?}", self.tier.stats());
    }
}
