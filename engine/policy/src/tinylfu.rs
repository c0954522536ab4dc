//! TinyLFU admission (Einziger, Friedman, Manes: "TinyLFU: a highly efficient cache admission
//! policy", ACM ToS 2017).
//!
//! Use counts of all content seen, held or not, are estimated in a count-min sketch of 4-bit
//! counters behind a doorkeeper (a Bloom filter that absorbs the first use, so that content seen
//! once costs no counter). New content enters a full cache only if its count exceeds the victim's.
//!
//! The paper halves every counter when a sample of uses is full, which stops the cache for
//! milliseconds. Here a hand walks the sketch and halves one word at a time, so that each counter
//! is still halved once per sample and each use pays the same.

use super::Admission;

pub(super) const NAME: &str = "tinylfu";

/// A sample is this many uses per resident block.
const SAMPLE_PER_BLOCK: u64 = 10;
/// Words of one sketch block: a cache line, which holds one counter of every row for a key.
const BLOCK_WORDS: usize = 8;
const ROWS: usize = 4;
const ROW_WORDS: usize = BLOCK_WORDS / ROWS;
const COUNTER_BITS: u32 = 4;
const COUNTER_MAX: u64 = 15;
/// All but the top bit of every counter: what remains after a shift right by one.
const HALVE_MASK: u64 = 0x7777_7777_7777_7777;

/// The frequency gate.
pub struct TinyLfu {
    sketch: Vec<u64>,
    /// One word of the doorkeeper per word of the sketch, so that one hand ages both.
    doorkeeper: Vec<u64>,
    hand: usize,
    /// Uses times sketch words, less one sample for each word that the hand aged.
    age_debt: u64,
    sample_uses: u64,
}

impl TinyLfu {
    /// A gate for a cache of at most `capacity` blocks: 8 bytes per block.
    pub fn new(capacity: u32) -> Self {
        let words = (capacity as usize / 2).next_power_of_two().max(BLOCK_WORDS);
        let mut gate = Self {
            sketch: vec![0; words],
            doorkeeper: vec![0; words],
            hand: 0,
            age_debt: 0,
            sample_uses: 0,
        };
        gate.set_resident(capacity as usize);
        gate
    }

    /// The estimated uses of the content, at most 16.
    fn estimate(&self, key_hash: u64) -> u64 {
        let spread = spread(key_hash);
        let count = (0..ROWS)
            .map(|row| {
                let (word, shift) = self.counter(spread, row);
                self.sketch[word] >> shift & COUNTER_MAX
            })
            .min()
            .unwrap_or(0);
        let (word, bits) = self.door(spread);
        count + u64::from(self.doorkeeper[word] & bits == bits)
    }

    /// Where a row's counter lies: word and shift.
    fn counter(&self, spread: u64, row: usize) -> (usize, u32) {
        let blocks = self.sketch.len() / BLOCK_WORDS;
        let block = (spread >> 32) as usize & (blocks - 1);
        let bits = (spread >> (5 * row)) as usize & 31;
        let word = block * BLOCK_WORDS + row * ROW_WORDS + bits % ROW_WORDS;
        (word, (bits / ROW_WORDS) as u32 * COUNTER_BITS)
    }

    /// The doorkeeper's word and two bits in it.
    fn door(&self, spread: u64) -> (usize, u64) {
        let mixed = spread.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        let word = (mixed >> 32) as usize & (self.doorkeeper.len() - 1);
        (word, 1 << (mixed & 63) | 1 << (mixed >> 6 & 63))
    }

    fn age(&mut self) {
        let words = self.sketch.len() as u64;
        self.age_debt += words;
        // A sample shorter than the sketch would owe several words per use; two keep it bounded.
        for _ in 0..2 {
            if self.age_debt < self.sample_uses {
                return;
            }
            self.age_debt -= self.sample_uses;
            self.sketch[self.hand] = self.sketch[self.hand] >> 1 & HALVE_MASK;
            self.doorkeeper[self.hand] = 0;
            self.hand = (self.hand + 1) & (self.sketch.len() - 1);
        }
        self.age_debt = self.age_debt.min(self.sample_uses);
    }
}

impl Admission for TinyLfu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn record(&mut self, key_hash: u64) {
        self.age();
        let spread = spread(key_hash);
        let (word, bits) = self.door(spread);
        if self.doorkeeper[word] & bits != bits {
            self.doorkeeper[word] |= bits;
            return;
        }
        for row in 0..ROWS {
            let (word, shift) = self.counter(spread, row);
            if self.sketch[word] >> shift & COUNTER_MAX < COUNTER_MAX {
                self.sketch[word] += 1 << shift;
            }
        }
    }

    fn admit(&mut self, candidate: u64, victim: u64) -> bool {
        self.estimate(candidate) > self.estimate(victim)
    }

    fn set_resident(&mut self, blocks: usize) {
        self.sample_uses = (blocks as u64).max(64) * SAMPLE_PER_BLOCK;
    }
}

/// Spreads a key hash over all 64 bits, so that callers may pass weak hashes.
fn spread(key_hash: u64) -> u64 {
    let x = (key_hash ^ key_hash >> 32).wrapping_mul(0x9FB2_1C65_1E98_DF25);
    let x = (x ^ x >> 29).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ x >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_used_often_replaces_content_used_rarely_and_never_the_reverse() {
        let mut gate = TinyLfu::new(1024);
        for _ in 0..5 {
            gate.record(1);
        }
        gate.record(2);
        assert!(gate.admit(1, 2));
        assert!(!gate.admit(2, 1));
        assert!(!gate.admit(3, 2), "never seen");
        assert!(!gate.admit(2, 2), "equal counts change nothing");
    }

    #[test]
    fn a_first_use_stays_in_the_doorkeeper() {
        let mut gate = TinyLfu::new(1024);
        gate.record(9);
        assert!(gate.sketch.iter().all(|word| *word == 0));
        assert_eq!(gate.estimate(9), 1);
        gate.record(9);
        assert_eq!(gate.estimate(9), 2);
    }

    #[test]
    fn counters_saturate() {
        let mut gate = TinyLfu::new(1 << 16);
        for _ in 0..100 {
            gate.record(5);
        }
        assert_eq!(gate.estimate(5), COUNTER_MAX + 1);
    }

    #[test]
    fn old_uses_fade_after_a_few_samples() {
        let mut gate = TinyLfu::new(256);
        for _ in 0..20 {
            gate.record(u64::MAX);
        }
        let before = gate.estimate(u64::MAX);
        for use_number in 0..256 * SAMPLE_PER_BLOCK * 6 {
            gate.record(use_number % 32);
        }
        let after = gate.estimate(u64::MAX);
        assert!(before >= 15 && after <= 4, "{before} uses became {after}");
    }

    #[test]
    fn a_sample_shorter_than_the_sketch_still_ages_a_bounded_number_of_words_per_use() {
        let mut gate = TinyLfu::new(1 << 20);
        gate.set_resident(1);
        for use_number in 0..10_000 {
            gate.record(use_number);
        }
        assert!(gate.hand <= 20_000 && gate.age_debt <= gate.sample_uses);
    }
}
