//! Queries that reach below the pool: what is on the tier is fetched, and the query says so.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use pegaflow_shm::desc::{MissReason, flags};
use pegaflow_shm::index::EntryId;
use pegaflow_shm::node::{Counter, Histogram};
use pegaflow_shm::status::Status;

use crate::cache::exchange::Presence;
use crate::cache::lease::RequestKey;
use crate::clock::Clock;
use crate::lane::api::SessionId;
use crate::lane::machine::Machine;
use crate::lane::prefetch::{Piece, PieceState, Prefetch, PrefetchId, Waiter};
use crate::lane::request::{QueryRequest, QueryScope, Request};
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};
use crate::lane::tier::{LaneTier, Moment};
use crate::tier::StoreKey;

/// How long a stop waits for drives.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// What a query does about blocks that are below the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// They are fetched, and the query is answered `loading` at once.
    Poll,
    /// They are left where they are.
    Now,
    /// They are fetched, and the query is answered when they are in.
    Wait,
}

impl Reach {
    pub(super) fn of(flags: u8) -> Reach {
        match flags & (flags::NOW | flags::WAIT) {
            flags::NOW => Reach::Now,
            flags::WAIT => Reach::Wait,
            _ => Reach::Poll,
        }
    }
}

/// What a query comes to below the pool.
pub(super) enum Below {
    /// Nothing (more) is coming: the query has its blocks.
    Settled,
    /// So many are there and so many are coming.
    Loading { held: u32, coming: u32 },
    /// It is answered later.
    Waiting,
}

impl<M: Machine> Lane<M> {
    /// Lets `work` act on the tier and on the lane at once; `None` without a tier.
    pub(super) fn with_tier<R>(
        &mut self,
        work: impl FnOnce(&mut Lane<M>, &mut LaneTier) -> R,
    ) -> Option<R> {
        let mut tier = self.tier.take()?;
        let result = work(self, &mut tier);
        self.tier = Some(tier);
        Some(result)
    }

    /// Takes in what the tier has ended, begins what can begin, answers who waited. True when there
    /// was something.
    pub(super) fn pump_tier(&mut self) -> bool {
        let Some(tier) = self.tier.as_mut() else {
            return false;
        };
        let now = self.clock.now();
        let mut moment = Moment {
            now,
            tally: &mut self.tally,
        };
        let any = tier.take_done(&mut self.cache, &mut moment);
        let more = tier.pump(&mut self.cache, &mut moment);
        let answered = self.answer_saves(now);
        self.resume_waiters() || any || more || answered
    }

    /// Answers saves that the tier held back.
    fn answer_saves(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(tier) = self.tier.as_mut()
            && let Some((session, request_id)) = tier.next_save(&self.cache, now)
        {
            any = true;
            self.with_session(session, |lane, session| {
                match session.requests.remove(&request_id) {
                    Some(Request::Save(save)) => lane.finish_save(session, *save),
                    Some(other) => {
                        session.requests.insert(request_id, other);
                        Ok(())
                    }
                    None => Ok(()),
                }
            });
        }
        any
    }

    /// Answers queries whose blocks are in, or whose time has passed.
    pub(super) fn resume_waiters(&mut self) -> bool {
        let mut any = false;
        while let Some((session, request_id)) = self.tier.as_mut().and_then(|t| t.resume.pop()) {
            any = true;
            self.with_session(session, |lane, session| {
                match session.requests.remove(&request_id) {
                    Some(Request::Query(mut query)) if query.waits => {
                        query.resumed = true;
                        let same = query.scope.is_some()
                            && lane.scope_of(session, &query.list.head) == query.scope;
                        if !same {
                            let about = u64::from(query.list.head.registration);
                            query.list.fail(Status::NotReady, about);
                        }
                        return lane.finish_query(session, query);
                    }
                    Some(other) => drop(session.requests.insert(request_id, other)),
                    None => {}
                }
                Ok(())
            });
        }
        any
    }

