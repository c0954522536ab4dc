//! The segments of a shard: which one is written, which ones are empty, which one is given up next.
//!
//! ```text
//! Blank ──────────────────────────────┐
//!   (never used)                      v
//! Dirty ── opener written, synced ─> Spare ──> Open ── full ──> Closed ── given up ──> Dirty
//! ```
//!
//! The opener is an empty table chunk of a new generation. It is durable before the first page is
//! written, so that no table of an earlier use can vouch for overwritten bytes.

use std::collections::VecDeque;

use pegaflow_policy::EvictionPolicy;

use super::table::TableWriter;
use crate::format::{Geometry, align_up};

/// Empty segments that are kept ready at least.
const SPARES_MIN: usize = 2;
/// So many at most: what is written while one is made ready.
const SPARES_MAX: usize = 8;
/// One segment in so many is kept ready.
const SPARES_PART: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Its table is empty: it was never used.
    Blank,
    /// Nothing in it counts any more, but its table may say otherwise.
    Dirty,
    /// Its opener is on the way.
    Opening,
    /// Ready to be written.
    Spare,
    /// Being written.
    Open,
    /// Written.
    Closed,
}

#[derive(Debug)]
struct Segment {
    state: State,
    generation: u64,
    /// Where the next page goes.
    cursor: u32,
    records: u32,
    live_pages: u32,
    live_bytes: u64,
    /// Pages being read.
    readers: u32,
    /// Pages that are being written, or whose records are neither durable nor given up.
    unsettled: u32,
    /// Blocks with pages here (number, write id), dead ones among them.
    blocks: Vec<(u32, u64)>,
    table: TableWriter,
}

/// All segments of a shard.
pub(crate) struct Segments {
    all: Vec<Segment>,
    geometry: Geometry,
    policy: Box<dyn EvictionPolicy>,
    next_generation: u64,
    open: Option<u32>,
    blank: VecDeque<u32>,
    spare: VecDeque<u32>,
    dirty: VecDeque<u32>,
    opening: usize,
    /// Empty segments that are kept ready.
    spares: usize,
    /// Segments that a block waits for beyond the spare ones.
    wanted: usize,
}

impl Segments {
    pub fn new(geometry: &Geometry, policy: Box<dyn EvictionPolicy>) -> Self {
        let segment = || Segment {
            state: State::Blank,
            generation: 0,
            cursor: 0,
            records: 0,
            live_pages: 0,
            live_bytes: 0,
            readers: 0,
            unsettled: 0,
            blocks: Vec::new(),
            table: TableWriter::default(),
        };
        Self {
            all: (0..geometry.segments).map(|_| segment()).collect(),
            geometry: *geometry,
            policy,
            next_generation: 1,
            open: None,
            blank: (0..geometry.segments).collect(),
            spare: VecDeque::new(),
            dirty: VecDeque::new(),
            opening: 0,
            spares: (geometry.segments as usize / SPARES_PART).clamp(SPARES_MIN, SPARES_MAX),
            wanted: 0,
        }
    }

    fn at(&mut self, segment: u32) -> &mut Segment {
        &mut self.all[segment as usize]
    }

    pub fn generation(&self, segment: u32) -> u64 {
        self.all[segment as usize].generation
    }

    pub fn table(&mut self, segment: u32) -> &mut TableWriter {
        &mut self.at(segment).table
    }

    /// Notes a use of something in a segment.
    pub fn touch(&mut self, segment: u32) {
        self.policy.touch(segment);
    }

    fn fits(&self, records: u32, cursor: u32, bytes: u32) -> bool {
        records < self.geometry.records_max()
            && u64::from(cursor) + u64::from(align_up(bytes))
                <= u64::from(self.geometry.segment_bytes)
    }

    /// Whether pages of these lengths have a place now. If not, segments are given up for them.
    pub fn have_room(&mut self, pages: impl Iterator<Item = u32>) -> bool {
        let (mut records, mut cursor) = match self.open {
            Some(open) => {
                let open = &self.all[open as usize];
                (open.records, open.cursor)
            }
            None => (u32::MAX, 0),
        };
        let mut fresh = 0;
        for bytes in pages {
            if !self.fits(records, cursor, bytes) {
                fresh += 1;
                (records, cursor) = (0, 0);
            }
            records += 1;
            cursor += align_up(bytes);
        }
        let have = self.spare.len() + self.blank.len();
        self.wanted = if fresh > have { fresh } else { 0 };
        fresh <= have
    }

    /// Gives a page its place: segment and offset. [`Self::have_room`] said that there is one.
    pub fn allocate(&mut self, bytes: u32) -> (u32, u32) {
        let segment = match self.open {
            Some(open)
                if self.fits(
                    self.all[open as usize].records,
                    self.all[open as usize].cursor,
                    bytes,
                ) =>
            {
                open
            }
            _ => self.open_next(),
        };
        let entry = self.at(segment);
        let offset = entry.cursor;
        entry.cursor += align_up(bytes);
        entry.records += 1;
        entry.live_pages += 1;
        entry.live_bytes += u64::from(bytes);
        entry.unsettled += 1;
        (segment, offset)
    }

