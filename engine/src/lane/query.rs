//! Query: pin what is cached, answer with a lease.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pegaflow_shm::desc::{Completion, DescriptorFault, MissReason, Op, Submission};
use pegaflow_shm::node::{Counter, Histogram};
use pegaflow_shm::payload;
use pegaflow_shm::status::Status;
use twox_hash::XxHash3_64;

use crate::cache::lease::{Lease, LeaseEnd, RequestKey};
use crate::clock::Clock;
use crate::copy::ChecksumMode;
use crate::fault::{self, CrashPoint};
use crate::lane::below::{Below, Reach};
use crate::lane::machine::Machine;
use crate::lane::prefetch::PieceState;
use crate::lane::request::{ListHead, ListProgress, QueryRequest, QueryScope, Request};
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};

/// Lists up to this length keep their memory whatever their capacity, in elements.
const SHORT_LIST: usize = 256;

/// A query's answer before it is posted.
struct Answer {
    lease: u64,
    count: u32,
    ttl_ms: u64,
    reason: MissReason,
}

impl<M: Machine> Lane<M> {
    pub(super) fn new_query(
        &mut self,
        session: &LaneSession,
        submission: &Submission,
        now: Instant,
    ) -> QueryRequest {
        let mut list = ListProgress::new(submission, now);
        let scope = match self.query_scope(session, submission) {
            Ok(scope) => Some(scope),
            Err((status, about)) => {
                list.fail(status, about);
                None
            }
        };
        QueryRequest {
            list,
            scope,
            entries: self.entry_lists.pop().unwrap_or_default(),
            digest: 0,
            miss: None,
            misses: [0; MissReason::ALL.len()],
            bits: Vec::new(),
            reach: Reach::of(submission.flags),
            deadline_ms: match Reach::of(submission.flags) {
                Reach::Wait => submission.arg2 >> 32,
                Reach::Poll | Reach::Now => 0,
            },
            pieces: Vec::new(),
            fetched: 0,
            waits: false,
            resumed: false,
        }
    }

    fn query_scope(
        &self,
        session: &LaneSession,
        submission: &Submission,
    ) -> Result<QueryScope, (Status, u64)> {
        let head = ListHead::of(submission);
        let scope = self.head_scope(session, &head)?;
        if submission.total as usize > self.options.max_blocks as usize {
            return Err((Status::TooMany, u64::from(self.options.max_blocks)));
        }
        let result_bytes = u64::from(submission.total).div_ceil(64) * 8;
        if scope.group != 0 && !session.result_fits(submission.arg1, result_bytes) {
            return Err((Status::InvalidArgument, submission.arg1));
        }
        Ok(scope)
    }

    /// Where the query looks, as of now; `None` when it cannot look any more.
    pub(super) fn scope_of(&self, session: &LaneSession, head: &ListHead) -> Option<QueryScope> {
        self.head_scope(session, head).ok()
    }

    fn head_scope(
        &self,
        session: &LaneSession,
        head: &ListHead,
    ) -> Result<QueryScope, (Status, u64)> {
        let id = head.registration;
        let registration = session.registration(id).map_err(|s| (s, u64::from(id)))?;
        if registration.save_only {
            return Err((Status::SaveOnly, u64::from(id)));
        }
        let namespace = registration
            .ready
            .ok_or((Status::NotReady, u64::from(id)))?;
        let group = head.group;
        let place = registration
            .place(group)
            .ok_or((Status::UnknownGroup, u64::from(group)))?;
        Ok(QueryScope {
            domain: registration.domain,
            namespace,
            instance: registration.instance,
            group,
            loaders: place.ranks,
            shards: place.shards,
        })
    }

