//! The daemon's side of the index: the only writer, and the daemon's own look-up table.

#![forbid(unsafe_code)]

use core::ops::Range;

use super::batch::{self, BATCH, MISS};
use super::entry::{self, EntryWords};
use super::key::{BlockKey, EntryId, KeyHasher, pack_scope};
use super::layout::{
    ENTRY_BYTES, HEADER_BYTES, HEADER_WORDS, IndexLayout, PAGE_BYTES, RESERVED_WORD, SEALED_WORD,
    USED_WORD, WORD_BYTES,
};
use super::memory::WritableIndexMemory;
use super::raw::prefetch_read;
use super::table::Table;
use crate::sync::Ordering;
use crate::{BlockHash, BootId};

/// Why no index was created.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CreateError {
    /// The memory is smaller than the layout.
    #[error("index memory has {actual} bytes, the layout needs {needed}: enlarge the file")]
    TooShort {
        /// Bytes there are.
        actual: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// Something lies there already.
    #[error("index memory is not zeroed at byte {offset}: create the file anew")]
    NotZeroed {
        /// First byte offset with a nonzero word.
        offset: u64,
    },
}

/// Why a key was not inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InsertError {
    /// The key is in the index already, sealed or not.
    #[error("the key is already {0}")]
    Exists(EntryId),
    /// Every entry is in use: evict one.
    #[error("all {capacity} index entries are in use: evict a block")]
    Full {
        /// Entries of the index.
        capacity: u32,
    },
    /// Entries are left, but have no storage: call [`IndexWriter::reserve`], then insert again.
    #[error("only {reserved} index entries have storage: reserve more")]
    NeedReserve {
        /// Entries with storage.
        reserved: u32,
    },
    /// All lines within the probe bound are full: evict a block, or do without this one.
    #[error("no free slot within {lines} index lines of the key's home")]
    ProbeLimit {
        /// Lines looked at.
        lines: u32,
    },
}

/// An id that names no entry in use: a mistake of the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("index {0} is not in use")]
pub struct EntryError(pub EntryId);

/// Writes an index. There is one per index file; it is the daemon's own look-up table as well.
///
/// An entry is inserted unsealed and invisible to readers; sealing makes it a hit.
#[derive(Debug)]
pub struct IndexWriter<M> {
    memory: M,
    layout: IndexLayout,
    hasher: KeyHasher,
    /// Ids that were used and are free again, the last one freed on top. Allocated once.
    free: Vec<u32>,
    /// Ids below were used at least once.
    high_water: u32,
    /// Ids below have storage.
    reserved: u32,
    used: u32,
    sealed: u32,
}

impl<M: WritableIndexMemory> IndexWriter<M> {
    /// Writes an empty index into zeroed memory. The first [`IndexLayout::fixed_bytes`] bytes
    /// must have storage; no entry is touched, and none is reserved yet.
    pub fn create(
        memory: M,
        layout: IndexLayout,
        boot_id: BootId,
        seed: u64,
    ) -> Result<Self, CreateError> {
        let words = memory.words();
        let actual = (words.len() * WORD_BYTES) as u64;
        let needed = layout.total_bytes();
        if actual < needed {
            return Err(CreateError::TooShort { actual, needed });
        }
        let mut fixed = words[..HEADER_BYTES / WORD_BYTES]
            .iter()
            .chain(&words[layout.line_words()]);
        if let Some(at) = fixed.position(|word| word.load(Ordering::Relaxed) != 0) {
            return Err(CreateError::NotZeroed {
                offset: (at * WORD_BYTES) as u64,
            });
        }
        let header: [u64; HEADER_WORDS] = bytemuck::cast(layout.header(boot_id, seed));
        for (word, value) in words.iter().zip(header).skip(1) {
            word.store(value, Ordering::Relaxed);
        }
        // SYNC: index-create (release). The magic comes last.
        words[0].store(header[0], Ordering::Release);
        Ok(Self {
            memory,
            layout,
            hasher: KeyHasher::new(seed, layout.bucket_count()),
            free: Vec::with_capacity(layout.entry_capacity() as usize),
            high_water: 0,
            reserved: 0,
            used: 0,
            sealed: 0,
        })
    }