    /// Goes on below the pool with the positions of a prefix query from its first miss on, which
    /// has `reason`. Returns how many of `hashes` it took on.
    pub(super) fn prefix_below(
        &mut self,
        scope: &QueryScope,
        query: &mut QueryRequest,
        hashes: &[BlockHash],
        reason: MissReason,
    ) -> usize {
        if query.reach == Reach::Now {
            query.miss = Some(reason);
            return 0;
        }
        let first = query.list.received - hashes.len() as u32;
        let taken = self.with_tier(|lane, tier| {
            let Some(tier_scope) = lane.cache.tier_scope(scope.namespace) else {
                return Err((0, reason));
            };
            for (at, hash) in hashes.iter().enumerate() {
                let state = lane.look_below(tier, scope, tier_scope, hash);
                let state = state.map_err(|why| match at {
                    0 if query.pieces.is_empty() => (0, reason),
                    _ => (at, why),
                })?;
                query.pieces.push(Piece {
                    position: first + at as u32,
                    state,
                });
            }
            Ok(hashes.len())
        });
        match taken {
            None => {
                query.miss = Some(reason);
                0
            }
            Some(Ok(all)) => all,
            Some(Err((taken, why))) => {
                query.miss = Some(why);
                taken
            }
        }
    }

    /// Looks for a missed position of a membership query below the pool. True when it is there.
    pub(super) fn member_below(
        &mut self,
        scope: &QueryScope,
        query: &mut QueryRequest,
        position: u32,
        hash: &BlockHash,
    ) -> bool {
        if query.reach == Reach::Now {
            return false;
        }
        let found = self.with_tier(|lane, tier| {
            let tier_scope = lane.cache.tier_scope(scope.namespace)?;
            lane.look_below(tier, scope, tier_scope, hash).ok()
        });
        let Some(state) = found.flatten() else {
            return false;
        };
        query.pieces.push(Piece { position, state });
        true
    }

    fn look_below(
        &mut self,
        tier: &LaneTier,
        scope: &QueryScope,
        tier_scope: [u8; 32],
        hash: &BlockHash,
    ) -> Result<PieceState, MissReason> {
        let wanted = Ok(PieceState::Wanted(*hash));
        let found = self
            .cache
            .presence(scope.domain, (scope.namespace, scope.group), hash);
        match found {
            Presence::Sealed(entry) => {
                let entry = self.cache.pin_sealed(scope.domain, entry)?;
                return Ok(PieceState::Held {
                    entry,
                    fetched: false,
                });
            }
            Presence::Copying(entry) => {
                return match tier.is_coming(scope.domain, entry, self.clock.now()) {
                    true => wanted,
                    false => Err(MissReason::InFlight),
                };
            }
            Presence::Partial(_) | Presence::Absent => {}
        }
        let key = StoreKey {
            scope: tier_scope,
            group: scope.group,
            hash: *hash,
        };
        match (tier.store.holds(&key), found) {
            (true, _) => wanted,
            (false, Presence::Partial(_)) => Err(MissReason::Incomplete),
            (false, _) => Err(MissReason::Absent),
        }
    }

