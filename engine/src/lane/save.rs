//! Save: offer each block's shard, copy what is new, answer when the last copy is done.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use pegaflow_shm::desc::{Completion, DescriptorFault, Op, Submission, flags};
use pegaflow_shm::node::{Counter, Histogram};
use pegaflow_shm::payload;
use pegaflow_shm::status::Status;

use crate::cache::store::{Offer, ShardScope};
use crate::clock::Clock;
use crate::copy::{BoundLayout, PageCopy};
use crate::device::AfterEvent;
use crate::lane::machine::Machine;
use crate::lane::request::{CopyProgress, ListProgress, Request, SaveRequest};
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};
use crate::lane::tasks::{TaskKind, TaskOrder, TaskOwner};

impl<M: Machine> Lane<M> {
    pub(super) fn new_save(
        &mut self,
        session: &LaneSession,
        submission: &Submission,
        now: Instant,
    ) -> SaveRequest {
        let mut list = ListProgress::new(submission, now);
        let scope = match self.save_scope(session, submission) {
            Ok(scope) => Some(scope),
            Err((status, about)) => {
                list.fail(status, about);
                None
            }
        };
        SaveRequest {
            list,
            scope,
            skipped: 0,
            no_space: 0,
            not_admitted: 0,
            copies: CopyProgress::new(),
        }
    }

    fn save_scope(
        &self,
        session: &LaneSession,
        submission: &Submission,
    ) -> Result<ShardScope, (Status, u64)> {
        let id = submission.registration;
        let registration = session.registration(id).map_err(|s| (s, u64::from(id)))?;
        if registration.rank.is_none() {
            return Err((Status::NoMemory, u64::from(id)));
        }
        let group = submission.group;
        let target = registration
            .target(group)
            .ok_or((Status::UnknownGroup, u64::from(group)))?;
        let namespace = registration
            .ready
            .ok_or((Status::NotReady, u64::from(id)))?;
        let place = registration
            .place(group)
            .ok_or((Status::UnknownGroup, u64::from(group)))?;
        Ok(ShardScope {
            domain: registration.domain,
            namespace,
            group,
            shard: place.shard,
            shards: place.shards,
            page_bytes: target.layout().page_bytes() as u32,
            near: target.memory_node(),
        })
    }

    pub(super) fn save_chunk(
        &mut self,
        session: &mut LaneSession,
        mut save: Box<SaveRequest>,
        submission: &Submission,
        more: bool,
        chunk: &[u8],
    ) -> Result<(), SessionFault> {
        let taken = save.list.take(submission, more);
        let outcome = match taken {
            Ok(()) => self.save_blocks(session, &mut save, submission, chunk),
            Err(fault) => Err(fault),
        };
        if outcome.is_ok() && save.list.listed && save.copies.running == 0 {
            return self.end_save(session, save);
        }
        session
            .requests
            .insert(submission.request_id, Request::Save(save));
        outcome.map_err(SessionFault::from)
    }

    fn save_blocks(
        &mut self,
        session: &mut LaneSession,
        save: &mut SaveRequest,
        submission: &Submission,
        chunk: &[u8],
    ) -> Result<(), DescriptorFault> {
        let (hashes, ids) = payload::split_save(chunk, submission.count)?;
        self.blocks.clear();
        let runs = submission.flags & flags::BLOCK_RUNS != 0;
        payload::decode_blocks(ids, runs, submission.count, &mut self.blocks)?;
        let registration = session.registration(submission.registration).ok();
        let target = registration
            .and_then(|r| r.target(submission.group))
            .cloned();
        let after = registration.map(|r| r.after(submission)).transpose()?;
        let after = after.flatten();
        let about = u64::from(submission.registration);
        let (Some(scope), Some(target)) = (save.scope, target) else {
            save.list.fail(Status::UnknownRegistration, about);
            self.count_refused(save, submission.count);
            return Ok(());
        };
        if self.save_scope(session, submission) != Ok(scope) {
            // A rank left since the first chunk. The namespace's number may mean another one by
            // now, also where it is the instance's again: of other ranks, with pages of other
            // sizes.
            save.list.fail(Status::NotReady, about);
        }
        let num_blocks = target.layout().num_blocks();
        if let Some(wrong) = self.blocks.iter().find(|block| **block >= num_blocks) {
            save.list.fail(Status::BlockOutOfRange, u64::from(*wrong));
        }
        if save.list.failed.is_none() && !save.copies.is_cancelled() {
            let target = (&target, after.as_ref());
            self.offer_blocks(session, save, &scope, target, hashes);
        } else {
            self.count_refused(save, submission.count);
        }
        Ok(())
    }

    /// Counts shards that were not even offered, because their request had failed or was cancelled.
    fn count_refused(&mut self, save: &SaveRequest, shards: u32) {
        let what = match save.list.failed {
            Some(_) => Counter::SaveFailed,
            None => Counter::SaveCancelled,
        };
        self.tally.add(what, u64::from(shards));
    }

