//! Which chunk of a segment's table is written next.

#![forbid(unsafe_code)]

use crate::format::{RECORDS_PER_CHUNK, Record};

/// The table of a segment that is being written.
///
/// No chunk that counts is ever written over. A chunk that is not full is followed by one, in
/// another slot, that has its records again and more; only when that is durable is the first one's
/// slot free. The lowest free slot is taken, so that who reads a table can stop early.
#[derive(Debug, Default)]
pub(crate) struct TableWriter {
    /// The slots with full chunks.
    full: Vec<bool>,
    /// The durable chunk that is not full.
    tail: Option<Tail>,
    /// Slots of the commit under way; the tail's records are in the first of them.
    begun: Vec<u32>,
}

#[derive(Debug)]
struct Tail {
    slot: u32,
    records: Vec<Record>,
}

/// The chunks to write for some records. It takes effect when they are durable.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Slot and records of each.
    pub chunks: Vec<(u32, Vec<Record>)>,
}

impl TableWriter {
    /// A table in which an empty chunk at slot 0 has opened the segment's generation.
    pub fn opened() -> Self {
        Self {
            full: Vec::new(),
            tail: Some(Tail {
                slot: 0,
                records: Vec::new(),
            }),
            begun: Vec::new(),
        }
    }

    /// Records that the next plan writes again.
    fn kept(&self) -> &[Record] {
        match &self.tail {
            Some(tail) if self.begun.is_empty() => &tail.records,
            _ => &[],
        }
    }

    /// How many more records fit that many chunks.
    pub fn room_in(&self, chunks: usize) -> usize {
        (chunks * RECORDS_PER_CHUNK).saturating_sub(self.kept().len())
    }

    /// Chooses chunks for `records` more records. A commit may do so several times if all plans but
    /// the last fill their chunks ([`Self::room_in`]).
    pub fn plan(&mut self, records: &[Record]) -> Plan {
        let all: Vec<Record> = self.kept().iter().chain(records).copied().collect();
        let tail_slot = self.tail.as_ref().map(|tail| tail.slot);
        let mut slots = (0..).filter(|&slot| {
            Some(slot) != tail_slot
                && !self.full.get(slot as usize).copied().unwrap_or(false)
                && !self.begun.contains(&slot)
        });
        let chunks: Vec<(u32, Vec<Record>)> = all
            .chunks(RECORDS_PER_CHUNK)
            .map(|records| (slots.next().unwrap_or(u32::MAX), records.to_vec()))
            .collect();
        self.begun.extend(chunks.iter().map(|&(slot, _)| slot));
        Plan { chunks }
    }

    /// The commit under way has failed: its slots are free again.
    pub fn abandon(&mut self) {
        self.begun.clear();
    }

    /// Takes in that the chunks of a plan are durable.
    pub fn apply(&mut self, plan: Plan) {
        self.begun.clear();
        self.tail = None;
        for (slot, records) in plan.chunks {
            if records.len() < RECORDS_PER_CHUNK {
                self.tail = Some(Tail { slot, records });
                continue;
            }
            let slot = slot as usize;
            if self.full.len() <= slot {
                self.full.resize(slot + 1, false);
            }
            self.full[slot] = true;
        }
    }
}
