//! A set of numbered slots from which the lowest free one is found in constant time.
//!
//! A tree of bit words: a set bit at the bottom is a free slot, a set bit above says that the word
//! below it is not zero. Four levels reach 16 million slots.

#![forbid(unsafe_code)]

const BITS: usize = u64::BITS as usize;

/// Slots numbered from 0, each free or taken.
pub(super) struct Slots {
    /// From the bottom to a top of one word.
    levels: Vec<Box<[u64]>>,
    count: u32,
    free: u32,
}

impl Slots {
    /// `count` free slots; `count` is not 0.
    pub(super) fn new(count: u32) -> Self {
        assert!(count > 0, "a slot set has at least one slot");
        let mut levels = Vec::new();
        let mut bits = count as usize;
        loop {
            levels.push(ones(bits));
            bits = bits.div_ceil(BITS);
            if bits == 1 {
                return Self {
                    levels,
                    count,
                    free: count,
                };
            }
        }
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn free(&self) -> u32 {
        self.free
    }

    pub(super) fn taken(&self) -> u32 {
        self.count - self.free
    }

    /// Whether `slot` exists and is free.
    pub(super) fn is_free(&self, slot: u32) -> bool {
        slot < self.count && self.levels[0][slot as usize / BITS] >> (slot as usize % BITS) & 1 == 1
    }

    /// Takes the lowest free slot.
    pub(super) fn take_lowest(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let mut at = 0;
        for level in self.levels.iter().rev() {
            debug_assert!(level[at] != 0, "a set bit above promises a set bit below");
            at = at * BITS + level[at].trailing_zeros() as usize;
        }
        self.clear(at);
        Some(at as u32)
    }

    /// Takes `slot`; false if it is taken already or does not exist.
    pub(super) fn take(&mut self, slot: u32) -> bool {
        let free = self.is_free(slot);
        if free {
            self.clear(slot as usize);
        }
        free
    }

    /// Gives `slot` back; false if it is free already or does not exist.
    pub(super) fn put(&mut self, slot: u32) -> bool {
        if slot >= self.count || self.is_free(slot) {
            return false;
        }
        let mut at = slot as usize;
        for level in &mut self.levels {
            let word = &mut level[at / BITS];
            let was_zero = *word == 0;
            *word |= 1 << (at % BITS);
            if !was_zero {
                break;
            }
            at /= BITS;
        }
        self.free += 1;
        true
    }

    /// The taken slots, lowest first.
    pub(super) fn iter_taken(&self) -> impl Iterator<Item = u32> + '_ {
        let count = self.count as usize;
        self.levels[0]
            .iter()
            .enumerate()
            .flat_map(move |(word_at, word)| {
                let base = word_at * BITS;
                let mut taken = !word & low_bits(count - base);
                std::iter::from_fn(move || {
                    let bit = (taken != 0).then(|| taken.trailing_zeros())?;
                    taken &= taken - 1;
                    Some(base as u32 + bit)
                })
            })
    }

    fn clear(&mut self, slot: usize) {
        let mut at = slot;
        for level in &mut self.levels {
            let word = &mut level[at / BITS];
            *word &= !(1 << (at % BITS));
            if *word != 0 {
                break;
            }
            at /= BITS;
        }
        self.free -= 1;
    }
}

/// A word with the lowest `bits` bits set, all of them from 64 on.
fn low_bits(bits: usize) -> u64 {
    if bits >= BITS {
        u64::MAX
    } else {
        (1 << bits) - 1
    }
}

fn ones(bits: usize) -> Box<[u64]> {
    (0..bits.div_ceil(BITS))
        .map(|word| low_bits(bits - word * BITS))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_slot_is_handed_out_once_lowest_first() {
        for count in [1, 2, 63, 64, 65, 4095, 4096, 4097, 131_072, 300_000] {
            let mut slots = Slots::new(count);
            for expected in 0..count {
                assert_eq!(slots.take_lowest(), Some(expected));
            }
            assert_eq!((slots.take_lowest(), slots.free()), (None, 0));
            assert!(slots.put(count - 1) && !slots.put(count - 1) && !slots.put(count));
            assert_eq!(slots.take_lowest(), Some(count - 1));
        }
    }

    proptest! {
        #[test]
        fn the_set_equals_its_model(
            count in 1..9000_u32,
            steps in prop::collection::vec((0..3_u8, any::<prop::sample::Index>()), 0..300),
        ) {
            let mut slots = Slots::new(count);
            let mut free: BTreeSet<u32> = (0..count).collect();
            for (what, index) in steps {
                let slot = index.index(count as usize) as u32;
                match what {
                    0 => assert_eq!(slots.take_lowest(), free.pop_first()),
                    1 => assert_eq!(slots.take(slot), free.remove(&slot)),
                    _ => assert_eq!(slots.put(slot), free.insert(slot)),
                }
                assert_eq!(slots.is_free(slot), free.contains(&slot));
                assert_eq!(slots.free() as usize, free.len());
            }
            let taken: Vec<u32> = (0..count).filter(|slot| !free.contains(slot)).collect();
            assert_eq!(slots.iter_taken().collect::<Vec<_>>(), taken);
        }
    }
}
