//! Making what was written durable.
//!
//! A commit takes two syncs: one that covers the pages, then, with their records in the tables, one
//! that covers the tables. The second also covers the pages that ended in between, if they are due.
//! One commit runs at a time; the openers of empty segments ride along. It writes no more than
//! [`CHUNKS_MAX`] chunks: records beyond are left to the next one, their pages are durable already.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::table::Plan;
use super::{OWN_COMMANDS, Shard, Under};
use crate::format::{CHUNK_BYTES, Chunk, Place, Record};
use crate::mover::{Command, Done, Op};
use crate::stats::ShardFault;

/// The most chunks and openers under way: with a sync fewer than the port takes.
const CHUNKS_MAX: usize = 128;
const _: () = assert!(CHUNKS_MAX < OWN_COMMANDS);
/// So many of them are made at a time: some ten microseconds, in between of which the shard's owner
/// does what else it has to do.
const CHUNKS_AT_A_TIME: usize = 8;

/// A page whose record is not durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unsettled {
    pub segment: u32,
    pub block: u32,
    pub write_id: u64,
    pub record: Record,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// So many chunks and openers have not ended.
    Writing(usize),
    Syncing,
}

/// The commits of a shard.
pub(super) struct Commit {
    interval: Duration,
    bytes: u64,
    phase: Phase,
    /// Something of this commit's tables failed.
    failed: bool,
    /// Commit now, whatever is due.
    flush: bool,
    /// Written since the last sync began.
    pending: Vec<Unsettled>,
    pending_bytes: u64,
    /// When the first of them was written.
    since: Option<Instant>,
    /// Covered by the sync under way.
    covered: Vec<Unsettled>,
    /// Their pages are durable, their records are not.
    /// In the order of their segments.
    synced: VecDeque<Unsettled>,
    /// Their records are in chunks under way.
    recorded: Vec<Unsettled>,
    plans: Vec<(u32, Plan)>,
    /// Chunks and openers of this commit.
    chunks: usize,
    openers: Vec<u32>,
}

impl Commit {
    pub fn new(interval: Duration, bytes: u64) -> Self {
        Self {
            interval,
            bytes,
            phase: Phase::Idle,
            failed: false,
            flush: false,
            pending: Vec::new(),
            pending_bytes: 0,
            since: None,
            covered: Vec::new(),
            synced: VecDeque::new(),
            recorded: Vec::new(),
            plans: Vec::new(),
            chunks: 0,
            openers: Vec::new(),
        }
    }

    /// A page was written.
    pub fn add(&mut self, now: Instant, page: Unsettled) {
        self.since.get_or_insert(now);
        self.pending_bytes += u64::from(page.record.bytes);
        self.pending.push(page);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| {
            self.flush
                || self.pending_bytes >= self.bytes
                || now.saturating_duration_since(since) >= self.interval
        })
    }

    /// When something will be due.
    pub fn deadline(&self) -> Option<Instant> {
        self.since
            .filter(|_| self.phase == Phase::Idle)
            .map(|since| since + self.interval)
    }

    /// Whether nothing is left to be made durable.
    pub fn is_clean(&self) -> bool {
        self.phase == Phase::Idle && self.pending.is_empty() && self.synced.is_empty()
    }

    /// These pages are durable.
    fn add_synced(&mut self, pages: Vec<Unsettled>) {
        if self.synced.is_empty() {
            self.synced = pages.into();
        } else {
            self.synced.extend(pages);
        }
        let pages = self.synced.make_contiguous();
        if !pages.is_sorted_by_key(|page| page.segment) {
            pages.sort_by_key(|page| page.segment);
        }
    }

    fn take_due(&mut self, now: Instant) -> bool {
        if !self.is_due(now) {
            return false;
        }
        self.covered = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        self.since = None;
        self.flush = false;
        true
    }
}

impl Shard {
    /// Makes everything written so far durable, as soon as can be.
    pub fn flush(&mut self, now: Instant) {
        self.commit.flush = self.commit.since.is_some();
        self.step(now);
    }

    /// Whether everything that was written is durable.
    pub fn is_clean(&self) -> bool {
        self.commit.is_clean()
    }

    /// Does what can be done: gives segments up, writes tables, syncs.
    pub(super) fn step(&mut self, now: Instant) {
        if self.health.refuses_writes(now).is_none() {
            self.reclaim();
        }
        let goes_on = matches!(self.commit.phase, Phase::Writing(_)) && !self.commit.failed;
        if goes_on && !self.health.refuses_tables(now) {
            self.write_tables(now);
        }
        while self.commit.phase == Phase::Idle && !self.health.refuses_tables(now) {
            self.commit.chunks = 0;
            if self.write_tables(now) > 0 {
                return;
            }
            if !self.commit.take_due(now) {
                return;
            }
            self.sync(now);
        }
    }

    /// Forgets the blocks of segments that are to be given up.
    fn reclaim(&mut self) {
        while let Some(blocks) = self.segments.next_victim() {
            for (block, write_id) in blocks {
                if self.is_current(block, write_id) {
                    self.gone
                        .push((self.blocks.get(block).expect("current").key, block));
                    self.stats.evicted_blocks += 1;
                    self.drop_block(block);
                }
            }
            self.stats.segments_reclaimed += 1;
        }
    }

