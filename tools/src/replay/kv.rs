//! Paged KV memory of a worker, as an engine would have it.
//!
//! A block is a row of one or more arrays (layers-first: all blocks' first segments, then all
//! second ones …), and the daemon packs the segments of a block into one page. The memory is either
//! shared with the daemon or plain memory of this process.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;

use clap::ValueEnum;
use pegaflow::{Client, GroupMemory, HostMemory, SegmentMemory};
use pegaflow_shm::mapping::{copy_from_shared, copy_to_shared};
use serde::{Deserialize, Serialize};

use super::pattern::{self, Mismatch};
use crate::error::ToolError;

/// Kinds of KV memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// A memfd region allocated through the library and mapped by the daemon.
    Shared,
    /// Plain memory, which the daemon reaches by process_vm_readv and process_vm_writev.
    Process,
}

/// Bytes that are generated or checked in one go: they stay in the first-level cache.
const PART_BYTES: usize = 16 << 10;

/// Size of the arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvShape {
    /// Kind of memory.
    pub memory: MemoryKind,
    /// Blocks.
    pub num_blocks: u32,
    /// Bytes of a block in one rank: what becomes a page.
    pub page_bytes: usize,
    /// Arrays that a block is spread over.
    pub segments: usize,
}

impl KvShape {
    /// Bytes of one block in one array.
    pub fn segment_bytes(&self) -> usize {
        self.page_bytes / self.segments
    }

    /// Bytes of all arrays.
    pub fn total_bytes(&self) -> usize {
        self.page_bytes * self.num_blocks as usize
    }
}

/// Zeroed pages of this process that are never given back: the daemon may write them until the
/// process ends.
#[derive(Debug)]
struct ProcessMemory {
    base: NonNull<u8>,
    bytes: usize,
}

impl ProcessMemory {
    fn new(bytes: usize) -> Result<ProcessMemory, ToolError> {
        let failed = || ToolError::Plan(format!("no {bytes} bytes of memory for KV blocks"));
        let layout = Layout::from_size_align(bytes.max(1), 4096).map_err(|_| failed())?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
        Ok(ProcessMemory { base, bytes })
    }

    fn at(&self, offset: usize, length: usize) -> NonNull<u8> {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.bytes)
        );
        // SAFETY: the assertion keeps the range inside the allocation.
        unsafe { self.base.add(offset) }
    }
}

enum Memory {
    Shared(HostMemory),
    Process(ProcessMemory),
}

/// The arrays of one worker.
pub struct KvCache {
    shape: KvShape,
    memory: Memory,
    part: Vec<u8>,
}

impl KvCache {
    /// Allocates the arrays.
    ///
    /// # Errors
    /// No memory, or the library refused.
    pub fn allocate(client: &Client, shape: KvShape) -> Result<KvCache, ToolError> {
        let bytes = shape.total_bytes();
        let memory = match shape.memory {
            MemoryKind::Shared => Memory::Shared(
                client
                    .alloc_host(bytes)
                    .map_err(ToolError::client("allocating shared KV memory"))?,
            ),
            MemoryKind::Process => Memory::Process(ProcessMemory::new(bytes)?),
        };
        Ok(KvCache {
            shape,
            memory,
            part: vec![0; PART_BYTES],
        })
    }

    /// Size of the arrays.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The arrays as the library registers them, for group 0.
    pub fn group(&self) -> GroupMemory {
        let bytes = self.shape.segment_bytes();
        let array = bytes * self.shape.num_blocks as usize;
        let segments = (0..self.shape.segments)
            .map(|segment| match &self.memory {
                Memory::Shared(memory) => {
                    SegmentMemory::in_host(memory, segment * array, bytes as u64, bytes as u64)
                }
                Memory::Process(memory) => {
                    let base = memory.at(segment * array, array).as_ptr();
                    // SAFETY: the array is inside memory that this process never gives back, and
                    // that it reaches only by the copies below, never through references.
                    unsafe { SegmentMemory::at(base, bytes as u64, bytes as u64) }
                }
            })
            .collect();
        GroupMemory {
            group: 0,
            num_blocks: self.shape.num_blocks,
            segments,
            replicated: false,
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), ToolError> {
        match &self.memory {
            Memory::Shared(memory) => memory
                .write(offset, bytes)
                .map_err(ToolError::client("writing KV memory")),
            Memory::Process(memory) => {
                let target = memory.at(offset, bytes.len());
                // SAFETY: `at` checked the range; `bytes` is private and cannot overlap it.
                unsafe { copy_to_shared(target.as_ptr(), bytes.as_ptr(), bytes.len()) };
                Ok(())
            }
        }
    }

    fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), ToolError> {
        match &self.memory {
            Memory::Shared(memory) => memory
                .read(offset, out)
                .map_err(ToolError::client("reading KV memory")),
            Memory::Process(memory) => {
                let source = memory.at(offset, out.len());
                // SAFETY: `at` checked the range; `out` is private and cannot overlap it.
                unsafe { copy_from_shared(out.as_mut_ptr(), source.as_ptr(), out.len()) };
                Ok(())
            }
        }
    }

