//! What is kept of a trace on a drive that does not hold all of it.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use pegaflow_policy::{EvictionPolicy, Lru};
use serde::Serialize;

use crate::error::ToolError;
use crate::replay::trace::{Request, read_trace};

/// Pages of a log lie together in segments.
const SEGMENT_BYTES: u64 = 64 << 20;
/// Segments of a log that are kept empty.
const SPARES: usize = 2;
/// Blocks in RAM in front of the drive, as in the replays of `docs/performance.md`.
const RAM_BLOCKS: u32 = 2000;

/// What is kept of a trace's blocks on a drive that does not hold them all.
#[derive(Clone, Debug, Serialize)]
pub(super) struct KeepRow {
    pub page_bytes: u64,
    /// Blocks that the drive holds, and as a part of the trace's distinct ones.
    pub blocks: u32,
    pub part: f64,
    /// Blocks found in RAM or on the drive, as a part of all asked for.
    pub log_hits: f64,
    pub slab_hits: f64,
    /// Blocks written to the drive.
    pub log_writes: u64,
    pub slab_writes: u64,
}

/// A drive that blocks are written to.
trait Drive {
    fn holds(&self, block: u32) -> bool;
    fn touch(&mut self, block: u32);
    /// Takes a block that is not held.
    fn write(&mut self, block: u32);
}

/// Slots that are reclaimed one by one.
struct Slab {
    policy: Lru,
    capacity: usize,
}

impl Drive for Slab {
    fn holds(&self, block: u32) -> bool {
        self.policy.contains(block)
    }

    fn touch(&mut self, block: u32) {
        self.policy.touch(block);
    }

    fn write(&mut self, block: u32) {
        if self.policy.len() == self.capacity
            && let Some(victim) = self.policy.victim(&mut |_| true)
        {
            self.policy.remove(victim);
        }
        self.policy.insert(block, u64::from(block));
    }
}

/// Segments that are reclaimed whole.
struct Log {
    policy: Lru,
    at: HashMap<u32, u32>,
    segments: Vec<Vec<u32>>,
    segment_blocks: usize,
    open: u32,
    free: VecDeque<u32>,
}

impl Log {
    fn new(segments: u32, segment_blocks: usize) -> Self {
        Self {
            policy: Lru::new(segments),
            at: HashMap::new(),
            segments: vec![Vec::new(); segments as usize],
            segment_blocks,
            open: 0,
            free: (1..segments).collect(),
        }
    }
}

impl Drive for Log {
    fn holds(&self, block: u32) -> bool {
        self.at.contains_key(&block)
    }

    fn touch(&mut self, block: u32) {
        if let Some(&segment) = self.at.get(&block) {
            self.policy.touch(segment);
        }
    }

    fn write(&mut self, block: u32) {
        if self.segments[self.open as usize].len() == self.segment_blocks {
            self.policy.insert(self.open, u64::from(self.open));
            self.open = self.free.pop_front().expect("spares are kept");
            while self.free.len() < SPARES
                && let Some(victim) = self.policy.victim(&mut |_| true)
            {
                self.policy.remove(victim);
                for block in std::mem::take(&mut self.segments[victim as usize]) {
                    self.at.remove(&block);
                }
                self.free.push_back(victim);
            }
        }
        self.segments[self.open as usize].push(block);
        self.at.insert(block, self.open);
    }
}

/// Asks for the requests' blocks one by one; those that leave RAM go to the drive. Says how many
/// were found and how many were written.
fn replay(requests: &[Vec<u32>], distinct: u32, drive: &mut dyn Drive) -> (u64, u64) {
    let mut ram = Lru::new(distinct);
    let (mut found, mut written) = (0, 0);
    for blocks in requests {
        let held = |block: &&u32| ram.contains(**block) || drive.holds(**block);
        let prefix = blocks.iter().take_while(held).count();
        found += prefix as u64;
        for &block in blocks {
            if !ram.contains(block) {
                drive.touch(block);
                if ram.len() == RAM_BLOCKS as usize
                    && let Some(leaves) = ram.victim(&mut |_| true)
                {
                    ram.remove(leaves);
                    if !drive.holds(leaves) {
                        drive.write(leaves);
                        written += 1;
                    }
                }
            }
            ram.insert(block, u64::from(block));
        }
    }
    (found, written)
}