    fn offer_blocks(
        &mut self,
        session: &mut LaneSession,
        save: &mut SaveRequest,
        scope: &ShardScope,
        (target, after): (&Arc<BoundLayout>, Option<&AfterEvent>),
        hashes: &[pegaflow_shm::BlockHash],
    ) {
        let mut pages = std::mem::take(&mut self.pages);
        let mut entries = self.entry_lists.pop().unwrap_or_default();
        let blocks = &self.blocks;
        let mut sampler = self.sampler;
        let (mut held, mut in_flight, mut no_space, mut not_admitted) = (0u32, 0u32, 0u32, 0u32);
        self.cache.offer(scope, hashes, |at, offer| match offer {
            Offer::Copy { entry, page } => {
                pages.push(PageCopy {
                    pool_offset: page.offset(),
                    block: blocks[at],
                    checksum: sampler.for_next_page(),
                });
                entries.push(entry.0);
            }
            Offer::Held => held += 1,
            Offer::InFlight => in_flight += 1,
            Offer::NoSpace => no_space += 1,
            Offer::NotAdmitted => not_admitted += 1,
        });
        self.sampler = sampler;
        save.skipped += held + in_flight;
        save.no_space += no_space;
        save.not_admitted += not_admitted;
        self.tally.add(Counter::SaveHeld, u64::from(held));
        self.tally.add(Counter::SaveInFlight, u64::from(in_flight));
        self.tally.add(Counter::SaveNoSpace, u64::from(no_space));
        self.tally
            .add(Counter::SaveRejected, u64::from(not_admitted));
        let owner = TaskOwner {
            session: session.id,
            registration: save.list.head.registration,
            request_id: save.list.head.request_id,
            kind: TaskKind::Save(*scope),
        };
        self.pages = pages;
        let cancelled = save.copies.cancelled.clone();
        let order = TaskOrder {
            cancelled: &cancelled,
            after,
            step: None,
        };
        let tasks = self.dispatch(session, owner, target, &entries, order);
        self.recycle(entries);
        save.copies.running += tasks;
    }

    /// A copy task of a save has ended: its shards are in, or taken back.
    pub(super) fn save_copied(
        &mut self,
        session: &mut LaneSession,
        request_id: u64,
        scope: &ShardScope,
        (entries, pages): (&[u32], &[PageCopy]),
        outcome: (usize, bool),
    ) -> Result<(), SessionFault> {
        let (pages_done, was_cancelled) = outcome;
        let mut sealed = 0;
        for (position, entry) in entries.iter().enumerate() {
            let entry = pegaflow_shm::index::EntryId(*entry);
            if position < pages_done {
                let checksum = pages[position].checksum;
                if self.cache.shard_copied(scope, entry, checksum) {
                    sealed += 1;
                    if let Some(tier) = self.tier.as_mut() {
                        tier.note_sealed(&self.cache, scope.domain, entry);
                    }
                }
            } else {
                self.cache.shard_failed(scope, entry);
            }
        }
        let failed = entries.len() - pages_done;
        let bytes = pages_done as u64 * u64::from(scope.page_bytes);
        self.tally.add(Counter::BlocksSealed, sealed);
        self.tally.add(Counter::SaveStored, pages_done as u64);
        self.tally.add(Counter::SavedBytes, bytes);
        let what = if was_cancelled {
            Counter::SaveCancelled
        } else {
            Counter::SaveFailed
        };
        self.tally.add(what, failed as u64);
        let Some(Request::Save(mut save)) = session.requests.remove(&request_id) else {
            return Ok(());
        };
        save.copies.running -= 1;
        save.copies.pages += pages_done as u32;
        save.copies.failed_pages += failed as u32;
        save.copies.bytes += bytes;
        if save.list.listed && save.copies.running == 0 {
            return self.end_save(session, save);
        }
        session.requests.insert(request_id, Request::Save(save));
        Ok(())
    }

    /// Answers a save that is over, now or when the tier lets it.
    fn end_save(
        &mut self,
        session: &mut LaneSession,
        save: Box<SaveRequest>,
    ) -> Result<(), SessionFault> {
        let may_wait = save.copies.pages > 0
            && save.list.failed.is_none()
            && !save.copies.is_cancelled()
            && self.draining.is_none();
        let request_id = save.list.head.request_id;
        let now = self.clock.now();
        if let (true, Some(tier)) = (may_wait, self.tier.as_mut())
            && tier.hold_save(session.id, request_id, now)
        {
            session.requests.insert(request_id, Request::Save(save));
            return Ok(());
        }
        self.finish_save(session, *save)
    }

    pub(super) fn finish_save(
        &mut self,
        session: &mut LaneSession,
        save: SaveRequest,
    ) -> Result<(), SessionFault> {
        let daemon_ns = self.since(save.list.started).as_nanos() as u64;
        let cancelled = save.copies.is_cancelled();
        let (status, about) = match save.list.failed {
            Some(failed) => failed,
            None if cancelled => (Status::Cancelled, 0),
            None if save.copies.failed_pages > 0 => (Status::CopyFailed, 0),
            None if save.no_space > 0 => (Status::NoSpace, u64::from(save.no_space)),
            None => (Status::Ok, 0),
        };
        let completion = Completion {
            count: save.copies.pages,
            bytes: save.copies.bytes,
            skipped: save.skipped,
            dropped: save.list.head.total - save.copies.pages - save.skipped,
            arg0: about,
            daemon_ns,
            ..Completion::new(Op::Save, save.list.head.request_id, status)
        };
        self.node.observe(Histogram::Save, daemon_ns);
        self.complete(session, completion)
    }
}
