//! One shard: its segments, its blocks, and what is under way.
//!
//! A shard lives on the lane thread and decides; a [`Port`] takes its commands to where they are
//! carried out and brings back how they ended. Nothing here waits, reads a clock or touches a file,
//! so that the tests can run it over a drive of their own, in any order of events.

#![forbid(unsafe_code)]

mod adopt;
mod commit;
mod health;
mod request;
mod segments;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pegaflow_policy::EvictionPolicy;

use crate::block::BlockKey;
use crate::format::{Geometry, Id, Place, Record, align_up};
use crate::mover::Done;
use crate::options::Options;
use crate::outcome::Completion;
use crate::port::Port;
use crate::slab::Slab;
use crate::stats::{ShardFault, ShardStats};

use commit::Commit;
use health::Health;
use segments::Segments;

pub(crate) use adopt::{Found, FoundSegment};

/// Commands of a shard's own (tables, syncs) that may be under way beside those for pages.
pub(crate) const OWN_COMMANDS: usize = 256;

/// One shard.
pub(crate) struct Shard {
    /// Its place in the options.
    index: u16,
    id: Id,
    geometry: Geometry,
    segments: Segments,
    blocks: Slab<Block>,
    requests: Slab<Request>,
    commands: Slab<Under>,
    commit: Commit,
    health: Health,
    port: Box<dyn Port>,
    max_pending: u32,
    /// Pages under way.
    pending: u32,
    /// Bytes of blocks that were taken for writing, since it was opened.
    taken_bytes: u64,
    stats: ShardStats,
    /// Blocks that left without being asked to, for the index to forget.
    gone: Vec<(BlockKey, u32)>,
    completions: VecDeque<Completion>,
}

/// A block of this shard.
#[derive(Debug)]
struct Block {
    key: BlockKey,
    write_id: u64,
    pages: Box<[Page]>,
    state: BlockState,
    /// Pages whose records are not durable.
    uncommitted: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockState {
    /// Its pages are being written.
    Writing,
    /// Likewise, but nobody wants it any more.
    Forgotten,
    /// It can be read.
    Live,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub segment: u32,
    pub offset: u32,
    pub bytes: u32,
    pub checksum: u64,
}

/// A block being written or read.
#[derive(Debug)]
struct Request {
    ticket: u64,
    block: u32,
    write_id: u64,
    /// Pages that have not ended.
    left: u16,
    ending: Ending,
    /// Of a block that is read: see [`Completion::checksums`].
    checksums: Vec<u64>,
}

/// How a request will end, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ending {
    Fine,
    Bad,
    Failed(crate::stats::ShardFault),
}

/// What a command is for.
#[derive(Debug)]
enum Under {
    Write {
        request: u32,
        page: u16,
    },
    Read {
        request: u32,
        page: u16,
        segment: u32,
        bytes: u32,
    },
    Chunk,
    Opener {
        segment: u32,
    },
    Sync,
}

/// What a shard is made of, for [`Shard::new`].
pub(crate) struct Parts {
    pub index: u16,
    pub id: Id,
    pub geometry: Geometry,
    pub port: Box<dyn Port>,
    pub policy: Box<dyn EvictionPolicy>,
    pub stats: ShardStats,
}

impl Shard {
    /// A shard without blocks; [`Shard::adopt`] gives it those of its file.
    pub fn new(now: Instant, options: &Options, parts: Parts) -> Self {
        let mut stats = parts.stats;
        stats.capacity_bytes =
            u64::from(parts.geometry.segments) * u64::from(parts.geometry.segment_bytes);
        Self {
            index: parts.index,
            id: parts.id,
            geometry: parts.geometry,
            segments: Segments::new(&parts.geometry, parts.policy),
            blocks: Slab::default(),
            requests: Slab::default(),
            commands: Slab::default(),
            commit: Commit::new(options.commit_interval, options.commit_bytes),
            health: Health::new(now, options.stall_limit, options.retry_after),
            port: parts.port,
            max_pending: options.max_pending,
            pending: 0,
            taken_bytes: 0,
            stats,
            gone: Vec::new(),
            completions: VecDeque::new(),
        }
    }

    /// Its place in the options.
    pub fn place(&self) -> u16 {
        self.index
    }

    /// It was out of order until now: its drive did not answer at the start.
    pub fn came_late(&mut self) {
        self.health.degradations += 1;
    }

    /// Takes its place among the others, whose turn it is as often as theirs from now on.
    pub fn take_turns_from(&mut self, turns: f64) {
        self.taken_bytes = (turns * self.stats.capacity_bytes as f64) as u64;
    }

