//! Finding a page: allocate, else evict.
//!
//! Victims come in the policy's order. A victim whose pages have another size frees nothing that
//! the new page could use, unless its whole extent empties: then every block of that extent goes,
//! and the extent changes its page size. Without that, the first model on a node would keep the
//! pool for ever.

#![forbid(unsafe_code)]

use pegaflow_shm::index::{BlockKey, EntryId};

use crate::cache::Cache;
use crate::cache::block::{Block, Shard};
use crate::cache::domain::DomainId;
use crate::cache::lookup::key_hash;
use crate::fault::{self, CrashPoint};
use crate::isolation::DomainKey;
use crate::pool::{Allocation, ExtentId, PageAddr};

/// Extents of another page size that are tried in vain before a list goes without room.
const EVACUATION_TRIES: usize = 8;

/// Victims that the tier could still take and are passed over for one that it has, or never takes.
const MOST_SPARED: u32 = 256;

/// Why there is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Everything is leased, being copied or unfinished.
    NothingToEvict,
    /// The admission gate prefers the victim.
    NotAdmitted,
}

impl Cache {
    /// A free page of this size, near a memory node if it may be, evicting what must go.
    pub(super) fn make_room(
        &mut self,
        (page_bytes, near): (u32, Option<u32>),
        candidate: u64,
    ) -> Result<PageAddr, NoRoom> {
        loop {
            if let Some(page) = self.take_page(page_bytes, near) {
                return Ok(page);
            }
            if self.drop_expired_unfinished() {
                continue;
            }
            if self.exhausted {
                return Err(NoRoom::NothingToEvict);
            }
            let Some((victim_domain, victim)) = self.pick_victim() else {
                self.exhausted = true;
                return Err(NoRoom::NothingToEvict);
            };
            self.admit(victim_domain, victim, candidate)?;
            match self.foreign_extent(victim_domain, victim, page_bytes) {
                None => {
                    self.evictions.capacity += 1;
                    self.evict(victim_domain, victim);
                }
                Some(extent) => {
                    if self.busy_extents.len() >= EVACUATION_TRIES {
                        self.exhausted = true;
                        return Err(NoRoom::NothingToEvict);
                    }
                    if !self.evacuate(extent) {
                        // Some block of it is in use, so none of its blocks makes room.
                        self.busy_extents.push(extent);
                    }
                }
            }
        }
    }

    /// Evicts one block of the domain to free an index entry.
    pub(super) fn evict_one(&mut self, domain: DomainId, candidate: u64) -> Result<(), NoRoom> {
        self.drop_expired_unfinished();
        let victim = self.victim_of(domain, &[]);
        let (domain, victim) = victim.ok_or(NoRoom::NothingToEvict)?;
        self.admit(domain, victim, candidate)?;
        self.evictions.capacity += 1;
        self.evict(domain, victim);
        Ok(())
    }

    fn admit(&mut self, domain: DomainId, victim: EntryId, candidate: u64) -> Result<(), NoRoom> {
        let Some(admission) = &mut self.admission else {
            return Ok(());
        };
        let Some(key) = self.domains[domain].index.writer.key(victim) else {
            return Ok(());
        };
        if admission.admit(candidate, key_hash(&key.hash())) {
            Ok(())
        } else {
            Err(NoRoom::NotAdmitted)
        }
    }

    fn take_page(&mut self, page_bytes: u32, near: Option<u32>) -> Option<PageAddr> {
        let Allocation {
            addr,
            opened,
            is_far,
        } = self.pool.alloc(page_bytes, near)?;
        if is_far {
            self.far_pages += 1;
            if self.far_pages.is_power_of_two() {
                tracing::warn!(
                    node = near,
                    pages = self.far_pages,
                    "the part of the pool near the GPU is full: pages are taken from another \
                     part, and its copies cross to another socket"
                );
            }
        }
        if let Some(extent) = opened
            && let Err(error) = self.open_extent(extent, addr)
        {
            tracing::warn!(%error, extent, "no room for the catalog of an extent");
            self.free_page(addr);
            return None;
        }
        Some(addr)
    }

