//! Blocks on their way to the tier below the pool, and back.
//!
//! A block that is being written is held like a leased one: its pages stay until the tier has let
//! go of them. A block that comes back is one whose shards are all being copied: invisible until
//! every page is in, and gone without a trace if one does not come.

#![forbid(unsafe_code)]

use pegaflow_shm::BlockHash;
use pegaflow_shm::desc::MissReason;
use pegaflow_shm::index::{BlockKey, EntryId};

use crate::cache::Cache;
use crate::cache::block::{Block, Shard};
use crate::cache::domain::DomainId;
use crate::cache::store::{Offer, ShardScope};
use crate::copy::NO_CHECKSUM;
use crate::tier::{PageSpan, StoreKey};

/// Where a block stands in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Every shard is in.
    Sealed(EntryId),
    /// Copies of it are running.
    Copying(EntryId),
    /// Some shards are in and the others are not on their way.
    Partial(EntryId),
    /// It is not there.
    Absent,
}

impl Cache {
    /// What the tier calls the namespace's blocks.
    pub fn tier_scope(&self, namespace: u32) -> Option<[u8; 32]> {
        self.catalog.tier_scope(namespace)
    }

    /// Looks one block up without holding it.
    pub fn presence(
        &self,
        domain: DomainId,
        (namespace, group): (u32, u16),
        hash: &BlockHash,
    ) -> Presence {
        let home = &self.domains[domain];
        let key = BlockKey::new(namespace, group, hash);
        let Some(entry) = home.index.writer.find(&key) else {
            return Presence::Absent;
        };
        let block = home.block(entry);
        if block.sealed {
            Presence::Sealed(entry)
        } else if block.copying > 0 {
            Presence::Copying(entry)
        } else {
            Presence::Partial(entry)
        }
    }

    /// Holds one block that [`Self::presence`] found sealed.
    ///
    /// # Errors
    /// It is not sealed any more, or its domain has no pins left.
    pub fn pin_sealed(&mut self, domain: DomainId, entry: EntryId) -> Result<u32, MissReason> {
        self.pin(domain, Some(entry))
    }

    /// Shows the domain's sealed blocks in about the order in which they would be evicted, until
    /// `visit` answers false.
    pub fn upcoming(&self, domain: DomainId, visit: &mut dyn FnMut(EntryId, &Block) -> bool) {
        let home = &self.domains[domain];
        home.policy.upcoming(&mut |id| {
            let entry = EntryId(id);
            visit(entry, home.block(entry))
        });
    }

    /// The name of a block for the tier; `None` when it is not there.
    pub fn store_key(&self, domain: DomainId, entry: EntryId) -> Option<StoreKey> {
        let key = self.domains[domain].index.writer.key(entry)?;
        Some(StoreKey {
            scope: self.tier_scope(key.namespace)?,
            group: key.group,
            hash: key.hash(),
        })
    }

    /// Bytes of a block's pages.
    pub fn block_bytes(&self, domain: DomainId, entry: EntryId) -> u64 {
        let home = &self.domains[domain];
        let block = home.block(entry);
        let bytes = (0..block.shards).map(|shard| match block.shard(shard, &home.runs) {
            Shard::In(page) | Shard::Copying(page) => {
                self.pool.page_bytes_of(page).map_or(0, u64::from)
            }
            Shard::Empty => 0,
        });
        bytes.sum()
    }

    /// Whether victims that the tier has are preferred to those that would be lost: as long as it
    /// takes blocks at all.
    pub fn spare_unwritten(&mut self, yes: bool) {
        self.spares_unwritten = yes;
    }

    /// Notes that the tier can never take the block: nothing is won by keeping it longer.
    pub fn mark_unfit(&mut self, domain: DomainId, entry: EntryId) {
        self.domains[domain].block_mut(entry).unfit = true;
    }

    /// Notes whether the tier has the block.
    pub fn mark_stored(&mut self, domain: DomainId, entry: EntryId, stored: bool) {
        self.domains[domain].block_mut(entry).stored = stored;
    }

