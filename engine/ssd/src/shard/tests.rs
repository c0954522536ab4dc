//! A shard over a port that ends commands when the test says so.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{OWN_COMMANDS, Parts, Shard};
use crate::block::{BlockKey, NO_CHECKSUM, PageRef};
use crate::format::{CHUNK_BYTES, Chunk, Geometry};
use crate::mover::{Command, Done, Moved, Op};
use crate::options::Options;
use crate::port::Port;
use crate::stats::{ShardFault, ShardStats};

const ID: [u8; 16] = [9; 16];

#[derive(Default)]
struct Drive {
    under_way: VecDeque<Command>,
    /// The most commands under way at any time.
    most: usize,
    /// Syncs do not end.
    holds_syncs: bool,
    /// Syncs fail.
    fails_syncs: bool,
    /// Chunks that were written: offset and content.
    chunks: Vec<(u64, Box<[u8]>)>,
}

#[derive(Clone, Default)]
struct Handle(Arc<Mutex<Drive>>);

impl Handle {
    fn drive(&self) -> MutexGuard<'_, Drive> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port for Handle {
    fn send(&mut self, command: Command) {
        let mut drive = self.drive();
        drive.under_way.push_back(command);
        drive.most = drive.most.max(drive.under_way.len());
    }

    fn receive(&mut self) -> Option<Done> {
        let mut drive = self.drive();
        let holds = drive.holds_syncs;
        let ends = |command: &Command| !(holds && matches!(command.op, Op::Sync));
        let at = drive.under_way.iter().position(ends)?;
        let command = drive.under_way.remove(at)?;
        let result = match command.op {
            Op::Sync if drive.fails_syncs => Err(ShardFault::Io(libc::EIO)),
            _ => Ok(Moved::Fine { checksum: 7 }),
        };
        if let Op::Table(content) = command.op {
            drive.chunks.push((command.offset, content));
        }
        Some(Done {
            id: command.id,
            result,
            took: Duration::ZERO,
        })
    }

    fn stop(&mut self) {}

    fn has_stopped(&self) -> bool {
        true
    }
}

fn key(number: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    BlockKey {
        scope: [7; 32],
        group: 0,
        hash,
    }
}

fn shard(drive: &Handle, segments: u32, now: Instant) -> (Shard, Geometry) {
    let geometry = Geometry {
        segments,
        ..Geometry::for_file(0, Geometry::MIN_SEGMENT_BYTES)
    };
    let options = Options::new("test", Vec::new());
    let parts = Parts {
        index: 0,
        id: ID,
        geometry,
        port: Box::new(drive.clone()),
        policy: pegaflow_policy::build(options.policy, segments),
        stats: ShardStats::default(),
    };
    (Shard::new(now, &options, parts), geometry)
}

const PAGE: PageRef = PageRef {
    offset: 0,
    bytes: 512,
    checksum: NO_CHECKSUM,
};

fn write(shard: &mut Shard, now: Instant, number: u64) {
    let taken = shard.write(now, number, &key(number), number + 1, &[PAGE]);
    taken.unwrap_or_else(|why| panic!("block {number}: {why}"));
}

#[test]
fn a_commit_of_any_number_of_pages_keeps_to_the_commands_that_were_agreed() {
    let (drive, now) = (Handle::default(), Instant::now());
    let (mut shard, geometry) = shard(&drive, 700, now);
    // Each segment has 16 pages of 4 KiB on the drive, and so a chunk of its own in the tables.
    let blocks = 600 * 16;
    drive.drive().holds_syncs = true;
    for number in 0..blocks {
        write(&mut shard, now, number);
        if number % 64 == 0 {
            shard.poll(now);
            shard.flush(now);
        }
    }
    drive.drive().holds_syncs = false;
    for _ in 0..100_000 {
        shard.flush(now);
        shard.poll(now);
        if shard.is_clean() {
            break;
        }
    }
    let stats = shard.stats();
    assert_eq!((stats.blocks, stats.uncommitted_blocks), (blocks, 0));
    let drive = drive.drive();
    let agreed = Options::new("test", Vec::new()).max_pending as usize + OWN_COMMANDS;
    assert!(drive.most <= agreed, "{} of {agreed}", drive.most);
    // Every page is recorded in a chunk of its segment's table.
    let mut recorded = HashSet::new();
    let mut segments = HashSet::new();
    for (offset, content) in &drive.chunks {
        let places = (0..geometry.segments)
            .flat_map(|segment| (0..geometry.slots()).map(move |slot| (segment, slot)));
        let (segment, slot) = places
            .into_iter()
            .find(|&(segment, slot)| geometry.chunk_offset(segment, slot) == *offset)
            .expect("a chunk is written to a place for one");
        let chunk = Chunk::decode(content, ID, segment, slot, &geometry).expect("it is whole");
        segments.insert(segment);
        recorded.extend(chunk.records.iter().map(|record| record.write_id));
    }
    assert_eq!(recorded.len() as u64, blocks);
    assert_eq!(segments.len(), 600);
    assert!(drive.chunks.iter().all(|(_, c)| c.len() == CHUNK_BYTES));
}

#[test]
fn a_flush_is_for_what_was_written_before_it() {
    let (drive, now) = (Handle::default(), Instant::now());
    let (mut shard, _) = shard(&drive, 8, now);
    write(&mut shard, now, 0);
    shard.poll(now);
    shard.flush(now);
    while !shard.is_clean() || shard.is_busy() {
        shard.poll(now);
    }
    let commits = shard.stats().commits;
    assert_eq!(commits, 1);
    write(&mut shard, now, 1);
    for _ in 0..100 {
        shard.poll(now);
    }
    assert_eq!(shard.stats().commits, commits, "it is not due");
    assert_eq!(shard.stats().uncommitted_blocks, 1);
}

#[test]
fn a_shard_whose_tables_cannot_be_written_asks_to_be_looked_at_when_it_tries_again() {
    let (drive, mut now) = (Handle::default(), Instant::now());
    let (mut shard, _) = shard(&drive, 8, now);
    drive.drive().fails_syncs = true;
    write(&mut shard, now, 0);
    write(&mut shard, now, 1);
    shard.poll(now);
    shard.flush(now);
    // Written while the sync is under way, and so left when it fails.
    drive.drive().holds_syncs = true;
    write(&mut shard, now, 2);
    shard.poll(now);
    drive.drive().holds_syncs = false;
    shard.poll(now);
    assert_eq!(shard.stats().uncommitted_blocks, 1, "one is left");
    now += Duration::from_secs(1);
    shard.poll(now);
    assert!(!shard.is_busy() && !shard.is_clean());
    let next = shard.deadline().expect("it will be tried again");
    assert!(next > now, "nothing can be done before");
    drive.drive().fails_syncs = false;
    while !shard.is_clean() || shard.is_busy() {
        now = now.max(shard.deadline().unwrap_or(now));
        shard.poll(now);
    }
    assert_eq!(shard.stats().uncommitted_blocks, 0);
}
