//! The tier below the pool, as the lane uses it: blocks written before they are evicted, and
//! blocks fetched for queries.
//!
//! Nothing here waits for a drive. A save does not wait for a block to be written, unless an
//! operator asks for it ([`hold`]): the blocks that the policy will evict next are written ahead of
//! time, and what was not written when its page is wanted is evicted all the same, and counted.

#![forbid(unsafe_code)]

mod begin;
mod down;
mod hold;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use pegaflow_shm::desc::MissReason;
use pegaflow_shm::index::EntryId;
use pegaflow_shm::node::Counter;

use crate::cache::Cache;
use crate::cache::domain::DomainId;
use crate::cache::exchange::Presence;
use crate::control::hex;
use crate::copy::Sampler;
use crate::lane::api::SessionId;
use crate::lane::prefetch::{PieceState, PrefetchId, Prefetches, Waiter};
use crate::lane::tally::Tally;
use crate::tier::{
    BlockStore, PageSpan, Refused, StoreDone, StoreKey, StoreOutcome, TierOptions, ToldHealth,
};

/// Part of the pool that is kept free or on the tier, so that a burst of saves finds room.
const AHEAD_SHARE: u64 = 2;
/// Parts of that which must have been used up before the next look ahead.
const LOOKS: u64 = 16;
/// Part of what a look ahead passes of which it asks whether the tier has it still.
const CHECKED_SHARE: u64 = 16;
/// Blocks that one look ahead passes, at most: a fraction of a millisecond.
const LOOK_BLOCKS: u64 = 4096;
/// Of how many blocks that queries find in the pool one counts as used on the tier.
const TOUCH_SHARE: usize = 16;
/// Part of the pool that may be on its way to the tier.
const WRITING_SHARE: u64 = 4;
/// Part of the pool that queries may hold with blocks that they had fetched.
const FETCHED_SHARE: u64 = 2;
/// Blocks to be written as soon as the tier takes them; beyond, they wait for the look ahead.
const MAX_TO_WRITE: usize = 64 * 1024;
/// Requests to the tier that one turn of the lane takes in, and that it begins, each way, at most:
/// a few microseconds, after which the lane looks at the rings again.
const TURN_ENDS: usize = 16;
const TURN_BEGINS: usize = 16;
/// How long blocks are spared for a tier that has finished no write: longer than a drive takes to
/// make a batch durable, shorter than anybody would notice a cache out of order.
const SPARING: Duration = Duration::from_millis(500);
/// Prefetches in a row whose turn cannot be now before it is no other one's either.
const MOST_LATER: usize = 8;
/// When a request that was put off is tried again, at the latest.
const RETRY: Duration = Duration::from_millis(5);

/// A block that is being moved.
enum Moving {
    Down {
        domain: DomainId,
        entry: EntryId,
        key: StoreKey,
        bytes: u64,
    },
    Up(Fetch),
}

/// A block on its way up.
struct Fetch {
    domain: DomainId,
    entry: EntryId,
    started: Instant,
    /// It does not count as one that is on its way: its drive has stalled.
    late: bool,
    waiters: Vec<(PrefetchId, u32)>,
}

/// A block that is to be written soon.
struct ToWrite {
    domain: DomainId,
    entry: EntryId,
    generation: u32,
}

/// What became of an attempt to write a block.
#[derive(PartialEq, Eq)]
enum Attempt {
    /// On its way, or nothing to do.
    Settled,
    /// The tier takes no more now.
    Later,
    /// The tier takes nothing for some time.
    Hopeless,
}

/// What became of a prefetch's turn.
enum Turn {
    /// It may have more to fetch.
    Again,
    /// Something has to end first.
    Later,
    /// It has all it wants.
    Over,
}

