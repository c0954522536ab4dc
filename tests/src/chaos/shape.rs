//! Instances, ranks, page sizes, pools.

#![forbid(unsafe_code)]

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::plan::Mode;
use crate::layout::Arrangement;
use crate::memory::MemoryKind;
use crate::worker::WorkerSpec;

/// Threads of a scheduler; each rank has one for each of them.
pub const THREADS: usize = 3;
/// Blocks of one thread's requests in each rank.
pub const BLOCKS_PER_THREAD: usize = 24;

/// How long a block waits for the shards of its remaining ranks.
pub const INCOMPLETE_TTL: Duration = Duration::from_secs(2);

/// One engine instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstanceShape {
    /// Its name.
    pub name: String,
    /// What each rank registers.
    pub ranks: Vec<WorkerSpec>,
    /// Numbers of its blocks are at most this.
    pub most_blocks: u64,
    /// Blocks may be evicted: any number may be a hit or a miss.
    pub evicts: bool,
    /// They come back from below the pool.
    pub below: bool,
}

impl InstanceShape {
    /// Bytes of a block in all ranks.
    pub fn block_bytes(&self) -> u64 {
        let pages = self.ranks.iter().map(WorkerSpec::page_bytes);
        pages.sum::<usize>() as u64
    }

    /// What the scheduler registers.
    pub fn scheduler(&self) -> WorkerSpec {
        self.ranks[0].scheduler()
    }
}

/// Layers, bytes of K of a layer and block, memory and arrangement of each rank of each instance.
type Rank = (usize, usize, MemoryKind, Arrangement);
const INSTANCES: [&[Rank]; 2] = [
    &[
        (2, 1 << 10, MemoryKind::Shared, Arrangement::KvApart),
        (3, 4 << 10, MemoryKind::Process, Arrangement::BlocksFirst),
    ],
    &[
        (2, 16 << 10, MemoryKind::Process, Arrangement::LayersFirst),
        (1, 64 << 10, MemoryKind::Shared, Arrangement::KvTogether),
    ],
];

/// The two instances of a scene over a pool of so many bytes.
pub fn instances(pool_bytes: u64, mode: Mode) -> Vec<InstanceShape> {
    let evicts = mode.evicts();
    let numbered = INSTANCES.iter().enumerate();
    numbered
        .map(|(number, ranks)| {
            let name = format!("chaos-{number}");
            let mut shape = InstanceShape {
                ranks: specs(&name, ranks),
                name,
                most_blocks: 0,
                evicts,
                below: mode == Mode::BothTiers,
            };
            let fitting = pool_bytes / 2 / shape.block_bytes();
            // Half of the room is left for extents that are not full, and for orphans.
            shape.most_blocks = if evicts { fitting * 3 } else { fitting / 2 };
            shape
        })
        .collect()
}

fn specs(name: &str, ranks: &[Rank]) -> Vec<WorkerSpec> {
    let world_size = ranks.len() as u32;
    let numbered = (0..).zip(ranks);
    numbered
        .map(
            |(rank, &(layers, half_bytes, memory, arrangement))| WorkerSpec {
                instance: name.into(),
                salt: name.into(),
                world_size,
                rank: Some(rank),
                memory,
                arrangement,
                layers,
                half_bytes,
                blocks: (THREADS * BLOCKS_PER_THREAD) as u32,
                ..WorkerSpec::default()
            },
        )
        .collect()
}
