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
        }
    }

    /// How many more records fit that many chunks.
    pub fn room_in(&self, chunks: usize) -> usize {
        let kept = self.tail.as_ref().map_or(0, |tail| tail.records.len());
        (chunks * RECORDS_PER_CHUNK).saturating_sub(kept)
    }

    /// Chooses chunks for `records` more records.
    pub fn plan(&self, records: &[Record]) -> Plan {
        let kept = self.tail.as_ref().map_or(&[][..], |tail| &tail.records);
        let all: Vec<Record> = kept.iter().chain(records).copied().collect();
        let tail_slot = self.tail.as_ref().map(|tail| tail.slot);
        let mut slots = (0..).filter(|&slot| {
            Some(slot) != tail_slot && !self.full.get(slot as usize).copied().unwrap_or(false)
        });
        let chunks = all
            .chunks(RECORDS_PER_CHUNK)
            .map(|records| (slots.next().unwrap_or(u32::MAX), records.to_vec()))
            .collect();
        Plan { chunks }
    }

    /// Takes in that the chunks of a plan are durable.
    pub fn apply(&mut self, plan: Plan) {
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