/// The tier and everything that is under way.
pub(super) struct LaneTier {
    pub store: Box<dyn BlockStore>,
    pub options: TierOptions,
    /// Says which pages that come up get a checksum.
    sampler: Sampler,
    pub prefetches: Prefetches,
    /// Requests whose answer has become ready, or whose time has passed.
    pub resume: Vec<(SessionId, u64)>,
    moving: Vec<Option<Moving>>,
    free: Vec<usize>,
    /// Fetches by the entry that they fill.
    by_entry: HashMap<(DomainId, u32), usize>,
    /// Of these, those that are late.
    late: u32,
    /// No other one becomes late before; `None` when there may be one.
    late_at: Option<Instant>,
    writes: u32,
    write_bytes: u64,
    /// Bytes that prefetches had brought in and hold.
    fetched_bytes: u64,
    to_write: VecDeque<ToWrite>,
    held_saves: VecDeque<hold::HeldSave>,
    /// What the log knows of the shards.
    pub told_health: ToldHealth,
    /// When the tier finished a write last, or was given one while it had none; none if it takes
    /// none.
    wrote: Option<Instant>,
    looked_at: Option<u64>,
    told_unfit: bool,
    dice: u32,
    put_off: Option<Instant>,
    unbegun: begin::Unbegun,
    /// No fetch can begin before something ends, or before then.
    blocked: Option<Instant>,
    done: Vec<StoreDone>,
    pages: Vec<PageSpan>,
    loose: Vec<u32>,
}

/// Time and what the lane counts with.
pub(super) struct Moment<'a> {
    pub now: Instant,
    pub tally: &'a mut Tally,
}

impl LaneTier {
    pub(super) fn new(
        store: Box<dyn BlockStore>,
        options: TierOptions,
        sampler: Sampler,
    ) -> LaneTier {
        LaneTier {
            store,
            options,
            sampler,
            prefetches: Prefetches::default(),
            resume: Vec::new(),
            moving: Vec::new(),
            free: Vec::new(),
            by_entry: HashMap::new(),
            late: 0,
            late_at: None,
            writes: 0,
            write_bytes: 0,
            fetched_bytes: 0,
            to_write: VecDeque::new(),
            held_saves: VecDeque::new(),
            told_health: ToldHealth::default(),
            wrote: None,
            looked_at: None,
            told_unfit: false,
            dice: 0,
            put_off: None,
            unbegun: begin::Unbegun::default(),
            blocked: None,
            done: Vec::new(),
            pages: Vec::new(),
            loose: Vec::new(),
        }
    }

    /// Blocks on their way down, and up.
    pub(super) fn under_way(&self) -> (u32, u32) {
        (self.writes, self.by_entry.len() as u32)
    }

    /// Whether the copy into this entry is a fetch that one may still hope for.
    pub(super) fn is_coming(&self, domain: DomainId, entry: EntryId, now: Instant) -> bool {
        let moving = self.by_entry.get(&(domain, entry.0));
        moving.is_some_and(|at| match &self.moving[*at] {
            Some(Moving::Up(fetch)) => now.duration_since(fetch.started) < self.options.patience,
            _ => false,
        })
    }

    /// What the store knows the requests by that have not ended.
    #[cfg(test)]
    pub(super) fn tickets(&self) -> Vec<u64> {
        let moving = (0..).zip(&self.moving);
        let taken = moving.filter(|(_, moving)| moving.is_some());
        taken.map(|(at, _)| at).collect()
    }

    /// Those that should have been answered by then.
    #[cfg(test)]
    pub(super) fn overdue(&self, by: Instant) -> usize {
        let waiters = self.prefetches.iter().flat_map(|one| &one.waiters);
        let queries = waiters.filter(|waiter| waiter.until.is_some_and(|until| until < by));
        let saves = self.held_saves.iter().filter(|save| save.until < by);
        queries.count() + saves.count()
    }

    /// Fetches that are late.
    #[cfg(test)]
    pub(super) fn late(&self) -> usize {
        self.late as usize
    }

    /// Blocks that prefetches hold, with repetitions.
    #[cfg(test)]
    pub(super) fn pins(&self) -> Vec<(DomainId, u32)> {
        let held = self.prefetches.iter().flat_map(|prefetch| {
            prefetch
                .pieces
                .iter()
                .filter_map(|piece| match piece.state {
                    PieceState::Held { entry, .. } => Some((prefetch.scope.domain, entry)),
                    _ => None,
                })
        });
        let written = self.moving.iter().filter_map(|moving| match moving {
            Some(Moving::Down { domain, entry, .. }) => Some((*domain, entry.0)),
            _ => None,
        });
        held.chain(written).collect()
    }

