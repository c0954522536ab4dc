//! The set of shards and the index of what is on them.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{BlockInfo, BlockKey, PageRef};
use crate::error::OpenError;
use crate::format::Record;
use crate::late::{LateIndex, Outsiders};
use crate::limiter::Limiter;
use crate::memory::PoolMemory;
use crate::open::Index;
use crate::opening::Joining;
use crate::options::Options;
use crate::outcome::{Completion, Refused};
use crate::shard::{Page, Shard};
use crate::stats::ShardStats;

/// What opening found, for the log.
#[derive(Clone, Debug, Default)]
pub struct OpenReport {
    /// What was found of each shard that is open, in the order of the options.
    pub shards: Vec<ShardReport>,
    /// Shards whose drives have not answered yet: see [`Tier::joined`].
    pub late: Vec<PathBuf>,
    /// Shards that belong to the set and were not named: their blocks are missing.
    pub missing_shards: u32,
    /// How long it took.
    pub took: Duration,
}

/// What opening one shard found.
#[derive(Clone, Debug, Default)]
pub struct ShardReport {
    /// Its file.
    pub path: PathBuf,
    /// Whether the file was made now.
    pub created: bool,
    /// `io_uring` or `threads`.
    pub io: &'static str,
    /// Whether pages go past the page cache.
    pub direct: bool,
    /// How many segments it has.
    pub segments: u32,
    /// The size of each, in bytes of pages.
    pub segment_bytes: u32,
    /// The most pages of each, however small they are: its table has no room for more.
    pub segment_pages: u32,
    /// What is not as wished (no io_uring, no direct I/O, memory not registered, space not
    /// reserved, a file that was cut), in words for the log.
    pub notes: Vec<String>,
    /// Blocks that can be read.
    pub blocks: u64,
    /// Blocks of which a page is missing, or that a newer copy replaces: forgotten.
    pub dropped_blocks: u64,
    /// Table chunks that are damaged. A crash while one is written leaves one.
    pub bad_chunks: u64,
}

/// The tier. One thread owns it; it never waits for a drive.
pub struct Tier {
    /// Those that are open: first those that were in time, then the others as they came.
    shards: Vec<Shard>,
    /// What is on them, but for what late shards have brought.
    index: Index,
    /// What each late shard has brought, with its place among the shards. A key may be here and in
    /// the index, since nobody knew of the late block: both have its bytes.
    brought: Vec<(u16, LateIndex)>,
    outsiders: Option<Outsiders>,
    joined: Vec<ShardReport>,
    limiter: Option<Limiter>,
    pool_bytes: u64,
    next_write_id: u64,
}

