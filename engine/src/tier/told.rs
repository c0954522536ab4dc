//! What the log was told of the shards' health: each change is one line.

#![forbid(unsafe_code)]

use pegaflow_ssd::{ShardHealth, ShardStats};

/// The state of each shard that the log knows.
#[derive(Debug, Default)]
pub struct ToldHealth {
    health: Vec<(ShardHealth, u64)>,
    /// So many of its pages had other bytes than were written when that was told last.
    bad_pages: Vec<u64>,
}

impl ToldHealth {
    /// Tells the log what has changed since the last time; true if anything has.
    pub fn tell(&mut self, shards: &[ShardStats]) -> bool {
        let bad = self.tell_bad_pages(shards);
        self.tell_health(shards) || bad
    }

    /// The first one is told, and then each time that there are twice as many.
    fn tell_bad_pages(&mut self, shards: &[ShardStats]) -> bool {
        self.bad_pages.resize(shards.len(), 0);
        let mut any = false;
        for (told, shard) in self.bad_pages.iter_mut().zip(shards) {
            if shard.bad_pages == 0 || shard.bad_pages < 2 * *told {
                continue;
            }
            *told = shard.bad_pages;
            any = true;
            tracing::warn!(
                path = %shard.path.display(), bad_pages = shard.bad_pages,
                "SSD shard: pages have other bytes than were written: their blocks are misses \
                 (pegactl ssd --verify finds all of them)"
            );
        }
        any
    }

    fn tell_health(&mut self, shards: &[ShardStats]) -> bool {
        self.health.resize(shards.len(), (ShardHealth::Healthy, 0));
        let mut any = false;
        for (told, shard) in self.health.iter_mut().zip(shards) {
            let now = (shard.health.clone(), shard.degradations);
            if *told == now {
                continue;
            }
            any = true;
            let path = shard.path.display();
            match &shard.health {
                ShardHealth::Healthy if told.1 == shard.degradations => {
                    tracing::info!(%path, "SSD shard: it is in order again");
                }
                ShardHealth::Healthy => tracing::warn!(
                    %path, degradations = shard.degradations,
                    "SSD shard: it was out of order for a moment"
                ),
                ShardHealth::ReadsOnly(fault) => tracing::warn!(
                    %path, %fault, write_errors = shard.write_errors,
                    "SSD shard: it takes no writes for now; what it has is served"
                ),
                ShardHealth::Degraded(fault) => tracing::warn!(
                    %path, %fault, read_errors = shard.read_errors,
                    "SSD shard: it is out of order; the pool serves on without it"
                ),
            }
            *told = now;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pegaflow_ssd::ShardFault;

    #[test]
    fn each_change_is_told_once_also_one_that_was_over_before_anybody_looked() {
        let mut told = ToldHealth::default();
        let mut shards = vec![ShardStats::default(), ShardStats::default()];
        assert!(!told.tell(&shards), "all is well");
        shards[1].health = ShardHealth::Degraded(ShardFault::Stalled);
        shards[1].degradations = 1;
        assert!(told.tell(&shards) && !told.tell(&shards));
        shards[1].health = ShardHealth::Healthy;
        assert!(told.tell(&shards) && !told.tell(&shards));
        shards[0].degradations = 1;
        assert!(told.tell(&shards) && !told.tell(&shards));
    }

    #[test]
    fn bad_pages_are_told_when_there_is_one_and_when_they_are_twice_as_many() {
        let mut told = ToldHealth::default();
        let mut shards = vec![ShardStats::default(), ShardStats::default()];
        let mut tells = Vec::new();
        for bad in 0..9 {
            shards[1].bad_pages = bad;
            if told.tell(&shards) {
                tells.push(bad);
            }
        }
        assert_eq!(tells, [1, 2, 4, 8]);
    }
}
