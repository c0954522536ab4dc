//! Counters gathered in private memory and published together.
//!
//! A locked add per event would be the dearest instruction of a short request; the lane adds up
//! privately and publishes at most every millisecond, and always before it sleeps.

#![forbid(unsafe_code)]

use pegaflow_shm::node::{Counter, NodeWriter};

/// Amounts not yet published.
pub(super) struct Tally {
    amounts: [u64; Counter::ALL.len()],
    dirty: bool,
}

impl Tally {
    pub(super) fn new() -> Tally {
        Tally {
            amounts: [0; Counter::ALL.len()],
            dirty: false,
        }
    }

    #[inline]
    pub(super) fn add(&mut self, counter: Counter, amount: u64) {
        self.amounts[counter as usize] += amount;
        self.dirty = true;
    }

    pub(super) fn publish(&mut self, node: &NodeWriter) {
        if !self.dirty {
            return;
        }
        for counter in Counter::ALL {
            let amount = std::mem::take(&mut self.amounts[*counter as usize]);
            if amount != 0 {
                node.add(*counter, amount);
            }
        }
        self.dirty = false;
    }
}