    /// Decides, once the whole list is in, whether the query waits for blocks from below.
    pub(super) fn settle_below(
        &mut self,
        session: (SessionId, usize),
        scope: &QueryScope,
        query: &mut QueryRequest,
        (request, now): (RequestKey, Instant),
    ) -> Below {
        let below = self.with_tier(|lane, tier| {
            let id = tier.prefetches.of(&request);
            let same = id.and_then(|id| tier.prefetches.get(id));
            let same = same.filter(|prefetch| prefetch.is_for(scope, query));
            let awaited = same.is_some_and(|prefetch| !prefetch.waiters.is_empty());
            let (Some(id), true) = (id, same.is_some() && query.reach != Reach::Now) else {
                if query.resumed {
                    // It was ended under the query that waited for it. What another query may have
                    // begun under its key since is not touched.
                    query.miss_all(MissReason::InFlight);
                    return Below::Settled;
                }
                // Who wants it now ends no wait of others for the same.
                if let Some(other) = id.filter(|_| !awaited) {
                    lane.tally.add(Counter::PrefetchAbandoned, 1);
                    lane.end_prefetch(tier, other);
                }
                return lane.begin_below(tier, session, scope, query, (request, now));
            };
            lane.drop_pins(query);
            let waiter = lane.waiter(session.0, query, now);
            let Some(prefetch) = tier.prefetches.get_mut(id) else {
                return Below::Settled;
            };
            prefetch.asked = now;
            if !prefetch.is_settled() && query.resumed && awaited {
                lane.share_prefetch(tier, id, query);
                return Below::Settled;
            }
            if prefetch.is_settled() || query.resumed {
                lane.take_prefetch(tier, id, query, now);
                return Below::Settled;
            }
            match waiter {
                Some(waiter) => {
                    prefetch.waiters.push(waiter);
                    Below::Waiting
                }
                None => Below::Loading {
                    held: prefetch.held(),
                    coming: prefetch.open,
                },
            }
        });
        below.unwrap_or(Below::Settled)
    }

    /// Whether blocks are on their way for this very query.
    pub(super) fn has_prefetch(
        &self,
        request: &RequestKey,
        scope: &QueryScope,
        query: &QueryRequest,
    ) -> bool {
        let tier = self.tier.as_ref();
        let prefetch = tier.and_then(|tier| tier.prefetches.get(tier.prefetches.of(request)?));
        prefetch.is_some_and(|prefetch| prefetch.is_for(scope, query))
    }

    /// A query that has just been asked, or asked with other hashes.
    fn begin_below(
        &mut self,
        tier: &mut LaneTier,
        session: (SessionId, usize),
        scope: &QueryScope,
        query: &mut QueryRequest,
        (request, now): (RequestKey, Instant),
    ) -> Below {
        tier.note_hits(&self.cache, scope.domain, &query.entries);
        let open = query.pieces.iter().filter(|piece| piece.state.is_open());
        let open = open.count() as u32;
        let promised = (query.entries.len() + query.pieces.len()) as u64;
        // What it holds already counts as its own.
        let pins_left = self.cache.pins_left(scope.domain) + promised - u64::from(open);
        let room = self
            .leases
            .has_room(session.1, scope.domain, promised, pins_left);
        let tier_scope = self.cache.tier_scope(scope.namespace);
        let (Some(tier_scope), true, true) = (tier_scope, room, open > 0) else {
            self.forget_below(query, room);
            return Below::Settled;
        };
        let waiter = self.waiter(session.0, query, now);
        let prefetch = Prefetch {
            request,
            scope: *scope,
            tier_scope,
            session: session.0,
            place: session.1,
            total: query.list.head.total,
            digest: query.digest,
            pieces: merge(scope, query),
            open,
            cursor: 0,
            after: query.miss,
            promised,
            bytes: 0,
            started: now,
            progress: now,
            asked: now,
            waiters: waiter.into_iter().collect(),
        };
        let held = prefetch.held();
        self.leases.promise(session.1, scope.domain, promised);
        tier.prefetches.add(prefetch);
        self.tally.add(Counter::PrefetchBegun, 1);
        match query.reach {
            Reach::Wait => Below::Waiting,
            _ => Below::Loading { held, coming: open },
        }
    }

    /// The query goes without what is below: it has not been asked for, or there is no room.
    fn forget_below(&mut self, query: &mut QueryRequest, room: bool) {
        let pieces = std::mem::take(&mut query.pieces);
        let Some(scope) = query.scope else { return };
        let mut loose = Vec::new();
        let reason = match room {
            true => MissReason::Absent,
            false => MissReason::NoLease,
        };
        for (at, piece) in pieces.iter().enumerate() {
            let first = at == 0;
            if let PieceState::Held { entry, .. } = piece.state {
                loose.push(entry);
            }
            let why = match (scope.group, first) {
                (0, false) => MissReason::AfterMiss,
                _ => reason,
            };
            query.misses[why as usize] += 1;
            if scope.group == 0 && first {
                // What was the first miss comes after another one now.
                if let Some(before) = query.miss.replace(reason) {
                    query.misses[before as usize] -= 1;
                    query.misses[MissReason::AfterMiss as usize] += 1;
                }
            }
        }
        if let (false, true) = (pieces.is_empty(), scope.group != 0) {
            query.miss.get_or_insert(reason);
        }
        self.cache.unpin(scope.domain, &loose);
    }

