//! Rows that one process writes and others read while it does: a version word, then the row.
//!
//! An odd version says that the row is being written. A reader takes a row whose version is even
//! and the same before and after. It tries a bounded number of times, so a writer that dies in the
//! middle of a row costs its readers that row and nothing else; the next writer of the row, whoever
//! it is, makes it whole again.

#![forbid(unsafe_code)]

use crate::sync::{AtomicU64, Ordering, fence, hint};

/// Looks at a row before it is given up.
const READ_TRIES: usize = if cfg!(loom) { 2 } else { 1000 };

/// Writes a row. `words` is the version word and as many words as `row` has. One writer at a time.
pub fn write(words: &[AtomicU64], row: &[u64]) {
    let Some((version_word, words)) = words.split_first() else {
        return;
    };
    let version = version_word.load(Ordering::Relaxed) | 1;
    version_word.store(version, Ordering::Relaxed);
    // SYNC: node-row. The odd version is visible before any new word of the row.
    fence(Ordering::Release);
    for (word, value) in words.iter().zip(row) {
        word.store(*value, Ordering::Relaxed);
    }
    // SYNC: node-row. The row's words are visible before the even version.
    version_word.store(version.wrapping_add(1), Ordering::Release);
}

/// Reads a row that was not changed meanwhile; false if it was, again and again, or if its writer
/// died. Then `row` means nothing.
pub fn read(words: &[AtomicU64], row: &mut [u64]) -> bool {
    let Some((version_word, words)) = words.split_first() else {
        return false;
    };
    for _ in 0..READ_TRIES {
        let before = version_word.load(Ordering::Relaxed);
        // SYNC: node-row. A fence rather than an acquire load, because only relaxed loads are
        // guaranteed on a read-only mapping.
        fence(Ordering::Acquire);
        for (value, word) in row.iter_mut().zip(words) {
            *value = word.load(Ordering::Relaxed);
        }
        // SYNC: node-row. Whoever saw a new word of the row sees its odd version below.
        fence(Ordering::Acquire);
        if before & 1 == 0 && version_word.load(Ordering::Relaxed) == before {
            return true;
        }
        hint::spin_loop();
    }
    false
}
