//! Which of the pool's memory is pinned for GPUs.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

/// The pool in ranges of one size, each of which is pinned by one call of the driver, or not yet. A
/// copy by DMA stays inside one range: the driver refuses one that spans two calls' memory.
#[derive(Debug)]
pub(crate) struct PinMap {
    pool_bytes: u64,
    range_bytes: u64,
    pinned: Box<[AtomicBool]>,
}

/// A range of the pool, as offsets, and whether it is pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PinRange {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) pinned: bool,
}

impl PinMap {
    /// Nothing pinned yet. The last range may be shorter.
    pub(crate) fn new(pool_bytes: u64, range_bytes: u64) -> PinMap {
        let ranges = pool_bytes.div_ceil(range_bytes.max(1));
        PinMap {
            pool_bytes,
            range_bytes: range_bytes.max(1),
            pinned: (0..ranges).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// How many ranges there are.
    pub(crate) fn ranges(&self) -> usize {
        self.pinned.len()
    }

    /// The range with this number.
    pub(crate) fn range(&self, number: usize) -> PinRange {
        let start = number as u64 * self.range_bytes;
        PinRange {
            start,
            end: (start + self.range_bytes).min(self.pool_bytes),
            // SYNC: pin-range. Pairs with `set`: who sees it pinned may hand it to the driver.
            pinned: self.pinned[number].load(Ordering::Acquire),
        }
    }

    /// The range that holds byte `offset` of the pool.
    #[inline]
    pub(crate) fn at(&self, offset: u64) -> PinRange {
        self.range((offset / self.range_bytes) as usize)
    }

    /// Says that a range is pinned from now on, or is not any more.
    pub(crate) fn set(&self, number: usize, pinned: bool) {
        // SYNC: pin-range. See `range`.
        self.pinned[number].store(pinned, Ordering::Release);
    }

    /// Bytes that are pinned.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        let ranges = (0..self.ranges()).map(|number| self.range(number));
        let pinned = ranges.filter(|range| range.pinned);
        pinned.map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_tile_the_pool_and_say_what_was_said_of_them() {
        let map = PinMap::new(1000, 300);
        assert_eq!(map.ranges(), 4);
        map.set(3, true);
        let last = PinRange {
            start: 900,
            end: 1000,
            pinned: true,
        };
        assert_eq!((map.at(900), map.at(999)), (last, last));
        assert!(!map.at(899).pinned);
        assert_eq!(map.pinned_bytes(), 100);
    }
}