    /// A request does not wait any more, and its number may be another one's next. Returns the
    /// prefetch that nobody waits for now.
    pub(super) fn forget_waiter(
        &mut self,
        session: SessionId,
        request_id: u64,
    ) -> Option<PrefetchId> {
        self.resume
            .retain(|resumed| *resumed != (session, request_id));
        let is_its = |waiter: &Waiter| (waiter.session, waiter.request_id) == (session, request_id);
        self.prefetches.ids().into_iter().find(|id| {
            self.prefetches.get_mut(*id).is_some_and(|prefetch| {
                let before = prefetch.waiters.len();
                prefetch.waiters.retain(|waiter| !is_its(waiter));
                before > 0 && prefetch.waiters.is_empty()
            })
        })
    }

    /// Everybody who waits goes on with what is there.
    pub(super) fn end_waits(&mut self) {
        for id in self.prefetches.ids() {
            if let Some(prefetch) = self.prefetches.get_mut(id) {
                let waiters = prefetch.waiters.drain(..);
                self.resume
                    .extend(waiters.map(|waiter| (waiter.session, waiter.request_id)));
            }
        }
    }

    /// Takes some of what has ended in; true when there was something.
    pub(super) fn take_done(&mut self, cache: &mut Cache, moment: &mut Moment<'_>) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.store.poll(moment.now, &mut done);
        let any = !done.is_empty();
        let some = done.len().min(TURN_ENDS);
        for ended in done.drain(..some) {
            self.ended(cache, moment, ended);
        }
        self.done = done;
        any
    }

