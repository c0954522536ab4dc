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
use crate::lane::machine::Machine;
use crate::lane::request::{ListProgress, QueryRequest, QueryScope, Request};
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
        }
    }

    fn query_scope(
        &self,
        session: &LaneSession,
        submission: &Submission,
    ) -> Result<QueryScope, (Status, u64)> {
        let id = submission.registration;
        let registration = session.registration(id).map_err(|s| (s, u64::from(id)))?;
        if registration.save_only {
            return Err((Status::SaveOnly, u64::from(id)));
        }
        let namespace = registration
            .ready
            .ok_or((Status::NotReady, u64::from(id)))?;
        let group = submission.group;
        let place = registration
            .place(group)
            .ok_or((Status::UnknownGroup, u64::from(group)))?;
        if submission.total as usize > self.options.max_blocks as usize {
            return Err((Status::TooMany, u64::from(self.options.max_blocks)));
        }
        let result_bytes = u64::from(submission.total).div_ceil(64) * 8;
        if group != 0 && !session.result_fits(submission.arg1, result_bytes) {
            return Err((Status::InvalidArgument, submission.arg1));
        }
        Ok(QueryScope {
            domain: registration.domain,
            namespace,
            instance: registration.instance,
            group,
            loaders: place.ranks,
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
        let mut pinned = 0;
        if query.miss.is_none() {
            let before = query.entries.len();
            let key = (scope.namespace, scope.group);
            query.miss = self
                .cache
                .pin_prefix(scope.domain, key, hashes, &mut query.entries);
            pinned = query.entries.len() - before;
            if let Some(reason) = query.miss {
                query.misses[reason as usize] += 1;
                pinned += 1;
            }
        }
        query.misses[MissReason::AfterMiss as usize] += (hashes.len() - pinned) as u32;
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
        let (bits, misses, miss) = (&mut query.bits, &mut query.misses, &mut query.miss);
        let key = (scope.namespace, scope.group);
        self.cache.pin_members(
            scope.domain,
            key,
            hashes,
            &mut query.entries,
            |at, outcome| match outcome {
                None => bits[(first + at) / 64] |= 1 << ((first + at) % 64),
                Some(reason) => {
                    misses[reason as usize] += 1;
                    miss.get_or_insert(reason);
                }
            },
        );
    }

    fn finish_query(
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
            let answer = self.answer((session.id, session.place), &scope, &mut query, now);
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
    ) -> Answer {
        let head = query.list.head;
        let request = RequestKey {
            instance: scope.instance,
            group: scope.group,
            key: head.args[0],
        };
        let ttl = match head.args[2] {
            0 => self.options.lease_ttl,
            ttl_ms => Duration::from_millis(ttl_ms).min(self.options.lease_ttl_max),
        };
        let ttl = (now + ttl, ttl.as_millis() as u64);
        if let Some(answer) = self.repeat(request, scope, query, ttl) {
            return answer;
        }
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
        if untouched {
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
        self.tally.add(Counter::QueryHit, hits);
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
