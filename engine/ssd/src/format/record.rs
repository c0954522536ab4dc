//! One page on the drive.

use bytemuck::{Pod, Zeroable};
use twox_hash::XxHash3_64;

use super::{ALIGNMENT, Geometry, Id};
use crate::block::BlockKey;
use crate::options::Options;

/// The identity and place of a page. All of it but the checksum is covered by the checksum.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Record {
    /// The block's scope.
    pub scope: [u8; 32],
    /// The block's hash.
    pub hash: [u8; 32],
    /// Grows with each block written. All pages of a block have the same; of two blocks with one
    /// key the greater one counts.
    pub write_id: u64,
    /// xxh3-64 of the page's bytes, seeded with [`Record::seed`].
    pub checksum: u64,
    /// The block's group.
    pub group: u32,
    /// Which page of the block this is.
    pub page: u16,
    /// How many the block has.
    pub pages: u16,
    /// Where the page starts in its segment's data.
    pub offset: u32,
    /// Its length in bytes; on the drive it is padded to the alignment.
    pub bytes: u32,
}

const _: () = assert!(size_of::<Record>() == 96 && align_of::<Record>() == 8);

/// Where a record stands. It is part of what the page's checksum covers: bytes at another place, in
/// another shard or from an earlier use of the segment never pass for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The shard.
    pub shard: Id,
    /// The segment.
    pub segment: u32,
    /// The use of the segment.
    pub generation: u64,
}

impl Place {
    /// No shard lives to see it; counting on from there does not overflow.
    pub const GENERATION_MAX: u64 = u64::MAX / 2;
}

impl Record {
    /// No block gets a greater one.
    pub const WRITE_ID_MAX: u64 = u64::MAX / 2;

    /// The block that the page belongs to.
    pub fn key(&self) -> BlockKey {
        BlockKey {
            scope: self.scope,
            group: self.group,
            hash: self.hash,
        }
    }

    /// What the checksum of the page's bytes starts from: identity, place and generation.
    pub fn seed(&self, place: &Place) -> u64 {
        let mut bytes = [0; 96 + 16 + 4 + 8];
        let (record, rest) = bytes.split_at_mut(96);
        let bare = Self {
            checksum: 0,
            ..*self
        };
        record.copy_from_slice(bytemuck::bytes_of(&bare));
        rest[..16].copy_from_slice(&place.shard);
        rest[16..20].copy_from_slice(&place.segment.to_le_bytes());
        rest[20..].copy_from_slice(&place.generation.to_le_bytes());
        XxHash3_64::oneshot(&bytes)
    }

    /// The checksum of a page's bytes.
    pub fn checksum_of(seed: u64, bytes: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_seed(seed, bytes)
    }

    /// Whether the record can describe a page of a segment with these sizes.
    pub fn is_valid(&self, geometry: &Geometry) -> bool {
        self.page < self.pages
            && usize::from(self.pages) <= Options::MAX_PAGES
            && self.bytes > 0
            && self.write_id <= Self::WRITE_ID_MAX
            && self.offset.is_multiple_of(ALIGNMENT)
            && u64::from(self.offset) + u64::from(self.bytes) <= u64::from(geometry.segment_bytes)
    }
}
