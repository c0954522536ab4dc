//! One entry and its sequence protocol.
//!
//! Words: 0 version and state, 1 scope (namespace, group), 2..6 hash, 6..8 zero. The version in
//! the upper 56 bits of word 0 grows with each change of state, so a state word never repeats.
//!
//! Why a reader that accepts has compared the sealed key and no mixture: it read the same state
//! word `w` = (version, sealed) twice. All key words of that version were stored before `w` was
//! released, and the fence after the first load acquires it, so none of its key loads returns an
//! older word. If one returned a newer word, of the entry's next use, the fence before the
//! second load makes that load see the vacated state stored before it, which is not `w`.

#![forbid(unsafe_code)]

use super::layout::WORDS;
use crate::sync::{AtomicU64, Ordering, fence};

/// The eight words of an entry in shared memory.
pub type EntryWords = [AtomicU64; WORDS];

/// A key as an entry stores it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyWords {
    /// Namespace in bits 0..32, group in bits 32..48.
    pub scope: u64,
    /// The hash, little-endian.
    pub hash: [u64; 4],
}

const STATE: usize = 0;
const SCOPE: usize = 1;
const HASH: usize = 2;

const STATE_BITS: u32 = 8;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const FREE: u64 = 0;
const UNSEALED: u64 = 1;
const SEALED: u64 = 2;

#[inline]
fn next(word: u64, state: u64) -> u64 {
    ((word >> STATE_BITS).wrapping_add(1) << STATE_BITS) | state
}

fn advance(entry: &EntryWords, state: u64) {
    let word = entry[STATE].load(Ordering::Relaxed);
    // SYNC: index-entry-publish (release). Everything before a block's sealing is visible to
    // whoever sees it sealed.
    entry[STATE].store(next(word, state), Ordering::Release);
}

/// Writer: gives a free entry its key; it is then in use and unsealed.
pub fn publish(entry: &EntryWords, key: &KeyWords) {
    // A fresh entry or one that `vacate` left: no reader accepts it. SYNC: index-entry-reuse
    // (release): whoever sees a key word stored below sees the vacated state, or a later one.
    fence(Ordering::Release);
    entry[SCOPE].store(key.scope, Ordering::Relaxed);
    for (word, value) in entry[HASH..].iter().zip(key.hash) {
        word.store(value, Ordering::Relaxed);
    }
    advance(entry, UNSEALED);
}

/// Writer: makes the entry a hit.
pub fn seal(entry: &EntryWords) {
    advance(entry, SEALED);
}

/// Writer: withdraws a sealed entry; it stays in use.
pub fn unseal(entry: &EntryWords) {
    advance(entry, UNSEALED);
}

/// Writer: takes the entry out of use. Its key words stay until the next use.
pub fn vacate(entry: &EntryWords) {
    advance(entry, FREE);
}

/// Writer: whether the entry holds a key.
#[inline]
pub(super) fn is_in_use(entry: &EntryWords) -> bool {
    entry[STATE].load(Ordering::Relaxed) & STATE_MASK != FREE
}

/// Writer: whether the entry is sealed.
#[inline]
pub(super) fn is_sealed(entry: &EntryWords) -> bool {
    entry[STATE].load(Ordering::Relaxed) & STATE_MASK == SEALED
}

/// Writer: the entry's key.
pub(super) fn key_words(entry: &EntryWords) -> KeyWords {
    KeyWords {
        scope: entry[SCOPE].load(Ordering::Relaxed),
        hash: [0, 1, 2, 3].map(|i| entry[HASH + i].load(Ordering::Relaxed)),
    }
}

/// Whether the key words are these, without regard to the state. The whole answer for the
/// writer, which takes an entry out of its bucket line before it vacates it.
#[inline]
pub(super) fn is_key_match(entry: &EntryWords, key: &KeyWords) -> bool {
    let mut difference = entry[SCOPE].load(Ordering::Relaxed) ^ key.scope;
    for i in 0..key.hash.len() {
        difference |= entry[HASH + i].load(Ordering::Relaxed) ^ key.hash[i];
    }
    difference == 0
}

/// Reader: whether the entry is sealed with exactly this key.
#[inline]
pub fn is_sealed_match(entry: &EntryWords, key: &KeyWords) -> bool {
    let before = entry[STATE].load(Ordering::Relaxed);
    if before & STATE_MASK != SEALED {
        return false;
    }
    // SYNC: index-entry-publish (acquire). A fence rather than an acquire load, because only
    // relaxed loads are guaranteed on a read-only mapping.
    fence(Ordering::Acquire);
    let is_match = is_key_match(entry, key);
    // SYNC: index-entry-reuse (acquire).
    fence(Ordering::Acquire);
    is_match && entry[STATE].load(Ordering::Relaxed) == before
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_match_needs_every_word_of_the_key() {
        let entry: EntryWords = Default::default();
        let key = KeyWords {
            scope: 1,
            hash: [2, 3, 4, 5],
        };
        publish(&entry, &key);
        seal(&entry);
        assert!(is_key_match(&entry, &key) && is_sealed_match(&entry, &key));
        for word in 0..5 {
            let mut other = key;
            match word {
                0 => other.scope ^= 1 << 40,
                _ => other.hash[word - 1] ^= 1 << 63,
            }
            assert!(!is_key_match(&entry, &other), "word {word}");
            assert!(!is_sealed_match(&entry, &other), "word {word}");
        }
    }
}
