//! What the tests of the index share.

#![forbid(unsafe_code)]

use core::convert::Infallible;

use super::{BlockKey, HeapMemory, IndexLayout, IndexWriter};
use crate::BlockHash;
use crate::sync::Arc;

pub(super) const NAMESPACE: u32 = 7;
pub(super) const GROUP: u16 = 2;
pub(super) const BOOT_ID: [u8; 16] = *b"0123456789abcdef";

/// A hash that looks random and is a function of `number` (splitmix64, four outputs).
pub(super) fn hash(number: u64) -> BlockHash {
    let mut hash = [0; 32];
    for (i, word) in hash.chunks_exact_mut(8).enumerate() {
        let mut mixed = (number * 4 + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    hash
}

pub(super) fn hashes(numbers: core::ops::Range<u64>) -> Vec<BlockHash> {
    numbers.map(hash).collect()
}

pub(super) fn key(number: u64) -> BlockKey {
    BlockKey::new(NAMESPACE, GROUP, &hash(number))
}

/// An empty index on the heap with all entries reserved.
pub(super) fn writer(layout: IndexLayout) -> (Arc<HeapMemory>, IndexWriter<Arc<HeapMemory>>) {
    let memory = Arc::new(HeapMemory::for_layout(&layout));
    let mut writer = IndexWriter::create(memory.clone(), layout, BOOT_ID, 42).unwrap();
    writer
        .reserve(layout.entry_capacity(), |_| Ok::<_, Infallible>(()))
        .unwrap();
    (memory, writer)
}

/// [`writer`] for `IndexLayout::for_capacity(capacity)`.
pub(super) fn writer_for(capacity: u32) -> (Arc<HeapMemory>, IndexWriter<Arc<HeapMemory>>) {
    writer(IndexLayout::for_capacity(capacity).unwrap())
}
