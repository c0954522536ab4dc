//! Bucket lines and entries as slices, and the probe over them that reader and writer share.

#![forbid(unsafe_code)]

use super::entry::{EntryWords, KeyWords};
use super::key::Home;
use super::layout::{IndexLayout, SLOTS_PER_LINE, WORDS};
use crate::sync::{AtomicU64, Ordering};

/// The eight words of a bucket line.
pub(super) type LineWords = [AtomicU64; WORDS];

/// Word of a line that counts the keys that probed past it.
const OVERFLOW: usize = SLOTS_PER_LINE;

/// A view of an index for one call. Slices bound every access; a view over memory that is
/// shorter than its layout is empty.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    lines: &'a [LineWords],
    entries: &'a [EntryWords],
    max_probe_lines: u32,
}

/// Matching slots of one line: bit i for slot i.
#[inline]
fn match_tag(line: &LineWords, tag: u32) -> u32 {
    let mut mask = 0;
    for (i, slot) in line[..SLOTS_PER_LINE].iter().enumerate() {
        let slot = slot.load(Ordering::Relaxed);
        mask |= u32::from((slot >> 32) as u32 == tag) << i;
    }
    mask
}

#[inline]
fn slot_id(line: &LineWords, slot: u32) -> Option<u32> {
    (line[slot as usize].load(Ordering::Relaxed) as u32).checked_sub(1)
}

#[inline]
fn slot_word(tag: u32, id: u32) -> u64 {
    // Ids stay below 2^31, so id + 1 fits.
    u64::from(tag) << 32 | u64::from(id + 1)
}

impl<'a> Table<'a> {
    /// View of the lines and of the first `entry_count` entries.
    #[inline]
    pub(super) fn new(words: &'a [AtomicU64], layout: &IndexLayout, entry_count: u32) -> Self {
        let lines = words.get(layout.line_words()).unwrap_or_default();
        let entries = words
            .get(layout.entry_words(entry_count))
            .unwrap_or_default();
        Self {
            lines: lines.as_chunks().0,
            entries: entries.as_chunks().0,
            max_probe_lines: layout.max_probe_lines(),
        }
    }

    #[inline]
    pub(super) fn line(&self, index: u32) -> Option<&'a LineWords> {
        self.lines.get(index as usize)
    }

    #[inline]
    pub(super) fn entry(&self, id: u32) -> Option<&'a EntryWords> {
        self.entries.get(id as usize)
    }

    #[inline]
    fn line_after(&self, index: u32) -> u32 {
        if index as usize + 1 >= self.lines.len() {
            0
        } else {
            index + 1
        }
    }

    /// First id in probe order whose slot carries the tag: a hint, not yet compared.
    #[inline]
    pub(super) fn first_candidate(&self, home: Home) -> Option<u32> {
        let mut index = home.line;
        for _ in 0..self.max_probe_lines {
            let line = self.line(index)?;
            let mask = match_tag(line, home.tag);
            if mask != 0 {
                return slot_id(line, mask.trailing_zeros());
            }
            if line[OVERFLOW].load(Ordering::Relaxed) == 0 {
                return None;
            }
            index = self.line_after(index);
        }
        None
    }

    /// The id whose entry `accept`s the key. At most `MAX_PROBE_LINES` lines are read.
    pub(super) fn find(
        &self,
        home: Home,
        key: &KeyWords,
        accept: impl Fn(&EntryWords, &KeyWords) -> bool,
    ) -> Option<u32> {
        let mut index = home.line;
        for _ in 0..self.max_probe_lines {
            let line = self.line(index)?;
            let mut mask = match_tag(line, home.tag);
            while mask != 0 {
                let id = slot_id(line, mask.trailing_zeros());
                if let Some(entry) = id.and_then(|id| self.entry(id))
                    && accept(entry, key)
                {
                    return id;
                }
                mask &= mask - 1;
            }
            if line[OVERFLOW].load(Ordering::Relaxed) == 0 {
                return None;
            }
            index = self.line_after(index);
        }
        None
    }

    /// Writer: an empty slot for a key that is not in the table.
    pub(super) fn vacancy(&self, home: Home) -> Option<Place> {
        let mut index = home.line;
        for passed in 0..self.max_probe_lines {
            let line = self.line(index)?;
            let is_empty = |slot: &AtomicU64| slot.load(Ordering::Relaxed) == 0;
            if let Some(slot) = line[..SLOTS_PER_LINE].iter().position(is_empty) {
                return Some(Place {
                    home,
                    line: index,
                    slot,
                    passed,
                });
            }
            index = self.line_after(index);
        }
        None
    }

    /// Writer: the slot that names entry `id`.
    pub(super) fn place_of(&self, home: Home, id: u32) -> Option<Place> {
        let wanted = slot_word(home.tag, id);
        let mut index = home.line;
        for passed in 0..self.max_probe_lines {
            let line = self.line(index)?;
            let is_wanted = |slot: &AtomicU64| slot.load(Ordering::Relaxed) == wanted;
            if let Some(slot) = line[..SLOTS_PER_LINE].iter().position(is_wanted) {
                return Some(Place {
                    home,
                    line: index,
                    slot,
                    passed,
                });
            }
            index = self.line_after(index);
        }
        None
    }

    /// Writer: fills a vacancy. The passed lines count the key first, so a line on a key's way
    /// never reads zero while the key is there.
    pub(super) fn fill(&self, place: &Place, id: u32) {
        self.count_passage(place, 1);
        self.store_slot(place, slot_word(place.home.tag, id));
    }

    /// Writer: empties a slot.
    pub(super) fn clear(&self, place: &Place) {
        self.store_slot(place, 0);
        self.count_passage(place, u64::MAX);
    }

    fn store_slot(&self, place: &Place, word: u64) {
        if let Some(line) = self.line(place.line) {
            // A hint needs no ordering: the entry decides.
            line[place.slot].store(word, Ordering::Relaxed);
        }
    }

    /// Adds `change` (1, or -1 in two's complement) on each line between home and the slot.
    fn count_passage(&self, place: &Place, change: u64) {
        let mut index = place.home.line;
        for _ in 0..place.passed {
            if let Some(line) = self.line(index) {
                let count = line[OVERFLOW].load(Ordering::Relaxed);
                line[OVERFLOW].store(count.wrapping_add(change), Ordering::Relaxed);
            }
            index = self.line_after(index);
        }
    }
}

/// A slot found by a probe.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    home: Home,
    line: u32,
    slot: usize,
    passed: u32,
}
