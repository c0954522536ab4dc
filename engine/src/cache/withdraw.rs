//! Checksums of pages, and taking a sealed block back whose bytes turned out to be wrong.

#![forbid(unsafe_code)]

use pegaflow_shm::BlockHash;
use pegaflow_shm::index::EntryId;

use crate::cache::Cache;
use crate::cache::block::Shard;
use crate::cache::domain::DomainId;
use crate::copy::NO_CHECKSUM;
use crate::pool::PageAddr;

/// A block that was withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Withdrawn {
    /// Its namespace.
    pub namespace: u32,
    /// Its cache group.
    pub group: u16,
    /// Its name.
    pub hash: BlockHash,
}

impl Cache {
    /// The recorded checksum of a sealed page, or [`NO_CHECKSUM`].
    #[inline]
    pub fn checksum(&self, page: PageAddr) -> u64 {
        self.catalog.checksum(page).unwrap_or(NO_CHECKSUM)
    }

    /// Keeps a shard's checksum until its block is recorded.
    pub(super) fn keep_checksum(&mut self, page: PageAddr, checksum: u64) {
        if let Some(kept) = &mut self.checksums {
            kept.insert(page, checksum);
        }
    }

    /// Forgets the checksum of a shard whose block is not recorded.
    pub(super) fn forget_checksum(&mut self, page: PageAddr) {
        if let Some(kept) = &mut self.checksums {
            kept.remove(&page);
        }
    }

    /// Takes the sealed block back that has this page: never a hit again, out of the catalog at
    /// once, its pages free when the last lease lets go. `None` when no block has the page, as when
    /// it was withdrawn before.
    pub fn withdraw(&mut self, page: PageAddr) -> Option<Withdrawn> {
        let (domain, entry) = self.owner_of(page)?;
        self.withdraw_block(domain, entry)
    }

    /// The same with the block itself.
    pub fn withdraw_block(&mut self, domain: DomainId, entry: EntryId) -> Option<Withdrawn> {
        let home = &mut self.domains[domain];
        if !home.block(entry).sealed {
            return None;
        }
        // Readers first, then the records: a crash in between leaves what was there before.
        let key = home.index.writer.withdraw(entry);
        home.policy.remove(entry.0);
        let block = home.block_mut(entry);
        (block.sealed, block.withdrawn) = (false, true);
        let (shards, held) = (block.shards, block.pins > 0);
        home.pinned -= u32::from(held);
        self.removals += 1;
        let mut bytes = 0;
        for shard in 0..shards {
            if let Some(page) = self.page_in(domain, entry, shard) {
                bytes += self.pool.page_bytes_of(page).map_or(0, i64::from);
                if let Err(error) = self.catalog.clear(page) {
                    tracing::error!(%error, "the record of a withdrawn page cannot be cleared");
                }
            }
        }
        if !held {
            self.bury(domain, entry);
        }
        match key {
            Ok(key) => {
                self.hold(key.namespace, -1, -bytes);
                Some(Withdrawn {
                    namespace: key.namespace,
                    group: key.group,
                    hash: key.hash(),
                })
            }
            Err(error) => {
                tracing::error!(%error, "a block to withdraw is not in the index");
                None
            }
        }
    }

    /// Frees what is left of a withdrawn block that nobody holds any more.
    pub(super) fn bury(&mut self, domain: DomainId, entry: EntryId) {
        let shards = self.domains[domain].block(entry).shards;
        for shard in 0..shards {
            if let Some(page) = self.page_in(domain, entry, shard) {
                self.drop_page(domain, page);
            }
        }
        let home = &mut self.domains[domain];
        if let Err(error) = home.index.writer.remove(entry) {
            tracing::error!(%error, "the entry of a withdrawn block cannot be freed");
        }
        home.blocks[entry.0 as usize].end(&mut home.runs);
    }

    fn page_in(&self, domain: DomainId, entry: EntryId, shard: u16) -> Option<PageAddr> {
        let home = &self.domains[domain];
        match home.block(entry).shard(shard, &home.runs) {
            Shard::In(page) => Some(page),
            Shard::Empty | Shard::Copying(_) => None,
        }
    }
}
