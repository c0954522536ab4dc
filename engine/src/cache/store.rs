//! Taking shards in: what to copy, and what a finished or failed copy means.
//!
//! A block goes *absent* → *unfinished* (in the index, invisible to clients) → *sealed* (visible)
//! when the last of its shards is completely copied. A failed copy takes its shard back, and a
//! block without any shard leaves the index, so that nothing half-written is ever a hit.

#![forbid(unsafe_code)]

use pegaflow_shm::BlockHash;
use pegaflow_shm::index::{BlockKey, EntryId, InsertError};

use crate::cache::block::Shard;
use crate::cache::domain::DomainId;
use crate::cache::lookup::key_hash;
use crate::cache::room::NoRoom;
use crate::cache::{Cache, Unfinished};
use crate::catalog::{Catalog, PageRecord};
use crate::copy::NO_CHECKSUM;
use crate::fault::{self, CrashPoint};
use crate::pool::{PageAddr, Pool, round_page};

/// Blocks that got their last shard, or left, and that may stay in the queue of unfinished ones
/// beyond one for each unfinished block.
const UNFINISHED_SLACK: u64 = 1024;

/// Whose shard of which blocks a save brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardScope {
    /// Isolation domain.
    pub domain: DomainId,
    /// Namespace.
    pub namespace: u32,
    /// Cache group.
    pub group: u16,
    /// Position of the rank among the group's ranks.
    pub shard: u16,
    /// Ranks that hold the group.
    pub shards: u16,
    /// Bytes of the rank's page.
    pub page_bytes: u32,
    /// The memory node near which its pages are best, if that matters.
    pub near: Option<u32>,
}

/// What becomes of an offered shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Copy it into this page, then call [`Cache::shard_copied`] or [`Cache::shard_failed`].
    Copy {
        /// The block.
        entry: EntryId,
        /// Where to.
        page: PageAddr,
    },
    /// Held already.
    Held,
    /// Another save is copying it.
    InFlight,
    /// Nothing can be evicted for it.
    NoSpace,
    /// The admission gate prefers what is there.
    NotAdmitted,
}

impl Cache {
    /// Offers one rank's shards of blocks, in the order of `hashes`; `outcome` hears each position
    /// once.
    pub fn offer(
        &mut self,
        scope: &ShardScope,
        hashes: &[BlockHash],
        mut outcome: impl FnMut(usize, Offer),
    ) {
        let found = self.find(scope.domain, (scope.namespace, scope.group), hashes);
        let removals = self.removals;
        self.exhausted = false;
        self.busy_extents.clear();
        for (position, hash) in hashes.iter().enumerate() {
            // An eviction for an earlier position may have taken what the look-up found.
            let stale = self.removals != removals;
            let known = found[position].filter(|entry| !stale || self.holds(scope, *entry, hash));
            let offer = match known {
                Some(entry) => self.offer_known(scope, entry, hash),
                None => self.offer_new(scope, hash),
            };
            outcome(position, offer);
        }
        self.found = found;
    }

    fn holds(&self, scope: &ShardScope, entry: EntryId, hash: &BlockHash) -> bool {
        let key = BlockKey::new(scope.namespace, scope.group, hash);
        self.domains[scope.domain].index.writer.key(entry) == Some(key)
    }

    pub(super) fn offer_known(
        &mut self,
        scope: &ShardScope,
        entry: EntryId,
        hash: &BlockHash,
    ) -> Offer {
        let home = &mut self.domains[scope.domain];
        let block = home.block(entry);
        if block.shards != scope.shards {
            // The namespace digest fixes the shards of a group: only a defect could bring this
            // about.
            tracing::error!(
                found = block.shards,
                expected = scope.shards,
                "shard counts differ"
            );
            return Offer::NoSpace;
        }
        match block.shard(scope.shard, &home.runs) {
            Shard::In(_) => {
                if block.sealed {
                    home.policy.touch(entry.0);
                }
                Offer::Held
            }
            Shard::Copying(_) => Offer::InFlight,
            Shard::Empty => {
                // The block itself must not be taken while room for its shard is made.
                self.domains[scope.domain].block_mut(entry).copying += 1;
                let page = self.make_room((scope.page_bytes, scope.near), key_hash(hash));
                self.domains[scope.domain].block_mut(entry).copying -= 1;
                match page {
                    Ok(page) => self.begin_copy(scope, entry, page),
                    Err(why) => why.into(),
                }
            }
        }
    }

    pub(super) fn offer_new(&mut self, scope: &ShardScope, hash: &BlockHash) -> Offer {
        let page = match self.make_room((scope.page_bytes, scope.near), key_hash(hash)) {
            Ok(page) => page,
            Err(why) => return why.into(),
        };
        let key = BlockKey::new(scope.namespace, scope.group, hash);
        let mut inserted = self.domains[scope.domain].insert(&key);
        if let Err(InsertError::Full { .. } | InsertError::NeedReserve { .. }) = inserted {
            if let Err(why) = self.evict_one(scope.domain, key_hash(hash)) {
                self.free_page(page);
                return why.into();
            }
            inserted = self.domains[scope.domain].insert(&key);
        }
        match inserted {
            Ok(entry) => {
                let born = self.now_s;
                let home = &mut self.domains[scope.domain];
                let runs = &mut home.runs;
                home.blocks[entry.0 as usize].begin(scope.shards, born, runs);
                self.begin_unfinished(scope.namespace);
                if scope.shards > 1 {
                    self.remember_unfinished(scope.domain, entry);
                }
                self.begin_copy(scope, entry, page)
            }
            Err(InsertError::Exists(entry)) => {
                // The same hash twice in one list.
                self.free_page(page);
                self.offer_known(scope, entry, hash)
            }
            Err(_) => {
                self.free_page(page);
                Offer::NoSpace
            }
        }
    }

