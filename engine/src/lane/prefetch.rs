//! Queries whose blocks are coming up from the tier below: what each waits for and what it holds.
//!
//! A prefetch stands for one query, by its request key and hashes, from the first time it is asked
//! until its answer is given or nobody asks any more. What is in is pinned for it, so that nothing
//! leaves again while the rest comes up.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use pegaflow_shm::BlockHash;
use pegaflow_shm::desc::MissReason;

use crate::cache::lease::RequestKey;
use crate::lane::api::SessionId;
use crate::lane::request::{QueryRequest, QueryScope};

/// Names a prefetch; an old name never means a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefetchId {
    slot: u32,
    generation: u32,
}

/// One position of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its number in the query's list.
    pub position: u32,
    pub state: PieceState,
}

/// Where the block of a position is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceState {
    /// In the pool and pinned; `fetched` when it had to come up.
    Held { entry: u32, fetched: bool },
    /// On its way into this entry.
    Coming { entry: u32 },
    /// To be fetched.
    Wanted(BlockHash),
    /// Not to be had.
    Missing(MissReason),
}

impl PieceState {
    pub(super) fn is_open(self) -> bool {
        matches!(self, PieceState::Coming { .. } | PieceState::Wanted(_))
    }
}

/// A request that waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter {
    pub session: SessionId,
    pub request_id: u64,
    /// When it takes what is there.
    pub until: Option<Instant>,
}

/// A query on its way up.
#[derive(Debug)]
pub(super) struct Prefetch {
    pub request: RequestKey,
    pub scope: QueryScope,
    /// What the tier calls the namespace.
    pub tier_scope: [u8; 32],
    pub session: SessionId,
    pub place: usize,
    pub total: u32,
    pub digest: u64,
    /// In the order of positions. Of a prefix query none is missing: it is cut off there.
    pub pieces: Vec<Piece>,
    /// Pieces that are coming or wanted.
    pub open: u32,
    /// No piece before this one is wanted.
    pub cursor: usize,
    /// Why the position after the last piece of a prefix query is a miss.
    pub after: Option<MissReason>,
    /// Pins that were set aside for it in the lease table.
    pub promised: u64,
    /// Bytes that it had brought into the pool.
    pub bytes: u64,
    pub started: Instant,
    /// When a piece came in last.
    pub progress: Instant,
    /// When it was asked for last, or became ready.
    pub asked: Instant,
    pub waiters: Vec<Waiter>,
}

impl Prefetch {
    pub(super) fn is_prefix(&self) -> bool {
        self.scope.group == 0
    }

    /// Whether it is this query's: its key's, with the same hashes.
    pub(super) fn is_for(&self, scope: &QueryScope, query: &QueryRequest) -> bool {
        (self.digest, self.total) == (query.digest, query.list.head.total) && self.scope == *scope
    }

    pub(super) fn is_settled(&self) -> bool {
        self.open == 0
    }

    /// Blocks that the answer would have now.
    pub(super) fn held(&self) -> u32 {
        let held = |piece: &&Piece| matches!(piece.state, PieceState::Held { .. });
        let count = match self.is_prefix() {
            true => self.pieces.iter().take_while(held).count(),
            false => self.pieces.iter().filter(held).count(),
        };
        count as u32
    }

    /// The next piece to fetch.
    pub(super) fn next_wanted(&mut self) -> Option<(usize, BlockHash)> {
        while let Some(piece) = self.pieces.get(self.cursor) {
            if let PieceState::Wanted(hash) = piece.state {
                return Some((self.cursor, hash));
            }
            self.cursor += 1;
        }
        None
    }

    /// Gives a piece its state; `loose` takes pins that the prefetch has no use for any more.
    pub(super) fn set(&mut self, at: usize, state: PieceState, loose: &mut Vec<u32>) {
        let before = std::mem::replace(&mut self.pieces[at].state, state);
        self.open -= u32::from(before.is_open());
        self.open += u32::from(state.is_open());
        if let (PieceState::Missing(reason), true) = (state, self.is_prefix()) {
            self.cut(at, reason, loose);
        }
    }

