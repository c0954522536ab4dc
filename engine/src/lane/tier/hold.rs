//! Saves that are over and whose answers wait until the tier has caught up (`--ssd-save-wait`).
//!
//! Whoever saves faster than the drives write is slowed down so, and no block is lost below.
//! Nobody waits for a drive that makes no progress, and nobody longer than the limit.

#![forbid(unsafe_code)]

use std::time::Instant;

use super::LaneTier;
use crate::cache::Cache;
use crate::lane::api::SessionId;

/// Part of the pool that may be about to leave without being on the tier before saves wait.
const BEHIND_SHARE: u64 = 8;

/// A save whose blocks are in the pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldSave {
    session: SessionId,
    request_id: u64,
    /// When it is answered in any case.
    pub(super) until: Instant,
}

impl LaneTier {
    /// Takes over when a save is answered, if that is not at once.
    pub(in crate::lane) fn hold_save(
        &mut self,
        session: SessionId,
        request_id: u64,
        now: Instant,
    ) -> bool {
        let Some(wait) = self.options.save_wait else {
            return false;
        };
        self.held_saves.push_back(HeldSave {
            session,
            request_id,
            until: now + wait,
        });
        true
    }

    /// The next save that is answered now.
    pub(in crate::lane) fn next_save(
        &mut self,
        cache: &Cache,
        now: Instant,
    ) -> Option<(SessionId, u64)> {
        let first = *self.held_saves.front()?;
        if now < first.until && self.is_behind(cache, now) {
            return None;
        }
        self.held_saves.pop_front();
        Some((first.session, first.request_id))
    }

    /// A save waits no more; false if it did not.
    pub(in crate::lane) fn let_go_of_save(&mut self, session: SessionId, request_id: u64) -> bool {
        let before = self.held_saves.len();
        let is_it = |held: &HeldSave| (held.session, held.request_id) == (session, request_id);
        self.held_saves.retain(|held| !is_it(held));
        self.held_saves.len() < before
    }

    /// The saves of a session that ends wait no more, and nobody is to be answered.
    pub(in crate::lane) fn forget_saves(&mut self, session: SessionId) {
        self.held_saves.retain(|held| held.session != session);
    }

    /// Every save is answered.
    pub(in crate::lane) fn end_saves(&mut self, now: Instant) {
        for held in &mut self.held_saves {
            held.until = now;
        }
    }

    /// When the next save is answered in any case.
    pub(super) fn save_deadline(&self) -> Option<Instant> {
        self.held_saves.front().map(|held| held.until)
    }

    /// Whether saves wait for the tier.
    pub(super) fn holds_saves(&self, cache: &Cache, now: Instant) -> bool {
        !self.held_saves.is_empty() && self.is_behind(cache, now)
    }

    /// Much of what the next saves would evict is not written yet, but will be.
    fn is_behind(&self, cache: &Cache, now: Instant) -> bool {
        let recent = |at: Instant| Some(now.duration_since(at)) < self.options.save_wait;
        let listed = self.to_write.len() as u64 * mean_block_bytes(cache);
        // As long as the tier takes nothing there is no other look, and nothing more is listed.
        let unseen = self.looked_at.map_or(0, |at| cache.taken_bytes() - at);
        let most = cache.pool().pool_bytes() / BEHIND_SHARE;
        listed + unseen + self.write_bytes > most && self.wrote.is_some_and(recent)
    }
}

/// Bytes that a block of the pool takes on average.
pub(super) fn mean_block_bytes(cache: &Cache) -> u64 {
    let pool = cache.pool();
    let domains = cache.domains().iter();
    let sealed = domains.map(|domain| u64::from(domain.index.writer.sealed_len()));
    (pool.pool_bytes() - pool.free_bytes()) / sealed.sum::<u64>().max(1)
}
