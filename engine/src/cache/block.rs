//! What the daemon knows of a block beyond its key: pins and where each rank's shard lies.

#![forbid(unsafe_code)]

use crate::pool::PageAddr;

/// State of one rank's shard of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Nothing there.
    Empty,
    /// A save is copying into the page.
    Copying(PageAddr),
    /// Completely copied.
    In(PageAddr),
}

/// A shard in 8 bytes. Pages are 64-byte aligned, so the low bits of the address hold the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PackedShard(u64);

const STATE_MASK: u64 = 3;
const STATE_COPYING: u64 = 1;
const STATE_IN: u64 = 2;

impl PackedShard {
    fn pack(shard: Shard) -> PackedShard {
        match shard {
            Shard::Empty => PackedShard(0),
            Shard::Copying(page) => PackedShard(page.offset() | STATE_COPYING),
            Shard::In(page) => PackedShard(page.offset() | STATE_IN),
        }
    }

    fn unpack(self) -> Shard {
        let page = PageAddr::from_offset(self.0 & !STATE_MASK);
        match self.0 & STATE_MASK {
            STATE_COPYING => Shard::Copying(page),
            STATE_IN => Shard::In(page),
            _ => Shard::Empty,
        }
    }
}

/// The daemon's private record of one index entry; 32 bytes, zero means unused.
#[derive(Clone, Copy, Debug, Default, bytemuck::Zeroable)]
pub struct Block {
    /// Leases that hold the block.
    pub pins: u32,
    /// Saves that are copying one of its shards.
    pub copying: u16,
    /// Shards completely copied.
    pub shards_in: u16,
    /// Shards it needs; 0 marks an unused record.
    pub shards: u16,
    /// All shards are in, and readers see it.
    pub sealed: bool,
    /// It was sealed and turned out to hold wrong bytes: nobody finds it any more, and its pages go
    /// with the last lease that holds it.
    pub withdrawn: bool,
    /// The tier below the pool has been given its bytes, as of the last look.
    pub stored: bool,
    /// The tier below the pool can never take it.
    pub unfit: bool,
    /// Queries that found it, counted up to 255.
    pub hits: u8,
    /// Raised at each use of the record, so that a remembered id is not taken for its successor.
    pub generation: u32,
    /// When it was first saved, in seconds of the cache's clock; only read while unfinished.
    pub born_s: u32,
    /// One shard: the packed shard. More: position of the first in [`ShardRuns`].
    place: u64,
}

const _: () = assert!(size_of::<Block>() == 32);

/// Runs of packed shards for blocks of more than one shard, recycled per run length.
#[derive(Default)]
pub struct ShardRuns {
    shards: Vec<PackedShard>,
    free: Vec<Vec<u64>>,
}

impl ShardRuns {
    fn take(&mut self, length: u16) -> u64 {
        if let Some(start) = self.free.get_mut(usize::from(length)).and_then(Vec::pop) {
            return start;
        }
        let start = self.shards.len() as u64;
        self.shards.resize(
            self.shards.len() + usize::from(length),
            PackedShard::default(),
        );
        start
    }

    fn give_back(&mut self, start: u64, length: u16) {
        let end = start as usize + usize::from(length);
        self.shards[start as usize..end].fill(PackedShard::default());
        if self.free.len() <= usize::from(length) {
            self.free.resize_with(usize::from(length) + 1, Vec::new);
        }
        self.free[usize::from(length)].push(start);
    }
}

impl Block {
    /// Starts using the record for a block of `shards` shards.
    pub fn begin(&mut self, shards: u16, born_s: u32, runs: &mut ShardRuns) {
        debug_assert!(self.shards == 0 && shards > 0);
        let place = if shards == 1 { 0 } else { runs.take(shards) };
        let generation = self.generation.wrapping_add(1);
        *self = Block {
            shards,
            born_s,
            generation,
            place,
            ..Block::default()
        };
    }

    /// Ends its use. Its shards must have been emptied.
    pub fn end(&mut self, runs: &mut ShardRuns) {
        if self.shards > 1 {
            runs.give_back(self.place, self.shards);
        }
        *self = Block {
            generation: self.generation,
            ..Block::default()
        };
    }

    /// One shard.
    #[inline]
    pub fn shard(&self, shard: u16, runs: &ShardRuns) -> Shard {
        debug_assert!(shard < self.shards);
        if self.shards == 1 {
            PackedShard(self.place).unpack()
        } else {
            runs.shards[self.place as usize + usize::from(shard)].unpack()
        }
    }

    /// Changes one shard.
    #[inline]
    pub fn set_shard(&mut self, shard: u16, to: Shard, runs: &mut ShardRuns) {
        debug_assert!(shard < self.shards);
        let packed = PackedShard::pack(to);
        if self.shards == 1 {
            self.place = packed.0;
        } else {
            runs.shards[self.place as usize + usize::from(shard)] = packed;
        }
    }

    /// No lease holds it and no copy runs into it: its pages can be taken.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.pins == 0 && self.copying == 0
    }

    /// All shards are in.
    pub fn is_whole(&self) -> bool {
        self.shards > 0 && self.shards_in == self.shards
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_keep_their_state_and_page() {
        let mut runs = ShardRuns::default();
        for count in [1u16, 2, 8] {
            let mut block = Block::default();
            block.begin(count, 0, &mut runs);
            for shard in 0..count {
                let page = PageAddr::from_offset(u64::from(shard) * 512);
                assert_eq!(block.shard(shard, &runs), Shard::Empty);
                block.set_shard(shard, Shard::Copying(page), &mut runs);
                assert_eq!(block.shard(shard, &runs), Shard::Copying(page));
                block.set_shard(shard, Shard::In(page), &mut runs);
            }
            for shard in 0..count {
                let page = PageAddr::from_offset(u64::from(shard) * 512);
                assert_eq!(block.shard(shard, &runs), Shard::In(page));
            }
        }
    }

    #[test]
    fn a_run_is_empty_when_it_is_used_again() {
        let mut runs = ShardRuns::default();
        let mut block = Block::default();
        block.begin(3, 0, &mut runs);
        block.set_shard(2, Shard::In(PageAddr::from_offset(64)), &mut runs);
        let generation = block.generation;
        block.end(&mut runs);
        block.begin(3, 0, &mut runs);
        assert_eq!(block.shard(2, &runs), Shard::Empty);
        assert_eq!(runs.shards.len(), 3);
        assert_ne!(block.generation, generation);
    }
}
