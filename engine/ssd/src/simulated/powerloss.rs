//! Power losses at any moment: what was durable is there, and no wrong byte ever is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::rig::{Rig, Setup};
use crate::block::{BlockKey, PageRef, page_checksum};
use crate::io::disk::{Dice, lock};
use crate::outcome::{Completion, Outcome, Refused};

/// Power losses per run of the test; `PEGAFLOW_SSD_POWER_LOSSES` asks for another number. Without
/// optimization they take long.
const LOSSES: u64 = if cfg!(debug_assertions) {
    1_000
} else {
    10_000
};
/// How often one tier loses power before the next begins.
const LIVES: u64 = 10;
const BLOCKS: u64 = 48;

fn key(block: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey {
        scope: [(block % 3) as u8; 32],
        group: (block % 2) as u32,
        hash,
    }
}

/// The pages of a block: their number and lengths are the block's, their bytes also the version's.
fn content(block: u64, version: u64) -> Vec<Vec<u8>> {
    let mut shape = Dice::new(block);
    let pages = shape.below(3) + 1;
    (0..pages)
        .map(|page| {
            let bytes = match shape.below(4) {
                0 => 4096,
                1 => shape.below(600) + 1,
                _ => shape.below(8000) + 1,
            };
            let mut dice = Dice::new(block << 40 | version << 8 | page);
            let pattern: Vec<u8> = (0..8)
                .flat_map(|_| dice.below(1 << 40).to_le_bytes())
                .collect();
            let mut content = pattern.repeat(bytes as usize / pattern.len() + 1);
            content.truncate(bytes as usize);
            content
        })
        .collect()
}

/// What is known about the blocks, whatever became of the drives.
#[derive(Default)]
struct Model {
    /// Every version that was ever given to the tier.
    written: HashMap<u64, BTreeSet<u64>>,
    /// The version of the blocks that the tier holds.
    held: BTreeMap<u64, u64>,
    next_version: u64,
}

impl Model {
    fn version_of(&self, block: u64, found: &[Vec<u8>]) -> Option<u64> {
        // The version that is held is most likely, and making content takes time.
        let versions = self.written.get(&block)?;
        let held = self.held.get(&block).into_iter();
        held.chain(versions.iter().rev())
            .copied()
            .find(|&version| content(block, version) == found)
    }
}

