//! A shard over a port that ends commands when the test says so.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{OWN_COMMANDS, Parts, Shard};
use crate::block::{BlockKey, NO_CHECKSUM, PageRef};
use crate::format::{CHUNK_BYTES, Chunk, Geometry};
use crate::io::{Bell, Ended, Engine, Piece};
use crate::memory::aligned;
use crate::mover::{Alignment, Command, Done, Moved, Mover, Op, bounce_area};
use crate::options::Options;
use crate::outcome::{Outcome, Refused};
use crate::port::{Port, ThreadPort};
use crate::stats::{ShardFault, ShardHealth, ShardStats};

const ID: [u8; 16] = [9; 16];

#[derive(Default)]
struct Drive {
    under_way: VecDeque<Command>,
    /// The most commands under way at any time.
    most: usize,
    /// Since when one request is held up.
    oldest: Option<Instant>,
    /// Syncs do not end.
    holds_syncs: bool,
    /// Reads do not end.
    holds_reads: bool,
    /// Syncs fail.
    fails_syncs: bool,
    /// Where pages were written.
    writes: Vec<u64>,
    /// Chunks that were written: offset and content.
    chunks: Vec<(u64, Box<[u8]>)>,
    /// How many there were at each sync.
    synced: Vec<usize>,
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
        let (syncs, reads) = (drive.holds_syncs, drive.holds_reads);
        let ends = |command: &Command| match command.op {
            Op::Sync => !syncs,
            Op::Read { .. } => !reads,
            _ => true,
        };
        let at = drive.under_way.iter().position(ends)?;
        let command = drive.under_way.remove(at)?;
        if matches!(command.op, Op::Sync) {
            let chunks = drive.chunks.len();
            drive.synced.push(chunks);
        }
        let result = match command.op {
            Op::Sync if drive.fails_syncs => Err(ShardFault::Io(libc::EIO)),
            _ => Ok(Moved::Fine { checksum: 7 }),
        };
        if matches!(command.op, Op::Write { .. }) {
            drive.writes.push(command.offset);
        }
        if let Op::Table(content) = command.op {
            drive.chunks.push((command.offset, content));
        }
        Some(Done {
            id: command.id,
            result,
            took: Duration::ZERO,
            checksums: Duration::ZERO,
        })
    }

    fn oldest(&self) -> Option<Instant> {
        self.drive().oldest
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
    shard_over(Box::new(drive.clone()), segments, now)
}

fn shard_over(port: Box<dyn Port>, segments: u32, now: Instant) -> (Shard, Geometry) {
    shard_of(port, (segments, Geometry::MIN_SEGMENT_BYTES), now)
}

