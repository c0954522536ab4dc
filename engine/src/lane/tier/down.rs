//! Blocks on their way down: which are written, and when.

#![forbid(unsafe_code)]

use std::time::Instant;

use pegaflow_shm::index::EntryId;

use super::hold::mean_block_bytes;
use super::{
    AHEAD_SHARE, Attempt, CHECKED_SHARE, LOOK_BLOCKS, LOOKS, LaneTier, MAX_TO_WRITE, Moving, RETRY,
    TOUCH_SHARE, TURN_BEGINS, ToWrite, WRITING_SHARE,
};
use crate::cache::Cache;
use crate::cache::block::Block;
use crate::cache::domain::DomainId;
use crate::tier::{AdmitWhen, Refused};

impl LaneTier {
    /// A block has all its shards: it is written at once if that is the policy.
    pub(in crate::lane) fn note_sealed(&mut self, cache: &Cache, domain: DomainId, entry: EntryId) {
        if self.options.admit == AdmitWhen::Seal {
            self.write_soon(cache, domain, entry);
        }
    }

    /// Tells the tier of some of the blocks that a query found in the pool: what is hot there would
    /// age below and be written again. Which ones is left to chance, so that each one's turn comes
    /// however queries repeat; a tier evicts in segments of many blocks, so that some will do.
    fn touch_some(&mut self, cache: &Cache, domain: DomainId, entries: &[u32]) {
        self.dice = self.dice.wrapping_mul(747_796_405);
        self.dice = self.dice.wrapping_add(2_891_336_453);
        let first = (self.dice >> 16) as usize % TOUCH_SHARE;
        for entry in entries.iter().skip(first).step_by(TOUCH_SHARE) {
            let entry = EntryId(*entry);
            if cache.domain_ref(domain).block(entry).stored
                && let Some(key) = cache.store_key(domain, entry)
            {
                self.store.touch(&key);
            }
        }
    }

    /// Queries have found these blocks: they are written if that was the last use they needed.
    pub(in crate::lane) fn note_hits(&mut self, cache: &Cache, domain: DomainId, entries: &[u32]) {
        self.touch_some(cache, domain, entries);
        let AdmitWhen::Hits(wanted) = self.options.admit else {
            return;
        };
        for entry in entries {
            let entry = EntryId(*entry);
            let block = cache.domain_ref(domain).block(entry);
            if block.hits == wanted && !block.stored {
                self.write_soon(cache, domain, entry);
            }
        }
    }

    fn write_soon(&mut self, cache: &Cache, domain: DomainId, entry: EntryId) {
        if self.to_write.len() < MAX_TO_WRITE {
            let generation = cache.domain_ref(domain).block(entry).generation;
            self.to_write.push_back(ToWrite {
                domain,
                entry,
                generation,
            });
        }
    }

    /// Writes in the order in which blocks were listed; true when there is more for the lane's next
    /// turn.
    pub(super) fn begin_writes(&mut self, cache: &mut Cache, now: Instant) -> bool {
        if self.put_off.is_some_and(|until| now < until) {
            return false;
        }
        self.put_off = None;
        if self.to_write.is_empty() && self.look_is_due(cache) {
            self.look_ahead(cache);
        }
        for _ in 0..TURN_BEGINS {
            let Some(next) = self.to_write.front() else {
                return false;
            };
            let (domain, entry) = (next.domain, next.entry);
            let block = cache.domain_ref(domain).block(entry);
            let current = block.generation == next.generation
                && block.sealed
                && !block.stored
                && !block.unfit;
            let attempt = match current {
                true => self.write(cache, now, domain, entry),
                false => Attempt::Settled,
            };
            match attempt {
                Attempt::Settled => drop(self.to_write.pop_front()),
                Attempt::Later => {
                    // It may still have to make room for its first write.
                    self.wrote.get_or_insert(now);
                    self.put_off = Some(now + RETRY);
                    return false;
                }
                Attempt::Hopeless => {
                    self.wrote = None;
                    self.to_write.clear();
                }
            }
        }
        !self.to_write.is_empty()
    }