    pub(super) fn query_chunk(
        &mut self,
        session: &mut LaneSession,
        mut query: Box<QueryRequest>,
        submission: &Submission,
        more: bool,
        chunk: &[u8],
    ) -> Result<(), SessionFault> {
        let first = query.list.received as usize;
        let taken = query.list.take(submission, more);
        let hashes = payload::query_hashes(chunk, submission.count);
        let hashes = match taken.and(hashes) {
            Ok(hashes) => hashes,
            Err(fault) => {
                // Pins of earlier chunks are let go of with the session.
                session
                    .requests
                    .insert(submission.request_id, Request::Query(query));
                return Err(fault.into());
            }
        };
        if let Some(scope) = query.scope
            && self.query_scope(session, submission) != Ok(scope)
        {
            // A rank left since the first chunk. The namespace's number may mean another one by
            // now, also where it is the instance's again.
            let about = u64::from(submission.registration);
            query.list.fail(Status::NotReady, about);
        }
        if let (Some(scope), None) = (query.scope, query.list.failed) {
            query.digest = XxHash3_64::oneshot_with_seed(query.digest, chunk);
            if scope.group == 0 {
                self.extend_prefix(&scope, &mut query, hashes);
            } else {
                self.extend_members(&scope, &mut query, hashes, first);
            }
        }
        if more {
            session
                .requests
                .insert(submission.request_id, Request::Query(query));
            return Ok(());
        }
        self.finish_query(session, query)
    }

    fn extend_prefix(
        &mut self,
        scope: &QueryScope,
        query: &mut QueryRequest,
        hashes: &[pegaflow_shm::BlockHash],
    ) {
        let mut taken = 0;
        if query.miss.is_none() {
            let mut reason = None;
            if query.pieces.is_empty() {
                let before = query.entries.len();
                let key = (scope.namespace, scope.group);
                reason = self
                    .cache
                    .pin_prefix(scope.domain, key, hashes, &mut query.entries);
                taken = query.entries.len() - before;
            } else {
                // The prefix goes on below the pool since an earlier chunk.
                reason.get_or_insert(MissReason::Absent);
            }
            if let Some(reason) = reason {
                taken += self.prefix_below(scope, query, &hashes[taken..], reason);
            }
            if let Some(reason) = query.miss {
                query.misses[reason as usize] += 1;
                taken += 1;
            }
        }
        query.misses[MissReason::AfterMiss as usize] += (hashes.len() - taken) as u32;
    }

    fn extend_members(
        &mut self,
        scope: &QueryScope,
        query: &mut QueryRequest,
        hashes: &[pegaflow_shm::BlockHash],
        first: usize,
    ) {
        // As far as hashes have come: all of it from the start would cost memory for a promise.
        query.bits.resize((first + hashes.len()).div_ceil(64), 0);
        let mut missed = std::mem::take(&mut self.missed);
        let bits = &mut query.bits;
        let key = (scope.namespace, scope.group);
        self.cache.pin_members(
            scope.domain,
            key,
            hashes,
            &mut query.entries,
            |at, outcome| match outcome {
                None => bits[(first + at) / 64] |= 1 << ((first + at) % 64),
                Some(reason) => missed.push((at as u32, reason)),
            },
        );
        for (at, reason) in missed.drain(..) {
            let hash = &hashes[at as usize];
            if !self.member_below(scope, query, first as u32 + at, hash) {
                query.misses[reason as usize] += 1;
                query.miss.get_or_insert(reason);
            }
        }
        self.missed = missed;
    }

    pub(super) fn finish_query(
        &mut self,
        session: &mut LaneSession,
        mut query: Box<QueryRequest>,
    ) -> Result<(), SessionFault> {
        let now = self.clock.now();
        let head = query.list.head;
        let daemon_ns = now.duration_since(query.list.started).as_nanos() as u64;
        let mut completion = Completion::new(Op::Query, head.request_id, Status::Ok);
        completion.daemon_ns = daemon_ns;
        if let (Some(scope), None) = (query.scope, query.list.failed) {
            let answer = match self.answer((session.id, session.place), &scope, &mut query, now) {
                Ok(answer) => answer,
                Err(Below::Loading { held, coming }) => {
                    completion.status = Status::Loading as u8;
                    completion.count = held;
                    completion.arg0 = u64::from(coming);
                    self.tally.add(Counter::QueryLoading, 1);
                    return self.complete(session, completion);
                }
                Err(Below::Waiting | Below::Settled) => {
                    query.waits = true;
                    session
                        .requests
                        .insert(head.request_id, Request::Query(query));
                    return Ok(());
                }
            };
            completion.count = answer.count;
            completion.lease = answer.lease;
            completion.reason = answer.reason as u16;
            completion.arg0 = answer.ttl_ms;
            if scope.group != 0 {
                let written = session.write_result(head.args[1], bytemuck::cast_slice(&query.bits));
                if written.is_err() {
                    let (offset, count) = (head.args[1], head.total);
                    return Err(DescriptorFault::Result { offset, count }.into());
                }
            }
            self.node.observe(Histogram::Query, daemon_ns);
        } else {
            let (status, about) = query.list.failed.unwrap_or((Status::Internal, 0));
            completion.status = status as u8;
            completion.arg0 = about;
            self.let_go(&mut query);
        }
        self.complete(session, completion)
    }