    /// The lane is about to sleep: all that was held back begins. True when it must not sleep,
    /// since something has ended.
    pub(super) fn has_done(&mut self, now: Instant) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.store.poll(now, &mut done);
        self.done = done;
        self.begin();
        !self.done.is_empty()
    }

    /// Begins some of what can begin; true when there is more.
    pub(super) fn pump(&mut self, cache: &mut Cache, moment: &mut Moment<'_>) -> bool {
        let mut more = false;
        if self.blocked.is_none_or(|until| moment.now >= until) {
            self.blocked = None;
            more |= self.begin_fetches(cache, moment);
        }
        more |= self.begin_writes(cache, moment.now);
        self.begin_if_due(cache, moment.now);
        let sparing = self
            .options
            .save_wait
            .map_or(SPARING, |wait| wait.max(SPARING));
        let moves = |at: Instant| moment.now.duration_since(at) < sparing;
        cache.spare_unwritten(self.wrote.is_some_and(moves));
        more
    }

    fn put(&mut self, moving: Moving) -> usize {
        let at = self.free.pop().unwrap_or_else(|| {
            self.moving.push(None);
            self.moving.len() - 1
        });
        self.moving[at] = Some(moving);
        at
    }

    fn take(&mut self, at: usize) -> Option<Moving> {
        let moving = self.moving.get_mut(at)?.take();
        if moving.is_some() {
            self.free.push(at);
        }
        moving
    }

    fn ended(&mut self, cache: &mut Cache, moment: &mut Moment<'_>, ended: StoreDone) {
        self.blocked = None;
        match self.take(ended.ticket as usize) {
            Some(Moving::Down {
                domain,
                entry,
                key,
                bytes,
            }) => {
                let written = ended.outcome == StoreOutcome::Written;
                if ended.outcome == StoreOutcome::Bad && !cache.is_withdrawn(domain, entry.0) {
                    withdraw(cache, moment, domain, entry);
                }
                self.writes -= 1;
                self.write_bytes -= bytes;
                if written {
                    self.wrote = Some(moment.now);
                }
                if cache.is_withdrawn(domain, entry.0) {
                    // Its bytes turned out to be wrong while they were written.
                    self.store.remove(&key);
                }
                cache.end_write(domain, entry, written);
                let what = match written {
                    true => Counter::SsdWritten,
                    false => Counter::SsdWriteFailed,
                };
                moment.tally.add(what, 1);
            }
            Some(Moving::Up(fetch)) => self.fetched(cache, moment, fetch, ended),
            None => tracing::error!(
                ticket = ended.ticket,
                "the tier ended what nobody asked for"
            ),
        }
    }

    fn fetched(
        &mut self,
        cache: &mut Cache,
        moment: &mut Moment<'_>,
        fetch: Fetch,
        ended: StoreDone,
    ) {
        let Fetch {
            domain,
            entry,
            late,
            waiters,
            ..
        } = fetch;
        self.by_entry.remove(&(domain, entry.0));
        self.late -= u32::from(late);
        let filled = (ended.outcome == StoreOutcome::Read).then_some(&ended.checksums[..]);
        let sealed = cache.end_fetch(domain, entry, filled);
        let what = match ended.outcome {
            StoreOutcome::Read => Counter::SsdFetched,
            StoreOutcome::Bad => Counter::SsdFetchBad,
            StoreOutcome::Written | StoreOutcome::Failed => Counter::SsdFetchFailed,
        };
        moment.tally.add(what, 1);
        for (id, at) in waiters {
            let at = at as usize;
            let coming = PieceState::Coming { entry: entry.0 };
            let waits = self.prefetches.get(id).is_some_and(|prefetch| {
                prefetch
                    .pieces
                    .get(at)
                    .is_some_and(|piece| piece.state == coming)
            });
            if !waits {
                continue;
            }
            let state = match sealed {
                true => pinned(cache, domain, entry),
                false => PieceState::Missing(MissReason::Absent),
            };
            self.set_piece(cache, moment, id, at, state);
        }
    }

    /// Gives a position of a prefetch its state, and has its waiters go on if that was the last.
    fn set_piece(
        &mut self,
        cache: &mut Cache,
        moment: &mut Moment<'_>,
        id: PrefetchId,
        at: usize,
        state: PieceState,
    ) {
        let Some(prefetch) = self.prefetches.get_mut(id) else {
            return;
        };
        prefetch.set(at, state, &mut self.loose);
        // What is merely on its way is none: a drive that does not answer takes on more and more.
        if !state.is_open() {
            prefetch.progress = moment.now;
        }
        cache.unpin(prefetch.scope.domain, &self.loose);
        self.loose.clear();
        self.note_settled(id, moment);
    }

    fn note_settled(&mut self, id: PrefetchId, moment: &mut Moment<'_>) {
        let Some(prefetch) = self.prefetches.get_mut(id).filter(|p| p.is_settled()) else {
            return;
        };
        prefetch.asked = moment.now;
        let waiters = prefetch.waiters.drain(..);
        self.resume
            .extend(waiters.map(|waiter| (waiter.session, waiter.request_id)));
    }

    /// Whether one more block may be on its way. Those that a stalled drive holds do not count, or
    /// nothing would come from the others as long as it stalls; how many it holds is bounded by
    /// what it takes.
    fn has_room(&self) -> bool {
        self.by_entry.len() as u32 - self.late < self.options.max_prefetch
    }

    /// [`Self::has_room`], of which there may be more by now.
    fn finds_room(&mut self, now: Instant) -> bool {
        if self.has_room() || self.late_at.is_some_and(|at| now < at) {
            return self.has_room();
        }
        let mut oldest = now;
        for moving in self.moving.iter_mut().flatten() {
            match moving {
                Moving::Up(fetch) if !fetch.late => {
                    fetch.late = now.duration_since(fetch.started) >= self.options.patience;
                    self.late += u32::from(fetch.late);
                    if !fetch.late {
                        oldest = oldest.min(fetch.started);
                    }
                }
                Moving::Up(_) | Moving::Down { .. } => {}
            }
        }
        self.late_at = Some(oldest + self.options.patience);
        self.has_room()
    }

    /// Fetches in turn, a block for each prefetch, as far as the options allow; true when there is
    /// more for the lane's next turn.
    fn begin_fetches(&mut self, cache: &mut Cache, moment: &mut Moment<'_>) -> bool {
        let (mut later, mut begun) = (0, 0);
        while self.prefetches.turns() > 0 && self.finds_room(moment.now) {
            if begun == TURN_BEGINS {
                return true;
            }
            begun += 1;
            let Some(id) = self.prefetches.next_turn() else {
                return false;
            };
            match self.turn(cache, moment, id) {
                Turn::Again => {
                    self.prefetches.turn_again(id);
                    later = 0;
                }
                Turn::Over => self.note_settled(id, moment),
                Turn::Later => {
                    // The next one's block may be on another drive.
                    self.prefetches.turn_again(id);
                    later += 1;
                    if later >= self.prefetches.turns().min(MOST_LATER) {
                        self.blocked = Some(moment.now + RETRY);
                        return false;
                    }
                }
            }
        }
        false
    }

    fn turn(&mut self, cache: &mut Cache, moment: &mut Moment<'_>, id: PrefetchId) -> Turn {
        let Some(prefetch) = self.prefetches.get_mut(id) else {
            return Turn::Over;
        };
        let Some((at, hash)) = prefetch.next_wanted() else {
            return Turn::Over;
        };
        let scope = prefetch.scope;
        let key = StoreKey {
            scope: prefetch.tier_scope,
            group: scope.group,
            hash,
        };
        let found = cache.presence(scope.domain, (scope.namespace, scope.group), &hash);
        let state = match found {
            // Somebody else had it fetched meanwhile.
            Presence::Sealed(entry) => pinned(cache, scope.domain, entry),
            Presence::Copying(entry) => match self.by_entry.get(&(scope.domain, entry.0)) {
                Some(moving) => {
                    if let Some(Moving::Up(fetch)) = &mut self.moving[*moving] {
                        fetch.waiters.push((id, at as u32));
                    }
                    PieceState::Coming { entry: entry.0 }
                }
                None => PieceState::Missing(MissReason::InFlight),
            },
            Presence::Partial(_) | Presence::Absent => {
                match self.begin_fetch(cache, moment, (id, at), &key) {
                    Ok(entry) => PieceState::Coming { entry: entry.0 },
                    Err(None) => return Turn::Later,
                    Err(Some(reason)) => PieceState::Missing(reason),
                }
            }
        };
        self.set_piece(cache, moment, id, at, state);
        Turn::Again
    }

    /// Has one block fetched. `Err(None)`: not before something else has ended.
    fn begin_fetch(
        &mut self,
        cache: &mut Cache,
        moment: &mut Moment<'_>,
        (id, at): (PrefetchId, usize),
        key: &StoreKey,
    ) -> Result<EntryId, Option<MissReason>> {
        let Some(prefetch) = self.prefetches.get_mut(id) else {
            return Err(Some(MissReason::Absent));
        };
        let scope = prefetch.scope;
        let sizes = self.store.lookup(key).ok_or(Some(MissReason::Absent))?;
        let fits = |bytes: &u32| cache.pool().check_page(u64::from(*bytes)).is_ok();
        if sizes.len() != usize::from(scope.shards) || !sizes.iter().all(fits) {
            tracing::warn!(
                ?sizes,
                shards = scope.shards,
                "the tier holds a block in other pages than its namespace has: it is forgotten"
            );
            self.store.remove(key);
            return Err(Some(MissReason::Absent));
        }
        let bytes: u64 = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
        if self.fetched_bytes + bytes > cache.pool().pool_bytes() / FETCHED_SHARE {
            return Err(Some(MissReason::NoLease));
        }
        self.pages.clear();
        let name = (scope.namespace, scope.group);
        let begun = cache.begin_fetch(scope.domain, name, &key.hash, &sizes, &mut self.pages);
        let entry = match begun {
            Ok(entry) => entry,
            // What is being written can be evicted as soon as it is.
            Err(_) if self.writes > 0 => return Err(None),
            Err(reason) => return Err(Some(reason)),
        };
        for page in &mut self.pages {
            page.checksum = self.sampler.for_next_page();
        }
        let waiters = vec![(id, at as u32)];
        let domain = scope.domain;
        let moving = self.put(Moving::Up(Fetch {
            domain,
            entry,
            started: moment.now,
            late: false,
            waiters,
        }));
        match self.store.read(moment.now, moving as u64, key, &self.pages) {
            Ok(()) => {
                if let Some(prefetch) = self.prefetches.get_mut(id) {
                    prefetch.bytes += bytes;
                }
                self.fetched_bytes += bytes;
                self.unbegun.wanted = true;
                self.by_entry.insert((domain, entry.0), moving);
                Ok(entry)
            }
            Err(why) => {
                self.take(moving);
                cache.end_fetch(domain, entry, None);
                match why {
                    Refused::Busy if !self.by_entry.is_empty() || self.writes > 0 => Err(None),
                    _ => Err(Some(MissReason::Absent)),
                }
            }
        }
    }

    /// Ends a prefetch that nobody needs any more: what it holds is let go of, and what it still
    /// wanted is not fetched. Those who wait for it go on without.
    pub(super) fn end_prefetch(
        &mut self,
        cache: &mut Cache,
        id: PrefetchId,
    ) -> Option<(usize, u64)> {
        let mut ended = self.prefetches.remove(id)?;
        self.fetched_bytes -= ended.bytes;
        self.blocked = None;
        let waiters = ended.waiters.drain(..);
        self.resume
            .extend(waiters.map(|waiter| (waiter.session, waiter.request_id)));
        self.loose.extend(ended.pins());
        cache.unpin(ended.scope.domain, &self.loose);
        self.loose.clear();
        Some((ended.place, ended.promised))
    }

    /// Prefetches that wait for too long go without what is not in yet.
    pub(super) fn lose_patience(&mut self, cache: &mut Cache, moment: &mut Moment<'_>) {
        for id in self.prefetches.ids() {
            let Some(prefetch) = self.prefetches.get_mut(id) else {
                continue;
            };
            let waited = moment.now.duration_since(prefetch.progress);
            if prefetch.is_settled() || waited < self.options.patience {
                continue;
            }
            prefetch.give_up(MissReason::InFlight, &mut self.loose);
            cache.unpin(prefetch.scope.domain, &self.loose);
            self.loose.clear();
            moment.tally.add(Counter::PrefetchLate, 1);
            self.note_settled(id, moment);
        }
    }

    /// Waiters whose time has passed take what is there.
    pub(super) fn call_late_waiters(&mut self, now: Instant) {
        for id in self.prefetches.ids() {
            let Some(prefetch) = self.prefetches.get_mut(id) else {
                continue;
            };
            let late = |waiter: &mut Waiter| waiter.until.is_some_and(|until| until <= now);
            let late = prefetch.waiters.extract_if(.., late);
            self.resume
                .extend(late.map(|waiter| (waiter.session, waiter.request_id)));
        }
    }

    /// When the lane has to look again if nothing wakes it.
    pub(super) fn next_deadline(&self, abandon_after: Duration) -> Option<Instant> {
        let prefetches = self.prefetches.iter().map(|prefetch| {
            let until = prefetch
                .waiters
                .iter()
                .filter_map(|waiter| waiter.until)
                .min();
            let patience = prefetch.progress + self.options.patience;
            let patience = (!prefetch.is_settled()).then_some(patience);
            let abandoned = prefetch
                .waiters
                .is_empty()
                .then(|| prefetch.asked + abandon_after);
            [until, patience, abandoned].into_iter().flatten().min()
        });
        let prefetches = prefetches.flatten().min();
        let turn = match (self.blocked, self.has_room()) {
            (None, false) => self.late_at,
            (until, _) => until,
        };
        let turn = turn.filter(|_| self.prefetches.turns() > 0);
        let saves = self.save_deadline();
        [
            prefetches,
            turn,
            saves,
            self.put_off,
            self.store.next_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }
}

fn pinned(cache: &mut Cache, domain: DomainId, entry: EntryId) -> PieceState {
    match cache.pin_sealed(domain, entry) {
        Ok(entry) => PieceState::Held {
            entry,
            fetched: true,
        },
        Err(reason) => PieceState::Missing(reason),
    }
}

/// A page was to be written that does not have its checksum any more: its block is served to nobody
/// again, and is not on the tier.
fn withdraw(cache: &mut Cache, moment: &mut Moment<'_>, domain: DomainId, entry: EntryId) {
    moment.tally.add(Counter::ChecksumMismatches, 1);
    if let Some(block) = cache.withdraw_block(domain, entry) {
        tracing::warn!(
            namespace = block.namespace,
            group = block.group,
            hash = %hex(&block.hash),
            "a block is withdrawn: a page of it has changed before it was written to the tier"
        );
    }
}
