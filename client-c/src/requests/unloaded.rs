//! The destination blocks of loads that failed, for the engine to recompute.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// Block lists of the latest failed loads whose completion was handed out.
///
/// Loads under way never name more blocks than the arena has room for, so the lists of all loads
/// that one daemon took with it fit at once. Beyond either maximum the oldest lists are forgotten.
#[derive(Debug)]
pub(crate) struct Unloaded {
    lists: VecDeque<(u64, Box<[u32]>)>,
    blocks: usize,
    most_lists: usize,
    most_blocks: usize,
}

impl Unloaded {
    pub(crate) fn new(most_lists: usize, most_blocks: usize) -> Unloaded {
        Unloaded {
            lists: VecDeque::new(),
            blocks: 0,
            most_lists,
            most_blocks,
        }
    }

    /// Keeps the blocks of a failed load.
    pub(crate) fn keep(&mut self, request: u64, blocks: Box<[u32]>) {
        self.blocks += blocks.len();
        self.lists.push_back((request, blocks));
        while self.lists.len() > self.most_lists || self.blocks > self.most_blocks {
            let Some((_, gone)) = self.lists.pop_front() else {
                return;
            };
            self.blocks -= gone.len();
        }
    }

    /// The blocks of a failed load that is not forgotten.
    pub(crate) fn get(&self, request: u64) -> Option<&[u32]> {
        let found = self.lists.iter().rev().find(|(known, _)| *known == request);
        found.map(|(_, blocks)| &**blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_lists_are_forgotten_beyond_either_maximum() {
        let mut kept = Unloaded::new(3, 10);
        kept.keep(1, Box::new([1; 4]));
        kept.keep(2, Box::new([2; 4]));
        assert_eq!(kept.get(1), Some(&[1; 4][..]));
        kept.keep(3, Box::new([3; 4]));
        assert_eq!((kept.get(1), kept.get(2)), (None, Some(&[2; 4][..])));
        for request in 4..7 {
            kept.keep(request, Box::new([9]));
        }
        assert_eq!((kept.get(3), kept.get(4)), (None, Some(&[9][..])));
        kept.keep(7, Box::new([7; 10]));
        assert_eq!((kept.lists.len(), kept.blocks), (1, 10));
        kept.keep(8, Box::new([7; 11]));
        assert_eq!((kept.lists.len(), kept.blocks), (0, 0));
    }
}
