//! What the catalog file consists of: header, namespace rows, page records.
//!
//! All numbers are little-endian. Each structure ends in a checksum and a state word that are
//! written together, last, by one 8-byte store, so that it is either complete or ignored.

#![forbid(unsafe_code)]

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};
use pegaflow_shm::BlockHash;
use pegaflow_shm::paths::MAX_NODE_NAME_BYTES;

use super::Namespace;
use crate::pool::{PageAddr, PoolIdentity};

/// First word of a catalog file.
pub const CATALOG_MAGIC: u64 = u64::from_le_bytes(*b"PGFLOCAT");
/// Changes whenever any structure here changes.
pub const CATALOG_VERSION: u32 = 3;

/// State word of a complete page record.
pub(super) const RECORD_SEALED: u32 = u32::from_le_bytes(*b"SEAL");
/// State word of a namespace row in use.
pub(super) const ROW_USED: u32 = u32::from_le_bytes(*b"USED");
/// State word of anything else: what a hole reads as.
pub(super) const EMPTY: u32 = 0;

/// Words of 8 bytes in a record or a row.
pub(super) const WORDS: usize = 8;
/// Bytes of a record.
pub(super) const RECORD_BYTES: u64 = 64;

/// A node's name, filled up with zeros.
pub type NodeName = [u8; MAX_NODE_NAME_BYTES];

/// The beginning of the file. Written once, when the file is created, but for the boot id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Header {
    /// [`CATALOG_MAGIC`]; written last.
    pub(super) magic: u64,
    /// [`CATALOG_VERSION`].
    pub(super) version: u32,
    /// Bytes of one page record.
    pub(super) record_bytes: u32,
    pub(super) pool_bytes: u64,
    pub(super) extent_bytes: u64,
    pub(super) pool: PoolIdentity,
    /// Name of the node, filled up with zeros.
    pub(super) node: NodeName,
    /// CRC-32C of all of the above.
    pub(super) crc: u32,
    pub(super) reserved: u32,
    /// The daemon that has the file, or had it last. Outside the checksum, because it changes.
    pub(super) boot_id: [u8; 16],
}

/// Bytes of the header that its checksum covers.
pub(super) const HEADER_CRC_BYTES: usize = offset_of!(Header, crc);

/// One namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct NamespaceRow {
    pub(super) digest: [u8; 32],
    pub(super) domain_key: u64,
    pub(super) world_size: u32,
    pub(super) reserved: [u8; 12],
    /// CRC-32C of all of the above.
    pub(super) crc: u32,
    /// [`ROW_USED`] or [`EMPTY`].
    pub(super) state: u32,
}

/// One sealed page. It lies at a place that follows from the page's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Record {
    pub(super) hash: BlockHash,
    /// Of the page's bytes; 0 for none.
    pub(super) checksum: u64,
    pub(super) page_bytes: u32,
    /// Row of the namespace table.
    pub(super) namespace: u32,
    pub(super) generation: u32,
    pub(super) group: u16,
    pub(super) rank: u8,
    pub(super) shards: u8,
    /// CRC-32C of the namespace's digest and domain key, the page's byte offset in the pool, and
    /// all of the above: what was written under a namespace whose row is used again, and a record
    /// that strayed to another page's place, are not believed.
    pub(super) crc: u32,
    /// [`RECORD_SEALED`] or [`EMPTY`].
    pub(super) state: u32,
}

/// Bytes of a row or record that its checksum covers.
const BODY_BYTES: usize = 56;

const _: () = {
    assert!(size_of::<Header>() == 144);
    assert!(offset_of!(Header, pool_bytes) == 16);
    assert!(offset_of!(Header, pool) == 32);
    assert!(offset_of!(Header, node) == 56);
    assert!(offset_of!(Header, crc) == 120);
    assert!(offset_of!(Header, boot_id) == 128);
    assert!(size_of::<NamespaceRow>() == RECORD_BYTES as usize);
    assert!(offset_of!(NamespaceRow, domain_key) == 32);
    assert!(offset_of!(NamespaceRow, world_size) == 40);
    assert!(offset_of!(NamespaceRow, crc) == BODY_BYTES);
    assert!(offset_of!(NamespaceRow, state) == BODY_BYTES + 4);
    assert!(size_of::<Record>() == RECORD_BYTES as usize);
    assert!(size_of::<Record>() == WORDS * 8);
    assert!(offset_of!(Record, checksum) == 32);
    assert!(offset_of!(Record, page_bytes) == 40);
    assert!(offset_of!(Record, namespace) == 44);
    assert!(offset_of!(Record, generation) == 48);
    assert!(offset_of!(Record, group) == 52);
    assert!(offset_of!(Record, rank) == 54);
    assert!(offset_of!(Record, shards) == 55);
    assert!(offset_of!(Record, crc) == BODY_BYTES);
    assert!(offset_of!(Record, state) == BODY_BYTES + 4);
    assert!(cfg!(target_endian = "little"));
};

impl Header {
    pub(super) fn computed_crc(&self) -> u32 {
        crc32c::crc32c(&bytemuck::bytes_of(self)[..HEADER_CRC_BYTES])
    }
}

impl NamespaceRow {
    pub(super) fn new(domain_key: u64, world_size: u32, digest: [u8; 32]) -> Self {
        let row = Self {
            digest,
            domain_key,
            world_size,
            reserved: [0; 12],
            crc: 0,
            state: ROW_USED,
        };
        Self {
            crc: row.computed_crc(),
            ..row
        }
    }

