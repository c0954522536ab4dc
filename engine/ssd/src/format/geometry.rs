//! Where things lie in a shard's file.

use super::{CHUNK_BYTES, RECORDS_PER_CHUNK};

/// Everything on the drive starts at a multiple of this and is padded to one, whatever the
/// device's own block is: the file can be copied to another drive.
pub(crate) const ALIGNMENT: u32 = 4096;

/// Where the first segment starts.
const FIRST_SEGMENT: u64 = 1 << 20;

/// `bytes` rounded up to the alignment.
pub(crate) const fn align_up(bytes: u32) -> u32 {
    bytes.next_multiple_of(ALIGNMENT)
}

/// The sizes of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes of data of one segment.
    pub segment_bytes: u32,
    /// Bytes of table of one segment.
    pub table_bytes: u32,
    /// How many segments there are.
    pub segments: u32,
}

impl Geometry {
    /// Fewer segments cannot be reclaimed while others are written.
    pub const MIN_SEGMENTS: u32 = 6;
    /// So that a segment's number fits the ids of an eviction policy with room to spare.
    pub const MAX_SEGMENTS: u32 = 1 << 24;
    /// The largest segment: offsets in it are 32 bits wide.
    pub const MAX_SEGMENT_BYTES: u32 = 1 << 30;
    /// The smallest segment.
    pub const MIN_SEGMENT_BYTES: u32 = 64 << 10;
    /// One table chunk per that many bytes of data: pages of 12.2 KiB fill table and data alike.
    const DATA_PER_CHUNK: u32 = 512 << 10;

    /// The sizes for a file of `file_bytes` bytes: of a file too small for segments of
    /// `segment_bytes`, smaller ones. Fewer than [`Self::MIN_SEGMENTS`] may fit all the same.
    pub fn for_file(file_bytes: u64, segment_bytes: u32) -> Self {
        let mut geometry = Self::of_segments(file_bytes, segment_bytes);
        while geometry.segments < Self::MIN_SEGMENTS
            && geometry.segment_bytes > Self::MIN_SEGMENT_BYTES
        {
            geometry = Self::of_segments(file_bytes, geometry.segment_bytes / 2);
        }
        geometry
    }

    fn of_segments(file_bytes: u64, segment_bytes: u32) -> Self {
        let segment_bytes = align_up(segment_bytes.min(Self::MAX_SEGMENT_BYTES))
            .clamp(Self::MIN_SEGMENT_BYTES, Self::MAX_SEGMENT_BYTES);
        let chunks = (segment_bytes / Self::DATA_PER_CHUNK).max(4);
        let table_bytes = chunks * CHUNK_BYTES as u32;
        let mut geometry = Self {
            segment_bytes,
            table_bytes,
            segments: 0,
        };
        geometry.segments = geometry.segments_in(file_bytes);
        geometry
    }

    /// How many segments of these sizes fit into a file.
    pub fn segments_in(&self, file_bytes: u64) -> u32 {
        let count = file_bytes.saturating_sub(FIRST_SEGMENT) / self.stride();
        count.min(u64::from(Self::MAX_SEGMENTS)) as u32
    }

    fn stride(&self) -> u64 {
        u64::from(self.table_bytes) + u64::from(self.segment_bytes)
    }

    /// The size of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        FIRST_SEGMENT + u64::from(self.segments) * self.stride()
    }

    /// Where chunk `slot` of a segment's table starts in the file.
    pub fn chunk_offset(&self, segment: u32, slot: u32) -> u64 {
        assert!(segment < self.segments && slot < self.slots());
        FIRST_SEGMENT + u64::from(segment) * self.stride() + u64::from(slot) * CHUNK_BYTES as u64
    }

    /// Where byte `offset` of a segment's data is in the file.
    pub fn data_offset(&self, segment: u32, offset: u32) -> u64 {
        assert!(segment < self.segments && offset < self.segment_bytes);
        FIRST_SEGMENT
            + u64::from(segment) * self.stride()
            + u64::from(self.table_bytes)
            + u64::from(offset)
    }

    /// The chunks of a segment's table.
    pub fn slots(&self) -> u32 {
        self.table_bytes / CHUNK_BYTES as u32
    }

    /// The most records of a segment: two chunks stay free, so that no chunk that counts is ever
    /// written over.
    pub fn records_max(&self) -> u32 {
        (self.slots() - 2) * RECORDS_PER_CHUNK as u32
    }

    /// Whether these are sizes that a shard can have.
    pub fn is_valid(&self) -> bool {
        self.segments >= Self::MIN_SEGMENTS
            && self.segments <= Self::MAX_SEGMENTS
            && self.segment_bytes.is_multiple_of(ALIGNMENT)
            && (Self::MIN_SEGMENT_BYTES..=Self::MAX_SEGMENT_BYTES).contains(&self.segment_bytes)
            && self.table_bytes.is_multiple_of(ALIGNMENT)
            && (4 * ALIGNMENT..=Self::MAX_SEGMENT_BYTES).contains(&self.table_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_has_small_segments_rather_than_too_few() {
        const MIB: u64 = 1 << 20;
        let large = Geometry::for_file(1024 * MIB, 64 << 20);
        assert_eq!((large.segment_bytes, large.segments), (64 << 20, 15));
        let small = Geometry::for_file(128 * MIB, 64 << 20);
        assert_eq!((small.segment_bytes, small.segments), (16 << 20, 7));
        assert!(small.file_bytes() <= 128 * MIB && small.is_valid());
        let least = Geometry::for_file(2 * MIB, 64 << 20);
        assert!(least.is_valid() && least.file_bytes() <= 2 * MIB);
        assert!(Geometry::for_file(MIB, 64 << 20).segments < Geometry::MIN_SEGMENTS);
    }
}