    fn waiter(&self, session: SessionId, query: &QueryRequest, now: Instant) -> Option<Waiter> {
        (query.reach == Reach::Wait).then(|| Waiter {
            session,
            request_id: query.list.head.request_id,
            until: match query.deadline_ms {
                0 => None,
                limit => Some(query.list.started.max(now) + Duration::from_millis(limit)),
            },
        })
    }

    /// The prefetch's blocks become the query's.
    fn take_prefetch(
        &mut self,
        tier: &mut LaneTier,
        id: PrefetchId,
        query: &mut QueryRequest,
        now: Instant,
    ) {
        let Some(prefetch) = tier.prefetches.get_mut(id) else {
            return;
        };
        let mut loose = Vec::new();
        prefetch.give_up(MissReason::InFlight, &mut loose);
        let (cache, domain) = (&self.cache, prefetch.scope.domain);
        prefetch.drop_held(|entry| cache.is_withdrawn(domain, entry), &mut loose);
        let took = now.duration_since(prefetch.started).as_nanos() as u64;
        let pieces = std::mem::take(&mut prefetch.pieces);
        let after = prefetch.after;
        self.cache.unpin(domain, &loose);
        fill_from(query, pieces.into_iter(), after);
        self.tally.add(Counter::PrefetchReady, 1);
        self.node.observe(Histogram::Prefetch, took);
        self.end_prefetch(tier, id);
    }

    /// The query's time has passed, and others wait on for the same blocks: it gets its own hold on
    /// what is there, and theirs goes on.
    fn share_prefetch(&mut self, tier: &mut LaneTier, id: PrefetchId, query: &mut QueryRequest) {
        let Some(prefetch) = tier.prefetches.get(id) else {
            return;
        };
        let domain = prefetch.scope.domain;
        let mut pieces = prefetch.pieces.clone();
        let mut after = prefetch.after;
        for at in 0..pieces.len() {
            let state = match pieces[at].state {
                PieceState::Held { entry, .. } if self.cache.is_withdrawn(domain, entry) => {
                    PieceState::Missing(MissReason::Absent)
                }
                PieceState::Held { entry, fetched } => {
                    match self.cache.pin_sealed(domain, EntryId(entry)) {
                        Ok(entry) => PieceState::Held { entry, fetched },
                        Err(reason) => PieceState::Missing(reason),
                    }
                }
                PieceState::Coming { .. } | PieceState::Wanted(_) => {
                    PieceState::Missing(MissReason::InFlight)
                }
                missing @ PieceState::Missing(_) => missing,
            };
            pieces[at].state = state;
            if let (PieceState::Missing(reason), true) = (state, prefetch.is_prefix()) {
                after = Some(reason);
                pieces.truncate(at);
                break;
            }
        }
        fill_from(query, pieces.into_iter(), after);
    }

    /// Ends a prefetch and gives back what was set aside for it.
    pub(super) fn end_prefetch(&mut self, tier: &mut LaneTier, id: PrefetchId) {
        let domain = tier
            .prefetches
            .get(id)
            .map(|prefetch| prefetch.scope.domain);
        let ended = tier.end_prefetch(&mut self.cache, id);
        if let (Some(domain), Some((place, promised))) = (domain, ended) {
            self.leases.take_back(place, domain, promised);
        }
    }

