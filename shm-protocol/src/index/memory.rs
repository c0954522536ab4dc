//! What an index lies in: words that two sides access atomically.

#![forbid(unsafe_code)]

use super::layout::{IndexLayout, WORD_BYTES};
use crate::sync::{Arc, AtomicU64, Ordering};

/// Memory that holds an index. The algorithms see nothing else, so that the same text runs over
/// a mapping, over the heap and over loom's atomics.
pub trait IndexMemory {
    /// All words, from the file's first byte on. Must be the same words at every call; a
    /// shorter answer than the first one gives misses, never an access outside.
    fn words(&self) -> &[AtomicU64];
}

/// Memory that may be written: the marker keeps a writer off a read-only mapping at compile time.
pub trait WritableIndexMemory: IndexMemory {}

/// An index in private memory: for tests, models, and engines that need no readers elsewhere.
#[derive(Debug)]
pub struct HeapMemory {
    words: Box<[AtomicU64]>,
}

impl HeapMemory {
    /// Zeroed memory for an index of this layout.
    pub fn for_layout(layout: &IndexLayout) -> Self {
        let count = layout.total_bytes() as usize / WORD_BYTES;
        Self {
            words: (0..count).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Memory with given words, whatever they are; a test feeds a reader garbage with it.
    pub fn from_words(words: &[u64]) -> Self {
        Self {
            words: words.iter().map(|&word| AtomicU64::new(word)).collect(),
        }
    }

    /// A copy of the first `count` words.
    pub fn snapshot(&self, count: usize) -> Vec<u64> {
        self.words
            .iter()
            .take(count)
            .map(|word| word.load(Ordering::Relaxed))
            .collect()
    }
}

impl IndexMemory for HeapMemory {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }
}

impl WritableIndexMemory for HeapMemory {}

impl<M: IndexMemory> IndexMemory for Arc<M> {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

impl<M: WritableIndexMemory> WritableIndexMemory for Arc<M> {}

impl<M: IndexMemory> IndexMemory for &M {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

impl<M: WritableIndexMemory> WritableIndexMemory for &M {}
