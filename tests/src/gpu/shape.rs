//! Random KV layouts of GPU memory, of every kind that engines have. The sizes of a block's pieces
//! follow from one seed, where they lie from another: two processes with the same sizes share
//! blocks, however different their arrangements.

#![forbid(unsafe_code)]

use crate::content::Stream;

/// Pieces of one cache group's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSizes {
    /// Number of the group.
    pub group: u16,
    /// Blocks.
    pub blocks: u32,
    /// Bytes of each piece, in layer order.
    pub pieces: Vec<usize>,
    /// So many pieces in a row lie side by side where a layer is kept together.
    pub row: usize,
}

impl GroupSizes {
    /// Bytes of a block.
    pub fn page_bytes(&self) -> usize {
        self.pieces.iter().sum()
    }
}

/// One strided array of pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which allocation.
    pub allocation: usize,
    /// Offset of block 0.
    pub base: usize,
    /// From one block to the next.
    pub stride: usize,
    /// Of one block.
    pub bytes: usize,
}

/// Where everything lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arranged {
    /// Bytes of each allocation.
    pub allocations: Vec<usize>,
    /// Pieces of each group, in the order of the groups and layers.
    pub groups: Vec<Vec<Piece>>,
}

/// Bytes of a piece, as engines have them.
const USUAL: [usize; 9] = [
    256,
    1 << 10,
    4 << 10,
    8 << 10,
    16 << 10,
    18_432,
    32 << 10,
    64 << 10,
    512 << 10,
];
const MOST_BLOCKS: usize = 192;

/// Sizes that follow from `seed`; all blocks of all groups have about `budget` bytes at most.
pub fn sizes(seed: u64, budget: usize) -> Vec<GroupSizes> {
    let mut random = Stream::new(&[0x5A11, seed]);
    let layers = 1 + random.below(12) as usize;
    let (pieces, row) = match seed % 7 {
        // K and V apart.
        0 => (vec![usual(&mut random, 7); 2 * layers], 2),
        // Cross-layer: one contiguous range per block.
        1 => (vec![(1 + random.below(16) as usize) << 17], 1),
        // MLA: one latent piece per layer.
        2 => (vec![usual(&mut random, 7); layers], 1),
        // fp8 with a scale beside each piece.
        3 => {
            let (data, scale) = (usual(&mut random, 6), 4 << random.below(6));
            ([data, scale].repeat(2 * layers), 4)
        }
        // A hybrid model's full attention; the other groups follow below.
        4 => (vec![usual(&mut random, 6); 2 * layers], 2),
        // Several physical blocks in a logical one.
        5 => {
            let split = 2 + random.below(3) as usize;
            (vec![usual(&mut random, 6); split * layers], split)
        }
        // Nothing is round.
        _ => {
            let odd = |_| 1 + random.below(5000) as usize;
            ((0..2 * layers).map(odd).collect(), 2)
        }
    };
    let mut groups = vec![(0, pieces, row)];
    if seed % 7 == 4 {
        for group in 1..=1 + random.below(2) as u16 {
            let pieces = vec![usual(&mut random, 6); 1 + random.below(6) as usize];
            groups.push((group, pieces, 1));
        }
    }
    let share = budget / groups.len();
    groups
        .into_iter()
        .map(|(group, pieces, row)| {
            let page: usize = pieces.iter().sum();
            GroupSizes {
                group,
                blocks: (share / page).clamp(12, MOST_BLOCKS) as u32,
                pieces,
                row,
            }
        })
        .collect()
}

fn usual(random: &mut Stream, most: u64) -> usize {
    USUAL[random.below(most) as usize]
}

/// Lays the pieces out as `seed` says.
pub fn arrange(sizes: &[GroupSizes], seed: u64) -> Arranged {
    let mut random = Stream::new(&[0xA44, seed]);
    let mut out = Arranged::default();
    for group in sizes {
        let rows: Vec<&[usize]> = match random.below(4) {
            // Blocks first: all pieces of a block side by side.
            0 => vec![&group.pieces],
            // Layer by layer.
            1 => group.pieces.chunks(group.row).collect(),
            // Every piece in an array of its own.
            _ => group.pieces.chunks(1).collect(),
        };
        let (apart, padded) = (random.below(3) == 0, random.below(2) == 0);
        let mut pieces = Vec::with_capacity(group.pieces.len());
        for (number, row) in rows.into_iter().enumerate() {
            if number == 0 || apart {
                out.allocations.push(random.below(5) as usize * 512);
            }
            let allocation = out.allocations.len() - 1;
            let start = out.allocations[allocation];
            let padding = if padded {
                random.below(400) as usize
            } else {
                0
            };
            let stride = row.iter().sum::<usize>() + padding;
            let mut base = start;
            for bytes in row {
                pieces.push(Piece {
                    allocation,
                    base,
                    stride,
                    bytes: *bytes,
                });
                base += bytes;
            }
            let gap = random.below(3) as usize * 256;
            out.allocations[allocation] = start + stride * group.blocks as usize + gap;
        }
        out.groups.push(pieces);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_belongs_to_two_blocks_or_pieces_and_all_lie_inside() {
        for seed in 0..70 {
            let sizes = sizes(seed, 1 << 20);
            let arranged = arrange(&sizes, seed * 31);
            let mut used: Vec<Vec<bool>> = arranged
                .allocations
                .iter()
                .map(|bytes| vec![false; *bytes])
                .collect();
            for (group, pieces) in sizes.iter().zip(&arranged.groups) {
                assert_eq!(
                    pieces.iter().map(|piece| piece.bytes).collect::<Vec<_>>(),
                    group.pieces
                );
                for piece in pieces {
                    for block in 0..group.blocks as usize {
                        let start = piece.base + block * piece.stride;
                        for byte in &mut used[piece.allocation][start..start + piece.bytes] {
                            assert!(!std::mem::replace(byte, true), "seed {seed}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_same_sizes_are_arranged_in_different_ways() {
        let sizes = sizes(3, 1 << 20);
        assert_ne!(arrange(&sizes, 1), arrange(&sizes, 2));
        assert_eq!(arrange(&sizes, 1), arrange(&sizes, 1));
    }
}
