//! Load: copy a lease's pages into the worker's blocks.
//!
//! The whole list is in and checked before anything happens, so that a load that is refused neither
//! consumes the lease nor writes a byte.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use pegaflow_shm::desc::{Completion, Op, Submission, flags};
use pegaflow_shm::node::{Counter, Histogram};
use pegaflow_shm::payload;
use pegaflow_shm::status::Status;

use crate::copy::{BoundLayout, ChecksumMode, NO_CHECKSUM, PageCopy, Signal};
use crate::device::AfterEvent;
use crate::fault::{self, CrashPoint};
use crate::lane::machine::Machine;
use crate::lane::request::{CopyProgress, ListProgress, LoadRequest, Request, StepsProgress};
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};
use crate::lane::tasks::{TaskKind, TaskOrder, TaskOwner};

/// A load that may go ahead; its pages are in `Lane::pages`.
struct Plan {
    target: Arc<BoundLayout>,
    lease: u64,
    rank: u32,
    /// Blocks that turned out to hold wrong bytes after the lease was given.
    withdrawn: u32,
}

impl<M: Machine> Lane<M> {
    pub(super) fn new_load(&mut self, submission: &Submission, now: Instant) -> LoadRequest {
        LoadRequest {
            list: ListProgress::new(submission, now),
            first: submission.first(),
            blocks: self.entry_lists.pop().unwrap_or_default(),
            counted: 0,
            copies: CopyProgress::new(),
            signal: None,
            steps: None,
        }
    }

    pub(super) fn load_chunk(
        &mut self,
        session: &mut LaneSession,
        mut load: Box<LoadRequest>,
        submission: &Submission,
        more: bool,
        chunk: &[u8],
    ) -> Result<(), SessionFault> {
        load.list.take(submission, more)?;
        self.take_blocks(session, &mut load, submission, chunk)?;
        if more {
            session
                .requests
                .insert(submission.request_id, Request::Load(load));
            return Ok(());
        }
        let registration = session.registration(submission.registration).ok();
        let after = registration.map(|r| r.after(submission)).transpose()?;
        let signal = registration.map(|r| r.signal(submission)).transpose()?;
        load.signal = signal.flatten();
        self.start_load(session, load, after.flatten().as_ref())
    }

    /// Takes a chunk's block ids in, as far as the session may keep them: a run of thousands takes
    /// eight bytes of payload, so the credit alone would not bound what a client can have the lane
    /// keep. They count until the load is finished, because its copies keep more for each of them
    /// and may wait for the client's process for as long as that likes.
    fn take_blocks(
        &mut self,
        session: &mut LaneSession,
        load: &mut LoadRequest,
        submission: &Submission,
        chunk: &[u8],
    ) -> Result<(), SessionFault> {
        let most = self.options.max_blocks as usize;
        if load.list.failed.is_none() && session.listed_blocks + submission.count as usize > most {
            load.list.fail(Status::TooMany, most as u64);
            session.listed_blocks -= std::mem::take(&mut load.counted);
            load.blocks = Vec::new();
        }
        if load.list.failed.is_none() {
            let runs = submission.flags & flags::BLOCK_RUNS != 0;
            payload::decode_blocks(chunk, runs, submission.count, &mut load.blocks)?;
            load.counted += submission.count as usize;
            session.listed_blocks += submission.count as usize;
        }
        Ok(())
    }

    fn start_load(
        &mut self,
        session: &mut LaneSession,
        mut load: Box<LoadRequest>,
        after: Option<&AfterEvent>,
    ) -> Result<(), SessionFault> {
        if load.copies.is_cancelled() {
            load.list.fail(Status::Cancelled, 0);
        }
        if load.list.failed.is_none() {
            match self.plan_load(session, &load) {
                Ok(plan) => self.run_load(session, &mut load, plan, after),
                Err((status, about)) => load.list.fail(status, about),
            }
        }
        self.recycle(std::mem::take(&mut load.blocks));
        if load.copies.running == 0 {
            return self.finish_load(session, *load);
        }
        session
            .requests
            .insert(load.list.head.request_id, Request::Load(load));
        Ok(())
    }