impl Tier {
    /// Opens the shards of `options`. `wake` is called on a shard's thread whenever
    /// [`Tier::poll`] has something to do. A shard whose drive does not answer within
    /// [`Options::open_wait`] is not waited for: it refuses everything until it does, joins then,
    /// and [`Tier::joined`] tells.
    ///
    /// # Errors
    /// Names the first shard that cannot be used, which is left as it is. (One that turns out so
    /// later is degraded, with the reason.)
    pub fn open(
        options: Options,
        pool: PoolMemory,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Result<(Self, OpenReport), OpenError> {
        crate::opening::open(options, pool, Arc::new(wake), Arc::new(|_, _| ()))
    }

    pub(crate) fn assemble(
        now: Instant,
        options: &Options,
        pool: &PoolMemory,
        shards: Vec<Shard>,
        index: Index,
        next_write_id: u64,
    ) -> Self {
        Self {
            shards,
            index,
            brought: Vec::new(),
            outsiders: None,
            joined: Vec::new(),
            limiter: options.write_limit.map(|limit| Limiter::new(limit, now)),
            pool_bytes: pool.bytes(),
            next_write_id,
        }
    }

    /// These shards are not open yet.
    pub(crate) fn wait_for(&mut self, outsiders: Outsiders) {
        self.outsiders = Some(outsiders);
    }

    /// Where a block is, as far as it is known.
    fn places(&self, key: &BlockKey) -> impl Iterator<Item = (u16, u32)> {
        let brought = self.brought.iter();
        let brought = brought.filter_map(|(shard, index)| Some((*shard, index.get(key)?)));
        self.index.get(key).copied().into_iter().chain(brought)
    }

    /// Where a block can be read now.
    fn pages(&self, key: &BlockKey) -> Option<(u16, u32, &[Page])> {
        self.places(key).find_map(|(shard, block)| {
            let pages = self.shards[usize::from(shard)].readable(block)?;
            Some((shard, block, pages))
        })
    }

    fn info(&self, shard: u16, pages: &[Page]) -> BlockInfo {
        let page_bytes = pages[0].bytes;
        BlockInfo {
            shard: self.shards[usize::from(shard)].place(),
            pages: pages.len() as u16,
            page_bytes,
            uniform: pages.iter().all(|page| page.bytes == page_bytes),
        }
    }

    /// What is known of a block that can be read now; none if it is not held, still on its way, or
    /// on a shard that does not take reads.
    pub fn lookup(&self, key: &BlockKey) -> Option<BlockInfo> {
        let (shard, _, pages) = self.pages(key)?;
        Some(self.info(shard, pages))
    }

    /// Whether a block is held or on its way, even if it cannot be read now.
    pub fn knows(&self, key: &BlockKey) -> bool {
        self.places(key).next().is_some()
    }

    /// The length of page `page` of a block that can be read now, in bytes.
    pub fn page_bytes(&self, key: &BlockKey, page: u16) -> Option<u32> {
        let (_, _, pages) = self.pages(key)?;
        pages.get(usize::from(page)).map(|page| page.bytes)
    }

    /// Queues the writing of a block from the pool. Its memory must not change until the
    /// completion of `ticket`. It begins with the next [`Tier::start`] or [`Tier::poll`].
    ///
    /// # Errors
    /// Why the block is not taken; nothing follows then.
    pub fn write(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &BlockKey,
        pages: &[PageRef],
    ) -> Result<(), Refused> {
        if self.shards.is_empty() {
            return Err(Refused::NoShard);
        }
        if self.knows(key) {
            return Err(Refused::Known);
        }
        self.check_pages(pages)?;
        if let Some(limiter) = &mut self.limiter
            && !limiter.is_open(now)
        {
            return Err(Refused::RateLimited);
        }
        let (shard, block) = self.write_somewhere(now, ticket, key, pages)?;
        self.index.insert(*key, (shard, block));
        self.next_write_id += 1;
        if let Some(limiter) = &mut self.limiter {
            limiter.spend(pages.iter().map(|page| u64::from(page.bytes)).sum());
        }
        Ok(())
    }

    /// Offers a block to the shards, the one that was written least for its size first.
    fn write_somewhere(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &BlockKey,
        pages: &[PageRef],
    ) -> Result<(u16, u32), Refused> {
        let mut tried = 0u64;
        let mut refused = Refused::NoShard;
        loop {
            let untried = (0..self.shards.len()).filter(|index| tried >> index & 1 == 0);
            let next = untried.min_by(|&a, &b| {
                let turns = |index: usize| self.shards[index].turns();
                turns(a).total_cmp(&turns(b))
            });
            let Some(index) = next else {
                return Err(refused);
            };
            tried |= 1 << index;
            let result = self.shards[index].write(now, ticket, key, self.next_write_id, pages);
            self.forget_gone(index);
            match result {
                Ok(block) => return Ok((index as u16, block)),
                Err(why) if waits_longer(&why) >= waits_longer(&refused) => refused = why,
                Err(_) => {}
            }
        }
    }

    fn check_pages(&self, pages: &[PageRef]) -> Result<(), Refused> {
        if pages.is_empty() || pages.len() > Options::MAX_PAGES {
            return Err(Refused::PageCount {
                pages: pages.len(),
                most: Options::MAX_PAGES,
            });
        }
        let inside = |page: &PageRef| {
            page.bytes > 0
                && page
                    .offset
                    .checked_add(u64::from(page.bytes))
                    .is_some_and(|end| end <= self.pool_bytes)
        };
        match pages.iter().position(|page| !inside(page)) {
            Some(page) => Err(Refused::OutsidePool { page }),
            None => Ok(()),
        }
    }

    /// Queues the reading of a block into the pool. Its memory must not be looked at or changed
    /// until the completion of `ticket`, however long the drive takes. It begins as a write does.
    ///
    /// # Errors
    /// Why the block is not read; nothing follows then.
    pub fn read(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &BlockKey,
        pages: &[PageRef],
    ) -> Result<(), Refused> {
        let readable = self.pages(key).map(|(shard, block, _)| (shard, block));
        let known = readable.or_else(|| self.places(key).next());
        let (shard, block) = known.ok_or(Refused::Unknown)?;
        self.check_pages(pages)?;
        self.shards[usize::from(shard)].read(now, ticket, block, pages)
    }

    /// Has what was queued begin: to be called behind the last of several requests, so that the
    /// shards' threads are woken once, and find together what lies together on the drive.
    pub fn start(&mut self) {
        self.shards.iter_mut().for_each(Shard::ring);
    }

    /// Brings what has ended, and moves on what has to happen behind it (commits, reclaiming).
    /// Never waits.
    pub fn poll(&mut self, now: Instant, out: &mut Vec<Completion>) {
        self.take_ended(now, out);
        self.start();
    }

    /// [`Tier::poll`], but what is to happen begins with the next [`Tier::start`] only: for whoever
    /// has something more urgent to do than to wake the shards' threads.
    pub fn take_ended(&mut self, now: Instant, out: &mut Vec<Completion>) {
        if self.outsiders.is_some() {
            self.take_joining();
        }
        for index in 0..self.shards.len() {
            self.shards[index].poll(now);
            self.forget_gone(index);
            while let Some(completion) = self.shards[index].completion() {
                out.push(completion);
            }
        }
    }

    /// Takes in the shards whose drives have answered meanwhile. They bring indexes of their own,
    /// however many blocks there are: whoever calls this serves others.
    fn take_joining(&mut self) {
        let Some(outsiders) = &mut self.outsiders else {
            return;
        };
        for joining in outsiders.joining() {
            let Joining {
                mut shard,
                report,
                mut index,
                last_write_id,
            } = joining;
            for key in outsiders.removed() {
                if let Some(block) = index.remove(key) {
                    shard.forget(block);
                }
            }
            let last = last_write_id.min(Record::WRITE_ID_MAX);
            self.next_write_id = self.next_write_id.max(last + 1);
            // Or all that is written would go to it for long.
            let turns = self.shards.iter().map(Shard::turns);
            shard.take_turns_from(turns.min_by(f64::total_cmp).unwrap_or(0.0));
            self.brought.push((self.shards.len() as u16, index));
            self.shards.push(shard);
            self.joined.push(report);
        }
        if outsiders.is_empty() {
            self.outsiders = None;
        }
    }

    /// What was found of a shard that was late and has joined since the last call.
    pub fn joined(&mut self) -> Option<ShardReport> {
        self.joined.pop()
    }

    fn forget_gone(&mut self, index: usize) {
        let shard = index as u16;
        while let Some((key, block)) = self.shards[index].next_gone() {
            if self.index.get(&key) == Some(&(shard, block)) {
                self.index.remove(&key);
            }
            for (_, brought) in self.brought.iter_mut().filter(|(of, _)| *of == shard) {
                if brought.get(&key) == Some(block) {
                    brought.remove(&key);
                }
            }
        }
    }

    /// When [`Tier::poll`] wants to be called even if nothing wakes: none is never.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.shards.iter().filter_map(Shard::deadline).min()
    }