    /// Writes some chunks of records whose pages are durable, and openers. Says how many.
    fn write_tables(&mut self, now: Instant) -> usize {
        let mut count = 0;
        let most = CHUNKS_AT_A_TIME.min(CHUNKS_MAX - self.commit.chunks);
        while count < most {
            let Some(segment) = self.commit.synced.front().map(|page| page.segment) else {
                break;
            };
            let records = self.records_to_write(segment, most - count);
            if records.is_empty() {
                continue;
            }
            let plan = self.segments.table(segment).plan(&records);
            for (slot, records) in &plan.chunks {
                self.write_chunk(now, Under::Chunk, segment, *slot, records.clone());
                count += 1;
            }
            self.commit.plans.push((segment, plan));
        }
        while count < most {
            let Some((segment, _)) = self.segments.next_opener() else {
                break;
            };
            self.write_chunk(now, Under::Opener { segment }, segment, 0, Vec::new());
            count += 1;
        }
        if count > 0 {
            self.commit.chunks += count;
            self.commit.phase = match self.commit.phase {
                Phase::Writing(left) => Phase::Writing(left + count),
                _ => Phase::Writing(count),
            };
        }
        count
    }

    /// The records of a segment that come next, for so many chunks at most.
    fn records_to_write(&mut self, segment: u32, chunks: usize) -> Vec<Record> {
        let most = self.segments.table(segment).room_in(chunks);
        let mut records = Vec::with_capacity(most);
        while records.len() < most
            && let Some(page) = self
                .commit
                .synced
                .pop_front_if(|page| page.segment == segment)
        {
            if self.is_current(page.block, page.write_id) {
                records.push(page.record);
                self.commit.recorded.push(page);
            } else {
                // Its block has left meanwhile and needs no record.
                self.segments.settle(segment);
            }
        }
        records
    }

    fn write_chunk(
        &mut self,
        now: Instant,
        under: Under,
        segment: u32,
        slot: u32,
        records: Vec<Record>,
    ) {
        let place: Place = self.place_in(segment);
        let content = Chunk {
            place,
            slot,
            records,
        }
        .encode();
        self.stats.device_bytes_written += CHUNK_BYTES as u64;
        let offset = self.geometry.chunk_offset(segment, slot);
        self.send(now, under, offset, Op::Table(content));
    }

    pub(super) fn send(&mut self, now: Instant, under: Under, offset: u64, op: Op) {
        self.health.asked(now, self.commands.len() == 0);
        let id = self.commands.insert(under);
        self.port.send(Command {
            id,
            at: now,
            offset,
            op,
        });
    }

    fn sync(&mut self, now: Instant) {
        self.commit.phase = Phase::Syncing;
        self.send(now, Under::Sync, 0, Op::Sync);
    }

    /// A chunk or an opener has ended.
    pub(super) fn table_ended(&mut self, now: Instant, opener: Option<u32>, done: &Done) {
        match &done.result {
            Ok(_) => self.commit.openers.extend(opener),
            Err(fault) => {
                self.table_failed(now, fault.clone());
                self.commit.failed = true;
                if let Some(segment) = opener {
                    self.segments.opener_failed(segment);
                }
            }
        }
        let Phase::Writing(left) = &mut self.commit.phase else {
            unreachable!("chunks end before the sync that covers them begins")
        };
        *left -= 1;
        if *left > 0 {
            return;
        }
        if self.commit.failed {
            self.commit_failed();
            return;
        }
        if self.write_tables(now) > 0 {
            return;
        }
        let _ = self.commit.take_due(now);
        self.sync(now);
    }

    fn table_failed(&mut self, now: Instant, fault: ShardFault) {
        self.stats.write_errors += 1;
        self.health.tables_failed(now, fault);
    }

    /// The sync has ended.
    pub(super) fn sync_ended(&mut self, now: Instant, done: &Done) {
        self.commit.phase = Phase::Idle;
        if let Err(fault) = &done.result {
            self.table_failed(now, fault.clone());
            // What a failed sync covers may be lost even if a later one ends well.
            let lost: Vec<Unsettled> = self
                .commit
                .recorded
                .drain(..)
                .chain(self.commit.covered.drain(..))
                .collect();
            self.abandon_plans();
            self.lose(lost);
            for segment in std::mem::take(&mut self.commit.openers) {
                self.segments.opener_failed(segment);
            }
            return;
        }
        self.health.tables_fine();
        for (segment, plan) in std::mem::take(&mut self.commit.plans) {
            self.segments.table(segment).apply(plan);
        }
        let recorded = std::mem::take(&mut self.commit.recorded);
        self.stats.commits += u64::from(!recorded.is_empty());
        for page in recorded {
            self.page_is_durable(&page);
            self.segments.settle(page.segment);
        }
        for segment in std::mem::take(&mut self.commit.openers) {
            self.segments.opened(segment);
        }
        let covered = std::mem::take(&mut self.commit.covered);
        self.commit.add_synced(covered);
    }

    fn abandon_plans(&mut self) {
        for (segment, _) in self.commit.plans.drain(..) {
            self.segments.table(segment).abandon();
        }
    }

    fn page_is_durable(&mut self, page: &Unsettled) {
        if !self.is_current(page.block, page.write_id) {
            return;
        }
        let block = self.blocks.get_mut(page.block).expect("current");
        block.uncommitted -= 1;
        if block.uncommitted == 0 {
            self.stats.uncommitted_blocks -= 1;
        }
    }

    /// The tables of this commit could not be written: the pages are durable, so their records are
    /// written again later, to the same free slots.
    fn commit_failed(&mut self) {
        self.commit.failed = false;
        self.commit.phase = Phase::Idle;
        self.abandon_plans();
        let recorded = std::mem::take(&mut self.commit.recorded);
        self.commit.add_synced(recorded);
        for segment in std::mem::take(&mut self.commit.openers) {
            self.segments.opener_failed(segment);
        }
    }

    fn lose(&mut self, pages: Vec<Unsettled>) {
        for page in pages {
            if self.is_current(page.block, page.write_id) {
                let key = self.blocks.get(page.block).expect("current").key;
                self.gone.push((key, page.block));
                self.drop_block(page.block);
            }
            self.segments.settle(page.segment);
        }
    }
}
