//! The first thing in a shard's file: whose it is and how it is cut.

use bytemuck::{Pod, Zeroable};
use twox_hash::XxHash3_64;

use super::{CHUNK_BYTES, Geometry, Id, LAYOUT_VERSION};

const MAGIC: [u8; 8] = *b"PEGASSD\0";
/// The superblock is written in turns to that many slots: one is always whole.
pub(crate) const SUPERBLOCK_SLOTS: u64 = 2;
/// The most shards of a set.
pub(crate) const MEMBERS_MAX: usize = 64;
const NODE_BYTES: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Raw {
    magic: [u8; 8],
    layout_version: u32,
    segment_bytes: u32,
    table_bytes: u32,
    segments: u32,
    /// xxh3-64 of the superblock with this field zero.
    checksum: u64,
    sequence: u64,
    created_unix_s: u64,
    set: Id,
    shard: Id,
    node: [u8; NODE_BYTES],
    node_bytes: u32,
    members_count: u32,
    members: [Id; MEMBERS_MAX],
}

const HEAD_BYTES: usize = size_of::<Raw>();
const _: () = assert!(HEAD_BYTES == 152 + 16 * MEMBERS_MAX && HEAD_BYTES < CHUNK_BYTES);

/// Whose a shard is, and its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Grows with each change; of two valid superblocks the greater one counts.
    pub sequence: u64,
    /// When the file was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// The sizes.
    pub geometry: Geometry,
    /// The set of shards that it belongs to.
    pub set: Id,
    /// The shard itself.
    pub shard: Id,
    /// The node's name.
    pub node: String,
    /// All shards of the set, as far as this one has seen them.
    pub members: Vec<Id>,
}

/// Why bytes are not a superblock that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SuperblockError {
    /// It does not begin like one.
    NoMagic,
    /// It has another layout version.
    Version(u32),
    /// It begins like one, but is damaged.
    Damaged,
}

impl Superblock {
    /// The bytes to write.
    ///
    /// # Panics
    /// If the node's name or the list of members is too long.
    pub fn encode(&self) -> Box<[u8]> {
        assert!(self.node.len() <= NODE_BYTES && self.members.len() <= MEMBERS_MAX);
        let mut raw = Raw::zeroed();
        raw.magic = MAGIC;
        raw.layout_version = LAYOUT_VERSION;
        raw.segment_bytes = self.geometry.segment_bytes;
        raw.table_bytes = self.geometry.table_bytes;
        raw.segments = self.geometry.segments;
        raw.sequence = self.sequence;
        raw.created_unix_s = self.created_unix_s;
        raw.set = self.set;
        raw.shard = self.shard;
        raw.node[..self.node.len()].copy_from_slice(self.node.as_bytes());
        raw.node_bytes = self.node.len() as u32;
        raw.members_count = self.members.len() as u32;
        raw.members[..self.members.len()].copy_from_slice(&self.members);
        raw.checksum = XxHash3_64::oneshot(bytemuck::bytes_of(&raw));
        let mut bytes = vec![0; CHUNK_BYTES].into_boxed_slice();
        bytes[..HEAD_BYTES].copy_from_slice(bytemuck::bytes_of(&raw));
        bytes
    }

    /// Reads one slot.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        let head = bytes.get(..HEAD_BYTES).ok_or(SuperblockError::NoMagic)?;
        let mut raw: Raw = bytemuck::pod_read_unaligned(head);
        if raw.magic != MAGIC {
            return Err(SuperblockError::NoMagic);
        }
        // The version is looked at first: another version may have its checksum elsewhere.
        if raw.layout_version != LAYOUT_VERSION {
            return Err(SuperblockError::Version(raw.layout_version));
        }
        let checksum = std::mem::take(&mut raw.checksum);
        if checksum != XxHash3_64::oneshot(bytemuck::bytes_of(&raw)) {
            return Err(SuperblockError::Damaged);
        }
        let geometry = Geometry {
            segment_bytes: raw.segment_bytes,
            table_bytes: raw.table_bytes,
            segments: raw.segments,
        };
        let node = raw
            .node
            .get(..raw.node_bytes as usize)
            .and_then(|name| std::str::from_utf8(name).ok());
        let members = raw.members.get(..raw.members_count as usize);
        let (Some(node), Some(members), true) = (node, members, geometry.is_valid()) else {
            return Err(SuperblockError::Damaged);
        };
        Ok(Self {
            sequence: raw.sequence,
            created_unix_s: raw.created_unix_s,
            geometry,
            set: raw.set,
            shard: raw.shard,
            node: node.to_owned(),
            members: members.to_vec(),
        })
    }

    /// Where the slot that this superblock goes to starts in the file.
    pub fn offset(&self) -> u64 {
        (self.sequence % SUPERBLOCK_SLOTS) * CHUNK_BYTES as u64
    }

    /// Chooses from the bytes of all slots the superblock that counts.
    ///
    /// # Errors
    /// What is wrong if none can be used.
    pub fn choose(slots: &[u8]) -> Result<Self, SuperblockError> {
        let mut found: Option<Self> = None;
        let mut problem = SuperblockError::NoMagic;
        for slot in slots.chunks(CHUNK_BYTES).take(SUPERBLOCK_SLOTS as usize) {
            match Self::decode(slot) {
                Ok(block) if found.as_ref().is_none_or(|f| f.sequence < block.sequence) => {
                    found = Some(block);
                }
                Ok(_) | Err(SuperblockError::NoMagic) => {}
                Err(error) => problem = error,
            }
        }
        found.ok_or(problem)
    }
}