    /// Calls `visit` for each part of a block with its place in memory, its place in the page and
    /// its length.
    fn parts(&self, block: u32) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let KvShape {
            num_blocks,
            segments,
            ..
        } = self.shape;
        let bytes = self.shape.segment_bytes();
        (0..segments).flat_map(move |segment| {
            let row = (segment * num_blocks as usize + block as usize) * bytes;
            (0..bytes)
                .step_by(PART_BYTES)
                .map(move |at| (row + at, segment * bytes + at, PART_BYTES.min(bytes - at)))
        })
    }

    /// Writes the bytes that the block with this seed computes to.
    ///
    /// # Errors
    /// The library refused.
    pub fn compute(&mut self, block: u32, seed: u64) -> Result<(), ToolError> {
        let mut part = std::mem::take(&mut self.part);
        for (at, in_page, length) in self.parts(block) {
            pattern::fill(seed, in_page, &mut part[..length]);
            self.write(at, &part[..length])?;
        }
        self.part = part;
        Ok(())
    }

    /// Overwrites a block with what no block computes to.
    ///
    /// # Errors
    /// The library refused.
    pub fn poison(&mut self, block: u32, round: u64) -> Result<(), ToolError> {
        let mut part = std::mem::take(&mut self.part);
        pattern::poison(round, &mut part);
        for (at, _, length) in self.parts(block) {
            self.write(at, &part[..length])?;
        }
        self.part = part;
        Ok(())
    }

    /// Checks every byte of a block; the outer error is the library's.
    ///
    /// # Errors
    /// The library refused.
    pub fn verify(&mut self, block: u32, seed: u64) -> Result<Result<(), Mismatch>, ToolError> {
        let mut part = std::mem::take(&mut self.part);
        let mut outcome = Ok(());
        for (at, in_page, length) in self.parts(block) {
            self.read(at, &mut part[..length])?;
            if outcome.is_ok() {
                outcome = pattern::verify(seed, in_page, &part[..length]);
            }
        }
        self.part = part;
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(page_bytes: usize, segments: usize) -> KvCache {
        let shape = KvShape {
            memory: MemoryKind::Process,
            num_blocks: 3,
            page_bytes,
            segments,
        };
        let memory = Memory::Process(ProcessMemory::new(shape.total_bytes()).unwrap());
        KvCache {
            shape,
            memory,
            part: vec![0; PART_BYTES],
        }
    }

    #[test]
    fn what_is_computed_verifies_and_anything_else_does_not() {
        for (page_bytes, segments) in [(4096, 2), (1024, 1), (96 << 10, 3), (80 << 10, 2)] {
            let mut kv = cache(page_bytes, segments);
            for block in 0..3 {
                kv.compute(block, u64::from(block) + 7).unwrap();
            }
            for block in 0..3 {
                assert_eq!(kv.verify(block, u64::from(block) + 7).unwrap(), Ok(()));
                assert!(kv.verify(block, 99).unwrap().is_err());
            }
            kv.poison(1, 5).unwrap();
            assert!(kv.verify(1, 8).unwrap().is_err());
            assert_eq!(kv.verify(0, 7).unwrap(), Ok(()));
            assert_eq!(kv.verify(2, 9).unwrap(), Ok(()));
        }
    }

    #[test]
    fn a_mismatch_names_the_byte_of_the_page() {
        let mut kv = cache(4096, 2);
        kv.compute(2, 1).unwrap();
        // Second array, block 2, its byte 10.
        kv.write(3 * 2048 + 2 * 2048 + 10, &[0]).unwrap();
        let mut byte = [0];
        kv.read(3 * 2048 + 2 * 2048 + 10, &mut byte).unwrap();
        let mismatch = kv.verify(2, 1).unwrap().unwrap_err();
        assert_eq!((mismatch.offset, mismatch.bytes), (2048 + 10, 1));
    }
}
