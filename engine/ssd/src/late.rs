//! Shards that are not open yet, as the tier sees them.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use crate::block::BlockKey;
use crate::open::take_in;
use crate::opening::{Joining, Shared};
use crate::shard::{Found, Shard};
use crate::stats::{ShardFault, ShardHealth, ShardStats};
use crate::tier::ShardReport;

/// Blocks removed while a shard is late that are remembered, so that it does not bring them back.
const REMOVED_MAX: usize = 65_536;

/// Which blocks a late shard has brought, by number.
#[derive(Debug, Default)]
pub(crate) struct LateIndex(HashMap<BlockKey, u32>);

impl LateIndex {
    /// Gives a shard the blocks that its file has, apart from all other shards.
    pub fn take_in(shard: &mut Shard, found: &Found, report: &mut ShardReport) -> Self {
        let one = std::slice::from_mut(shard);
        let index = take_in(
            one,
            std::slice::from_ref(found),
            std::slice::from_mut(report),
        );
        Self(index.into_iter().map(|(key, (_, at))| (key, at)).collect())
    }

    pub fn get(&self, key: &BlockKey) -> Option<u32> {
        self.0.get(key).copied()
    }

    pub fn remove(&mut self, key: &BlockKey) -> Option<u32> {
        self.0.remove(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&BlockKey, u32)> {
        self.0.iter().map(|(key, block)| (key, *block))
    }
}

struct Outsider {
    place: usize,
    path: PathBuf,
    fault: ShardFault,
}

/// The shards that are not open.
pub(crate) struct Outsiders {
    shared: Arc<Shared>,
    shards: Vec<Outsider>,
    /// Blocks that were removed meanwhile.
    removed: HashSet<BlockKey>,
}

impl Outsiders {
    /// The shards at these places of the options are late.
    pub fn new(shared: Arc<Shared>, late: Vec<(usize, PathBuf)>) -> Self {
        let outsider = |(place, path)| Outsider {
            place,
            path,
            fault: ShardFault::Opening,
        };
        Self {
            shared,
            shards: late.into_iter().map(outsider).collect(),
            removed: HashSet::new(),
        }
    }

    fn waits(&self) -> bool {
        let mut faults = self.shards.iter().map(|shard| &shard.fault);
        faults.any(|fault| *fault == ShardFault::Opening)
    }

    /// A block was removed: no late shard brings it back.
    pub fn note_removed(&mut self, key: &BlockKey) {
        if !self.waits() {
            return;
        }
        self.removed.insert(*key);
        if self.removed.len() > REMOVED_MAX {
            self.shared.give_up();
            for shard in &mut self.shards {
                if shard.fault == ShardFault::Opening {
                    shard.fault = ShardFault::Unusable(format!(
                        "more than {REMOVED_MAX} blocks were withdrawn before its drive answered: \
                         it stays out until the next start"
                    ));
                }
            }
            self.removed = HashSet::new();
        }
    }

    /// Shards that have become open, without the blocks that were removed meanwhile.
    pub fn joining(&mut self) -> Vec<Joining> {
        let mut joining = Vec::new();
        for (place, result) in self.shared.take_news() {
            let at = self.shards.iter().position(|shard| shard.place == place);
            match (result, at) {
                (Ok(shard), Some(at)) => {
                    self.shards.remove(at);
                    joining.push(*shard);
                }
                (Err(error), Some(at)) => {
                    self.shards[at].fault = ShardFault::Unusable(error.to_string());
                }
                (_, None) => {}
            }
        }
        joining
    }

    /// Blocks that were removed before a shard came.
    pub fn removed(&self) -> impl Iterator<Item = &BlockKey> {
        self.removed.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    pub fn len(&self) -> usize {
        self.shards.len()
    }

    /// What there is to say of each, with its place in the options.
    pub fn stats(&self) -> impl Iterator<Item = (usize, ShardStats)> + '_ {
        self.shards.iter().map(|shard| {
            let fault = match &shard.fault {
                ShardFault::Opening if self.shared.is_in_use(shard.place) => ShardFault::InUse,
                fault => fault.clone(),
            };
            let stats = ShardStats {
                path: shard.path.clone(),
                health: ShardHealth::Degraded(fault),
                degradations: 1,
                ..ShardStats::default()
            };
            (shard.place, stats)
        })
    }
}

impl Drop for Outsiders {
    fn drop(&mut self) {
        self.shared.give_up();
    }
}
