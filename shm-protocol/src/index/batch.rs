//! Looking up many hashes of one scope with the memory latencies overlapped.
//!
//! A batch goes through three passes: hash and prefetch the home lines; find candidates and
//! prefetch their entries; compare. Each pass leaves the next one's lines on their way.

#![forbid(unsafe_code)]

use super::entry::{EntryWords, KeyWords};
use super::key::{Home, KeyHasher, hash_to_words};
use super::raw::prefetch_read;
use super::table::Table;
use crate::BlockHash;

/// Hashes per batch: about as many lines as a core can have on their way.
pub(super) const BATCH: usize = 32;

/// Result of a hash without an accepted entry.
pub(super) const MISS: u32 = u32::MAX;

/// Looks up `hashes` (at most [`BATCH`], the rest is ignored) and writes an id or [`MISS`] for
/// each. `on_candidate` hears each id whose entry is about to be compared; nearly all of them
/// become results.
#[inline]
pub(super) fn find_batch(
    table: &Table<'_>,
    hasher: &KeyHasher,
    scope: u64,
    hashes: &[BlockHash],
    accept: impl Fn(&EntryWords, &KeyWords) -> bool + Copy,
    mut on_candidate: impl FnMut(u32),
) -> [u32; BATCH] {
    let mut homes = [Home { line: 0, tag: 0 }; BATCH];
    for (home, hash) in homes.iter_mut().zip(hashes) {
        *home = hasher.home(&KeyWords {
            scope,
            hash: hash_to_words(hash),
        });
        if let Some(line) = table.line(home.line) {
            prefetch_read(line);
        }
    }

    let mut ids = [MISS; BATCH];
    for ((id, home), _) in ids.iter_mut().zip(&homes).zip(hashes) {
        if let Some(candidate) = table.first_candidate(*home) {
            *id = candidate;
            if let Some(entry) = table.entry(candidate) {
                prefetch_read(entry);
                on_candidate(candidate);
            }
        }
    }

    for ((id, home), hash) in ids.iter_mut().zip(&homes).zip(hashes) {
        if *id == MISS {
            continue;
        }
        let key = KeyWords {
            scope,
            hash: hash_to_words(hash),
        };
        if !table.entry(*id).is_some_and(|entry| accept(entry, &key)) {
            // Another key with the same tag comes first, or a change is under way.
            *id = table.find(*home, &key, accept).unwrap_or(MISS);
        }
    }
    ids
}
