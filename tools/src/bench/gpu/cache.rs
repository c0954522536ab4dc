//! KV memory on a GPU, and the bytes that belong there.

use pegaflow::{GroupMemory, SegmentMemory};

use super::case::GpuShape;
use crate::error::ToolError;
use crate::gpu::{DeviceMemory, GpuError};

/// Threads that make or check bytes.
const THREADS: usize = 8;

/// Arrays of one engine: all blocks' first pieces, then all second ones …
pub struct GpuCache {
    memory: DeviceMemory,
    shape: GpuShape,
}

impl GpuCache {
    /// Allocates the arrays.
    ///
    /// # Errors
    /// The GPU has not as much memory.
    pub fn allocate(shape: GpuShape) -> Result<GpuCache, GpuError> {
        let memory = DeviceMemory::allocate(shape.total_bytes())?;
        Ok(GpuCache { memory, shape })
    }

    /// The arrays as the library registers them, for group 0.
    pub fn group(&self) -> GroupMemory {
        let bytes = self.shape.segment_bytes;
        let array = bytes * self.shape.blocks as usize;
        let segment = |segment: usize| {
            let address = self.memory.address() as usize + segment * array;
            let address = std::ptr::without_provenance_mut::<u8>(address);
            // SAFETY: device memory, which no processor follows; it lives longer than the client's
            // registration, and this process leaves it alone while a request is under way.
            unsafe { SegmentMemory::at(address, bytes as u64, bytes as u64) }
        };
        GroupMemory {
            group: 0,
            num_blocks: self.shape.blocks,
            segments: (0..self.shape.segments).map(segment).collect(),
            replicated: false,
        }
    }

    /// The memory itself.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Writes bytes that differ from place to place, and by `seed`.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn fill(&self, seed: u64) -> Result<(), GpuError> {
        let mut bytes = vec![0; self.memory.bytes()];
        for_parts(&mut bytes, |part, words| {
            for (at, word) in words.chunks_mut(8).enumerate() {
                let value = value(seed, part + 8 * at).to_le_bytes();
                word.copy_from_slice(&value[..word.len()]);
            }
            true
        });
        self.memory.write(0, &bytes)
    }

    /// Checks that all bytes are as [`Self::fill`] wrote them.
    ///
    /// # Errors
    /// The GPU fails, or a byte differs.
    pub fn verify(&self, seed: u64) -> Result<(), ToolError> {
        let mut bytes = vec![0; self.memory.bytes()];
        self.memory.read(0, &mut bytes)?;
        let same = for_parts(&mut bytes, |part, words| {
            let words = words.chunks(8).enumerate();
            let mut same = words.map(|(at, word)| {
                let value = value(seed, part + 8 * at).to_le_bytes();
                word == &value[..word.len()]
            });
            same.all(|same| same)
        });
        if same {
            return Ok(());
        }
        Err(ToolError::Child {
            process: "the daemon".into(),
            what: format!("loaded wrong bytes into GPU memory of {:?}", self.shape),
        })
    }
}

/// The eight bytes of a place: no two are alike, and their bits are mixed.
pub(super) fn value(seed: u64, at: usize) -> u64 {
    (at as u64 ^ seed.rotate_left(40)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Does the same to all parts of some memory, on several threads; true if all said so.
fn for_parts(bytes: &mut [u8], each: impl Fn(usize, &mut [u8]) -> bool + Sync) -> bool {
    let share = bytes.len().div_ceil(THREADS).next_multiple_of(8);
    std::thread::scope(|scope| {
        let each = &each;
        let parts = bytes.chunks_mut(share).enumerate();
        let threads: Vec<_> = parts
            .map(|(part, words)| scope.spawn(move || each(part * share, words)))
            .collect();
        threads
            .into_iter()
            .all(|thread| thread.join().is_ok_and(|same| same))
    })
}
