use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::block::NO_CHECKSUM;
use crate::format::{Record, align_up};
use crate::io::disk::{Dice, Disk, DiskEngine, lock};
use crate::io::{Bell, Piece};
use crate::memory::aligned;

const ALIGNMENT: Alignment = Alignment {
    memory: 512,
    offset: 512,
};
const SEED: u64 = 7;
const BUFFER: u32 = BOUNCE_BYTES;

struct NoBell;

impl Bell for NoBell {
    fn ring(&self) {}
}

/// What becomes of a piece: nothing special, or this.
type Fate = Box<dyn FnMut(&Piece) -> Option<Result<u32, i32>> + Send>;

/// A file in memory that ends pieces in the order in which it was given them, and notes them.
struct Noting {
    file: Vec<u8>,
    depth: u32,
    given: Vec<Piece>,
    seen: Vec<(Kind, u64, u32)>,
    fate: Fate,
}

impl Noting {
    fn carry_out(&mut self, piece: &Piece) -> Result<u32, i32> {
        if piece.kind == Kind::Sync {
            return Ok(0);
        }
        self.seen.push((piece.kind, piece.offset, piece.bytes));
        let offset = (piece.offset as usize).min(self.file.len());
        let bytes = match (self.fate)(piece) {
            Some(Err(errno)) => return Err(errno),
            Some(Ok(bytes)) => bytes as usize,
            None => piece.bytes as usize,
        };
        let bytes = bytes.min(self.file.len() - offset);
        let file = &mut self.file[offset..][..bytes];
        // SAFETY: the piece's maker promises that the memory is there and nobody else's.
        unsafe {
            match piece.kind {
                Kind::Read => piece
                    .address
                    .as_ptr()
                    .copy_from_nonoverlapping(file.as_ptr(), bytes),
                _ => piece
                    .address
                    .as_ptr()
                    .copy_to_nonoverlapping(file.as_mut_ptr(), bytes),
            }
        }
        Ok(bytes as u32)
    }
}

impl Engine for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        assert!(self.given.len() < self.depth as usize);
        self.given.push(piece);
        Ok(())
    }

    fn wait(&mut self, _: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
        for piece in std::mem::take(&mut self.given) {
            let result = self.carry_out(&piece);
            out.push(Ended {
                id: piece.id,
                result,
            });
        }
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::new(NoBell)
    }
}

/// A mover, and pages: where in the file, where in the pool, and how long.
struct World {
    mover: Mover<Noting>,
    pool: Area,
    done: HashMap<u32, Result<Moved, ShardFault>>,
    next: u32,
}

#[derive(Clone, Copy)]
struct Page {
    offset: u64,
    at: u64,
    bytes: u32,
}

impl World {
    fn new(depth: u32) -> Self {
        Self::with_buffers(depth, depth)
    }

    fn with_buffers(depth: u32, buffers: u32) -> Self {
        let engine = Noting {
            file: vec![0xee; 16 << 20],
            depth,
            given: Vec::new(),
            seen: Vec::new(),
            fate: Box::new(|_| None),
        };
        let pool = aligned(32 << 20);
        Self {
            mover: Mover::new(engine, pool.clone(), bounce_area(buffers), ALIGNMENT),
            pool,
            done: HashMap::new(),
            next: 0,
        }
    }

    fn take(&mut self, offset: u64, op: Op) -> u32 {
        let id = self.next;
        self.next += 1;
        self.mover.take(Command {
            id,
            at: Instant::now(),
            offset,
            op,
        });
        id
    }

    fn write(&mut self, page: Page) -> u32 {
        self.pool.fill(page.at, &content(page));
        self.take(
            page.offset,
            Op::Write {
                page: page.at,
                bytes: page.bytes,
                seed: SEED,
                plain: NO_CHECKSUM,
            },
        )
    }

    fn read(&mut self, page: Page) -> u32 {
        self.pool.fill(page.at, &vec![0x11; page.bytes as usize]);
        self.take(
            page.offset,
            Op::Read {
                page: page.at,
                bytes: page.bytes,
                seed: SEED,
                checksum: Record::checksum_of(SEED, &content(page)),
                plain: NO_CHECKSUM,
            },
        )
    }

    /// Turns until everything has ended. Says which pieces the engine had.
    fn run(&mut self) -> Vec<(Kind, u64, u32)> {
        let mut out = Vec::new();
        for _ in 0..1000 {
            self.mover.turn(None, &mut out).expect("it never fails");
            for done in out.drain(..) {
                let before = self.done.insert(done.id, done.result);
                assert!(before.is_none(), "{} ended twice", done.id);
            }
            if self.mover.is_idle() {
                let seen = std::mem::take(&mut self.mover.engine_mut().seen);
                assert_eq!(self.done.len(), self.next as usize);
                return seen;
            }
        }
        panic!("{} of {} ended", self.done.len(), self.next);
    }