    fn plan_load(
        &mut self,
        session: &LaneSession,
        load: &LoadRequest,
    ) -> Result<Plan, (Status, u64)> {
        let head = load.list.head;
        let (id, group, lease_id) = (head.registration, head.group, head.args[0]);
        let registration = session.registration(id).map_err(|s| (s, u64::from(id)))?;
        if registration.save_only {
            return Err((Status::SaveOnly, u64::from(id)));
        }
        let rank = registration.rank.ok_or((Status::NoMemory, u64::from(id)))?;
        let unknown_group = (Status::UnknownGroup, u64::from(group));
        let target = registration.target(group).ok_or(unknown_group)?;
        let namespace = registration
            .ready
            .ok_or((Status::NotReady, u64::from(id)))?;
        let place = registration.place(group).ok_or(unknown_group)?;
        let lease = self
            .leases
            .get(lease_id)
            .map_err(|status| (status, lease_id))?;
        // The instance may have come back with other pages since the lease was given.
        let same = lease.request.instance == registration.instance
            && lease.request.group == group
            && lease.namespace == namespace;
        if !same {
            return Err((Status::UnknownLease, lease_id));
        }
        self.leases
            .check_consume(lease_id, rank)
            .map_err(|status| (status, lease_id))?;
        let first = load.first;
        let held = lease.entries.len() as u64;
        let end = first
            .checked_add(load.blocks.len() as u64)
            .filter(|end| *end <= held);
        let end = end.ok_or((Status::TooMany, held))?;
        self.seen_blocks
            .check(&load.blocks, target.layout().num_blocks())?;
        self.pages.clear();
        self.pages.reserve(load.blocks.len());
        let verifies = self.options.checksum != ChecksumMode::Off;
        let mut withdrawn = 0;
        let entries = &lease.entries[first as usize..end as usize];
        let shard = (place.shard, place.shards);
        let pages = self.cache.pinned_pages(lease.domain, entries, shard);
        for ((entry, block), page) in entries.iter().zip(&load.blocks).zip(pages) {
            let Some(page) = page else {
                if self.cache.is_withdrawn(lease.domain, *entry) {
                    withdrawn += 1;
                    continue;
                }
                tracing::error!(entry, lease = lease_id, "a leased block has no page");
                return Err((Status::Internal, u64::from(*entry)));
            };
            self.pages.push(PageCopy {
                pool_offset: page.offset(),
                block: *block,
                checksum: if verifies {
                    self.cache.checksum(page)
                } else {
                    NO_CHECKSUM
                },
            });
        }
        Ok(Plan {
            target: target.clone(),
            lease: lease_id,
            rank,
            withdrawn,
        })
    }

    fn run_load(
        &mut self,
        session: &mut LaneSession,
        load: &mut LoadRequest,
        plan: Plan,
        after: Option<&AfterEvent>,
    ) {
        let owner = TaskOwner {
            session: session.id,
            registration: load.list.head.registration,
            request_id: load.list.head.request_id,
            kind: TaskKind::Load(plan.lease),
        };
        let cancelled = load.copies.cancelled.clone();
        let order = TaskOrder {
            cancelled: &cancelled,
            after,
            step: None,
        };
        let tasks = match self.steps_of(session, load, &plan) {
            Some((signal, targets)) => {
                load.steps = Some(StepsProgress::default());
                self.dispatch_steps(session, owner, &targets, signal, order)
            }
            None => self.dispatch(session, owner, &plan.target, &[], order),
        };
        load.copies.running = tasks;
        load.copies.failed_pages = plan.withdrawn;
        self.tally
            .add(Counter::LoadFailed, u64::from(plan.withdrawn));
        // Checked in `plan_load`, and nothing has run in between.
        if let Err(status) = self.leases.consume(plan.lease, plan.rank, tasks) {
            tracing::error!(%status, lease = plan.lease, "a checked lease was not consumed");
        }
        self.show_lease(plan.lease);
        let ended = self.leases.settle(plan.lease);
        self.finish_leases(ended);
        fault::point(CrashPoint::LoadStarted);
    }

    /// The steps in which a load is copied, if it is: its pages have no checksums, which are those
    /// of whole pages, and none of its blocks is missing.
    fn steps_of(
        &self,
        session: &mut LaneSession,
        load: &LoadRequest,
        plan: &Plan,
    ) -> Option<(Signal, Arc<[Arc<BoundLayout>]>)> {
        let signal = load.signal.as_ref().filter(|signal| signal.steps() > 1)?;
        let is_checked = |page: &PageCopy| page.checksum != NO_CHECKSUM;
        if plan.withdrawn > 0 || self.pages.iter().any(is_checked) {
            return None;
        }
        let registration = session.registration_mut(load.list.head.registration)?;
        let group = load.list.head.group;
        Some((
            signal.clone(),
            registration.steps(group, &plan.target, signal.steps())?,
        ))
    }

    /// A copy task of a load has ended.
    pub(super) fn load_copied(
        &mut self,
        session: &mut LaneSession,
        request_id: u64,
        lease: u64,
        outcome: (usize, usize, bool),
        (page_bytes, is_step): (u64, bool),
    ) -> Result<(), SessionFault> {
        let ended = self.leases.copy_drained(lease);
        fault::point(CrashPoint::LoadCopied);
        // The engine hears of it, asleep or not, before the lane lets go of each of the blocks.
        let answered = self.count_load(session, request_id, outcome, (page_bytes, is_step));
        self.ring(session);
        self.finish_leases(ended);
        answered
    }

