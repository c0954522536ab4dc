//! The requests of a client from submission until their completion is consumed.
//!
//! A fixed number of slots, made once. A request id is `generation << 16 | slot + 1`, so that the
//! look-up of a completion is an index and a comparison, and an id from the past never names a
//! later request.

#![forbid(unsafe_code)]

use std::sync::Arc;

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Completion as Answer, MissReason, Op};
use pegaflow_shm::status::Status;

use super::arena::Chain;
use super::results::ResultRange;
use crate::completion::{Completion, RequestId};
use crate::cuda::{EventSlot, SignalSlot};
use crate::session::Session;

/// Ends the ready list.
const NONE: u32 = u32::MAX;
const SLOT_BITS: u32 = 16;

/// Where the bitmap of a finished membership query lies.
#[derive(Clone, Debug)]
pub(crate) struct ResultSource {
    /// The session it lies in; `None` if there is no bitmap to copy.
    pub(crate) session: Option<Arc<Session>>,
    /// The place in its result arena; `None` where the library answered by itself.
    pub(crate) range: Option<ResultRange>,
    /// Positions.
    pub(crate) positions: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Free,
    InFlight,
    Ready,
}

/// What a submission keeps until its completion.
#[derive(Debug)]
pub(crate) struct Held {
    /// The operation.
    pub(crate) op: Op,
    /// Items in the whole list.
    pub(crate) total: u32,
    /// Arena chunks.
    pub(crate) chain: Chain,
    /// Ring slots.
    pub(crate) slots: u32,
    /// Room for the bitmap.
    pub(crate) source: Option<ResultSource>,
    /// The caller's value.
    pub(crate) cookie: u64,
    /// Load: the blocks that it was to fill.
    pub(crate) blocks: Option<Box<[u32]>>,
    /// The event that it comes after; free for others once the request has finished.
    pub(crate) after: Option<EventSlot>,
    /// The word that a load raises; raised past all its steps once the request has finished.
    pub(crate) signal: Option<SignalSlot>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    phase: Phase,
    waiters: u32,
    previous: u32,
    next: u32,
    held: Held,
    answer: Answer,
}

/// All requests of one client.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Box<[Entry]>,
    free: Vec<u32>,
    generation: u64,
    ready_head: u32,
    ready_tail: u32,
}

impl Table {
    pub(crate) fn new(slots: u32) -> Table {
        let empty = |_| Entry {
            id: 0,
            phase: Phase::Free,
            waiters: 0,
            previous: NONE,
            next: NONE,
            held: Held {
                op: Op::Nop,
                total: 0,
                chain: Chain::EMPTY,
                slots: 0,
                source: None,
                cookie: 0,
                blocks: None,
                after: None,
                signal: None,
            },
            answer: Answer::zeroed(),
        };
        Table {
            entries: (0..slots).map(empty).collect(),
            free: (0..slots).rev().collect(),
            generation: 0,
            ready_head: NONE,
            ready_tail: NONE,
        }
    }