    fn answer(
        &mut self,
        session: (u64, usize),
        scope: &QueryScope,
        query: &mut QueryRequest,
        now: Instant,
    ) -> Result<Answer, Below> {
        let head = query.list.head;
        let request = RequestKey {
            instance: scope.instance,
            group: scope.group,
            key: head.args[0],
        };
        let ttl_ms = match query.reach {
            Reach::Wait => head.args[2] & u64::from(u32::MAX),
            Reach::Poll | Reach::Now => head.args[2],
        };
        let ttl = match ttl_ms {
            0 => self.options.lease_ttl,
            ttl_ms => Duration::from_millis(ttl_ms).min(self.options.lease_ttl_max),
        };
        let ttl = (now + ttl, ttl.as_millis() as u64);
        // What it waits for may be more than who was in a greater hurry has a lease on.
        if !(query.reach == Reach::Wait && self.has_prefetch(&request, scope, query))
            && let Some(answer) = self.repeat(request, scope, query, ttl)
        {
            return Ok(answer);
        }
        match self.settle_below(session, scope, query, (request, now)) {
            Below::Settled => {}
            later => return Err(later),
        }
        Ok(self.grant(session, scope, query, (request, ttl)))
    }

    /// Gives a lease on what the query holds.
    fn grant(
        &mut self,
        session: (u64, usize),
        scope: &QueryScope,
        query: &mut QueryRequest,
        (request, ttl): (RequestKey, (Instant, u64)),
    ) -> Answer {
        let head = query.list.head;
        let reason = query.miss.unwrap_or(MissReason::None);
        if query.entries.is_empty() {
            self.count_query(scope, query);
            self.recycle(std::mem::take(&mut query.entries));
            return Answer {
                lease: 0,
                count: 0,
                ttl_ms: 0,
                reason,
            };
        }
        let hits = query.entries.len() as u32;
        // The query's own pins are not part of what its session holds yet.
        let pins_left = self.cache.pins_left(scope.domain) + u64::from(hits);
        let room = self
            .leases
            .has_room(session.1, scope.domain, u64::from(hits), pins_left);
        if !room {
            query.misses[MissReason::NoLease as usize] += hits;
            self.let_go(query);
            self.count_query(scope, query);
            query.bits.fill(0);
            return Answer {
                lease: 0,
                count: 0,
                ttl_ms: 0,
                reason: MissReason::NoLease,
            };
        }
        self.count_query(scope, query);
        let mut entries = std::mem::take(&mut query.entries);
        let count = entries.len() as u32;
        if entries.capacity() / 4 > entries.len().max(SHORT_LIST) {
            // A recycled list: a short lease must not keep a long one's memory.
            entries.shrink_to_fit();
        }
        let mut lease = Lease::new(
            scope.domain,
            scope.namespace,
            session.0,
            request,
            (head.total, query.digest),
            entries,
            query.bits.clone(),
            ttl,
            u32::from(scope.loaders),
        );
        lease.place = session.1;
        let lease = self.leases.grant(lease);
        self.tally.add(Counter::LeasesGranted, 1);
        self.show_lease(lease);
        fault::point(CrashPoint::LeaseGranted);
        Answer {
            lease,
            count,
            ttl_ms: ttl.1,
            reason,
        }
    }

