//! A drive in memory that loses power, tears writes and fails, as a seed says.
//!
//! What MUST hold of it, so that surviving it means something: a write that no sync covers may be
//! there, be missing, or be there in any of its sectors, whatever became of others; a read sees
//! what was written last; a sync covers exactly the writes that ended before it was submitted.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Bell, Ended, Engine, Kind, Piece};
use crate::scan::ReadAt;

/// What a drive writes all of or nothing of.
const SECTOR: usize = 512;

/// Numbers from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.roll();
        }
        dice
    }

    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// True once in `count`.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            let other = self.below(index as u64 + 1) as usize;
            items.swap(index, other);
        }
    }
}

struct Write {
    offset: usize,
    content: Vec<u8>,
}

/// The drive.
pub(crate) struct Disk {
    /// What is there for sure.
    durable: Vec<u8>,
    /// What reads see.
    current: Vec<u8>,
    /// Ended, in order, and not covered by a sync.
    volatile: Vec<Write>,
    /// So many writes have left `volatile` by being covered.
    covered: usize,
    pub dice: Dice,
    /// Which errors there are, and that one piece in so many fails with one of them.
    pub faults: Vec<i32>,
    pub fault_one_in: u64,
    /// One piece in so many moves only some of its bytes, a multiple of `unit`.
    pub short_one_in: u64,
    /// What direct I/O moves at least.
    pub unit: u32,
    /// Nothing ends.
    pub hangs: bool,
}

/// What tests and engines share.
pub(crate) type SharedDisk = Arc<Mutex<Disk>>;

pub(crate) fn lock(disk: &SharedDisk) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    /// An empty drive.
    pub fn new(bytes: usize, seed: u64) -> SharedDisk {
        Arc::new(Mutex::new(Self {
            durable: vec![0; bytes],
            current: vec![0; bytes],
            volatile: Vec::new(),
            covered: 0,
            dice: Dice::new(seed),
            faults: Vec::new(),
            fault_one_in: 0,
            short_one_in: 0,
            unit: 1,
            hangs: false,
        }))
    }

    fn ended_writes(&self) -> usize {
        self.covered + self.volatile.len()
    }

    fn write(&mut self, offset: usize, content: Vec<u8>) {
        self.current[offset..offset + content.len()].copy_from_slice(&content);
        self.volatile.push(Write { offset, content });
    }

    fn sync(&mut self, before: usize) {
        let count = before.saturating_sub(self.covered);
        for write in self.volatile.drain(..count) {
            self.durable[write.offset..write.offset + write.content.len()]
                .copy_from_slice(&write.content);
        }
        self.covered += count;
    }

    /// The power goes: of what no sync covers, some sectors are there and some are not.
    fn lose_power(&mut self, under_way: Vec<Write>) {
        let mut writes = std::mem::take(&mut self.volatile);
        self.covered += writes.len();
        writes.extend(under_way);
        self.dice.shuffle(&mut writes);
        for write in writes {
            let fate = self.dice.below(4);
            for (index, sector) in write.content.chunks(SECTOR).enumerate() {
                if fate == 0 || (fate < 3 && self.dice.one_in(2)) {
                    continue;
                }
                let at = write.offset + index * SECTOR;
                self.durable[at..at + sector.len()].copy_from_slice(sector);
            }
        }
        self.current.copy_from_slice(&self.durable);
    }

    /// Changes one bit.
    pub fn rot(&mut self, offset: usize, bit: u8) {
        self.durable[offset] ^= 1 << (bit % 8);
        self.current[offset] ^= 1 << (bit % 8);
    }
}

impl ReadAt for SharedDisk {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = lock(self);
        buffer.copy_from_slice(&disk.current[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// An engine over the drive.
pub(crate) struct DiskEngine {
    disk: SharedDisk,
    /// Pieces that have not ended; for a sync with the writes that it covers.
    running: Vec<(Piece, usize)>,
    depth: u32,
}

struct NoBell;

impl Bell for NoBell {
    fn ring(&self) {}
}

impl DiskEngine {
    pub fn new(disk: SharedDisk, depth: u32) -> Self {
        Self {
            disk,
            running: Vec::new(),
            depth,
        }
    }

    fn content(piece: &Piece, bytes: u32) -> Vec<u8> {
        let mut content = vec![0; bytes as usize];
        // SAFETY: the piece's maker promises that the memory is there until the piece has ended.
        unsafe {
            piece
                .address
                .as_ptr()
                .copy_to_nonoverlapping(content.as_mut_ptr(), content.len());
        }
        content
    }

    fn carry_out(disk: &mut Disk, piece: &Piece, before: usize) -> Result<u32, i32> {
        if disk.fault_one_in > 0 && disk.dice.one_in(disk.fault_one_in) {
            let index = disk.dice.below(disk.faults.len() as u64) as usize;
            return Err(disk.faults[index]);
        }
        let mut bytes = piece.bytes;
        let units = bytes / disk.unit;
        if disk.short_one_in > 0 && units > 0 && disk.dice.one_in(disk.short_one_in) {
            bytes = (disk.dice.below(u64::from(units)) as u32 + 1) * disk.unit;
        }
        let offset = piece.offset as usize;
        match piece.kind {
            Kind::Write => disk.write(offset, Self::content(piece, bytes)),
            Kind::Read => {
                let content = &disk.current[offset..offset + bytes as usize];
                // SAFETY: the piece's maker promises that the memory is there and nobody else's.
                unsafe {
                    piece
                        .address
                        .as_ptr()
                        .copy_from_nonoverlapping(content.as_ptr(), content.len());
                }
            }
            Kind::Sync => disk.sync(before),
        }
        Ok(bytes)
    }
}

impl Engine for DiskEngine {
    fn name(&self) -> &'static str {
        "disk in memory"
    }

    fn depth(&self) -> u32 {
        self.depth
    }

    fn submit(&mut self, piece: Piece) -> Result<(), Piece> {
        if self.running.len() == self.depth as usize {
            return Err(piece);
        }
        let before = lock(&self.disk).ended_writes();
        self.running.push((piece, before));
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ended>) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        if disk.hangs {
            return Ok(());
        }
        disk.dice.shuffle(&mut self.running);
        // Who waits gets something.
        let least = usize::from(timeout.is_some()).min(self.running.len());
        let count = (disk.dice.below(self.running.len() as u64 + 1) as usize).max(least);
        for (piece, before) in self.running.drain(..count) {
            out.push(Ended {
                id: piece.id,
                result: Self::carry_out(&mut disk, &piece, before),
            });
        }
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        Arc::new(NoBell)
    }
}

impl DiskEngine {
    /// The power goes while pieces are under way.
    pub fn lose_power(&mut self) {
        let writes = self
            .running
            .drain(..)
            .filter(|(piece, _)| piece.kind == Kind::Write)
            .map(|(piece, _)| Write {
                offset: piece.offset as usize,
                content: Self::content(&piece, piece.bytes),
            })
            .collect();
        lock(&self.disk).lose_power(writes);
    }
}

impl Drop for DiskEngine {
    fn drop(&mut self) {
        // Who drops an engine without a power loss waits for its pieces.
        let mut out = Vec::new();
        while !self.running.is_empty() && !lock(&self.disk).hangs {
            let _ = self.wait(Some(Duration::ZERO), &mut out);
        }
    }
}
