//! Room in the daemon's result arena: the client says where each bitmap goes.

#![forbid(unsafe_code)]

/// Bytes of one unit of the result arena; a bitmap over 4,096 positions.
pub(crate) const UNIT_BYTES: usize = 512;

/// Units of the result arena that one request holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResultRange {
    first: u32,
    units: u32,
}

impl ResultRange {
    /// Byte offset in the result arena.
    pub(crate) fn offset(self) -> usize {
        self.first as usize * UNIT_BYTES
    }
}

/// Bytes of a bitmap over `positions`.
pub(crate) fn bitmap_bytes(positions: usize) -> usize {
    positions.div_ceil(64) * 8
}

/// Which units are taken; first fit.
#[derive(Debug)]
pub(crate) struct ResultPool {
    taken: Box<[bool]>,
    /// No unit below is free.
    low: usize,
}

impl ResultPool {
    /// A result arena of `bytes` bytes, all of it free.
    pub(crate) fn new(bytes: usize) -> ResultPool {
        ResultPool {
            taken: vec![false; bytes / UNIT_BYTES].into_boxed_slice(),
            low: 0,
        }
    }

    /// Positions of the longest bitmap that fits an empty arena.
    pub(crate) fn max_positions(&self) -> usize {
        self.taken.len() * UNIT_BYTES * 8
    }

    /// Takes room for a bitmap over `positions`, or nothing if no gap is long enough.
    pub(crate) fn take(&mut self, positions: usize) -> Option<ResultRange> {
        let units = bitmap_bytes(positions).div_ceil(UNIT_BYTES).max(1);
        let mut start = self.low;
        for at in self.low..self.taken.len() {
            if self.taken[at] {
                start = at + 1;
            } else if at + 1 - start == units {
                self.taken[start..=at].fill(true);
                if start == self.low {
                    self.low = at + 1;
                }
                return Some(ResultRange {
                    first: start as u32,
                    units: units as u32,
                });
            }
        }
        None
    }

    /// Takes a range back.
    pub(crate) fn put(&mut self, range: ResultRange) {
        let first = range.first as usize;
        let units = &mut self.taken[first..first + range.units as usize];
        debug_assert!(units.iter().all(|taken| *taken));
        units.fill(false);
        self.low = self.low.min(first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_gaps_are_found_again() {
        let mut pool = ResultPool::new(4 * UNIT_BYTES);
        assert_eq!(pool.max_positions(), 4 * 4096);
        let a = pool.take(1).unwrap();
        let b = pool.take(4097).unwrap();
        let c = pool.take(4096).unwrap();
        assert_eq!([a.offset(), b.offset(), c.offset()], [0, 512, 1536]);
        assert_eq!(pool.take(1), None);
        pool.put(b);
        assert_eq!(pool.take(3 * 4096), None, "the gap is too short");
        assert_eq!(pool.take(2 * 4096), Some(b));
        for range in [a, b, c] {
            pool.put(range);
        }
        assert!(pool.take(4 * 4096).is_some());
        assert_eq!(bitmap_bytes(65), 16);
    }
}