    /// Takes in what has ended and does what follows from it.
    pub fn poll(&mut self, now: Instant) {
        // Asked first: what ended before is still received.
        let broken = self.port.is_broken();
        while let Some(done) = self.port.receive() {
            self.health.ended(now);
            self.stats.checksum_time += done.checksums;
            self.end(now, done);
        }
        if broken {
            self.health.stop();
            for id in self.commands.numbers() {
                let result = Err(ShardFault::Stopped);
                let done = Done {
                    id,
                    result,
                    took: Duration::ZERO,
                    checksums: Duration::ZERO,
                };
                self.end(now, done);
            }
        }
        self.look(now);
        self.step(now);
    }

    fn look(&mut self, now: Instant) {
        let oldest = self.port.oldest();
        self.health.look(now, self.is_busy(), oldest);
    }

    /// Whether commands are under way.
    pub fn is_busy(&self) -> bool {
        self.commands.len() > 0
    }

    /// Requests that have no completion yet.
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// When [`Shard::poll`] has something to do though nothing ended.
    pub fn deadline(&self) -> Option<Instant> {
        // While no table can be written, health says when one may be tried again.
        let commit = self.commit.deadline().filter(|_| self.health.can_commit());
        let health = self.health.deadline(self.is_busy());
        commit.into_iter().chain(health).min()
    }

    /// The next completion.
    pub fn completion(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// The next block that left without being asked to, with its number.
    pub fn next_gone(&mut self) -> Option<(BlockKey, u32)> {
        self.gone.pop()
    }

    /// Numbers and state.
    pub fn stats(&self) -> ShardStats {
        ShardStats {
            health: self.health.state(),
            degradations: self.health.degradations,
            pending: self.pending,
            ..self.stats.clone()
        }
    }

    /// The pages of a block that can be read now.
    pub fn readable(&self, block: u32) -> Option<&[Page]> {
        if !self.health.is_readable() {
            return None;
        }
        self.live(block)
    }

    /// The pages of a block that is there.
    pub fn live(&self, block: u32) -> Option<&[Page]> {
        let block = self.blocks.get(block)?;
        (block.state == BlockState::Live).then_some(&block.pages[..])
    }

    /// Whether a block's records are durable.
    #[cfg(test)]
    pub fn is_durable(&self, block: u32) -> bool {
        self.live(block).is_some() && self.blocks.get(block).is_some_and(|b| b.uncommitted == 0)
    }

    /// Notes a use of a block.
    pub fn touch(&mut self, block: u32) {
        if let Some(block) = self.blocks.get(block) {
            for page in &block.pages {
                self.segments.touch(page.segment);
            }
        }
    }

    /// Forgets a block.
    pub fn forget(&mut self, block: u32) {
        match self.blocks.get_mut(block).map(|block| &mut block.state) {
            Some(state @ BlockState::Writing) => *state = BlockState::Forgotten,
            Some(BlockState::Live) => self.drop_block(block),
            Some(BlockState::Forgotten) | None => {}
        }
    }

    /// Takes a block that is there out of the accounts.
    fn drop_block(&mut self, index: u32) {
        let Some(block) = self.blocks.remove(index) else {
            return;
        };
        if block.state == BlockState::Live {
            self.stats.blocks -= 1;
            self.stats.uncommitted_blocks -= u64::from(block.uncommitted > 0);
            self.stats.live_bytes -= bytes_of(&block.pages);
        }
        for page in &block.pages {
            self.segments.page_died(page.segment, page.bytes);
        }
    }

    /// Whether a block is still the one that was written under `write_id`.
    fn is_current(&self, index: u32, write_id: u64) -> bool {
        self.blocks
            .get(index)
            .is_some_and(|block| block.write_id == write_id)
    }

    fn place_in(&self, segment: u32) -> Place {
        Place {
            shard: self.id,
            segment,
            generation: self.segments.generation(segment),
        }
    }

    /// The record of a page of a block.
    fn record(&self, block: &Block, page: usize) -> Record {
        let at = block.pages[page];
        Record {
            scope: block.key.scope,
            hash: block.key.hash,
            write_id: block.write_id,
            checksum: at.checksum,
            group: block.key.group,
            page: page as u16,
            pages: block.pages.len() as u16,
            offset: at.offset,
            bytes: at.bytes,
        }
    }

    /// Bytes written for each byte there is: the shard with the fewest is next.
    pub fn turns(&self) -> f64 {
        self.taken_bytes as f64 / self.stats.capacity_bytes.max(1) as f64
    }

    /// Wakes the port's thread for what was sent.
    pub fn ring(&mut self) {
        self.port.ring();
    }

    /// Whether the port's thread has ended.
    pub fn has_stopped(&self) -> bool {
        self.port.has_stopped()
    }

    /// Lets nothing be waited for any more, and ends the port's thread when it is done.
    pub fn stop(&mut self) {
        self.port.stop();
    }
}

fn bytes_of(pages: &[Page]) -> u64 {
    pages.iter().map(|page| u64::from(page.bytes)).sum()
}

/// Bytes that a page takes on the drive.
fn padded(bytes: u32) -> u64 {
    u64::from(align_up(bytes))
}