    /// Ends a prefix before the piece at `at`.
    fn cut(&mut self, at: usize, reason: MissReason, loose: &mut Vec<u32>) {
        for piece in self.pieces.drain(at..) {
            match piece.state {
                PieceState::Held { entry, .. } => loose.push(entry),
                state => self.open -= u32::from(state.is_open()),
            }
        }
        self.after = Some(reason);
    }

    /// Gives up everything that is not in yet.
    pub(super) fn give_up(&mut self, reason: MissReason, loose: &mut Vec<u32>) {
        let mut at = 0;
        while at < self.pieces.len() {
            if self.pieces[at].state.is_open() {
                self.set(at, PieceState::Missing(reason), loose);
            }
            at += 1;
        }
        debug_assert_eq!(self.open, 0);
    }

    /// Gives up blocks that are in and not to be served any more.
    pub(super) fn drop_held(&mut self, gone: impl Fn(u32) -> bool, loose: &mut Vec<u32>) {
        let mut at = 0;
        while at < self.pieces.len() {
            if let PieceState::Held { entry, .. } = self.pieces[at].state
                && gone(entry)
            {
                loose.push(entry);
                self.set(at, PieceState::Missing(MissReason::Absent), loose);
            }
            at += 1;
        }
    }

    /// Takes the pins out.
    pub(super) fn pins(&mut self) -> impl Iterator<Item = u32> + '_ {
        self.pieces.drain(..).filter_map(|piece| match piece.state {
            PieceState::Held { entry, .. } => Some(entry),
            _ => None,
        })
    }
}

#[derive(Default)]
struct Slot {
    generation: u32,
    prefetch: Option<Box<Prefetch>>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Prefetches {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_request: HashMap<RequestKey, PrefetchId>,
    /// Those with pieces to fetch, in the order of their turns.
    turns: VecDeque<PrefetchId>,
}

impl Prefetches {
    pub(super) fn len(&self) -> usize {
        self.by_request.len()
    }

    pub(super) fn of(&self, request: &RequestKey) -> Option<PrefetchId> {
        self.by_request.get(request).copied()
    }

    pub(super) fn get(&self, id: PrefetchId) -> Option<&Prefetch> {
        let slot = self.slots.get(id.slot as usize)?;
        let current = slot.generation == id.generation;
        slot.prefetch.as_deref().filter(|_| current)
    }

    pub(super) fn get_mut(&mut self, id: PrefetchId) -> Option<&mut Prefetch> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        let current = slot.generation == id.generation;
        slot.prefetch.as_deref_mut().filter(|_| current)
    }