    /// Ends the prefetches that `over` names.
    pub(super) fn end_prefetches(&mut self, over: impl Fn(&Prefetch) -> bool) {
        self.with_tier(|lane, tier| {
            for id in tier.prefetches.ids() {
                if tier.prefetches.get(id).is_some_and(&over) {
                    lane.tally.add(Counter::PrefetchAbandoned, 1);
                    lane.end_prefetch(tier, id);
                }
            }
        });
    }

    /// A session ends: what others wait for is theirs from now on.
    pub(super) fn hand_prefetches_over(&mut self, session: SessionId) {
        self.with_tier(|lane, tier| {
            for id in tier.prefetches.ids() {
                let Some(prefetch) = tier.prefetches.get_mut(id) else {
                    continue;
                };
                prefetch.waiters.retain(|waiter| waiter.session != session);
                if prefetch.session != session {
                    continue;
                }
                let mut heirs = prefetch.waiters.iter().map(|waiter| waiter.session);
                let heir = heirs.find_map(|heir| Some((heir, *lane.by_id.get(&heir)?)));
                let Some((heir, place)) = heir else {
                    continue;
                };
                let (domain, promised) = (prefetch.scope.domain, prefetch.promised);
                lane.leases.take_back(prefetch.place, domain, promised);
                lane.leases.promise(place, domain, promised);
                (prefetch.session, prefetch.place) = (heir, place);
            }
        });
    }

    /// What the clock brings about below the pool.
    pub(super) fn tier_upkeep(&mut self, now: Instant) {
        let Some(tier) = self.tier.as_mut() else {
            return;
        };
        if tier.prefetches.len() > 0 {
            let mut moment = Moment {
                now,
                tally: &mut self.tally,
            };
            tier.lose_patience(&mut self.cache, &mut moment);
            tier.call_late_waiters(now);
            // Before the prefetch may end: they are given what it holds.
            self.resume_waiters();
            let limit = self.options.lease_ttl;
            self.end_prefetches(|prefetch| {
                prefetch.waiters.is_empty() && now.duration_since(prefetch.asked) > limit
            });
        }
        self.pump_tier();
    }

    /// When the tier wants the lane to look again.
    pub(super) fn tier_deadline(&self) -> Option<Instant> {
        let tier = self.tier.as_ref()?;
        tier.next_deadline(self.options.lease_ttl)
    }

    /// Cancels a query that waits; what it had fetched stays for others to find.
    pub(super) fn cancel_wait(
        &mut self,
        session: &mut LaneSession,
        request_id: u64,
    ) -> Result<bool, SessionFault> {
        match session.requests.get(&request_id) {
            Some(Request::Query(query)) if query.waits => {}
            _ => return Ok(false),
        }
        let Some(Request::Query(mut query)) = session.requests.remove(&request_id) else {
            return Ok(false);
        };
        let id = session.id;
        self.with_tier(|lane, tier| {
            if let Some(alone) = tier.forget_waiter(id, request_id) {
                lane.tally.add(Counter::PrefetchAbandoned, 1);
                lane.end_prefetch(tier, alone);
            }
        });
        query.list.fail(Status::Cancelled, 0);
        self.finish_query(session, query)?;
        Ok(true)
    }