    /// So much of the pool has been used up since the last look that there may be more to write.
    fn look_is_due(&self, cache: &Cache) -> bool {
        let Some(looked_at) = self.looked_at else {
            return true;
        };
        let used = cache.taken_bytes() - looked_at;
        if used == 0 {
            return false;
        }
        let step = cache.pool().pool_bytes() / AHEAD_SHARE / LOOKS;
        used >= step
            .min(LOOK_BLOCKS / LOOKS * mean_block_bytes(cache))
            .max(1)
    }

    /// Lists the blocks that will be evicted next and are not on the tier yet.
    fn look_ahead(&mut self, cache: &mut Cache) {
        self.looked_at = Some(cache.taken_bytes());
        let wanted = cache.pool().pool_bytes() / AHEAD_SHARE;
        let mut ready = cache.pool().free_bytes();
        if ready >= wanted {
            return;
        }
        let mut domains: Vec<DomainId> = (0..cache.domains().len()).collect();
        domains.sort_by_key(|domain| std::cmp::Reverse(cache.domain_ref(*domain).bytes));
        let mut passed = 0;
        let mut gone = Vec::new();
        let (store, admit, to_write) = (&self.store, self.options.admit, &mut self.to_write);
        for domain in domains {
            let seen: &Cache = cache;
            seen.upcoming(domain, &mut |entry: EntryId, block: &Block| {
                passed += 1;
                if block.is_idle() && !block.unfit && admit.worth_keeping(block.hits) {
                    let is_there = || {
                        let key = seen.store_key(domain, entry);
                        key.is_some_and(|key| store.holds(&key))
                    };
                    // What leaves before the next look must be there; of the others there will be
                    // other looks.
                    if block.stored && ready < wanted / CHECKED_SHARE && !is_there() {
                        gone.push((domain, entry));
                    }
                    if !block.stored || gone.last() == Some(&(domain, entry)) {
                        to_write.push_back(ToWrite {
                            domain,
                            entry,
                            generation: block.generation,
                        });
                    }
                }
                ready += seen.block_bytes(domain, entry);
                ready < wanted && passed < LOOK_BLOCKS
            });
        }
        for (domain, entry) in gone {
            // It left the tier since.
            cache.mark_stored(domain, entry, false);
        }
    }

    fn write(
        &mut self,
        cache: &mut Cache,
        now: Instant,
        domain: DomainId,
        entry: EntryId,
    ) -> Attempt {
        let Some(key) = cache.store_key(domain, entry) else {
            return Attempt::Settled;
        };
        if self.store.holds(&key) {
            cache.mark_stored(domain, entry, true);
            return Attempt::Settled;
        }
        cache.mark_stored(domain, entry, false);
        let bytes = cache.block_bytes(domain, entry);
        let most = cache.pool().pool_bytes() / WRITING_SHARE;
        if self.writes > 0 && self.write_bytes + bytes > most {
            return Attempt::Later;
        }
        self.pages.clear();
        if !cache.begin_write(domain, entry, &mut self.pages) {
            return Attempt::Settled;
        }
        let moving = self.put(Moving::Down {
            domain,
            entry,
            key,
            bytes,
        });
        match self.store.write(now, moving as u64, &key, &self.pages) {
            Ok(()) => {
                if self.writes == 0 {
                    self.wrote = Some(now);
                }
                self.writes += 1;
                self.write_bytes += bytes;
                Attempt::Settled
            }
            Err(why) => {
                self.take(moving);
                cache.end_write(domain, entry, false);
                match why {
                    Refused::Busy | Refused::RateLimited => Attempt::Later,
                    Refused::Degraded => Attempt::Hopeless,
                    Refused::Unfit => {
                        cache.mark_unfit(domain, entry);
                        self.tell_unfit();
                        Attempt::Settled
                    }
                    Refused::Known | Refused::Absent => Attempt::Settled,
                }
            }
        }
    }

    /// Says once that there are blocks that the tier can never hold.
    fn tell_unfit(&mut self) {
        if !std::mem::replace(&mut self.told_unfit, true) {
            let bytes: Vec<u32> = self.pages.iter().map(|page| page.bytes).collect();
            tracing::warn!(
                ?bytes,
                "a block with pages of these sizes does not fit the SSD tier: it and others like \
                 it are never written (pegaflow_ssd_blocks counts them as evicted_unwritten); make \
                 the engine's blocks smaller or the shards larger"
            );
        }
    }
}