    pub(super) fn add(&mut self, prefetch: Prefetch) -> PrefetchId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let place = &mut self.slots[slot as usize];
        place.generation = place.generation.wrapping_add(1);
        let id = PrefetchId {
            slot,
            generation: place.generation,
        };
        self.by_request.insert(prefetch.request, id);
        place.prefetch = Some(Box::new(prefetch));
        self.turns.push_back(id);
        id
    }

    /// Ends one; what it still holds is the caller's.
    pub(super) fn remove(&mut self, id: PrefetchId) -> Option<Box<Prefetch>> {
        self.get(id)?;
        let prefetch = self.slots[id.slot as usize].prefetch.take()?;
        self.by_request.remove(&prefetch.request);
        self.free.push(id.slot);
        Some(prefetch)
    }

    /// How many may have a block to fetch.
    pub(super) fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Whose turn it is to have a block fetched; [`Self::turn_again`] when it has more.
    pub(super) fn next_turn(&mut self) -> Option<PrefetchId> {
        self.turns.pop_front()
    }

    pub(super) fn turn_again(&mut self, id: PrefetchId) {
        self.turns.push_back(id);
    }

    /// Their names, in an order that the past alone decides.
    pub(super) fn ids(&self) -> Vec<PrefetchId> {
        let slots = (0..).zip(&self.slots);
        let used = slots.filter(|(_, slot)| slot.prefetch.is_some());
        let ids = used.map(|(at, slot)| PrefetchId {
            slot: at,
            generation: slot.generation,
        });
        ids.collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Prefetch> {
        self.slots
            .iter()
            .filter_map(|slot| slot.prefetch.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: SessionId = 1;

    fn prefetch(group: u16, states: &[PieceState]) -> Prefetch {
        let now = Instant::now();
        Prefetch {
            request: RequestKey {
                instance: 1,
                group,
                key: 1,
            },
            scope: QueryScope {
                domain: 0,
                namespace: 0,
                instance: 1,
                group,
                loaders: 1,
                shards: 1,
            },
            tier_scope: [0; 32],
            session: NOBODY,
            place: 0,
            total: states.len() as u32,
            digest: 0,
            pieces: (0..)
                .zip(states)
                .map(|(position, state)| Piece {
                    position,
                    state: *state,
                })
                .collect(),
            open: states.iter().filter(|state| state.is_open()).count() as u32,
            cursor: 0,
            after: None,
            promised: 0,
            bytes: 0,
            started: now,
            progress: now,
            asked: now,
            waiters: Vec::new(),
        }
    }

    const fn held(entry: u32) -> PieceState {
        PieceState::Held {
            entry,
            fetched: true,
        }
    }

    const COMING: PieceState = PieceState::Coming { entry: 9 };
    const WANTED: PieceState = PieceState::Wanted([7; 32]);

    #[test]
    fn a_prefix_ends_where_a_block_does_not_come() {
        let mut prefix = prefetch(0, &[held(1), COMING, held(2), COMING, WANTED]);
        let mut loose = Vec::new();
        prefix.set(1, PieceState::Missing(MissReason::Absent), &mut loose);
        assert_eq!((prefix.pieces.len(), prefix.open, prefix.held()), (1, 0, 1));
        assert_eq!(loose, [2]);
        assert_eq!(prefix.after, Some(MissReason::Absent));
    }

    #[test]
    fn a_membership_query_goes_without_one_block_and_waits_for_the_others() {
        let mut members = prefetch(3, &[held(1), COMING, held(2), WANTED]);
        let mut loose = Vec::new();
        members.set(1, PieceState::Missing(MissReason::Absent), &mut loose);
        assert_eq!(
            (members.pieces.len(), members.open, members.held()),
            (4, 1, 2)
        );
        members.give_up(MissReason::InFlight, &mut loose);
        assert!(members.is_settled() && loose.is_empty());
        assert_eq!(members.pins().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn giving_up_leaves_what_is_in_without_a_gap() {
        let mut prefix = prefetch(0, &[held(1), WANTED, held(2), COMING]);
        let mut loose = Vec::new();
        assert_eq!(prefix.next_wanted(), Some((1, [7; 32])));
        prefix.give_up(MissReason::InFlight, &mut loose);
        assert_eq!((prefix.held(), prefix.open), (1, 0));
        assert_eq!(loose, [2]);
        assert_eq!(prefix.next_wanted(), None);
    }

    #[test]
    fn what_was_withdrawn_meanwhile_is_let_go_of_with_what_comes_after_it() {
        let mut prefix = prefetch(0, &[held(1), held(2), held(3)]);
        let mut loose = Vec::new();
        prefix.drop_held(|entry| entry == 2, &mut loose);
        assert_eq!((prefix.held(), prefix.pieces.len()), (1, 1));
        assert_eq!(loose, [2, 3]);
        let mut members = prefetch(3, &[held(1), held(2), held(3)]);
        loose.clear();
        members.drop_held(|entry| entry == 2, &mut loose);
        assert_eq!((members.held(), loose.as_slice()), (2, &[2][..]));
    }

    #[test]
    fn an_old_name_never_means_a_later_prefetch() {
        let mut all = Prefetches::default();
        let first = all.add(prefetch(0, &[WANTED]));
        assert!(all.remove(first).is_some() && all.remove(first).is_none());
        let second = all.add(prefetch(0, &[COMING]));
        assert!(all.get(first).is_none() && all.get_mut(second).is_some());
        assert_eq!((all.len(), all.next_turn()), (1, Some(first)));
    }
}