    /// Requests whose completion is not consumed.
    pub(crate) fn outstanding(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Gives a request its id; `None` if every slot is taken.
    pub(crate) fn insert(&mut self, held: Held) -> Option<u64> {
        let slot = self.free.pop()?;
        self.generation += 1;
        let id = self.generation << SLOT_BITS | u64::from(slot + 1);
        let entry = &mut self.entries[slot as usize];
        debug_assert_eq!(entry.phase, Phase::Free);
        entry.id = id;
        entry.phase = Phase::InFlight;
        entry.waiters = 0;
        entry.held = held;
        Some(id)
    }

    fn slot(&self, id: u64) -> Option<usize> {
        let slot = (id & ((1 << SLOT_BITS) - 1)).checked_sub(1)? as usize;
        let entry = self.entries.get(slot)?;
        (entry.id == id && entry.phase != Phase::Free).then_some(slot)
    }

    /// What a request holds, if it is unfinished.
    pub(crate) fn in_flight(&mut self, id: u64) -> Option<&mut Held> {
        let slot = self.slot(id)?;
        let entry = &mut self.entries[slot];
        (entry.phase == Phase::InFlight).then_some(&mut entry.held)
    }

    /// True if the request is unfinished, or finished and not consumed.
    pub(crate) fn contains(&self, id: u64) -> bool {
        self.slot(id).is_some()
    }

    /// True if the request is finished and not consumed.
    pub(crate) fn is_ready(&self, id: u64) -> bool {
        self.slot(id)
            .is_some_and(|slot| self.entries[slot].phase == Phase::Ready)
    }

    /// The status of a request that is finished and not consumed.
    pub(crate) fn answered(&self, id: u64) -> Option<Status> {
        let entry = &self.entries[self.slot(id)?];
        (entry.phase == Phase::Ready).then(|| entry.answer.status())
    }

    /// Marks an unfinished request as finished; true if somebody waits for exactly this one. What
    /// nobody waits for goes to the ready list.
    pub(crate) fn finish(&mut self, id: u64, answer: Answer) -> bool {
        let Some(slot) = self.slot(id) else {
            debug_assert!(false, "finished request {id:#x} is not in the table");
            return false;
        };
        let entry = &mut self.entries[slot];
        debug_assert_eq!(entry.phase, Phase::InFlight);
        entry.phase = Phase::Ready;
        entry.answer = answer;
        (entry.held.after, entry.held.signal) = (None, None);
        if entry.waiters > 0 {
            return true;
        }
        self.link(slot as u32);
        false
    }

    /// Ids of all unfinished requests.
    pub(crate) fn unfinished(&self) -> Vec<u64> {
        let open = self
            .entries
            .iter()
            .filter(|entry| entry.phase == Phase::InFlight);
        open.map(|entry| entry.id).collect()
    }

    /// Counts one more (or one fewer) thread that waits for this request. A finished one that
    /// nobody waits for any more goes to the ready list.
    pub(crate) fn set_waiting(&mut self, id: u64, waits: bool) {
        let Some(slot) = self.slot(id) else { return };
        let entry = &mut self.entries[slot];
        if waits {
            entry.waiters += 1;
        } else {
            entry.waiters -= 1;
            if entry.waiters == 0 && entry.phase == Phase::Ready {
                self.link(slot as u32);
            }
        }
    }

    /// Consumes this request if it is finished.
    pub(crate) fn take(&mut self, id: u64) -> Option<Completion> {
        let slot = self.slot(id)?;
        let entry = &self.entries[slot];
        if entry.phase != Phase::Ready {
            return None;
        }
        if entry.waiters == 0 {
            self.unlink(slot as u32);
        }
        Some(self.consume(slot))
    }

    /// Consumes the request that has been finished longest, of those that nobody waits for.
    pub(crate) fn take_next(&mut self) -> Option<Completion> {
        if self.ready_head == NONE {
            return None;
        }
        let slot = self.ready_head;
        self.unlink(slot);
        Some(self.consume(slot as usize))
    }

    fn consume(&mut self, slot: usize) -> Completion {
        let entry = &mut self.entries[slot];
        let answer = &entry.answer;
        let reason = MissReason::ALL.get(answer.reason as usize).copied();
        let completion = Completion {
            request: RequestId(entry.id),
            op: entry.held.op,
            status: answer.status(),
            reason: reason.unwrap_or(MissReason::None),
            count: answer.count,
            lease: answer.lease,
            bytes: answer.bytes,
            skipped: answer.skipped,
            dropped: answer.dropped,
            arg0: answer.arg0,
            daemon_ns: answer.daemon_ns,
            bitmap: None,
            cookie: entry.held.cookie,
            source: entry.held.source.take(),
            blocks: entry.held.blocks.take(),
        };
        entry.phase = Phase::Free;
        self.free.push(slot as u32);
        completion
    }

    fn link(&mut self, slot: u32) {
        let tail = std::mem::replace(&mut self.ready_tail, slot);
        let entry = &mut self.entries[slot as usize];
        (entry.previous, entry.next) = (tail, NONE);
        match tail {
            NONE => self.ready_head = slot,
            tail => self.entries[tail as usize].next = slot,
        }
    }

    fn unlink(&mut self, slot: u32) {
        let entry = &self.entries[slot as usize];
        let (previous, next) = (entry.previous, entry.next);
        match previous {
            NONE => self.ready_head = next,
            previous => self.entries[previous as usize].next = next,
        }
        match next {
            NONE => self.ready_tail = previous,
            next => self.entries[next as usize].previous = previous,
        }
    }
}

/// The answer that the library gives where no daemon does.
pub(crate) fn local_answer(op: Op, id: u64, status: Status) -> Answer {
    let mut answer = Answer::new(op, id, status);
    if op == Op::Query && !status.is_ok() {
        answer.reason = MissReason::Disconnected as u16;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Held {
        Held {
            op: Op::Nop,
            total: 0,
            chain: Chain::EMPTY,
            slots: 1,
            source: None,
            cookie: 5,
            blocks: None,
            after: None,
            signal: None,
        }
    }

    fn finish(table: &mut Table, id: u64) -> bool {
        table.finish(id, Answer::new(Op::Nop, id, Status::Ok))
    }

    #[test]
    fn an_id_from_the_past_names_nothing() {
        let mut table = Table::new(1);
        let first = table.insert(held()).unwrap();
        assert!(table.is_full() && table.insert(held()).is_none());
        assert!(!finish(&mut table, first));
        assert_eq!(table.take_next().unwrap().cookie, 5);
        let second = table.insert(held()).unwrap();
        assert_ne!(first, second);
        assert!(table.in_flight(first).is_none() && table.take(first).is_none());
        assert!(table.in_flight(second).is_some());
        for garbage in [0, 1, u64::MAX, second + 1, second ^ 1 << 40] {
            assert!(!table.contains(garbage), "{garbage:#x}");
        }
    }

    #[test]
    fn what_a_thread_waits_for_is_not_handed_to_a_poller() {
        let mut table = Table::new(4);
        let ids: Vec<u64> = (0..3).map(|_| table.insert(held()).unwrap()).collect();
        table.set_waiting(ids[1], true);
        for id in &ids {
            assert_eq!(finish(&mut table, *id), *id == ids[1]);
        }
        assert_eq!(table.take_next().unwrap().request.0, ids[0]);
        assert_eq!(table.take_next().unwrap().request.0, ids[2]);
        assert!(table.take_next().is_none());
        table.set_waiting(ids[1], false);
        assert_eq!(table.take_next().unwrap().request.0, ids[1]);
        assert_eq!(table.outstanding(), 0);
    }

    #[test]
    fn a_ready_request_can_leave_the_list_from_any_place() {
        for leave in 0..3 {
            let mut table = Table::new(3);
            let ids: Vec<u64> = (0..3).map(|_| table.insert(held()).unwrap()).collect();
            for id in &ids {
                finish(&mut table, *id);
            }
            assert!(table.take(ids[leave]).is_some());
            let rest: Vec<u64> = std::iter::from_fn(|| table.take_next())
                .map(|done| done.request.0)
                .collect();
            let expected: Vec<u64> = ids.iter().copied().filter(|id| *id != ids[leave]).collect();
            assert_eq!(rest, expected);
            let again = table.insert(held()).unwrap();
            finish(&mut table, again);
            assert_eq!(table.take_next().unwrap().request.0, again);
        }
    }
}
