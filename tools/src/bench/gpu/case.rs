//! What is measured, and what each figure should be.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// How the blocks of all layers lie in GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuShape {
    /// Blocks.
    pub blocks: u32,
    /// Pieces of a block, one in each array (layers, K and V apart).
    pub segments: usize,
    /// Bytes of a piece.
    pub segment_bytes: usize,
}

impl GpuShape {
    /// Bytes of a block, which is a page of the pool.
    pub fn page_bytes(&self) -> usize {
        self.segments * self.segment_bytes
    }

    /// A block is one piece, as large as to be copied on its own: no kernel runs for it.
    pub fn is_of_pages(&self) -> bool {
        self.segment_bytes >= MIB
    }

    /// Bytes of all blocks.
    pub fn total_bytes(&self) -> usize {
        self.blocks as usize * self.page_bytes()
    }
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Target {
    /// At least this share of one large copy of the same run.
    Ratio(f64),
    /// Save to sealed, in milliseconds at most.
    SaveMs(f64),
    /// Load submitted to all in place, in microseconds at most.
    LoadUs(f64),
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// What the table calls it.
    pub name: String,
    /// Its memory.
    pub shape: GpuShape,
    /// Saves and loads of all blocks.
    pub rounds: usize,
    /// What should come out.
    pub target: Target,
}

const MIB: usize = 1 << 20;

/// All cases, each with about `total` bytes of GPU memory where that is not part of the case.
pub fn cases(total: usize, rounds: usize) -> Vec<Case> {
    // Such as 32 layers, K and V apart.
    const ARRAYS: usize = 64;
    let mut cases = vec![Case {
        name: "2-MiB pages, cross-layer".into(),
        shape: GpuShape {
            blocks: (total / (2 * MIB)).max(1) as u32,
            segments: 1,
            segment_bytes: 2 * MIB,
        },
        rounds,
        target: Target::Ratio(0.95),
    }];
    for (kib, target) in [(64, 0.88), (32, 0.88), (16, 0.80), (4, 0.65)] {
        let segment_bytes = kib << 10;
        cases.push(Case {
            name: format!("{ARRAYS} arrays of {kib}-KiB segments"),
            shape: GpuShape {
                blocks: (total / (ARRAYS * segment_bytes)).max(1) as u32,
                segments: ARRAYS,
                segment_bytes,
            },
            rounds,
            target: Target::Ratio(target),
        });
    }
    let tiny = |name: &str, blocks, segments, rounds, target| Case {
        name: name.into(),
        shape: GpuShape {
            blocks,
            segments,
            segment_bytes: 1 << 10,
        },
        rounds,
        target,
    };
    cases.extend([
        tiny(
            "61 layers x 8,192 x 1 KiB",
            8192,
            61,
            rounds,
            Target::SaveMs(25.0),
        ),
        tiny(
            "32,768 x 1 KiB",
            32_768,
            1,
            4 * rounds,
            Target::LoadUs(1500.0),
        ),
        tiny("128 x 1 KiB", 128, 1, 60 * rounds, Target::LoadUs(60.0)),
        tiny(
            "1 x 1 KiB (first byte)",
            1,
            1,
            60 * rounds,
            Target::LoadUs(60.0),
        ),
    ]);
    cases
}

/// What a GPU computes beside the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compute {
    /// bf16, 4096 x 4096 x 4096, of numbers as a model has them.
    Matmul,
    /// The same of zeros, which takes so little power that the GPU keeps its highest clock.
    MatmulOfZeros,
    /// bf16, a vector times each of 16 matrices of 8192 x 8192: bound by memory.
    Gemv,
}

impl Compute {
    /// All of them.
    pub const ALL: [Compute; 3] = [Compute::Matmul, Compute::MatmulOfZeros, Compute::Gemv];
    /// Those that an engine has.
    pub const OF_MODELS: [Compute; 2] = [Compute::Matmul, Compute::Gemv];

    /// What the table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Compute::Matmul => "matmul 4096^3",
            Compute::MatmulOfZeros => "matmul 4096^3 of zeros",
            Compute::Gemv => "gemv 8192^2 x16",
        }
    }

    /// By how much it may slow down, with segments as given; no engine computes with zeros.
    pub fn most_slowdown(self, shape: GpuShape) -> Option<f64> {
        match (self, shape.is_of_pages()) {
            (Compute::Matmul, true) => Some(1.03),
            (Compute::Gemv, true) => Some(1.09),
            (Compute::Matmul, false) => Some(1.06),
            (Compute::Gemv, false) => Some(1.12),
            (Compute::MatmulOfZeros, _) => None,
        }
    }
}