fn shard_of(
    port: Box<dyn Port>,
    (segments, segment_bytes): (u32, u32),
    now: Instant,
) -> (Shard, Geometry) {
    let geometry = Geometry {
        segments,
        ..Geometry::for_file(1 << 32, segment_bytes)
    };
    let options = Options::new("test", Vec::new());
    let parts = Parts {
        index: 0,
        id: ID,
        geometry,
        port,
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

fn write(shard: &mut Shard, now: Instant, number: u64) -> u32 {
    let taken = shard.write(now, number, &key(number), number + 1, &[PAGE]);
    taken.unwrap_or_else(|why| panic!("block {number}: {why}"))
}

/// Until all is durable.
fn settle(shard: &mut Shard, now: Instant) {
    for _ in 0..1_000 {
        shard.flush(now);
        shard.poll(now);
        if shard.is_clean() {
            return;
        }
    }
    panic!("it does not settle: {:?}", shard.stats());
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
fn a_table_that_is_written_in_several_turns_names_every_page_once_and_spares_what_counts() {
    let (drive, now) = (Handle::default(), Instant::now());
    let segment_bytes = 64 << 20;
    let (mut shard, geometry) = shard_of(Box::new(drive.clone()), (4, segment_bytes), now);
    let settle = |shard: &mut Shard| {
        while !shard.is_clean() || shard.is_busy() {
            shard.flush(now);
            shard.poll(now);
        }
    };
    let mut written = 0u64;
    // More than one turn's chunks, and some that end in the middle of a chunk.
    for pages in [30, 450, 3, 420] {
        drive.drive().holds_syncs = true;
        for _ in 0..pages {
            write(&mut shard, now, written);
            written += 1;
            if written.is_multiple_of(64) {
                shard.poll(now);
            }
        }
        drive.drive().holds_syncs = false;
        settle(&mut shard);
    }
    let state = drive.drive();
    let (mut before, mut counts, mut most) = (0, None, 0);
    for end in &state.synced {
        let commit = &state.chunks[std::mem::replace(&mut before, *end)..*end];
        let Some((last, _)) = commit.last() else {
            continue;
        };
        let offsets: HashSet<u64> = commit.iter().map(|(offset, _)| *offset).collect();
        assert_eq!(offsets.len(), commit.len(), "written over in its commit");
        assert!(
            counts.is_none_or(|counts| !offsets.contains(&counts)),
            "the chunk that counted is written over"
        );
        most = most.max(commit.len());
        // Each commit here ends with a chunk that is not full.
        counts = Some(*last);
    }
    assert!(most > 8, "no commit takes several turns: {most}");
    // As who opens the shard reads it: of a slot what was written last.
    let mut table = std::collections::HashMap::new();
    table.extend(
        state
            .chunks
            .iter()
            .map(|(offset, content)| (*offset, content)),
    );
    let mut named = HashSet::new();
    for segment in 0..geometry.segments {
        for slot in 0..geometry.slots() {
            if let Some(content) = table.get(&geometry.chunk_offset(segment, slot)) {
                let chunk = Chunk::decode(content, ID, segment, slot, &geometry).expect("whole");
                named.extend(chunk.records.iter().map(|record| record.write_id));
            }
        }
    }
    assert_eq!(named.len() as u64, written);
}

#[test]
fn a_segment_that_is_read_from_is_not_written_over_though_all_in_it_has_left() {
    let (drive, now) = (Handle::default(), Instant::now());
    let (mut shard, geometry) = shard(&drive, 8, now);
    // Two segments full, 16 pages each.
    let blocks: Vec<u32> = (0..32).map(|n| write(&mut shard, now, n)).collect();
    settle(&mut shard, now);
    drive.drive().holds_reads = true;
    shard
        .read(now, 1_000, blocks[0], &[PAGE])
        .expect("it is there");
    let at = drive.drive().under_way[0].offset;
    for block in blocks {
        shard.forget(block);
    }
    let segment = (0..geometry.segments)
        .find(|&segment| {
            let start = geometry.data_offset(segment, 0);
            (start..start + u64::from(geometry.segment_bytes)).contains(&at)
        })
        .expect("pages lie in segments");
    let written_over = |number: u64, shard: &mut Shard| {
        drive.drive().writes.clear();
        let block = write(shard, now, number);
        settle(shard, now);
        shard.forget(block);
        let start = geometry.data_offset(segment, 0);
        let range = start..start + u64::from(geometry.segment_bytes);
        drive.drive().writes.iter().any(|at| range.contains(at))
    };
    // Enough for all segments three times.
    let rounds = 3 * 16 * u64::from(geometry.segments);
    let early = (0..rounds).find(|n| written_over(100 + n, &mut shard));
    assert_eq!(early, None, "its pages are still on their way");
    drive.drive().holds_reads = false;
    shard.poll(now);
    let then = (0..rounds).find(|n| written_over(5_000 + n, &mut shard));
    assert!(then.is_some(), "it is used again when the reader has left");
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

#[test]
fn one_request_that_is_held_up_marks_the_shard_though_others_end() {
    let (drive, start) = (Handle::default(), Instant::now());
    let (mut shard, _) = shard(&drive, 8, start);
    let limit = Options::new("test", Vec::new()).stall_limit;
    drive.drive().holds_syncs = true;
    drive.drive().oldest = Some(start);
    write(&mut shard, start, 0);
    shard.flush(start);
    shard.poll(start);
    shard.flush(start);
    let mut now = start;
    // Writes end all the time, the sync does not.
    for number in 1.. {
        now += limit / 5;
        assert!(shard.deadline().is_some_and(|at| at <= start + limit));
        if now >= start + limit {
            break;
        }
        write(&mut shard, now, number);
        shard.poll(now);
        assert_eq!(shard.stats().health, ShardHealth::Healthy, "{number}");
    }
    shard.poll(now);
    let stalled = ShardHealth::Degraded(ShardFault::Stalled);
    assert_eq!(shard.stats().health, stalled);
    assert_eq!(shard.stats().degradations, 1);
    let refused = shard.write(now, 99, &key(99), 100, &[PAGE]);
    assert_eq!(refused, Err(Refused::Degraded(ShardFault::Stalled)));
    drive.drive().holds_syncs = false;
    drive.drive().oldest = None;
    shard.poll(now);
    assert_eq!(shard.stats().health, ShardHealth::Healthy);
}

/// Ends pieces well until it is armed, panics over those that it takes then, and tells when nothing
/// of it is left.
struct Panicking {
    ended: Vec<Ended>,
    has_pieces: bool,
    armed: Arc<AtomicBool>,
    gone: Arc<AtomicBool>,
}

struct NoBell;

impl Bell for NoBell {
    fn ring(&self) {}
}

impl Engine for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn depth(&self) -> u32 {
        8
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        self.has_pieces |= self.armed.load(Ordering::SeqCst);
        self.ended.push(Ended {
            id: piece.id,
            result: Ok(piece.bytes),
        });
        Ok(())
    }

    fn wait(&mut self, _: Option<Duration>, out: &mut Vec<Ended>) -> std::io::Result<()> {
        assert!(!self.has_pieces, "as the test wants it");
        out.append(&mut self.ended);
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::new(NoBell)
    }
}

impl Drop for Panicking {
    fn drop(&mut self) {
        // Long enough for whoever does not wait for it.
        std::thread::sleep(Duration::from_millis(50));
        self.gone.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_shard_whose_thread_panics_ends_its_requests_once_nothing_touches_their_memory() {
    let (armed, gone) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let engine = Panicking {
        ended: Vec::new(),
        has_pieces: false,
        armed: armed.clone(),
        gone: gone.clone(),
    };
    let alignment = Alignment {
        memory: 512,
        offset: 512,
    };
    let mover = Mover::new(engine, aligned(1 << 16), bounce_area(8), alignment);
    let (wake, news) = std::sync::mpsc::channel();
    let wake = Arc::new(move || {
        // The test may be over.
        let _ = wake.send(());
    });
    let lock = Arc::new(tempfile::tempfile().expect("a file"));
    let port = ThreadPort::start("ssd-test".into(), mover, lock, 512, wake).expect("a thread");
    let now = Instant::now();
    let (mut shard, _) = shard_over(Box::new(port), 8, now);
    let end = Instant::now() + Duration::from_secs(60);
    // The first ones are opened before anything is written to them.
    loop {
        shard.poll(now);
        if !shard.is_busy() {
            break;
        }
        assert!(Instant::now() < end, "segments are not opened");
        std::thread::sleep(Duration::from_millis(1));
    }
    armed.store(true, Ordering::SeqCst);
    (0..3).for_each(|number| {
        write(&mut shard, now, number);
    });
    let mut ends = Vec::new();
    while ends.len() < 3 {
        assert!(Instant::now() < end, "its requests do not end");
        let _ = news.recv_timeout(Duration::from_secs(1));
        shard.poll(now);
        while let Some(completion) = shard.completion() {
            assert!(gone.load(Ordering::SeqCst), "the engine goes first");
            assert_eq!(completion.outcome, Outcome::Failed(ShardFault::Stopped));
            ends.push(completion.ticket);
        }
    }
    ends.sort_unstable();
    assert_eq!(ends, [0, 1, 2]);
    assert_eq!((shard.in_flight(), shard.stats().pending), (0, 0));
    assert!(!shard.is_busy());
    let later = now + Duration::from_secs(3600);
    let refused = shard.write(later, 9, &key(9), 9, &[PAGE]);
    assert_eq!(refused, Err(Refused::Degraded(ShardFault::Stopped)));
}