    /// Answers a cancelled save that waits for the tier and nothing else.
    pub(super) fn cancel_held(
        &mut self,
        session: &mut LaneSession,
        request_id: u64,
    ) -> Result<(), SessionFault> {
        let held = self.tier.as_mut();
        if !held.is_some_and(|tier| tier.let_go_of_save(session.id, request_id)) {
            return Ok(());
        }
        match session.requests.remove(&request_id) {
            Some(Request::Save(save)) => self.finish_save(session, *save),
            Some(other) => {
                session.requests.insert(request_id, other);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// True when the tier has ended something that the lane has not seen.
    pub(super) fn tier_has_done(&mut self) -> bool {
        let now = self.clock.now();
        self.tier.as_mut().is_some_and(|tier| tier.has_done(now))
    }

    /// Lets go of the tier.
    pub(super) fn close_tier(&mut self) {
        let Some(tier) = self.tier.take() else { return };
        if !tier.store.close(CLOSE_LIMIT) {
            tracing::warn!(limit = ?CLOSE_LIMIT, "the SSD tier was not closed in time");
        }
    }

    /// Has every query that waits take what is there, and answers every save that is over.
    pub(super) fn end_waits(&mut self) {
        let now = self.clock.now();
        if let Some(tier) = self.tier.as_mut() {
            tier.end_waits();
            tier.end_saves(now);
        }
        self.answer_saves(now);
        self.resume_waiters();
    }

    /// Lets go of the blocks of a query that goes on with those of its prefetch. It has not found
    /// them once more.
    fn drop_pins(&mut self, query: &mut QueryRequest) {
        let entries = std::mem::take(&mut query.entries);
        let Some(scope) = query.scope else { return };
        self.cache.uncount_hits(scope.domain, &entries);
        self.cache.unpin(scope.domain, &entries);
        self.recycle(entries);
        let held = query
            .pieces
            .drain(..)
            .filter_map(|piece| match piece.state {
                PieceState::Held { entry, .. } => Some(entry),
                _ => None,
            });
        let held: Vec<u32> = held.collect();
        self.cache.uncount_hits(scope.domain, &held);
        self.cache.unpin(scope.domain, &held);
        query.entries = self.entry_lists.pop().unwrap_or_default();
    }
}

/// Gives a query the blocks of these pieces; `after` is why the position behind the last one is a
/// miss, of a prefix query.
fn fill_from(
    query: &mut QueryRequest,
    pieces: impl Iterator<Item = Piece>,
    after: Option<MissReason>,
) {
    let total = query.list.head.total;
    let is_prefix = query.scope.is_some_and(|scope| scope.group == 0);
    query.misses.fill(0);
    query.bits.fill(0);
    query.bits.resize((total as usize).div_ceil(64), 0);
    query.miss = if is_prefix { after } else { None };
    for piece in pieces {
        let at = piece.position as usize;
        match piece.state {
            PieceState::Held { entry, fetched } => {
                query.entries.push(entry);
                query.fetched += u32::from(fetched);
                query.bits[at / 64] |= 1 << (at % 64);
            }
            PieceState::Missing(reason) => {
                query.misses[reason as usize] += 1;
                query.miss.get_or_insert(reason);
            }
            PieceState::Coming { .. } | PieceState::Wanted(_) => {}
        }
    }
    if is_prefix {
        query.bits.clear();
        let missed = total - query.entries.len() as u32;
        if missed > 0 {
            let reason = *query.miss.get_or_insert(MissReason::Absent);
            query.misses[reason as usize] += 1;
            query.misses[MissReason::AfterMiss as usize] += missed - 1;
        } else {
            query.miss = None;
        }
    }
}

/// All positions of a query that matter, in order: those that were hits and those from below.
fn merge(scope: &QueryScope, query: &mut QueryRequest) -> Vec<Piece> {
    let below = std::mem::take(&mut query.pieces);
    let mut entries = query.entries.drain(..);
    let mut held = |position: u32| {
        entries.next().map(|entry| Piece {
            position,
            state: PieceState::Held {
                entry,
                fetched: false,
            },
        })
    };
    let mut pieces = Vec::new();
    if scope.group == 0 {
        pieces.extend((0..).map_while(&mut held));
        pieces.extend(below);
        return pieces;
    }
    let mut below = below.into_iter().peekable();
    for position in 0..query.list.head.total {
        let hit = query.bits[position as usize / 64] & 1 << (position % 64) != 0;
        if hit {
            pieces.extend(held(position));
        } else if let Some(piece) = below.next_if(|piece| piece.position == position) {
            pieces.push(piece);
        } else {
            pieces.push(Piece {
                position,
                state: PieceState::Missing(query.miss.unwrap_or(MissReason::Absent)),
            });
        }
    }
    pieces
}