    /// Notes that a block has a page in a segment.
    pub fn holds(&mut self, segment: u32, block: u32, write_id: u64) {
        let blocks = &mut self.at(segment).blocks;
        if blocks.last() != Some(&(block, write_id)) {
            blocks.push((block, write_id));
        }
    }

    fn open_next(&mut self) -> u32 {
        if let Some(full) = self.open.take() {
            self.at(full).state = State::Closed;
            self.look_at_closed(full);
        }
        let next = self
            .spare
            .pop_front()
            .or_else(|| self.blank.pop_front())
            .expect("the caller asked whether there is room");
        if self.at(next).state == State::Blank {
            self.at(next).generation = self.next_generation;
            self.next_generation += 1;
        }
        self.at(next).state = State::Open;
        self.open = Some(next);
        next
    }

    /// A closed segment can leave once everything in it is settled, and does at once if nothing in
    /// it is left.
    fn look_at_closed(&mut self, segment: u32) {
        let entry = &self.all[segment as usize];
        if entry.state != State::Closed || entry.unsettled > 0 {
            return;
        }
        if entry.live_pages > 0 {
            if !self.policy.contains(segment) {
                self.policy.insert(segment, u64::from(segment));
            }
            self.at(segment).table = TableWriter::default();
        } else if entry.readers == 0 {
            self.empty(segment);
        }
    }

    fn empty(&mut self, segment: u32) {
        self.policy.remove(segment);
        let entry = self.at(segment);
        entry.state = State::Dirty;
        entry.blocks = Vec::new();
        entry.table = TableWriter::default();
        self.dirty.push_back(segment);
    }

    /// A page of a segment is needed no more.
    pub fn page_died(&mut self, segment: u32, bytes: u32) {
        let entry = self.at(segment);
        entry.live_pages -= 1;
        entry.live_bytes -= u64::from(bytes);
        self.look_at_closed(segment);
    }

    /// A page's record is durable, or never will be.
    pub fn settle(&mut self, segment: u32) {
        self.at(segment).unsettled -= 1;
        self.look_at_closed(segment);
    }

    pub fn reader_came(&mut self, segment: u32) {
        self.at(segment).readers += 1;
    }

    pub fn reader_left(&mut self, segment: u32) {
        self.at(segment).readers -= 1;
        self.look_at_closed(segment);
    }

    /// How many empty segments have to be made ready.
    fn shortage(&self) -> usize {
        let have = self.spare.len() + self.blank.len() + self.opening;
        self.spares.max(self.wanted).saturating_sub(have)
    }

    /// A segment whose opener is to be written now, with its new generation.
    pub fn next_opener(&mut self) -> Option<(u32, u64)> {
        if self.shortage() == 0 {
            return None;
        }
        let segment = self.dirty.pop_front()?;
        let generation = self.next_generation;
        self.next_generation += 1;
        let entry = self.at(segment);
        entry.state = State::Opening;
        entry.generation = generation;
        self.opening += 1;
        Some((segment, generation))
    }

    /// The blocks (number, write id) of the segment to give up next, if one has to be.
    pub fn next_victim(&mut self) -> Option<Vec<(u32, u64)>> {
        if self.shortage() <= self.dirty.len() {
            return None;
        }
        let all = &self.all;
        let victim = self
            .policy
            .victim(&mut |segment| all[segment as usize].readers == 0)?;
        Some(std::mem::take(&mut self.at(victim).blocks))
    }

    /// A segment's opener is durable: it can be written.
    pub fn opened(&mut self, segment: u32) {
        self.opening -= 1;
        let entry = self.at(segment);
        entry.state = State::Spare;
        entry.cursor = 0;
        entry.records = 0;
        entry.table = TableWriter::opened();
        self.spare.push_back(segment);
    }

    /// A segment's opener could not be written.
    pub fn opener_failed(&mut self, segment: u32) {
        self.opening -= 1;
        self.at(segment).state = State::Dirty;
        self.dirty.push_back(segment);
    }

    /// Takes in what the file has of a segment before anything is written. `generation` is zero if
    /// its table is blank.
    pub fn found(&mut self, segment: u32, generation: u64) {
        self.next_generation = self.next_generation.max(generation.saturating_add(1));
        let end = self.geometry.segment_bytes;
        let entry = self.at(segment);
        entry.generation = generation;
        entry.state = State::Closed;
        entry.cursor = end;
        if let Some(at) = self.blank.iter().position(|&blank| blank == segment) {
            self.blank.remove(at);
        }
    }

    /// Takes in a page of a block that the file has.
    pub fn adopt(&mut self, segment: u32, bytes: u32, block: u32, write_id: u64) {
        let entry = self.at(segment);
        entry.live_pages += 1;
        entry.live_bytes += u64::from(bytes);
        self.holds(segment, block, write_id);
    }

    /// All pages of the file are taken in: the oldest segment leaves first.
    pub fn adopted(&mut self) {
        let mut closed: Vec<u32> = (0..self.geometry.segments)
            .filter(|&segment| self.all[segment as usize].state == State::Closed)
            .collect();
        closed.sort_by_key(|&segment| self.all[segment as usize].generation);
        for segment in closed {
            self.look_at_closed(segment);
        }
    }
}