struct World {
    rig: Rig,
    model: Model,
    dice: Dice,
    /// Blocks being read.
    reads: HashMap<u64, (u64, Vec<PageRef>)>,
    /// Blocks being written whose bytes have changed in the pool.
    damaged: HashMap<u64, u64>,
    /// How many of these were not taken.
    not_taken: u64,
    seed: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let setup = Setup {
            shards: dice.below(2) as usize + 1,
            segments: 6 + dice.below(4) as u32,
            alignment: [1, 512, 4096][dice.below(3) as usize],
            checksums: seed % 2 == 1,
        };
        let rig = Rig::new(setup, seed);
        // Some drives move less than they are asked to.
        let short = dice.below(2) * 9;
        for disk in &rig.disks {
            let mut disk = lock(disk);
            disk.short_one_in = short;
            disk.unit = setup.alignment;
        }
        Self {
            rig,
            model: Model::default(),
            dice,
            reads: HashMap::new(),
            damaged: HashMap::new(),
            not_taken: 0,
            seed,
        }
    }

    fn step(&mut self) {
        match self.dice.below(12) {
            0..=4 => self.write(),
            5 => self.rig.pass(Duration::from_millis(self.dice.below(400))),
            6 => self.read(),
            7 if self.dice.one_in(3) => {
                let block = self.dice.below(BLOCKS);
                self.rig.tier.remove(&key(block));
                self.model.held.remove(&block);
            }
            8 => {
                let block = self.dice.below(BLOCKS);
                self.rig.tier.touch(&key(block));
            }
            9 if self.dice.one_in(6) => self.rig.tier.flush(self.rig.now),
            _ => self.poll(),
        }
    }

    /// Gives up a block and writes it anew, so that segments empty and fill as fast as can be.
    fn rewrite(&mut self) {
        let block = self.dice.below(BLOCKS);
        self.rig.tier.remove(&key(block));
        self.model.held.remove(&block);
        self.write_block(block);
    }

    fn write(&mut self) {
        let block = self.dice.below(BLOCKS);
        self.write_block(block);
    }

    fn write_block(&mut self, block: u64) {
        let version = self.model.next_version;
        let pages = content(block, version);
        let damaged = self.rig.has_checksums() && self.dice.one_in(20);
        match self.rig.write(&key(block), &pages, damaged, &mut self.dice) {
            Some(Ok(ticket)) if damaged => {
                // These bytes are nobody's: wherever they are read from, they are wrong.
                self.damaged.insert(ticket, block);
            }
            Some(Ok(_)) => {
                self.model.next_version += 1;
                self.model.written.entry(block).or_default().insert(version);
                self.model.held.insert(block, version);
            }
            None | Some(Err(Refused::Known | Refused::Reclaiming | Refused::QueueFull)) => {}
            Some(Err(why)) => panic!("seed {}: {why}", self.seed),
        }
    }

    fn read(&mut self) {
        let block = self.dice.below(BLOCKS);
        if let Some(taken) = self.rig.read(&key(block), &mut self.dice) {
            let (ticket, pages) = taken.expect("a shard without faults takes reads");
            self.reads.insert(ticket, (block, pages));
        }
    }

    fn poll(&mut self) {
        for completion in self.rig.poll() {
            match completion.outcome {
                Outcome::Written => assert!(
                    !self.damaged.contains_key(&completion.ticket),
                    "seed {}: other bytes than those of the checksum were taken",
                    self.seed
                ),
                Outcome::Bad if self.damaged.contains_key(&completion.ticket) => {
                    let block = self
                        .damaged
                        .remove(&completion.ticket)
                        .expect("it is there");
                    // It may have been given up meanwhile, and written anew.
                    assert!(
                        self.model.held.contains_key(&block)
                            || self.rig.tier.lookup(&key(block)).is_none(),
                        "seed {}: block {block} was not taken and is there",
                        self.seed
                    );
                    self.not_taken += 1;
                }
                Outcome::Read => {
                    let (block, pages) = self.reads.remove(&completion.ticket).expect("asked for");
                    self.check(block, &pages, &completion);
                }
                other => panic!("seed {}: {other:?}", self.seed),
            }
        }
    }

    /// What was read is something that was once written under this very key.
    fn check(&self, block: u64, pages: &[PageRef], end: &Completion) -> u64 {
        let found: Vec<Vec<u8>> = pages
            .iter()
            .map(|page| self.rig.pool.content(page.offset, page.bytes))
            .collect();
        if self.rig.has_checksums() {
            let taken: Vec<u64> = found.iter().map(|page| page_checksum(page)).collect();
            assert_eq!(end.checksums, taken, "seed {}: block {block}", self.seed);
        }
        self.model
            .version_of(block, &found)
            .unwrap_or_else(|| panic!("seed {}: wrong bytes of block {block}", self.seed))
    }

    fn reclaimed(&self) -> u64 {
        let stats = self.rig.tier.stats();
        stats.iter().map(|shard| shard.segments_reclaimed).sum()
    }

    /// The blocks that must survive, with their versions.
    fn durable(&self) -> BTreeMap<u64, u64> {
        let durable = |&(&block, _): &(&u64, &u64)| self.rig.tier.is_durable(&key(block));
        let held = self.model.held.iter().filter(durable);
        held.map(|(&block, &version)| (block, version)).collect()
    }

    fn lose_power(mut self) -> Self {
        let durable = self.durable();
        self.reads.clear();
        self.damaged.clear();
        self.rig = self.rig.lose_power();
        self.model.held.clear();
        for block in durable.keys() {
            let found = self.rig.tier.lookup(&key(*block)).is_some();
            assert!(
                found,
                "seed {}: block {block} was durable and is gone",
                self.seed
            );
        }
        for block in 0..BLOCKS {
            // Some leave meanwhile, to make room.
            let Some(taken) = self.rig.read(&key(block), &mut self.dice) else {
                continue;
            };
            let (ticket, pages) = taken.expect("a shard without faults takes reads");
            let end = loop {
                if let Some(end) = self.rig.poll().pop() {
                    assert_eq!(end.ticket, ticket);
                    break end;
                }
            };
            // Records come after pages: what a table names is there, whatever was lost.
            let outcome = &end.outcome;
            assert_eq!(*outcome, Outcome::Read, "seed {}: block {block}", self.seed);
            let version = self.check(block, &pages, &end);
            if let Some(&expected) = durable.get(&block) {
                assert_eq!(
                    version, expected,
                    "seed {}: block {block} is old",
                    self.seed
                );
            }
            self.model.held.insert(block, version);
        }
        self
    }
}

fn losses() -> u64 {
    std::env::var("PEGAFLOW_SSD_POWER_LOSSES")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(LOSSES)
}

#[test]
fn after_a_power_loss_at_any_moment_what_was_durable_is_there_and_no_byte_is_wrong() {
    let (mut done, mut survived, mut reclaimed, mut not_taken) = (0, 0, 0, 0);
    for seed in 0..losses().div_ceil(LIVES) {
        let mut world = World::new(seed);
        for _ in 0..LIVES {
            for _ in 0..world.dice.below(120) {
                world.step();
            }
            survived += world.durable().len();
            reclaimed += world.reclaimed();
            world = world.lose_power();
            done += 1;
        }
        not_taken += world.not_taken;
    }
    eprintln!(
        "{done} power losses, {survived} durable blocks survived, {reclaimed} reclaimed, \
         {not_taken} with other bytes than their checksum's were not taken"
    );
    assert!(not_taken > done / 10, "the test must see such blocks");
    assert!(
        survived as u64 > done,
        "the test must see blocks that survive"
    );
    assert!(
        reclaimed > done / 10,
        "the test must see segments used again"
    );
}

#[test]
fn no_table_names_pages_of_a_segment_that_is_written_over() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        for _ in 0..LIVES {
            for _ in 0..20 + world.dice.below(60) {
                for _ in 0..world.dice.below(12) {
                    world.rewrite();
                }
                world.poll();
                if world.dice.one_in(8) {
                    world.rig.pass(Duration::from_millis(400));
                }
            }
            world = world.lose_power();
        }
    }
}

#[test]
fn after_a_clean_end_everything_is_there() {
    for seed in 0..50 {
        let mut world = World::new(seed);
        for _ in 0..200 {
            world.step();
        }
        world.rig.settle();
        let held: Vec<u64> = (0..BLOCKS)
            .filter(|&block| world.rig.tier.lookup(&key(block)).is_some())
            .collect();
        assert_eq!(world.durable().len(), held.len());
        assert!(!held.is_empty());
        world.lose_power();
    }
}
