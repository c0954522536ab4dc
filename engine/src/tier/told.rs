//! What the log was told of the shards' health: each change is one line.

#![forbid(unsafe_code)]

use pegaflow_ssd::{ShardHealth, ShardStats};

/// The state of each shard that the log knows.
#[derive(Debug, Default)]
pub struct ToldHealth(Vec<(ShardHealth, u64)>);

impl ToldHealth {
    /// Tells the log what has changed since the last time; true if anything has.
    pub fn tell(&mut self, shards: &[ShardStats]) -> bool {
        self.0.resize(shards.len(), (ShardHealth::Healthy, 0));
        let mut any = false;
        for (told, shard) in self.0.iter_mut().zip(shards) {
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
}
