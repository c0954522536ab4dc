//! Arrangements of KV memory, as engines have them.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// How the blocks of all layers lie in one piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arrangement {
    /// Per layer a K array over all blocks, then a V array over all blocks.
    KvApart,
    /// Per layer one array over all blocks, K and V of a block side by side.
    KvTogether,
    /// K arrays of all layers, then V arrays of all layers.
    LayersFirst,
    /// All layers of a block side by side.
    BlocksFirst,
    /// As [`Arrangement::BlocksFirst`], with unused bytes behind each block.
    Padded,
}

impl Arrangement {
    /// Every one.
    pub const ALL: [Arrangement; 5] = [
        Arrangement::KvApart,
        Arrangement::KvTogether,
        Arrangement::LayersFirst,
        Arrangement::BlocksFirst,
        Arrangement::Padded,
    ];
}

/// One strided array; block `b` lies at `base + b * stride`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset of block 0.
    pub base: usize,
    /// From one block to the next.
    pub stride: usize,
    /// Of one block.
    pub bytes: usize,
}

/// Unused bytes behind each block of [`Arrangement::Padded`].
const PADDING: usize = 192;

/// Segments in layer order for `layers` layers, each with K and V of `half` bytes per block, and
/// the bytes that all blocks take.
pub fn segments(
    arrangement: Arrangement,
    layers: usize,
    half: usize,
    blocks: usize,
) -> (Vec<Segment>, usize) {
    let array = half * blocks;
    let mut segments = Vec::new();
    for layer in 0..layers {
        let mut add = |base, stride, bytes| {
            segments.push(Segment {
                base,
                stride,
                bytes,
            })
        };
        match arrangement {
            Arrangement::KvApart => {
                add(2 * layer * array, half, half);
                add((2 * layer + 1) * array, half, half);
            }
            Arrangement::KvTogether => add(2 * layer * array, 2 * half, 2 * half),
            Arrangement::LayersFirst => {
                add(layer * array, half, half);
                add((layers + layer) * array, half, half);
            }
            Arrangement::BlocksFirst => add(2 * layer * half, 2 * half * layers, 2 * half),
            Arrangement::Padded => add(2 * layer * half, 2 * half * layers + PADDING, 2 * half),
        }
    }
    let padding = if arrangement == Arrangement::Padded {
        PADDING * blocks
    } else {
        0
    };
    (segments, 2 * layers * array + padding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_belongs_to_two_blocks_or_segments() {
        for arrangement in Arrangement::ALL {
            let (segments, bytes) = segments(arrangement, 3, 16, 5);
            let mut used = vec![false; bytes];
            for segment in segments {
                for block in 0..5 {
                    let start = segment.base + block * segment.stride;
                    for byte in &mut used[start..start + segment.bytes] {
                        assert!(!std::mem::replace(byte, true), "{arrangement:?}");
                    }
                }
            }
            let unused = used.iter().filter(|used| !**used).count();
            assert_eq!(unused > 0, arrangement == Arrangement::Padded);
        }
    }
}
