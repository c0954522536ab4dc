//! The engines' memory, with bytes that tell what they are.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;

use pegaflow_shm::BlockHash;
use pegaflow_shm::mapping::{Mapping, create_kv_region};

use crate::copy::{BoundLayout, ClientMemory, RegionMapping};
use crate::layout::{GroupLayout, MemoryRef, SegmentLayout, ValidLayout};
use crate::sim::rng::{Rng, mix};

/// What a block's or page's bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    pub namespace: usize,
    pub group: u16,
    pub hash: u64,
    pub shard: u16,
    /// Raised at each save, so that old bytes of the same block are told from new ones.
    pub version: u64,
}

impl Content {
    /// The same block's shard, whichever save it came from.
    pub fn same_shard(&self, other: &Content) -> bool {
        let unversioned = |content: &Content| Content {
            version: 0,
            ..*content
        };
        unversioned(self) == unversioned(other)
    }

    /// Nobody saved it: it marks a block that waits for a load.
    pub fn is_mark(&self) -> bool {
        self.namespace == MARK
    }

    fn bytes(&self, count: usize) -> Vec<u8> {
        let name = mix(self.namespace as u64 + 1)
            ^ mix(0x100 + u64::from(self.group))
            ^ mix(0x10_000 + self.hash)
            ^ mix(0x1_0000_0000 + u64::from(self.shard))
            ^ mix(0x10_0000_0000 + self.version);
        let words: Vec<u64> = (0..count as u64 / 8)
            .map(|at| name.wrapping_add(at.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
            .collect();
        bytemuck::cast_slice(&words).to_vec()
    }
}

/// The namespace of what no page ever holds.
const MARK: usize = usize::MAX - 1;

/// The block hash with this number.
pub fn hash_of(number: u64) -> BlockHash {
    let mut hash = [0; 32];
    for (at, word) in hash.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(number * 4 + at as u64 + 1).to_le_bytes());
    }
    hash
}

/// A cache group's blocks in one process.
pub struct KvGroup {
    pub group: u16,
    pub bound: Arc<BoundLayout>,
    /// What each block holds; `None` when it was hit by a copy that failed half-way.
    pub content: Vec<Option<Content>>,
    /// Blocks that an unfinished request names.
    pub busy: Vec<bool>,
    /// Base and bytes of the two segments, each with blocks one after the other.
    segments: [(u64, u64); 2],
}

/// One process's KV memory: each group is two segments, keys and values, of all its blocks.
pub struct KvMemory {
    mapping: Mapping,
    pub groups: Vec<KvGroup>,
}

impl KvMemory {
    /// Memory for `blocks` blocks of each group, given as number and page size in bytes. `owner`
    /// tells what lies in it at first.
    pub fn new(owner: u64, blocks: u32, groups: &[(u16, u64)]) -> KvMemory {
        let per_block: u64 = groups.iter().map(|(_, page)| page).sum();
        let bytes = (per_block * u64::from(blocks)).next_multiple_of(4096);
        let (fd, mapping) = create_kv_region("KV memory", bytes).expect("a region");
        let region = RegionMapping::map(fd.as_fd(), bytes).expect("a mapped region");
        let mut base = 0;
        let mut made = Vec::new();
        for (group, page) in groups {
            let first = page / 3 / 64 * 64 + 64;
            let segments = [
                (base, first),
                (base + first * u64::from(blocks), page - first),
            ];
            base += page * u64::from(blocks);
            let layout = GroupLayout {
                group: *group,
                num_blocks: blocks,
                segments: segments
                    .iter()
                    .map(|(base, bytes)| SegmentLayout {
                        memory: MemoryRef::Region(0),
                        base: *base,
                        block_stride: *bytes,
                        bytes: *bytes,
                    })
                    .collect(),
                replicated: false,
            };
            let valid = ValidLayout::new(&layout, |_| Some(region.bytes())).expect("a layout");
            let resolve = |_| Some(ClientMemory::Region(region.clone()));
            made.push(KvGroup {
                group: *group,
                bound: BoundLayout::bind(Arc::new(valid), resolve).expect("a bound layout"),
                content: vec![None; blocks as usize],
                busy: vec![false; blocks as usize],
                segments,
            });
        }
        let mut memory = KvMemory {
            mapping,
            groups: made,
        };
        for at in 0..memory.groups.len() {
            for block in 0..blocks {
                memory.mark(at, block, owner);
            }
        }
        memory
    }

    /// Position of a group.
    pub fn group_at(&self, group: u16) -> Option<usize> {
        self.groups.iter().position(|found| found.group == group)
    }

    /// Blocks of a group that no unfinished request names.
    pub fn free_blocks(&self, at: usize) -> Vec<u32> {
        let busy = (0u32..).zip(&self.groups[at].busy);
        busy.filter(|(_, busy)| !**busy)
            .map(|(block, _)| block)
            .collect()
    }

    /// Fills a block.
    pub fn write(&mut self, at: usize, block: u32, content: Content) {
        self.groups[at].content[block as usize] = Some(content);
        let bytes = content.bytes(self.page_bytes(at));
        let mut rest = bytes.as_slice();
        for (base, length) in self.groups[at].segments {
            let (part, behind) = rest.split_at(length as usize);
            rest = behind;
            let offset = base + u64::from(block) * length;
            self.mapping.copy_in(offset as usize, part).expect("inside");
        }
    }

    /// Fills a block with what no page ever holds.
    pub fn mark(&mut self, at: usize, block: u32, owner: u64) {
        let content = Content {
            namespace: MARK,
            group: self.groups[at].group,
            hash: owner,
            shard: 0,
            version: u64::from(block),
        };
        self.write(at, block, content);
    }

    /// Overwrites part of a block with noise, as a copy does that fails half-way.
    pub fn tear(&mut self, at: usize, block: u32, rng: &mut Rng) {
        self.groups[at].content[block as usize] = None;
        let (base, length) = self.groups[at].segments[0];
        let noise: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
        let offset = base + u64::from(block) * length;
        self.mapping
            .copy_in(offset as usize, &noise)
            .expect("inside");
    }

    /// Whether a block's bytes are what they should be; blocks of unknown content pass.
    pub fn is_intact(&self, at: usize, block: u32) -> bool {
        let Some(content) = self.groups[at].content[block as usize] else {
            return true;
        };
        self.read(at, block) == content.bytes(self.page_bytes(at))
    }

    fn page_bytes(&self, at: usize) -> usize {
        self.groups[at].bound.layout().page_bytes() as usize
    }

    fn read(&self, at: usize, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.page_bytes(at)];
        let mut rest = bytes.as_mut_slice();
        for (base, length) in self.groups[at].segments {
            let (part, behind) = rest.split_at_mut(length as usize);
            rest = behind;
            let offset = base + u64::from(block) * length;
            self.mapping
                .copy_out(offset as usize, part)
                .expect("inside");
        }
        bytes
    }
}