    /// Forgets a block. One that is being read or written stays until that has ended. It may come
    /// back with the next opening if its space was not used again.
    pub fn remove(&mut self, key: &BlockKey) {
        if let Some((shard, block)) = self.index.remove(key) {
            self.shards[usize::from(shard)].forget(block);
        }
        for (shard, brought) in &mut self.brought {
            if let Some(block) = brought.remove(key) {
                self.shards[usize::from(*shard)].forget(block);
            }
        }
        if let Some(outsiders) = &mut self.outsiders {
            outsiders.note_removed(key);
        }
    }

    /// Notes a use of a block.
    pub fn touch(&mut self, key: &BlockKey) {
        let place = self.places(key).next();
        if let Some((shard, block)) = place {
            self.shards[usize::from(shard)].touch(block);
        }
    }

    /// Every block that is there, on shards that do not take reads too; twice if a late shard has
    /// brought it once more.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockKey, BlockInfo)> + '_ {
        let brought = self.brought.iter().flat_map(|(shard, index)| {
            let blocks = index.iter();
            blocks.map(|(key, block)| (key, (*shard, block)))
        });
        let index = self.index.iter().map(|(key, place)| (key, *place));
        index.chain(brought).filter_map(|(key, (shard, block))| {
            let pages = self.shards[usize::from(shard)].live(block)?;
            Some((*key, self.info(shard, pages)))
        })
    }

    /// How many requests have no completion yet.
    pub fn in_flight(&self) -> usize {
        self.shards.iter().map(Shard::in_flight).sum()
    }

    /// How many shards there are.
    pub fn shard_count(&self) -> usize {
        self.shards.len() + self.outsiders.as_ref().map_or(0, Outsiders::len)
    }

    /// Numbers and states, one per shard in the order of the options.
    pub fn stats(&self) -> Vec<ShardStats> {
        let open = self.shards.iter();
        let open = open.map(|shard| (usize::from(shard.place()), shard.stats()));
        let mut stats: Vec<_> = open.collect();
        stats.extend(self.outsiders.iter().flat_map(Outsiders::stats));
        stats.sort_by_key(|(place, _)| *place);
        stats.into_iter().map(|(_, stats)| stats).collect()
    }

    /// Whether a block that is there would survive a power loss.
    #[cfg(test)]
    pub(crate) fn is_durable(&self, key: &BlockKey) -> bool {
        let at = self.places(key).next();
        at.is_some_and(|(shard, block)| self.shards[usize::from(shard)].is_durable(block))
    }

    /// Starts to make durable what was written, without waiting for the interval.
    pub fn flush(&mut self, now: Instant) {
        for shard in &mut self.shards {
            shard.flush(now);
        }
        self.start();
    }

    /// Ends all requests and makes everything durable, but waits no longer than `limit`. True if
    /// nothing was left undone. Threads that a drive holds up keep the pool's memory alive.
    pub fn close(mut self, limit: Duration) -> bool {
        const PAUSE: Duration = Duration::from_millis(1);
        let end = Instant::now() + limit;
        let mut out = Vec::new();
        loop {
            let now = Instant::now();
            self.poll(now, &mut out);
            self.flush(now);
            let done = self
                .shards
                .iter()
                .all(|shard| shard.is_clean() && !shard.is_busy());
            if done || now >= end {
                return done && self.stop(end);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Lets the threads end, and waits for them until `end`.
    fn stop(mut self, end: Instant) -> bool {
        for shard in &mut self.shards {
            shard.stop();
        }
        while !self.shards.iter().all(Shard::has_stopped) {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl fmt::Debug for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tier")
            .field("shards", &self.shards.len())
            .field("blocks", &self.index.len())
            .field("late", &self.outsiders.as_ref().map_or(0, Outsiders::len))
            .finish_non_exhaustive()
    }
}

/// Of several reasons to refuse, the one to tell: whatever ends soonest by itself.
fn waits_longer(why: &Refused) -> u8 {
    match why {
        Refused::QueueFull => 3,
        Refused::Reclaiming => 2,
        Refused::Degraded(_) => 1,
        _ => 0,
    }
}
