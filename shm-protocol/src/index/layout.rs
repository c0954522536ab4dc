//! Byte layout of the index file: sizes, offsets, the header page and its validation.

#![forbid(unsafe_code)]

use core::mem::{offset_of, size_of};
use core::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::BootId;

/// First eight bytes of an index file: "PEGAINDX", little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PEGAINDX");
/// A reader refuses any other major version.
pub const LAYOUT_MAJOR: u32 = 1;
/// Counts additions that an older reader may ignore.
pub const LAYOUT_MINOR: u32 = 0;
/// Bytes of the header page.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of one bucket line: one cache line.
pub const LINE_BYTES: usize = 64;
/// Bytes of one entry: one cache line.
pub const ENTRY_BYTES: usize = 64;
/// Slots of one bucket line; the eighth word counts the keys that probed past it.
pub const SLOTS_PER_LINE: usize = 7;
/// A key lies at most this many lines after its home, home included.
pub const MAX_PROBE_LINES: u32 = 64;
/// Most entries an index can have (2^31).
pub const MAX_ENTRIES: u32 = 1 << 31;

/// Average keys per line when the index is full; 5 of 7 keeps most keys in their home line.
const ENTRIES_PER_LINE: u32 = 5;
/// Storage is reserved in whole pages of the smallest size.
pub(super) const PAGE_BYTES: u64 = 4096;
pub(super) const WORD_BYTES: usize = 8;
/// Words of a bucket line and of an entry.
pub(super) const WORDS: usize = LINE_BYTES / WORD_BYTES;

/// Word of the header page with the number of entries that have storage. On its own line, since
/// readers load it and the counters below change with every insertion.
pub(super) const RESERVED_WORD: usize = 256 / WORD_BYTES;
/// Word of the header page: entries in use.
pub(super) const USED_WORD: usize = 384 / WORD_BYTES;
/// Word of the header page: sealed entries.
pub(super) const SEALED_WORD: usize = 392 / WORD_BYTES;

/// The constant part of the header page, in bytes 0..128. Mutable words follow at 256
/// (entries with storage), 384 (entries in use) and 392 (sealed entries), each a u64.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct IndexHeader {
    /// [`MAGIC`]; written last, so a file without it is not an index yet.
    pub magic: u64,
    /// [`LAYOUT_MAJOR`] of the writer.
    pub layout_major: u32,
    /// [`LAYOUT_MINOR`] of the writer.
    pub layout_minor: u32,
    /// Start of the daemon that wrote the file.
    pub boot_id: BootId,
    /// Seed of the hash function.
    pub seed: u64,
    /// Number of bucket lines.
    pub bucket_count: u64,
    /// Number of entries the file has room for.
    pub entry_capacity: u64,
    /// Byte offset of the first bucket line.
    pub buckets_offset: u64,
    /// Byte offset of the first entry.
    pub entries_offset: u64,
    /// Bytes of the whole file.
    pub total_bytes: u64,
    /// [`LINE_BYTES`] of the writer.
    pub line_bytes: u32,
    /// [`ENTRY_BYTES`] of the writer.
    pub entry_bytes: u32,
    /// [`SLOTS_PER_LINE`] of the writer.
    pub slots_per_line: u32,
    /// [`MAX_PROBE_LINES`] of the writer.
    pub max_probe_lines: u32,
    /// Properties a reader must know; none is defined in this version.
    pub feature_bits: u64,
    /// Zero.
    pub reserved: [u64; 3],
}

pub(super) const HEADER_WORDS: usize = size_of::<IndexHeader>() / WORD_BYTES;

const _: () = {
    assert!(cfg!(target_endian = "little"));
    assert!(size_of::<IndexHeader>() == 128);
    assert!(offset_of!(IndexHeader, magic) == 0);
    assert!(offset_of!(IndexHeader, layout_major) == 8);
    assert!(offset_of!(IndexHeader, boot_id) == 16);
    assert!(offset_of!(IndexHeader, seed) == 32);
    assert!(offset_of!(IndexHeader, bucket_count) == 40);
    assert!(offset_of!(IndexHeader, entry_capacity) == 48);
    assert!(offset_of!(IndexHeader, buckets_offset) == 56);
    assert!(offset_of!(IndexHeader, entries_offset) == 64);
    assert!(offset_of!(IndexHeader, total_bytes) == 72);
    assert!(offset_of!(IndexHeader, line_bytes) == 80);
    assert!(offset_of!(IndexHeader, max_probe_lines) == 92);
    assert!(offset_of!(IndexHeader, feature_bits) == 96);
    assert!((SLOTS_PER_LINE + 1) * WORD_BYTES == LINE_BYTES);
    assert!(ENTRY_BYTES == LINE_BYTES);
    assert!(RESERVED_WORD >= HEADER_WORDS && SEALED_WORD < HEADER_BYTES / WORD_BYTES);
    assert!(HEADER_BYTES as u64 == PAGE_BYTES);
};