    fn remember_unfinished(&mut self, domain: DomainId, entry: EntryId) {
        let generation = self.domains[domain].block(entry).generation;
        self.unfinished.push_back(Unfinished {
            domain,
            entry,
            generation,
        });
        if self.unfinished.len() as u64 > 2 * self.unsealed + UNFINISHED_SLACK {
            // One block that waits long must not keep the memory of all that came after it.
            let domains = &self.domains;
            self.unfinished.retain(|found| {
                let block = domains[found.domain].block(found.entry);
                block.generation == found.generation
                    && block.shards > 0
                    && !block.sealed
                    && !block.withdrawn
            });
        }
    }

    fn begin_copy(&mut self, scope: &ShardScope, entry: EntryId, page: PageAddr) -> Offer {
        let home = &mut self.domains[scope.domain];
        home.bytes += round_page(u64::from(scope.page_bytes));
        self.taken_bytes += u64::from(scope.page_bytes);
        let runs = &mut home.runs;
        let block = &mut home.blocks[entry.0 as usize];
        block.copying += 1;
        block.set_shard(scope.shard, Shard::Copying(page), runs);
        fault::point(CrashPoint::PageOffered);
        Offer::Copy { entry, page }
    }

    /// The copy of a shard has completed, with this checksum or [`NO_CHECKSUM`]. True when it
    /// sealed its block.
    pub fn shard_copied(&mut self, scope: &ShardScope, entry: EntryId, checksum: u64) -> bool {
        fault::point(CrashPoint::ShardCopied);
        let home = &mut self.domains[scope.domain];
        let runs = &mut home.runs;
        let block = &mut home.blocks[entry.0 as usize];
        let Shard::Copying(page) = block.shard(scope.shard, runs) else {
            unreachable!(
                "a copy ended for {entry} whose shard {} is not copying",
                scope.shard
            );
        };
        block.copying -= 1;
        block.shards_in += 1;
        block.set_shard(scope.shard, Shard::In(page), runs);
        let whole = block.is_whole();
        block.sealed = whole;
        if checksum != NO_CHECKSUM {
            self.keep_checksum(page, checksum);
        }
        if whole {
            self.seal(scope, entry);
        }
        whole
    }

    /// Records the pages of a whole block, then lets readers see it.
    fn seal(&mut self, scope: &ShardScope, entry: EntryId) {
        let home = &mut self.domains[scope.domain];
        let Some(key) = home.index.writer.key(entry) else {
            unreachable!("a copy ended for {entry}, which is not in the index");
        };
        let hash = key.hash();
        let block = home.block(entry);
        let mut bytes = 0;
        for shard in 0..block.shards {
            let Shard::In(page) = block.shard(shard, &home.runs) else {
                continue;
            };
            let mark = (shard, block.shards, block.generation);
            let kept = self.checksums.as_mut().and_then(|kept| kept.remove(&page));
            let checksum = kept.unwrap_or(NO_CHECKSUM);
            let name = (scope, &hash, checksum);
            match record_page(&self.catalog, &self.pool, page, name, mark) {
                Ok(page_bytes) => {
                    bytes += i64::from(page_bytes);
                    fault::point(CrashPoint::ShardRecorded);
                }
                Err(error) => {
                    tracing::error!(%error, "a page is not recorded and will not survive a restart");
                }
            }
        }
        fault::point(CrashPoint::BlockRecorded);
        self.hold(scope.namespace, 1, bytes);
        self.end_unfinished(scope.namespace);
        let home = &mut self.domains[scope.domain];
        home.policy.insert(entry.0, key_hash(&hash));
        if let Err(error) = home.index.writer.seal(entry) {
            tracing::error!(%error, "a finished block cannot be sealed");
        }
        fault::point(CrashPoint::BlockSealed);
    }

    /// The copy of a shard failed or was cancelled, and has drained: its page is free again.
    pub fn shard_failed(&mut self, scope: &ShardScope, entry: EntryId) {
        let home = &mut self.domains[scope.domain];
        let runs = &mut home.runs;
        let block = &mut home.blocks[entry.0 as usize];
        let Shard::Copying(page) = block.shard(scope.shard, runs) else {
            unreachable!(
                "a copy failed for {entry} whose shard {} is not copying",
                scope.shard
            );
        };
        block.copying -= 1;
        block.set_shard(scope.shard, Shard::Empty, runs);
        home.bytes -= round_page(u64::from(scope.page_bytes));
        let empty = block.shards_in == 0 && block.copying == 0;
        self.free_page(page);
        if empty {
            self.evict(scope.domain, entry);
        }
    }
}

fn record_page(
    catalog: &Catalog,
    pool: &Pool,
    page: PageAddr,
    (scope, hash, checksum): (&ShardScope, &BlockHash, u64),
    (shard, shards, generation): (u16, u16, u32),
) -> Result<u32, Box<dyn std::error::Error>> {
    let page_bytes = pool.page_bytes_of(page)?;
    let (namespace, group, hash) = (scope.namespace, scope.group, *hash);
    let record = PageRecord {
        hash,
        checksum,
        namespace,
        group,
        rank: u8::try_from(shard)?,
        shards: u8::try_from(shards)?,
        generation,
        page_bytes,
    };
    catalog.write_sealed(page, &record)?;
    Ok(page_bytes)
}

impl From<NoRoom> for Offer {
    fn from(why: NoRoom) -> Offer {
        match why {
            NoRoom::NothingToEvict => Offer::NoSpace,
            NoRoom::NotAdmitted => Offer::NotAdmitted,
        }
    }
}