    pub(super) fn namespace(&self, slot: u32) -> Namespace {
        Namespace {
            slot,
            domain_key: self.domain_key,
            world_size: self.world_size,
            digest: self.digest,
        }
    }

    pub(super) fn is_valid(&self) -> bool {
        self.state == ROW_USED && self.world_size > 0 && self.crc == self.computed_crc()
    }

    /// Where the checksums of the namespace's records begin.
    pub(super) fn seed(&self) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&self.digest), &self.domain_key.to_le_bytes())
    }

    fn computed_crc(&self) -> u32 {
        crc32c::crc32c(&bytemuck::bytes_of(self)[..BODY_BYTES])
    }
}

impl Record {
    pub(super) fn new(seed: u32, addr: PageAddr, page: &PageRecord) -> Self {
        let record = Self {
            hash: page.hash,
            checksum: page.checksum,
            page_bytes: page.page_bytes,
            namespace: page.namespace,
            generation: page.generation,
            group: page.group,
            rank: page.rank,
            shards: page.shards,
            crc: 0,
            state: RECORD_SEALED,
        };
        Self {
            crc: record.computed_crc(seed, addr),
            ..record
        }
    }

    pub(super) fn computed_crc(&self, seed: u32, addr: PageAddr) -> u32 {
        let place = crc32c::crc32c_append(seed, &addr.offset().to_le_bytes());
        crc32c::crc32c_append(place, &bytemuck::bytes_of(self)[..BODY_BYTES])
    }

    pub(super) fn page(&self) -> PageRecord {
        PageRecord {
            hash: self.hash,
            checksum: self.checksum,
            namespace: self.namespace,
            group: self.group,
            rank: self.rank,
            shards: self.shards,
            generation: self.generation,
            page_bytes: self.page_bytes,
        }
    }
}

/// What the catalog tells about a page, besides its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord {
    /// The block's name.
    pub hash: BlockHash,
    /// Of the page's bytes; 0 when none was taken.
    pub checksum: u64,
    /// Row of the namespace table.
    pub namespace: u32,
    /// Cache group.
    pub group: u16,
    /// Which of the block's shards the page holds: the rank's position among those that hold the
    /// group.
    pub rank: u8,
    /// Shards of the block.
    pub shards: u8,
    /// The same for all shards that were sealed together as one block.
    pub generation: u32,
    /// The page's size as the pool rounds it, in bytes.
    pub page_bytes: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_record_are_these() {
        let row = NamespaceRow::new(1000, 2, [7; 32]);
        let page = PageRecord {
            hash: std::array::from_fn(|at| at as u8),
            checksum: 0x0A0B_0C0D_0E0F_1011,
            namespace: 3,
            group: 4,
            rank: 1,
            shards: 2,
            generation: 0x0102_0304,
            page_bytes: 4096,
        };
        let record = Record::new(row.seed(), PageAddr::from_offset(0x1_0000_2000), &page);
        let bytes = bytemuck::bytes_of(&record);
        assert_eq!(bytes[..32], page.hash);
        let golden = "11100f0e0d0c0b0a00100000030000000403020104000102";
        assert_eq!(hex(&bytes[32..56]), golden);
        assert_eq!(
            hex(&bytes[56..]),
            format!("{:08x}5345414c", record.crc.swap_bytes())
        );
        assert_eq!(record.crc, GOLDEN_RECORD_CRC);
        assert_eq!(row.crc, GOLDEN_ROW_CRC);
        assert_eq!(record.page(), page);
    }

    const GOLDEN_RECORD_CRC: u32 = 0xBF2F_566D;
    const GOLDEN_ROW_CRC: u32 = 0xAA81_2C90;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_record_is_not_believed_under_another_namespace() {
        let seeds = [(1, [7; 32]), (2, [7; 32]), (1 << 32, [7; 32]), (1, [8; 32])]
            .map(|(key, digest)| NamespaceRow::new(key, 1, digest).seed());
        let different: std::collections::HashSet<u32> = seeds.into();
        assert_eq!(different.len(), seeds.len());
    }

    #[test]
    fn a_record_is_not_believed_at_another_pages_place() {
        let page = PageRecord {
            hash: [1; 32],
            checksum: 0,
            namespace: 0,
            group: 0,
            rank: 0,
            shards: 1,
            generation: 0,
            page_bytes: 512,
        };
        let record = Record::new(5, PageAddr::from_offset(512), &page);
        for elsewhere in [0, 1024, 512 << 32] {
            let place = PageAddr::from_offset(elsewhere);
            assert_ne!(record.crc, record.computed_crc(5, place), "{elsewhere}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_record_is_noticed() {
        let page = PageRecord {
            hash: [1; 32],
            checksum: 3,
            namespace: 0,
            group: 0,
            rank: 0,
            shards: 1,
            generation: 0,
            page_bytes: 512,
        };
        let addr = PageAddr::from_offset(512);
        let record = Record::new(5, addr, &page);
        for bit in 0..60 * 8 {
            let mut bytes: [u8; 64] = bytemuck::cast(record);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let flipped: Record = bytemuck::cast(bytes);
            assert_ne!(flipped.crc, flipped.computed_crc(5, addr), "bit {bit}");
        }
    }
}