    fn on_fate(&mut self, fate: impl FnMut(&Piece) -> Option<Result<u32, i32>> + Send + 'static) {
        self.mover.engine_mut().fate = Box::new(fate);
    }

    fn is_fine(&self, id: u32) -> bool {
        matches!(self.done[&id], Ok(Moved::Fine { .. }))
    }

    fn in_pool(&self, page: Page) -> bool {
        self.pool.content(page.at, page.bytes) == content(page)
    }

    fn in_file(&self, page: Page) -> bool {
        let file = &self.mover.engine().file;
        file[page.offset as usize..][..page.bytes as usize] == content(page)
    }
}

/// What a page has: each place in the file has bytes of its own.
fn content(page: Page) -> Vec<u8> {
    (page.offset..page.offset + u64::from(page.bytes))
        .map(|place| (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8)
        .collect()
}

/// Pages of these sizes that follow one another from `offset` on, in the pool in disorder. Every
/// third one's address is odd.
fn pages(offset: u64, sizes: &[u32]) -> Vec<Page> {
    let mut next = offset;
    let mut pages = Vec::new();
    for (index, &bytes) in (0u64..).zip(sizes) {
        let slot = (index * 7 + 3) % 127;
        pages.push(Page {
            offset: next,
            at: offset * 2 + slot * 65536 + if index % 3 == 2 { 13 } else { 0 },
            bytes,
        });
        next += u64::from(align_up(bytes));
    }
    pages
}

#[test]
fn small_pages_that_follow_one_another_are_one_piece_whatever_their_size_and_address() {
    let mut world = World::new(4);
    // The buffer is not empty.
    for page in pages(1 << 20, &[4096; 32]) {
        world.write(page);
    }
    assert_eq!(world.run().len(), 1);
    let pages = pages(8192, &[4096, 1, 3000, 511, 5000, 4097, 8192, 32768, 700]);
    let ids: Vec<u32> = pages.iter().map(|&page| world.write(page)).collect();
    let last = pages[8];
    let bytes = (last.offset + 1024 - 8192) as u32;
    assert_eq!(world.run(), [(Kind::Write, 8192, bytes)]);
    for (&id, &page) in ids.iter().zip(&pages) {
        let checksum = Record::checksum_of(SEED, &content(page));
        assert_eq!(world.done[&id], Ok(Moved::Fine { checksum }));
        assert!(world.in_file(page), "{}", page.offset);
    }
    let file = &world.mover.engine().file;
    let padding = &file[pages[1].offset as usize + 1..pages[2].offset as usize];
    assert!(padding.iter().all(|&byte| byte == 0), "no old bytes");
    assert_eq!(file[last.offset as usize + 1024], 0xee);

    let ids: Vec<u32> = pages.iter().map(|&page| world.read(page)).collect();
    assert_eq!(world.run(), [(Kind::Read, 8192, bytes)]);
    for (id, page) in ids.into_iter().zip(pages) {
        assert!(world.is_fine(id) && world.in_pool(page), "{}", page.offset);
    }
}

#[test]
fn only_what_follows_is_joined_also_if_others_are_queued_in_between() {
    let mut world = World::new(8);
    let one = pages(0, &[4096; 4]);
    let two = pages(1 << 20, &[4096; 4]);
    for (&a, &b) in one.iter().zip(&two) {
        world.write(a);
        world.write(b);
    }
    // One page is missing between these.
    let gap = pages(2 << 20, &[4096; 3]);
    world.write(gap[0]);
    world.write(gap[2]);
    // These begin where others end, but are large, or go the other way.
    let large = pages(3 << 20, &[4096, 65536, 4096]);
    large.iter().for_each(|&page| {
        world.write(page);
    });
    let seen = world.run();
    let expected = [
        (0, 4 * 4096),
        (1 << 20, 4 * 4096),
        (2 << 20, 4096),
        ((2 << 20) + 8192, 4096),
        (3 << 20, 4096),
        ((3 << 20) + 4096, 65536),
        ((3 << 20) + 4096 + 65536, 4096),
    ];
    assert_eq!(
        seen,
        expected.map(|(offset, bytes)| (Kind::Write, offset, bytes))
    );
    for page in [one, two, vec![gap[0], gap[2]], large].concat() {
        assert!(world.in_file(page), "{}", page.offset);
    }
    // A read does not join a write.
    let other = pages(4 << 20, &[4096; 2]);
    world.write(other[0]);
    world.read(other[1]);
    assert_eq!(world.run().len(), 2);
}

#[test]
fn a_shared_piece_is_no_larger_than_its_buffer() {
    for sizes in [
        vec![4096; 70],
        vec![32768; 9],
        vec![32767; 9],
        vec![5000; 40],
    ] {
        let mut world = World::new(4);
        let pages = pages(0, &sizes);
        pages.iter().for_each(|&page| {
            world.write(page);
        });
        let seen = world.run();
        assert!(seen.len() > 1 && seen.len() < sizes.len());
        assert!(seen.iter().all(|&(.., bytes)| bytes <= BUFFER));
        assert!(pages.iter().all(|&page| world.in_file(page)));
        assert!(
            seen[0].2 > BUFFER - align_up(sizes[0]),
            "as many as fit: {seen:?}"
        );
    }
}

#[test]
fn a_bad_sector_costs_its_page_and_no_other_of_the_piece() {
    for bad in 0..5usize {
        let mut world = World::new(4);
        let pages = pages(0, &[4096, 3000, 8192, 700, 4096]);
        let sector = pages[bad].offset + u64::from(pages[bad].bytes) / 2;
        world.on_fate(move |piece| {
            let hit = (piece.offset..piece.offset + u64::from(piece.bytes)).contains(&sector);
            hit.then_some(Err(libc::EIO))
        });
        let written: Vec<u32> = pages.iter().map(|&page| world.write(page)).collect();
        world.run();
        for (index, &page) in pages.iter().enumerate() {
            assert_eq!(world.is_fine(written[index]), index != bad);
            assert_eq!(world.in_file(page), index != bad);
        }
        let fault = Err(ShardFault::Io(libc::EIO));
        assert_eq!(world.done[&written[bad]], fault);
        world.mover.engine_mut().file[pages[bad].offset as usize..][..pages[bad].bytes as usize]
            .copy_from_slice(&content(pages[bad]));
        let read: Vec<u32> = pages.iter().map(|&page| world.read(page)).collect();
        let seen = world.run();
        assert_eq!(seen.len(), 6, "once together, then one by one: {seen:?}");
        for (index, &page) in pages.iter().enumerate() {
            assert_eq!(world.is_fine(read[index]), index != bad);
            assert_eq!(
                world.in_pool(page),
                index != bad,
                "nothing is taken out of it"
            );
        }
        assert_eq!(world.done[&read[bad]], fault);
    }
}

#[test]
fn at_the_files_end_only_pages_that_are_cut_are_truncated() {
    let mut world = World::new(4);
    let pages = pages(0, &[4096, 3000, 4096, 4096]);
    for &page in &pages {
        world.write(page);
    }
    world.run();
    // It ends with the third page's last byte but one.
    let end = pages[2].offset as usize + 4095;
    world.mover.engine_mut().file.truncate(end);
    let ids: Vec<u32> = pages.iter().map(|&page| world.read(page)).collect();
    world.run();
    let fine: Vec<bool> = ids.iter().map(|&id| world.is_fine(id)).collect();
    assert_eq!(fine, [true, true, false, false]);
    for id in &ids[2..] {
        let fault = world.done[id].clone().expect_err("it was cut");
        assert!(
            [ShardFault::Truncated, ShardFault::Io(libc::EIO)].contains(&fault),
            "{fault:?}"
        );
    }
    // What is wanted is there, only padding is not.
    world.mover.engine_mut().file.truncate(4096 + 3000);
    let ids = [world.read(pages[0]), world.read(pages[1])];
    assert_eq!(world.run().len(), 1);
    assert!(world.is_fine(ids[0]) && world.is_fine(ids[1]));
    assert!(world.in_pool(pages[1]));
}

#[test]
fn a_shared_piece_that_stops_short_goes_on_where_it_stopped() {
    // Inside a page, at a page's end, and in padding.
    for first in [512, 4096, 4096 + 3072, 8192 + 512] {
        let mut world = World::new(2);
        let pages = pages(4096, &[4096, 3000, 4096]);
        for kind in [Kind::Write, Kind::Read] {
            let mut stops = true;
            world.on_fate(move |_| std::mem::take(&mut stops).then_some(Ok(first)));
            let ids: Vec<u32> = match kind {
                Kind::Write => pages.iter().map(|&page| world.write(page)).collect(),
                _ => pages.iter().map(|&page| world.read(page)).collect(),
            };
            let rest = (kind, 4096 + u64::from(first), 3 * 4096 - first);
            assert_eq!(world.run(), [(kind, 4096, 3 * 4096), rest]);
            assert!(ids.iter().all(|&id| world.is_fine(id)));
        }
        assert!(pages.iter().all(|&page| world.in_pool(page)));
        assert!(pages.iter().all(|&page| world.in_file(page)));
    }
}

#[test]
fn with_one_piece_at_a_time_or_few_buffers_everything_ends() {
    for (depth, buffers) in [(1, 1), (4, 1), (8, 2)] {
        let mut world = World::with_buffers(depth, buffers);
        let sizes: Vec<u32> = (0..60).map(|index| 100 + index * 611 % 34000).collect();
        let pages = pages(0, &sizes);
        pages.iter().for_each(|&page| {
            world.write(page);
        });
        world.take(15 << 20, Op::Table(vec![5; 4096].into()));
        world.take(0, Op::Sync);
        world.run();
        assert!(pages.iter().all(|&page| world.in_file(page)));
        let read: Vec<u32> = pages.iter().rev().map(|&page| world.read(page)).collect();
        world.run();
        assert!(read.iter().all(|&id| world.is_fine(id)));
        assert!(pages.iter().all(|&page| world.in_pool(page)));
    }
}

#[test]
fn a_large_page_that_fails_behind_pages_that_part_company_ends_once() {
    let mut world = World::new(2);
    let small = pages(0, &[4096, 4096]);
    let large = Page {
        offset: 1 << 20,
        at: 16 << 20,
        bytes: 9 << 20,
    };
    let mut pieces = 0;
    world.on_fate(move |_| {
        pieces += 1;
        (pieces <= 2).then_some(Err(libc::EIO))
    });
    let ids = [world.read(small[0]), world.read(small[1])];
    let failed = world.read(large);
    for page in small.iter().chain([&large]) {
        let bytes = content(*page);
        world.mover.engine_mut().file[page.offset as usize..][..bytes.len()]
            .copy_from_slice(&bytes);
    }
    world.run();
    assert_eq!(world.done[&failed], Err(ShardFault::Io(libc::EIO)));
    assert!(ids.iter().all(|&id| world.is_fine(id)));
    let again = world.read(large);
    world.run();
    assert!(world.is_fine(again) && world.in_pool(large));
}

#[test]
fn an_engine_that_goes_ends_every_page_of_a_shared_piece_once() {
    let mut world = World::new(2);
    for page in pages(0, &[4096; 5]) {
        world.write(page);
    }
    world.mover.issue();
    assert_eq!(world.mover.engine().given.len(), 1);
    let mut done = Vec::new();
    world.mover.abandon(&mut done);
    let mut ids: Vec<u32> = done.iter().map(|done| done.id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [0, 1, 2, 3, 4]);
    let stopped = |done: &Done| done.result == Err(ShardFault::Stopped);
    assert!(done.iter().all(stopped));
}

#[test]
fn with_errors_and_short_pieces_at_random_each_command_ends_once_and_no_byte_is_wrong() {
    for seed in 0..20 {
        let mut dice = Dice::new(seed);
        let disk = Disk::new(4 << 20, seed);
        let pool = aligned(16 << 20);
        let depth = dice.below(6) as u32 + 1;
        let engine = DiskEngine::new(Arc::clone(&disk), depth);
        let mut mover = Mover::new(engine, pool.clone(), bounce_area(depth), ALIGNMENT);
        let sizes: Vec<u32> = (0..50).map(|_| dice.below(40_000) as u32 + 1).collect();
        let pages = pages(0, &sizes);
        {
            let mut disk = lock(&disk);
            (disk.faults, disk.fault_one_in) = (vec![libc::EIO], 9);
            (disk.short_one_in, disk.unit) = (4, 512);
        }
        let mut written = vec![false; pages.len()];
        for round in 0..4 {
            let mut left = pages.len();
            let mut order: Vec<usize> = (0..pages.len()).collect();
            if round == 3 {
                order.reverse();
            }
            for &index in &order {
                let page = pages[index];
                let checksum = Record::checksum_of(SEED, &content(page));
                let (page_at, bytes) = (page.at, page.bytes);
                let op = if round == 0 {
                    pool.fill(page.at, &content(page));
                    Op::Write {
                        page: page_at,
                        bytes,
                        seed: SEED,
                        plain: NO_CHECKSUM,
                    }
                } else {
                    pool.fill(page.at, &vec![0x11; bytes as usize]);
                    Op::Read {
                        page: page_at,
                        bytes,
                        seed: SEED,
                        checksum,
                        plain: NO_CHECKSUM,
                    }
                };
                mover.take(Command {
                    id: index as u32,
                    at: Instant::now(),
                    offset: page.offset,
                    op,
                });
            }
            let mut out = Vec::new();
            while left > 0 {
                mover
                    .turn(Some(Duration::ZERO), &mut out)
                    .expect("it can be waited for");
                for done in out.drain(..) {
                    left -= 1;
                    let index = done.id as usize;
                    let fine = matches!(done.result, Ok(Moved::Fine { .. }));
                    match round {
                        0 => written[index] = fine,
                        _ if fine => {
                            let page = pages[index];
                            assert_eq!(pool.content(page.at, page.bytes), content(page));
                        }
                        _ => assert!(done.result.is_err() || !written[index]),
                    }
                }
            }
            assert!(mover.is_idle());
        }
        assert!(written.iter().filter(|fine| **fine).count() > pages.len() / 2);
    }
}
