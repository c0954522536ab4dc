//! What the cache holds, for the simulation's checks.

#![forbid(unsafe_code)]

use pegaflow_shm::index::{BlockKey, EntryId};

use crate::cache::Cache;
use crate::cache::block::{Block, Shard};
use crate::cache::domain::DomainId;

/// A block as the cache and its index know it.
#[derive(Debug)]
pub struct BlockView {
    /// Where it is.
    pub domain: DomainId,
    /// Its entry.
    pub entry: EntryId,
    /// What the index calls it.
    pub key: Option<BlockKey>,
    /// Clients see it.
    pub readable: bool,
    /// Pins, states.
    pub block: Block,
    /// Where its shards lie.
    pub shards: Vec<Shard>,
}

impl Cache {
    /// Every block, finished or not.
    pub fn block_views(&self) -> Vec<BlockView> {
        let mut views = Vec::new();
        for (domain, home) in self.domains.iter().enumerate() {
            for (entry, block) in (0u32..).zip(&home.blocks) {
                if block.shards == 0 {
                    continue;
                }
                let entry = EntryId(entry);
                views.push(BlockView {
                    domain,
                    entry,
                    key: home.index.writer.key(entry),
                    readable: home.index.writer.is_sealed(entry),
                    block: *block,
                    shards: (0..block.shards)
                        .map(|shard| block.shard(shard, &home.runs))
                        .collect(),
                });
            }
        }
        views
    }

    /// Isolation domains.
    pub fn domain_count(&self) -> usize {
        self.domains.len()
    }

    /// Places in the queue of unfinished blocks.
    pub fn unfinished_queue_len(&self) -> usize {
        self.unfinished.len()
    }
}