/// Why no layout exists for a requested size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    /// Zero entries or more than an id can name.
    #[error("an index of {requested} entries is not possible: choose 1 to {max}")]
    EntryCapacity {
        /// What was asked for.
        requested: u32,
        /// [`MAX_ENTRIES`].
        max: u32,
    },
    /// A table without lines.
    #[error("an index needs at least one bucket line")]
    NoBuckets,
}

/// Why bytes were not accepted as an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// The mapping ends before the header does, or before the file says it ends.
    #[error("index mapping has {actual} bytes, needs {needed}: map the whole file")]
    TooShort {
        /// Bytes mapped.
        actual: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// Not an index, or its writer has not finished creating it.
    #[error("no index here: magic {0:#018x} (expected {MAGIC:#018x})")]
    Magic(u64),
    /// Written by an incompatible version.
    #[error("index layout version {major}.{minor}, this library reads {LAYOUT_MAJOR}.x: upgrade")]
    Version {
        /// Major version in the file.
        major: u32,
        /// Minor version in the file.
        minor: u32,
    },
    /// The file needs readers to know something this one does not.
    #[error("index feature bits {0:#x} are unknown to this library: upgrade it")]
    Features(u64),
    /// A size or offset contradicts the others.
    #[error("index header field {field} has the impossible value {value}: the file is corrupt")]
    Field {
        /// Name of the header field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Sizes and offsets of an index, all in bytes unless named otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexLayout {
    bucket_count: u32,
    entry_capacity: u32,
    max_probe_lines: u32,
    buckets_offset: u64,
    entries_offset: u64,
    total_bytes: u64,
}

impl IndexLayout {
    /// Layout for `max_entries` entries, with a bucket line for every five of them.
    pub fn for_capacity(max_entries: u32) -> Result<Self, LayoutError> {
        Self::with_buckets(max_entries, max_entries.div_ceil(ENTRIES_PER_LINE))
    }

    /// Layout with a chosen number of bucket lines; few lines make long probes.
    pub fn with_buckets(max_entries: u32, bucket_count: u32) -> Result<Self, LayoutError> {
        if max_entries == 0 || max_entries > MAX_ENTRIES {
            return Err(LayoutError::EntryCapacity {
                requested: max_entries,
                max: MAX_ENTRIES,
            });
        }
        if bucket_count == 0 {
            return Err(LayoutError::NoBuckets);
        }
        let round = |bytes: u64| bytes.next_multiple_of(PAGE_BYTES);
        let buckets_offset = HEADER_BYTES as u64;
        let entries_offset = buckets_offset + round(u64::from(bucket_count) * LINE_BYTES as u64);
        let total_bytes = entries_offset + round(u64::from(max_entries) * ENTRY_BYTES as u64);
        Ok(Self {
            bucket_count,
            entry_capacity: max_entries,
            max_probe_lines: MAX_PROBE_LINES.min(bucket_count),
            buckets_offset,
            entries_offset,
            total_bytes,
        })
    }

    /// Number of bucket lines.
    pub const fn bucket_count(&self) -> u32 {
        self.bucket_count
    }

    /// Number of entries.
    pub const fn entry_capacity(&self) -> u32 {
        self.entry_capacity
    }

    /// Size to give the file. Entries may stay holes until reserved.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes from the start of the file that need storage before `IndexWriter::create`: the
    /// header page and all bucket lines.
    pub const fn fixed_bytes(&self) -> u64 {
        self.entries_offset
    }

    /// Page-rounded byte range in the file of the entries `ids`.
    pub fn entry_byte_range(&self, ids: Range<u32>) -> Range<u64> {
        let at = |id: u32| self.entries_offset + u64::from(id) * ENTRY_BYTES as u64;
        let start = at(ids.start) / PAGE_BYTES * PAGE_BYTES;
        start..at(ids.end).next_multiple_of(PAGE_BYTES)
    }

    pub(super) const fn max_probe_lines(&self) -> u32 {
        self.max_probe_lines
    }

    /// Word indices of the bucket lines.
    pub(super) fn line_words(&self) -> Range<usize> {
        let start = self.buckets_offset as usize / WORD_BYTES;
        start..start + self.bucket_count as usize * WORDS
    }

    /// Word indices of the first `count` entries.
    pub(super) fn entry_words(&self, count: u32) -> Range<usize> {
        let start = self.entries_offset as usize / WORD_BYTES;
        start..start + count.min(self.entry_capacity) as usize * WORDS
    }

    /// The header of a fresh index.
    pub(super) fn header(&self, boot_id: BootId, seed: u64) -> IndexHeader {
        IndexHeader {
            magic: MAGIC,
            layout_major: LAYOUT_MAJOR,
            layout_minor: LAYOUT_MINOR,
            boot_id,
            seed,
            bucket_count: u64::from(self.bucket_count),
            entry_capacity: u64::from(self.entry_capacity),
            buckets_offset: self.buckets_offset,
            entries_offset: self.entries_offset,
            total_bytes: self.total_bytes,
            line_bytes: LINE_BYTES as u32,
            entry_bytes: ENTRY_BYTES as u32,
            slots_per_line: SLOTS_PER_LINE as u32,
            max_probe_lines: self.max_probe_lines,
            feature_bits: 0,
            reserved: [0; 3],
        }
    }

    /// Checks a private copy of a header against the bytes that are mapped.
    pub(super) fn from_header(header: &IndexHeader, mapped: u64) -> Result<Self, OpenError> {
        if header.magic != MAGIC {
            return Err(OpenError::Magic(header.magic));
        }
        if header.layout_major != LAYOUT_MAJOR {
            let (major, minor) = (header.layout_major, header.layout_minor);
            return Err(OpenError::Version { major, minor });
        }
        if header.feature_bits != 0 {
            return Err(OpenError::Features(header.feature_bits));
        }
        let field = |ok: bool, field, value: u64| {
            if ok {
                Ok(())
            } else {
                Err(OpenError::Field { field, value })
            }
        };
        let line = LINE_BYTES as u64;
        field(
            header.line_bytes as usize == LINE_BYTES,
            "line_bytes",
            header.line_bytes.into(),
        )?;
        field(
            header.entry_bytes as usize == ENTRY_BYTES,
            "entry_bytes",
            header.entry_bytes.into(),
        )?;
        let slots = header.slots_per_line;
        field(
            slots as usize == SLOTS_PER_LINE,
            "slots_per_line",
            slots.into(),
        )?;
        let probe = header.max_probe_lines;
        field(
            (1..=MAX_PROBE_LINES).contains(&probe),
            "max_probe_lines",
            probe.into(),
        )?;
        let buckets = header.bucket_count;
        field(
            (1..=u64::from(u32::MAX)).contains(&buckets),
            "bucket_count",
            buckets,
        )?;
        let capacity = header.entry_capacity;
        field(
            (1..=u64::from(MAX_ENTRIES)).contains(&capacity),
            "entry_capacity",
            capacity,
        )?;

        // The counts are below 2^32, so products with 64 fit; the sums are checked.
        let start = header.buckets_offset;
        let start_ok = start >= HEADER_BYTES as u64 && start.is_multiple_of(line);
        field(start_ok, "buckets_offset", start)?;
        let entries = header.entries_offset;
        let lines_end = start.checked_add(buckets * line);
        let entries_ok =
            lines_end.is_some_and(|end| end <= entries) && entries.is_multiple_of(line);
        field(entries_ok, "entries_offset", entries)?;
        let total = header.total_bytes;
        let entries_end = entries.checked_add(capacity * ENTRY_BYTES as u64);
        field(
            entries_end.is_some_and(|end| end <= total),
            "total_bytes",
            total,
        )?;
        if total > mapped {
            return Err(OpenError::TooShort {
                actual: mapped,
                needed: total,
            });
        }
        Ok(Self {
            bucket_count: buckets as u32,
            entry_capacity: capacity as u32,
            max_probe_lines: probe.min(buckets as u32),
            buckets_offset: start,
            entries_offset: entries,
            total_bytes: total,
        })
    }
}