    /// The layout given at creation.
    pub fn layout(&self) -> &IndexLayout {
        &self.layout
    }

    /// Entries in use, sealed or not.
    pub fn len(&self) -> u32 {
        self.used
    }

    /// Whether no entry is in use.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Sealed entries.
    pub fn sealed_len(&self) -> u32 {
        self.sealed
    }

    /// Entries that have storage.
    pub fn reserved_entries(&self) -> u32 {
        self.reserved
    }

    /// Bytes of entry storage written so far: entries up to the highest id ever used.
    pub fn entries_touched_bytes(&self) -> u64 {
        u64::from(self.high_water) * ENTRY_BYTES as u64
    }

    /// Gives storage to at least `step_entries` more entries (in whole pages, up to the
    /// capacity). `allocate` gets the byte range in the file and must return only when writing
    /// it cannot fail, as after `NamedFile::reserve`; its error comes back. Returns the entries
    /// that have storage now; at the capacity, `allocate` is not called.
    pub fn reserve<E>(
        &mut self,
        step_entries: u32,
        allocate: impl FnOnce(Range<u64>) -> Result<(), E>,
    ) -> Result<u32, E> {
        const PER_PAGE: u32 = PAGE_BYTES as u32 / ENTRY_BYTES as u32;
        let capacity = self.layout.entry_capacity();
        let target = self.reserved.saturating_add(step_entries.max(1));
        let target = target
            .checked_next_multiple_of(PER_PAGE)
            .unwrap_or(capacity)
            .min(capacity);
        if target > self.reserved {
            allocate(self.layout.entry_byte_range(self.reserved..target))?;
            self.reserved = target;
            self.memory.words()[RESERVED_WORD].store(u64::from(target), Ordering::Relaxed);
        }
        Ok(self.reserved)
    }

    /// Takes an entry for the key, unsealed. Ids are handed out lowest first while the index
    /// fills, so keys inserted together lie together; freed ids come back last in, first out.
    pub fn insert(&mut self, key: &BlockKey) -> Result<EntryId, InsertError> {
        let words = key.words();
        let home = self.hasher.home(&words);
        let table = self.table();
        if let Some(id) = table.find(home, &words, entry::is_key_match) {
            return Err(InsertError::Exists(EntryId(id)));
        }
        let id = match self.free.last() {
            Some(&id) => id,
            None if self.high_water < self.reserved => self.high_water,
            None => return Err(self.out_of_entries()),
        };
        let lines = self.layout.max_probe_lines();
        let place = table
            .vacancy(home)
            .ok_or(InsertError::ProbeLimit { lines })?;
        let entry = table.entry(id).ok_or_else(|| self.out_of_entries())?;
        entry::publish(entry, &words);
        table.fill(&place, id);

        if self.free.pop().is_none() {
            self.high_water += 1;
        }
        self.count(1, 0);
        Ok(EntryId(id))
    }

    fn out_of_entries(&self) -> InsertError {
        let capacity = self.layout.entry_capacity();
        if self.reserved < capacity {
            InsertError::NeedReserve {
                reserved: self.reserved,
            }
        } else {
            InsertError::Full { capacity }
        }
    }

    /// Makes the entry a hit for readers. Sealing twice changes nothing.
    pub fn seal(&mut self, id: EntryId) -> Result<(), EntryError> {
        let entry = self.used_entry(id)?;
        if !entry::is_sealed(entry) {
            entry::seal(entry);
            self.count(0, 1);
        }
        Ok(())
    }

    /// Withdraws the entry from readers, but keeps it. Unsealing twice changes nothing.
    pub fn unseal(&mut self, id: EntryId) -> Result<(), EntryError> {
        let entry = self.used_entry(id)?;
        if entry::is_sealed(entry) {
            entry::unseal(entry);
            self.count(0, -1);
        }
        Ok(())
    }

    /// Takes the key out, so that nobody finds it and it can be inserted anew, and keeps the entry,
    /// for [`IndexWriter::remove`] to free. Returns the key.
    pub fn withdraw(&mut self, id: EntryId) -> Result<BlockKey, EntryError> {
        self.unseal(id)?;
        let words = entry::key_words(self.used_entry(id)?);
        let table = self.table();
        if let Some(place) = table.place_of(self.hasher.home(&words), id.0) {
            table.clear(&place);
        }
        Ok(BlockKey::from_words(&words))
    }