    fn open_extent(
        &mut self,
        extent: ExtentId,
        addr: PageAddr,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let page_bytes = self.pool.page_bytes_of(addr)?;
        self.catalog.prepare_extent(extent, page_bytes)?;
        Ok(())
    }

    /// Frees a page whose content, if any, is no longer in the catalog.
    pub(super) fn free_page(&mut self, page: PageAddr) {
        match self.pool.free(page) {
            Ok(freed) => {
                if let Some(extent) = freed.emptied
                    && let Err(error) = self.catalog.release_extent(extent)
                {
                    tracing::error!(%error, extent, "the catalog of an empty extent stays");
                }
            }
            Err(error) => tracing::error!(%error, "a page cannot be freed"),
        }
    }

    /// The next victim: of the domain that holds most, so that none can crowd another one out.
    fn pick_victim(&mut self) -> Option<(DomainId, EntryId)> {
        let heaviest = (0..self.domains.len()).max_by_key(|domain| self.domains[*domain].bytes)?;
        let busy = std::mem::take(&mut self.busy_extents);
        let others = (0..self.domains.len()).filter(|domain| *domain != heaviest);
        let victim = std::iter::once(heaviest)
            .chain(others)
            .find_map(|domain| self.victim_of(domain, &busy));
        self.busy_extents = busy;
        victim
    }

    /// The domain's next victim that does not lie in `busy` extents alone.
    fn victim_of(&mut self, domain: DomainId, busy: &[ExtentId]) -> Option<(DomainId, EntryId)> {
        let home = &mut self.domains[domain];
        if home.index.writer.sealed_len() <= home.pinned {
            // Every member of the policy is held: do not look at each of them for each block.
            return None;
        }
        let (blocks, runs, pool) = (&home.blocks, &home.runs, &self.pool);
        let is_busy = |block: &Block| {
            (0..block.shards).all(|shard| match block.shard(shard, runs) {
                Shard::In(page) | Shard::Copying(page) => pool
                    .extent_of(page)
                    .is_ok_and(|extent| busy.contains(&extent)),
                Shard::Empty => true,
            })
        };
        let may_leave = |block: &Block| block.is_idle() && (busy.is_empty() || !is_busy(block));
        let tier = self.options.tier.filter(|_| self.spares_unwritten);
        let mut spared = 0;
        let mut victim = home.policy.victim(&mut |id| {
            let block = &blocks[id as usize];
            if !may_leave(block) {
                return false;
            }
            let lost = tier.is_some_and(|admit| {
                !block.stored && !block.unfit && admit.worth_keeping(block.hits)
            });
            spared += u32::from(lost && spared < MOST_SPARED);
            !lost || spared == MOST_SPARED
        });
        if victim.is_none() && spared > 0 {
            // All would be lost: a save does not wait for the tier.
            victim = home
                .policy
                .victim(&mut |id| may_leave(&blocks[id as usize]));
        }
        let victim = victim?;
        Some((domain, EntryId(victim)))
    }

    /// The extent of a victim none of whose pages has the wanted size: one that was not tried in
    /// vain, if its pages lie in several.
    fn foreign_extent(
        &self,
        domain: DomainId,
        victim: EntryId,
        page_bytes: u32,
    ) -> Option<ExtentId> {
        let wanted = self.pool.check_page(u64::from(page_bytes)).ok()?;
        let home = &self.domains[domain];
        let block = home.block(victim);
        let mut foreign = None;
        for shard in 0..block.shards {
            if let Shard::In(page) | Shard::Copying(page) = block.shard(shard, &home.runs) {
                let extent = self.pool.extent_of(page).ok()?;
                if self.pool.page_bytes_of_extent(extent) == Some(wanted) {
                    return None;
                }
                let is_busy = |extent| self.busy_extents.contains(&extent);
                if foreign.is_none_or(is_busy) {
                    foreign = Some(extent);
                }
            }
        }
        foreign
    }

