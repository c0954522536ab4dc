//! When blocks are written to the tier, and how far reading may go.

#![forbid(unsafe_code)]

use std::time::Duration;

/// When a block is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdmitWhen {
    /// When it is about to be evicted.
    #[default]
    Evict,
    /// As soon as it is sealed.
    Seal,
    /// Once queries have found it so many times.
    Hits(u8),
}

impl AdmitWhen {
    /// Whether a block that queries have found `hits` times may be written when it is about to be
    /// evicted.
    pub fn worth_keeping(self, hits: u8) -> bool {
        match self {
            AdmitWhen::Evict | AdmitWhen::Seal => true,
            AdmitWhen::Hits(wanted) => hits >= wanted,
        }
    }
}

/// How the lane uses the tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierOptions {
    /// When a block is written.
    pub admit: AdmitWhen,
    /// Most blocks that are on their way up at once.
    pub max_prefetch: u32,
    /// How long a query waits for a block on its way up before it goes without.
    pub patience: Duration,
    /// How long the answer to a save waits for a tier that is behind; `None` for not at all.
    pub save_wait: Option<Duration>,
}

impl Default for TierOptions {
    fn default() -> TierOptions {
        TierOptions {
            admit: AdmitWhen::default(),
            max_prefetch: 256,
            patience: Duration::from_secs(5),
            save_wait: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hits_keep_a_block_from_the_tier() {
        assert!(AdmitWhen::Evict.worth_keeping(0) && AdmitWhen::Seal.worth_keeping(0));
        assert!(!AdmitWhen::Hits(2).worth_keeping(1) && AdmitWhen::Hits(2).worth_keeping(2));
    }
}
