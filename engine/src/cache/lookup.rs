//! Finding blocks for a query and holding them.

#![forbid(unsafe_code)]

use pegaflow_shm::BlockHash;
use pegaflow_shm::desc::MissReason;
use pegaflow_shm::index::{EntryId, prefetch_read};

use crate::cache::block::{Block, Shard};
use crate::cache::domain::DomainId;
use crate::cache::{Cache, PINS_PER_BLOCK};
use crate::pool::PageAddr;

impl Cache {
    /// Pins the longest prefix of `hashes` that is sealed, appends its entries to `pinned`, and
    /// tells why the next one is a miss; `None` when all are hits.
    pub fn pin_prefix(
        &mut self,
        domain: DomainId,
        scope: (u32, u16),
        hashes: &[BlockHash],
        pinned: &mut Vec<u32>,
    ) -> Option<MissReason> {
        let found = self.find(domain, scope, hashes);
        let mut miss = None;
        for entry in &found {
            match self.pin(domain, *entry) {
                Ok(entry) => pinned.push(entry),
                Err(reason) => {
                    miss = Some(reason);
                    break;
                }
            }
        }
        self.found = found;
        miss
    }

    /// Pins each of `hashes` that is sealed, appends the entries to `pinned`, and calls `outcome`
    /// with each position: `None` for a hit.
    pub fn pin_members(
        &mut self,
        domain: DomainId,
        scope: (u32, u16),
        hashes: &[BlockHash],
        pinned: &mut Vec<u32>,
        mut outcome: impl FnMut(usize, Option<MissReason>),
    ) {
        let found = self.find(domain, scope, hashes);
        for (position, entry) in found.iter().enumerate() {
            match self.pin(domain, *entry) {
                Ok(entry) => {
                    pinned.push(entry);
                    outcome(position, None);
                }
                Err(reason) => outcome(position, Some(reason)),
            }
        }
        self.found = found;
    }

    /// Looks all hashes up; gives its buffer away, to be put back into `self.found`.
    pub(super) fn find(
        &mut self,
        domain: DomainId,
        scope: (u32, u16),
        hashes: &[BlockHash],
    ) -> Vec<Option<EntryId>> {
        let mut found = std::mem::take(&mut self.found);
        let home = &self.domains[domain];
        let blocks = &home.blocks;
        home.index
            .writer
            .find_batch(scope.0, scope.1, hashes, &mut found, |entry| {
                if let Some(block) = blocks.get(entry.0 as usize) {
                    prefetch_read(block);
                }
            });
        if let Some(admission) = &mut self.admission {
            for hash in hashes {
                admission.record(key_hash(hash));
            }
        }
        found
    }

    #[inline]
    pub(super) fn pin(
        &mut self,
        domain: DomainId,
        entry: Option<EntryId>,
    ) -> Result<u32, MissReason> {
        let Some(entry) = entry else {
            return Err(MissReason::Absent);
        };
        let most = self.most_pins();
        let home = &mut self.domains[domain];
        let block = &mut home.blocks[entry.0 as usize];
        if !block.sealed {
            return Err(unsealed_reason(block));
        }
        if home.pins >= most {
            return Err(MissReason::NoLease);
        }
        if block.pins == 0 {
            home.pinned += 1;
        }
        home.pins += 1;
        block.pins += 1;
        block.hits = block.hits.saturating_add(1);
        home.policy.touch(entry.0);
        Ok(entry.0)
    }

    /// Pins that a domain may have: a block's own counter cannot overflow before.
    fn most_pins(&self) -> u64 {
        let most = u64::from(PINS_PER_BLOCK) * u64::from(self.options.max_blocks);
        most.min(u64::from(u32::MAX))
    }

    /// Pins that a domain has left.
    pub fn pins_left(&self, domain: DomainId) -> u64 {
        self.most_pins() - self.domains[domain].pins
    }

    /// Takes back that a pin call counted these as found; that which is at its limit stays there.
    pub fn uncount_hits(&mut self, domain: DomainId, entries: &[u32]) {
        for entry in entries {
            let block = &mut self.domains[domain].blocks[*entry as usize];
            if block.hits < u8::MAX {
                block.hits = block.hits.saturating_sub(1);
            }
        }
    }

    /// Lets go of blocks that a pin call gave.
    pub fn unpin(&mut self, domain: DomainId, entries: &[u32]) {
        self.domains[domain].pins -= entries.len() as u64;
        for entry in entries {
            let home = &mut self.domains[domain];
            let block = &mut home.blocks[*entry as usize];
            assert!(
                block.pins > 0,
                "entry {entry} is let go more often than it was held"
            );
            block.pins -= 1;
            if block.pins > 0 {
                continue;
            }
            if block.withdrawn {
                self.bury(domain, EntryId(*entry));
            } else {
                home.pinned -= 1;
            }
        }
    }

    /// Whether a pinned block was withdrawn.
    pub fn is_withdrawn(&self, domain: DomainId, entry: u32) -> bool {
        self.domains[domain].block(EntryId(entry)).withdrawn
    }

    /// The pages of shard `shard` of pinned blocks, in their order; `None` also where a block was
    /// withdrawn, or is cut into another number than `shards`: its pages then have sizes that the
    /// caller does not know.
    #[inline]
    pub fn pinned_pages<'a>(
        &'a self,
        domain: DomainId,
        entries: &'a [u32],
        (shard, shards): (u16, u16),
    ) -> impl Iterator<Item = Option<PageAddr>> + 'a {
        let home = &self.domains[domain];
        entries.iter().map(move |entry| {
            let block = home.block(EntryId(*entry));
            if block.pins == 0 || shard >= shards || block.shards != shards || block.withdrawn {
                return None;
            }
            match block.shard(shard, &home.runs) {
                Shard::In(page) => Some(page),
                Shard::Empty | Shard::Copying(_) => None,
            }
        })
    }
}

fn unsealed_reason(block: &Block) -> MissReason {
    if block.copying > 0 && block.shards_in + block.copying == block.shards {
        MissReason::InFlight
    } else {
        MissReason::Incomplete
    }
}

/// What policies and admission know a block by: eight bytes of its hash, wherever it is stored.
pub(super) fn key_hash(hash: &BlockHash) -> u64 {
    u64::from_le_bytes([
        hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7],
    ])
}