    /// Evicts every block of an extent, if none of them is in use. False when it must stay.
    fn evacuate(&mut self, extent: ExtentId) -> bool {
        let pages: Vec<PageAddr> = self.pool.live_pages(extent).collect();
        let mut blocks = Vec::with_capacity(pages.len());
        for page in pages {
            match self.owner_of(page) {
                Some((domain, entry)) if self.domains[domain].block(entry).is_idle() => {
                    blocks.push((domain, entry));
                }
                _ => return false,
            }
        }
        if self.pool.drain(extent).is_err() {
            return false;
        }
        fault::point(CrashPoint::ExtentDrained);
        for (domain, entry) in blocks {
            // Two shards of one block may lie in the same extent.
            if self.domains[domain].block(entry).shards > 0 {
                self.evictions.extent += 1;
                self.evict(domain, entry);
            }
        }
        true
    }

    /// The block whose completely copied shard lies in a page, found through the catalog.
    pub(super) fn owner_of(&self, page: PageAddr) -> Option<(DomainId, EntryId)> {
        let record = self.catalog.record(page)?;
        let key = BlockKey::new(record.namespace, record.group, &record.hash);
        let stored = self.catalog.namespace_in(record.namespace)?;
        let domain = self.domain_of_key(DomainKey(stored.domain_key))?;
        let entry = self.domains[domain].index.writer.find(&key)?;
        Some((domain, entry))
    }

    /// Takes a block out: readers first, then its records, then its pages.
    pub(super) fn evict(&mut self, domain: DomainId, entry: EntryId) {
        assert!(
            self.domains[domain].block(entry).is_idle(),
            "{entry} is in use"
        );
        let shards = self.domains[domain].block(entry).shards;
        self.domains[domain].policy.remove(entry.0);
        let block = *self.domains[domain].block(entry);
        let sealed = block.sealed;
        if let (Some(admit), true, false) = (self.options.tier, sealed, block.stored) {
            self.evictions.unwritten += u64::from(admit.worth_keeping(block.hits));
        }
        let removed = self.domains[domain].index.writer.remove(entry);
        self.removals += 1;
        fault::point(CrashPoint::BlockUnindexed);
        let mut bytes = 0;
        for shard in 0..shards {
            let home = &self.domains[domain];
            if let Shard::In(page) = home.block(entry).shard(shard, &home.runs) {
                bytes += self.drop_page(domain, page);
            }
        }
        match removed {
            Ok(key) if sealed => self.hold(key.namespace, -1, -(bytes as i64)),
            Ok(key) => self.end_unfinished(key.namespace),
            Err(error) => tracing::error!(%error, "a block to evict is not in the index"),
        }
        let home = &mut self.domains[domain];
        let block = &mut home.blocks[entry.0 as usize];
        block.end(&mut home.runs);
        home.prefetch_victims();
    }

    pub(super) fn drop_page(&mut self, domain: DomainId, page: PageAddr) -> u64 {
        // The record goes before the page can be used again, so that a crash in between loses a
        // page and never adopts another block's bytes.
        if let Err(error) = self.catalog.clear(page) {
            tracing::error!(%error, "a catalog record cannot be cleared");
        }
        fault::point(CrashPoint::RecordCleared);
        self.forget_checksum(page);
        let bytes = self.pool.page_bytes_of(page).map_or(0, u64::from);
        self.domains[domain].bytes = self.domains[domain].bytes.saturating_sub(bytes);
        self.free_page(page);
        bytes
    }

    /// Drops blocks whose remaining shards never came. True when one went.
    pub fn drop_expired_unfinished(&mut self) -> bool {
        let ttl_s = self.options.incomplete_ttl.as_secs() as u32;
        let now_s = self.now_s;
        let mut dropped = false;
        while let Some(oldest) = self.unfinished.front().copied() {
            let block = *self.domains[oldest.domain].block(oldest.entry);
            let current = block.generation == oldest.generation && block.shards > 0;
            if current && !block.sealed && !block.withdrawn {
                if now_s.saturating_sub(block.born_s) < ttl_s || !block.is_idle() {
                    break;
                }
                self.evictions.incomplete += 1;
                self.evict(oldest.domain, oldest.entry);
                dropped = true;
            }
            self.unfinished.pop_front();
        }
        dropped
    }
}