    /// The live lease of the same query, if there is one, for as long again as this answer
    /// promises; a lease of another query under the same key makes room, unless somebody has begun
    /// to load from it.
    fn repeat(
        &mut self,
        request: RequestKey,
        scope: &QueryScope,
        query: &mut QueryRequest,
        (deadline, ttl_ms): (Instant, u64),
    ) -> Option<Answer> {
        let id = self.leases.of_request(&request)?;
        let lease = self.leases.get(id).ok()?;
        let untouched = lease.consumed_by() == 0;
        let same = lease.namespace == scope.namespace
            && lease.total == query.list.head.total
            && lease.digest == query.digest
            && self.is_sound(lease);
        if same && untouched {
            let count = lease.entries.len() as u32;
            let reason = match (count == lease.total, query.miss) {
                (true, _) => MissReason::None,
                (false, reason) => reason.unwrap_or(MissReason::Absent),
            };
            query.bits.clone_from(&lease.hits);
            self.let_go(query);
            if let Err(status) = self.leases.extend(id, deadline, ttl_ms) {
                tracing::error!(%status, lease = id, "a live lease was not extended");
            }
            self.show_lease(id);
            self.tally.add(Counter::QueryRepeated, 1);
            return Some(Answer {
                lease: id,
                count,
                ttl_ms,
                reason,
            });
        }
        // A query that has waited is older than the lease: it does not take its place.
        if untouched && !query.resumed {
            let ended = self.leases.end(id, LeaseEnd::Replaced);
            self.finish_leases(ended);
        }
        None
    }

    /// False when a block of the lease was withdrawn since: that one is no hit any more.
    fn is_sound(&self, lease: &Lease) -> bool {
        let mut entries = lease.entries.iter();
        self.options.checksum == ChecksumMode::Off
            || entries.all(|entry| !self.cache.is_withdrawn(lease.domain, *entry))
    }

    fn count_query(&mut self, scope: &QueryScope, query: &QueryRequest) {
        let misses: u32 = query.misses.iter().sum();
        let total = query.list.head.total;
        let hits = u64::from(total - misses);
        debug_assert_eq!(
            hits,
            query.entries.len() as u64,
            "each block asked for counts once"
        );
        let fetched = u64::from(query.fetched).min(hits);
        self.tally.add(Counter::QueryHit, hits - fetched);
        self.tally.add(Counter::QueryHitSsd, fetched);
        for (reason, counter) in [
            (MissReason::Absent, Counter::QueryMissAbsent),
            (MissReason::Incomplete, Counter::QueryMissIncomplete),
            (MissReason::InFlight, Counter::QueryMissInFlight),
            (MissReason::AfterMiss, Counter::QueryMissAfterMiss),
            (MissReason::NoLease, Counter::QueryMissNoLease),
        ] {
            self.tally
                .add(counter, u64::from(query.misses[reason as usize]));
        }
        self.namespaces
            .count_query(scope.namespace, u64::from(total), hits);
    }

    /// Unpins what the query holds.
    pub(super) fn let_go(&mut self, query: &mut QueryRequest) {
        let entries = std::mem::take(&mut query.entries);
        if let Some(scope) = query.scope {
            self.cache.unpin(scope.domain, &entries);
            let held = query
                .pieces
                .drain(..)
                .filter_map(|piece| match piece.state {
                    PieceState::Held { entry, .. } => Some(entry),
                    _ => None,
                });
            let held: Vec<u32> = held.collect();
            self.cache.unpin(scope.domain, &held);
        }
        self.recycle(entries);
    }

    /// Keeps a list's memory for the next query.
    pub(super) fn recycle(&mut self, mut entries: Vec<u32>) {
        // At most 16 MiB are kept.
        const KEEP: usize = 64;
        const LONGEST: usize = 64 * 1024;
        if self.entry_lists.len() < KEEP && entries.capacity() <= LONGEST {
            entries.clear();
            self.entry_lists.push(entries);
        }
    }
}