/// What both layouts keep of a trace, on drives for parts of its blocks.
pub(super) fn keeps(path: &Path, page_bytes: u64) -> Result<Vec<KeepRow>, ToolError> {
    let trace: Vec<Request> = read_trace(path, usize::MAX)?;
    let mut numbers: HashMap<u64, u32> = HashMap::new();
    let requests: Vec<Vec<u32>> = trace
        .iter()
        .map(|request| {
            let number = |id: &u64| {
                let next = numbers.len() as u32;
                *numbers.entry(*id).or_insert(next)
            };
            request.hash_ids.iter().map(number).collect()
        })
        .collect();
    let distinct = numbers.len() as u32;
    let asked: usize = requests.iter().map(Vec::len).sum();
    let segment_blocks = (SEGMENT_BYTES / page_bytes).max(1);
    let mut rows = Vec::new();
    for part in [0.05, 0.1, 0.25, 0.5] {
        let segments = (f64::from(distinct) * part / segment_blocks as f64).round() as u32;
        if segments < 6 {
            continue;
        }
        let blocks = segments * segment_blocks as u32;
        let mut log = Log::new(segments, segment_blocks as usize);
        let mut slab = Slab {
            policy: Lru::new(distinct),
            capacity: blocks as usize,
        };
        let (log_found, log_writes) = replay(&requests, distinct, &mut log);
        let (slab_found, slab_writes) = replay(&requests, distinct, &mut slab);
        rows.push(KeepRow {
            page_bytes,
            blocks,
            part: f64::from(blocks) / f64::from(distinct),
            log_hits: log_found as f64 / asked as f64,
            slab_hits: slab_found as f64 / asked as f64,
            log_writes,
            slab_writes,
        });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_with_segments_of_one_block_keeps_about_what_a_slab_keeps() {
        const DISTINCT: u32 = 4004;
        let mut dice = 7u64;
        let requests: Vec<Vec<u32>> = (0..30_000)
            .map(|_| {
                dice = dice
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                // Low numbers more often than high ones.
                let part = (dice >> 33) % 1000;
                vec![(part * part * 4000 / 1_000_000 + (dice >> 50) % 4) as u32]
            })
            .collect();
        let slots = 500;
        let mut slab = Slab {
            policy: Lru::new(DISTINCT),
            capacity: slots,
        };
        // The spare ones hold nothing. A use of the open one is not seen, which is the difference.
        let mut log = Log::new(slots as u32 + SPARES as u32, 1);
        let of_slab = replay(&requests, DISTINCT, &mut slab);
        let of_log = replay(&requests, DISTINCT, &mut log);
        assert!(of_slab.0 > 0 && of_slab.1 > slots as u64);
        assert!(
            of_slab.0.abs_diff(of_log.0) * 100 <= of_slab.0,
            "{of_log:?}"
        );
        assert!(
            of_slab.1.abs_diff(of_log.1) * 100 <= of_slab.1,
            "{of_log:?}"
        );
    }

    #[test]
    fn what_leaves_with_its_segment_is_not_found_and_space_is_used_again() {
        let mut log = Log::new(4, 2);
        for block in 0..100 {
            assert!(!log.holds(block));
            log.write(block);
            assert!(log.holds(block));
        }
        let held = (0..100).filter(|&block| log.holds(block)).count();
        assert!((3..=4).contains(&held), "{held} of two segments");
        assert!(log.holds(99) && !log.holds(0));
    }
}
