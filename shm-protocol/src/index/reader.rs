//! A client's side of the index: pure memory reads, no lock, no system call.

#![forbid(unsafe_code)]

use super::batch::{self, BATCH, MISS};
use super::entry;
use super::key::{BlockKey, KeyHasher, pack_scope};
use super::layout::{
    HEADER_BYTES, HEADER_WORDS, IndexHeader, IndexLayout, OpenError, RESERVED_WORD, SEALED_WORD,
    USED_WORD, WORD_BYTES,
};
use super::memory::IndexMemory;
use super::table::Table;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::{BlockHash, BootId};

/// Reads an index that another process writes.
///
/// An answer is advice: the block may be evicted right after. Only a lease holds it.
#[derive(Debug)]
pub struct IndexReader<M> {
    memory: M,
    layout: IndexLayout,
    hasher: KeyHasher,
    boot_id: BootId,
}

impl<M: IndexMemory> IndexReader<M> {
    /// Validates the header against the bytes that are mapped and keeps a private copy of it.
    pub fn open(memory: M) -> Result<Self, OpenError> {
        let words = memory.words();
        let mapped = (words.len() * WORD_BYTES) as u64;
        if mapped < HEADER_BYTES as u64 {
            return Err(OpenError::TooShort {
                actual: mapped,
                needed: HEADER_BYTES as u64,
            });
        }
        let magic = words[0].load(Ordering::Relaxed);
        // SYNC: index-create (acquire). Whoever sees the magic sees the rest of the header.
        fence(Ordering::Acquire);
        let mut copy = [0; HEADER_WORDS];
        for (target, word) in copy.iter_mut().zip(words) {
            *target = word.load(Ordering::Relaxed);
        }
        copy[0] = magic;
        let header: IndexHeader = bytemuck::cast(copy);
        let layout = IndexLayout::from_header(&header, mapped)?;
        let hasher = KeyHasher::new(header.seed, layout.bucket_count());
        Ok(Self {
            memory,
            layout,
            hasher,
            boot_id: header.boot_id,
        })
    }

    /// The daemon start that this index belongs to; another one's answers are void.
    pub fn boot_id(&self) -> &BootId {
        &self.boot_id
    }

    /// Most blocks the index can hold.
    pub fn entry_capacity(&self) -> u32 {
        self.layout.entry_capacity()
    }

    /// Blocks in the index, sealed or not; approximate while the writer runs.
    pub fn used_entries(&self) -> u64 {
        self.header_word(USED_WORD)
    }

    /// Sealed blocks; approximate while the writer runs.
    pub fn sealed_entries(&self) -> u64 {
        self.header_word(SEALED_WORD)
    }

    /// Whether the block is sealed.
    pub fn contains(&self, key: &BlockKey) -> bool {
        let words = key.words();
        self.table()
            .find(self.hasher.home(&words), &words, entry::is_sealed_match)
            .is_some()
    }

    /// How many of `hashes`, from the first on, are sealed without a gap.
    pub fn prefix_len(&self, namespace: u32, group: u16, hashes: &[BlockHash]) -> u32 {
        let mut hits = 0;
        let mut rest = hashes;
        // A prompt with no cached prefix is common, so the first batch is small.
        let mut size = BATCH / 4;
        while !rest.is_empty() {
            let (chunk, next) = rest.split_at(size.min(rest.len()));
            let found = self.sealed_mask(namespace, group, chunk);
            let run = found.trailing_ones();
            hits += run;
            if (run as usize) < chunk.len() {
                break;
            }
            rest = next;
            size = BATCH;
        }
        hits
    }

    /// Sets bit `i % 64` of `bitmap[i / 64]` if and only if `hashes[i]` is sealed, and returns
    /// the number of bits set. Hashes beyond the bitmap's end are not looked up; words of the
    /// bitmap that no hash reaches become zero.
    pub fn membership(
        &self,
        namespace: u32,
        group: u16,
        hashes: &[BlockHash],
        bitmap: &mut [u64],
    ) -> u32 {
        bitmap.fill(0);
        let mut hits = 0;
        for (target, block) in bitmap.iter_mut().zip(hashes.chunks(u64::BITS as usize)) {
            for (half, chunk) in block.chunks(BATCH).enumerate() {
                let found = self.sealed_mask(namespace, group, chunk);
                hits += found.count_ones();
                *target |= u64::from(found) << (half * BATCH);
            }
        }
        hits
    }

    /// Bit i for each sealed `hashes[i]`, at most [`BATCH`] of them.
    #[inline]
    fn sealed_mask(&self, namespace: u32, group: u16, hashes: &[BlockHash]) -> u32 {
        const { assert!(BATCH == u32::BITS as usize) };
        let scope = pack_scope(namespace, group);
        let table = self.table();
        let accept = entry::is_sealed_match;
        let ids = batch::find_batch(&table, &self.hasher, scope, hashes, accept, |_| ());
        let mut mask = 0;
        for (i, id) in ids.iter().enumerate() {
            mask |= u32::from(*id != MISS) << i;
        }
        mask
    }

    /// A view without the entries that have no storage yet: reading a hole of a full tmpfs
    /// raises SIGBUS. An old count can only hide keys inserted since, never a key whose sealing
    /// happened before the look-up.
    #[inline]
    fn table(&self) -> Table<'_> {
        let reserved = u32::try_from(self.header_word(RESERVED_WORD)).unwrap_or(u32::MAX);
        Table::new(self.memory.words(), &self.layout, reserved)
    }

    #[inline]
    fn header_word(&self, index: usize) -> u64 {
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        self.memory.words().get(index).map_or(0, load)
    }
}