    fn count_load(
        &mut self,
        session: &mut LaneSession,
        request_id: u64,
        outcome: (usize, usize, bool),
        (page_bytes, is_step): (u64, bool),
    ) -> Result<(), SessionFault> {
        let (pages_done, pages, was_cancelled) = outcome;
        let bytes = pages_done as u64 * page_bytes;
        self.tally.add(Counter::LoadedBytes, bytes);
        let what = if was_cancelled {
            Counter::LoadCancelled
        } else {
            Counter::LoadFailed
        };
        if !is_step {
            self.tally.add(Counter::LoadLoaded, pages_done as u64);
            self.tally.add(what, (pages - pages_done) as u64);
        }
        let Some(Request::Load(mut load)) = session.requests.remove(&request_id) else {
            return Ok(());
        };
        load.copies.running -= 1;
        load.copies.bytes += bytes;
        match &mut load.steps {
            // Each page comes in every step: what one of them lacks, all of it lacks.
            Some(steps) => {
                if pages_done < pages {
                    steps.failed.get_or_insert(what);
                }
            }
            None => {
                load.copies.pages += pages_done as u32;
                load.copies.failed_pages += (pages - pages_done) as u32;
            }
        }
        if load.copies.running == 0 {
            if let Some(steps) = &load.steps {
                let blocks = load.list.head.total;
                let pages = match steps.failed {
                    None => &mut load.copies.pages,
                    Some(_) => &mut load.copies.failed_pages,
                };
                *pages = blocks;
                let what = steps.failed.unwrap_or(Counter::LoadLoaded);
                self.tally.add(what, u64::from(blocks));
            }
            return self.finish_load(session, *load);
        }
        session.requests.insert(request_id, Request::Load(load));
        Ok(())
    }

    fn finish_load(
        &mut self,
        session: &mut LaneSession,
        load: LoadRequest,
    ) -> Result<(), SessionFault> {
        session.listed_blocks -= load.counted;
        let daemon_ns = self.since(load.list.started).as_nanos() as u64;
        let cancelled = load.copies.is_cancelled();
        if let Some((status, _)) = load.list.failed {
            let what = match status {
                Status::Cancelled => Counter::LoadCancelled,
                _ => Counter::LoadFailed,
            };
            self.tally.add(what, u64::from(load.list.head.total));
        }
        let (status, about) = match load.list.failed {
            Some(failed) => failed,
            None if load.copies.failed_pages > 0 && cancelled => (Status::Cancelled, 0),
            None if load.copies.failed_pages > 0 => {
                (Status::CopyFailed, u64::from(load.copies.failed_pages))
            }
            None => (Status::Ok, 0),
        };
        let completion = Completion {
            count: load.copies.pages,
            lease: load.list.head.args[0],
            bytes: load.copies.bytes,
            dropped: load.copies.failed_pages,
            arg0: about,
            daemon_ns,
            ..Completion::new(Op::Load, load.list.head.request_id, status)
        };
        self.node.observe(Histogram::Load, daemon_ns);
        // Before the completion, after which the client may use the word for another load.
        if let Some(signal) = &load.signal {
            signal.raise(signal.steps());
        }
        self.complete(session, completion)
    }
}

/// Finds block ids that are out of range or given twice, without sorting. A group's most blocks
/// bound its marks to 2 MiB.
#[derive(Default)]
pub(super) struct SeenBlocks {
    bits: Vec<u64>,
}

impl SeenBlocks {
    pub(super) fn check(&mut self, blocks: &[u32], num_blocks: u32) -> Result<(), (Status, u64)> {
        // Ids that only grow are all different: what an engine gives whose blocks lie in order.
        let grows = blocks.windows(2).all(|pair| pair[0] < pair[1]);
        if grows && blocks.last().is_none_or(|last| *last < num_blocks) {
            return Ok(());
        }
        let words = num_blocks.div_ceil(64) as usize;
        if self.bits.len() < words {
            self.bits.resize(words, 0);
        }
        let mut fault = None;
        let mut marked = blocks.len();
        for (position, block) in blocks.iter().enumerate() {
            if *block >= num_blocks {
                fault = Some((Status::BlockOutOfRange, u64::from(*block)));
            } else if self.bits[*block as usize / 64] & 1 << (block % 64) != 0 {
                fault = Some((Status::DuplicateBlock, u64::from(*block)));
            }
            if fault.is_some() {
                marked = position;
                break;
            }
            self.bits[*block as usize / 64] |= 1 << (block % 64);
        }
        for block in &blocks[..marked] {
            self.bits[*block as usize / 64] = 0;
        }
        fault.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_and_repeated_blocks_are_named_and_nothing_is_remembered() {
        let mut seen = SeenBlocks::default();
        assert_eq!(seen.check(&[1, 2, 3], 4), Ok(()));
        assert_eq!(seen.check(&[1, 2, 1], 4), Err((Status::DuplicateBlock, 1)));
        assert_eq!(seen.check(&[0, 4], 4), Err((Status::BlockOutOfRange, 4)));
        assert_eq!(seen.check(&[0, 4, 4], 4), Err((Status::BlockOutOfRange, 4)));
        assert_eq!(seen.check(&[1, 1], 4), Err((Status::DuplicateBlock, 1)));
        assert_eq!(seen.check(&[3, 0, 1, 2], 4), Ok(()));
        assert_eq!(
            seen.check(&[u32::MAX], u32::MAX - 1).unwrap_err().0,
            Status::BlockOutOfRange
        );
        assert!(seen.bits.iter().all(|word| *word == 0));
    }
}