    /// Holds a sealed block for as long as the tier reads its pages, which are appended to `pages`.
    /// False when it cannot be held.
    pub fn begin_write(
        &mut self,
        domain: DomainId,
        entry: EntryId,
        pages: &mut Vec<PageSpan>,
    ) -> bool {
        if self.pins_left(domain) == 0 || !self.domains[domain].block(entry).sealed {
            return false;
        }
        let home = &self.domains[domain];
        for shard in 0..home.block(entry).shards {
            if let Shard::In(page) = home.block(entry).shard(shard, &home.runs) {
                pages.push(PageSpan {
                    offset: page.offset(),
                    bytes: self.pool.page_bytes_of(page).unwrap_or(0),
                    checksum: match self.checksums {
                        Some(_) => self.checksum(page),
                        None => NO_CHECKSUM,
                    },
                });
            }
        }
        let home = &mut self.domains[domain];
        let block = &mut home.blocks[entry.0 as usize];
        home.pinned += u32::from(block.pins == 0);
        home.pins += 1;
        block.pins += 1;
        true
    }

    /// The tier has let go of the pages of [`Self::begin_write`].
    pub fn end_write(&mut self, domain: DomainId, entry: EntryId, written: bool) {
        let block = self.domains[domain].block_mut(entry);
        block.stored |= written && block.sealed;
        self.unpin(domain, &[entry.0]);
    }

    /// Makes room for a block that comes back, in pages of these sizes, which are appended to
    /// `pages` with no checksum wanted. It must be absent, or partial with nothing on its way.
    ///
    /// # Errors
    /// There is no room; what was taken is given back.
    pub fn begin_fetch(
        &mut self,
        domain: DomainId,
        (namespace, group): (u32, u16),
        hash: &BlockHash,
        sizes: &[u32],
        pages: &mut Vec<PageSpan>,
    ) -> Result<EntryId, MissReason> {
        if let Presence::Partial(entry) = self.presence(domain, (namespace, group), hash) {
            if !self.domains[domain].block(entry).is_idle() {
                return Err(MissReason::Incomplete);
            }
            self.evict(domain, entry);
        }
        self.exhausted = false;
        self.busy_extents.clear();
        // A query asks for it: the admission gate is not asked.
        let admission = self.admission.take();
        let mut begun = None;
        for (shard, bytes) in (0u16..).zip(sizes) {
            let scope = ShardScope {
                domain,
                namespace,
                group,
                shard,
                shards: sizes.len() as u16,
                page_bytes: *bytes,
                near: None,
            };
            let offer = match begun {
                Some(entry) => self.offer_known(&scope, entry, hash),
                None => self.offer_new(&scope, hash),
            };
            let Offer::Copy { entry, page } = offer else {
                break;
            };
            if begun.is_none() && sizes.len() > 1 {
                // It does not wait for ranks: what it waits for ends by itself.
                self.unfinished.pop_back();
            }
            begun = Some(entry);
            pages.push(PageSpan {
                offset: page.offset(),
                bytes: *bytes,
                checksum: NO_CHECKSUM,
            });
        }
        self.admission = admission;
        match begun {
            Some(entry) if pages.len() == sizes.len() => Ok(entry),
            Some(entry) => {
                self.end_fetch(domain, entry, None);
                Err(MissReason::NoLease)
            }
            None => Err(MissReason::NoLease),
        }
    }

    /// The tier has filled the pages of [`Self::begin_fetch`], whose checksums those are of which
    /// there is one, or has let go of them. True when the block is a hit now.
    pub fn end_fetch(&mut self, domain: DomainId, entry: EntryId, filled: Option<&[u64]>) -> bool {
        let Some(key) = self.domains[domain].index.writer.key(entry) else {
            unreachable!("{entry} came back and is not in the index");
        };
        let shards = self.domains[domain].block(entry).shards;
        let mut sealed = false;
        for shard in 0..shards {
            let home = &self.domains[domain];
            if home.block(entry).shards == 0 {
                // The last page that had been taken is given back, and the block with it.
                break;
            }
            let Shard::Copying(page) = home.block(entry).shard(shard, &home.runs) else {
                continue;
            };
            let scope = ShardScope {
                domain,
                namespace: key.namespace,
                group: key.group,
                shard,
                shards,
                page_bytes: self.pool.page_bytes_of(page).unwrap_or(0),
                near: None,
            };
            if let Some(checksums) = filled {
                let checksum = checksums.get(usize::from(shard));
                let checksum = checksum.copied().unwrap_or(NO_CHECKSUM);
                sealed = self.shard_copied(&scope, entry, checksum);
            } else {
                self.shard_failed(&scope, entry);
            }
        }
        if sealed {
            self.mark_stored(domain, entry, true);
        }
        sealed
    }
}