    /// Takes the key out, unless it was withdrawn, and frees its entry. Returns the key.
    pub fn remove(&mut self, id: EntryId) -> Result<BlockKey, EntryError> {
        let entry = self.used_entry(id)?;
        let words = entry::key_words(entry);
        let was_sealed = entry::is_sealed(entry);
        let table = self.table();
        let place = table.place_of(self.hasher.home(&words), id.0);
        debug_assert!(
            place.is_some() || !was_sealed,
            "{id} is sealed but in no bucket line"
        );
        if let Some(place) = place {
            table.clear(&place);
        }
        entry::vacate(entry);
        self.free.push(id.0);
        self.count(-1, -i32::from(was_sealed));
        Ok(BlockKey::from_words(&words))
    }

    /// Brings closer what removing an entry reads first. Reads and changes nothing.
    pub fn prefetch_entry(&self, id: EntryId) {
        if let Some(entry) = self.table().entry(id.0) {
            prefetch_read(entry);
        }
    }

    /// Brings closer what removing an entry reads next: its bucket line, which its key tells.
    /// Changes nothing.
    pub fn prefetch_line(&self, id: EntryId) {
        let line = self.used_entry(id).ok().and_then(|entry| {
            let home = self.hasher.home(&entry::key_words(entry));
            self.table().line(home.line)
        });
        if let Some(line) = line {
            prefetch_read(line);
        }
    }

    /// The key's entry, sealed or not.
    pub fn find(&self, key: &BlockKey) -> Option<EntryId> {
        let words = key.words();
        self.table()
            .find(self.hasher.home(&words), &words, entry::is_key_match)
            .map(EntryId)
    }

    /// Whether the entry is in use and sealed.
    #[inline]
    pub fn is_sealed(&self, id: EntryId) -> bool {
        self.used_entry(id).is_ok_and(entry::is_sealed)
    }

    /// The key of an entry in use.
    pub fn key(&self, id: EntryId) -> Option<BlockKey> {
        let entry = self.used_entry(id).ok()?;
        Some(BlockKey::from_words(&entry::key_words(entry)))
    }

    /// Looks up `hashes`; afterwards `out` has one element for each, whatever it held before.
    /// Sealed or not, every entry in use is found.
    ///
    /// `on_entry` hears the ids while their entries are on the way from memory, so that the
    /// caller can prefetch its own record of them ([`super::prefetch_read`]); an id may be heard
    /// that is not a result.
    pub fn find_batch(
        &self,
        namespace: u32,
        group: u16,
        hashes: &[BlockHash],
        out: &mut Vec<Option<EntryId>>,
        mut on_entry: impl FnMut(EntryId),
    ) {
        let scope = pack_scope(namespace, group);
        let table = self.table();
        out.clear();
        out.reserve(hashes.len());
        for chunk in hashes.chunks(BATCH) {
            let accept = entry::is_key_match;
            let heard = |id| on_entry(EntryId(id));
            let ids = batch::find_batch(&table, &self.hasher, scope, chunk, accept, heard);
            let results = ids.iter().take(chunk.len());
            out.extend(results.map(|&id| (id != MISS).then_some(EntryId(id))));
        }
    }

    #[inline]
    fn table(&self) -> Table<'_> {
        Table::new(self.memory.words(), &self.layout, self.reserved)
    }

    /// An entry below the high-water mark that holds a key.
    #[inline]
    fn used_entry(&self, id: EntryId) -> Result<&EntryWords, EntryError> {
        if id.0 >= self.high_water {
            return Err(EntryError(id));
        }
        let entry = self.table().entry(id.0).ok_or(EntryError(id))?;
        if entry::is_in_use(entry) {
            Ok(entry)
        } else {
            Err(EntryError(id))
        }
    }

    fn count(&mut self, used: i32, sealed: i32) {
        self.used = self.used.wrapping_add_signed(used);
        self.sealed = self.sealed.wrapping_add_signed(sealed);
        let words = self.memory.words();
        words[USED_WORD].store(u64::from(self.used), Ordering::Relaxed);
        words[SEALED_WORD].store(u64::from(self.sealed), Ordering::Relaxed);
    }
}
