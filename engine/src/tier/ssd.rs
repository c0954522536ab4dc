//! The SSD tier as the lane's store.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow_shm::sync::{Ordering, fence};
use pegaflow_ssd as ssd;

use crate::copy::PoolMemory;
use crate::lane::LaneWake;
use crate::tier::{BlockStore, PageSpan, Refused, StoreDone, StoreKey, StoreOutcome};

/// Blocks on drives.
pub struct SsdStore {
    tier: ssd::Tier,
    pages: Vec<ssd::PageRef>,
    ended: Vec<ssd::Completion>,
}

impl SsdStore {
    /// Opens the shards and tells the log what was found.
    ///
    /// # Errors
    /// A shard cannot be used.
    pub fn open(
        options: ssd::Options,
        pool: &PoolMemory,
        wake: Arc<LaneWake>,
    ) -> Result<SsdStore, ssd::OpenError> {
        let (tier, report) = ssd::Tier::open(options, pool.for_ssd(), move || {
            // SYNC: copy-done. Pairs with the lane's fence in `LaneWake::park`.
            fence(Ordering::SeqCst);
            wake.wake_if_parked();
        })?;
        tell(&report);
        Ok(SsdStore {
            tier,
            pages: Vec::new(),
            ended: Vec::new(),
        })
    }

    fn gather(&mut self, pages: &[PageSpan]) {
        self.pages.clear();
        self.pages.extend(pages.iter().map(|page| ssd::PageRef {
            offset: page.offset,
            bytes: page.bytes,
            checksum: page.checksum,
        }));
    }
}

fn tell_shard(shard: &ssd::ShardReport) {
    let ssd::ShardReport {
        path,
        created,
        io,
        notes,
        blocks,
        dropped_blocks,
        bad_chunks,
        direct,
        segments,
        segment_bytes,
        segment_pages,
    } = shard;
    tracing::info!(
        path = %path.display(), created, io, direct, segments, segment_bytes,
        segment_pages, blocks,
        dropped_blocks, bad_chunks, "SSD shard"
    );
    for note in notes {
        tracing::warn!(path = %path.display(), "SSD shard: {note}");
    }
}

fn tell(report: &ssd::OpenReport) {
    report.shards.iter().for_each(tell_shard);
    for path in &report.late {
        tracing::warn!(
            path = %path.display(),
            "SSD shard: not open yet, since it, or another one of the set, has not finished opening \
             within --ssd-open-wait: the daemon serves without it, and it joins when it is open"
        );
    }
    if report.missing_shards > 0 {
        tracing::warn!(
            missing = report.missing_shards,
            "shards of the SSD tier are not named: their blocks are not there"
        );
    }
    tracing::info!(took = ?report.took, "the SSD tier is open");
}

fn key_of(key: &StoreKey) -> ssd::BlockKey {
    ssd::BlockKey {
        scope: key.scope,
        group: u32::from(key.group),
        hash: key.hash,
    }
}

fn refused(refused: &ssd::Refused) -> Refused {
    use ssd::Refused as R;
    match refused {
        R::QueueFull | R::Reclaiming => Refused::Busy,
        R::RateLimited => Refused::RateLimited,
        R::Known => Refused::Known,
        R::Unknown | R::OtherPages => Refused::Absent,
        R::NoShard | R::Degraded(_) => Refused::Degraded,
        R::TooLarge { .. }
        | R::BlockTooLarge { .. }
        | R::OutsidePool { .. }
        | R::PageCount { .. } => Refused::Unfit,
    }
}

impl BlockStore for SsdStore {
    fn lookup(&self, key: &StoreKey) -> Option<Vec<u32>> {
        let key = key_of(key);
        let info = self.tier.lookup(&key)?;
        if info.uniform {
            return Some(vec![info.page_bytes; usize::from(info.pages)]);
        }
        let pages = 0..info.pages;
        pages.map(|page| self.tier.page_bytes(&key, page)).collect()
    }

    fn holds(&self, key: &StoreKey) -> bool {
        self.tier.lookup(&key_of(key)).is_some()
    }

    fn write(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused> {
        self.gather(pages);
        let taken = self.tier.write(now, ticket, &key_of(key), &self.pages);
        taken.map_err(|why| refused(&why))
    }

    fn read(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused> {
        self.gather(pages);
        let taken = self.tier.read(now, ticket, &key_of(key), &self.pages);
        taken.map_err(|why| refused(&why))
    }

    fn start(&mut self) {
        self.tier.start();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<StoreDone>) {
        self.tier.take_ended(now, &mut self.ended);
        while let Some(report) = self.tier.joined() {
            tell_shard(&report);
        }
        done.extend(self.ended.drain(..).map(|ended| StoreDone {
            ticket: ended.ticket,
            outcome: match ended.outcome {
                ssd::Outcome::Written => StoreOutcome::Written,
                ssd::Outcome::Read => StoreOutcome::Read,
                ssd::Outcome::Bad => StoreOutcome::Bad,
                ssd::Outcome::Failed(_) => StoreOutcome::Failed,
            },
            checksums: ended.checksums,
        }));
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.tier.next_deadline()
    }

    fn remove(&mut self, key: &StoreKey) {
        self.tier.remove(&key_of(key));
    }

    fn touch(&mut self, key: &StoreKey) {
        self.tier.touch(&key_of(key));
    }

    fn shards(&self) -> Vec<ssd::ShardStats> {
        self.tier.stats()
    }

    fn close(self: Box<Self>, limit: Duration) -> bool {
        self.tier.close(limit)
    }
}
