//! Why a layout is refused.
#![forbid(unsafe_code)]

use std::fmt;

use super::{
    MAX_BLOCKS, MAX_PAGE_BYTES, MAX_SEGMENTS, MemoryRef, PROCESS_ADDRESS_END, PROCESS_ADDRESS_START,
};

/// A memory as people read it: `region 3` or `process memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryName(pub MemoryRef);

impl fmt::Display for MemoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            MemoryRef::Region(id) => write!(f, "region {id}"),
            MemoryRef::Process => f.write_str("process memory"),
        }
    }
}

/// A rule that a layout broke. `segment` counts from 0 in the order of registration; every byte
/// and address value is what the engine sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum LayoutError {
    #[error("group {group}: no segments; register at least one (memory, base, stride, bytes)")]
    NoSegments { group: u16 },
    #[error(
        "group {group}: {count} segments, at most {MAX_SEGMENTS}; \
         merge pieces that lie next to each other in every block"
    )]
    TooManySegments { group: u16, count: usize },
    #[error("group {group}: zero blocks; num_blocks is the number of block ids the engine uses")]
    ZeroBlocks { group: u16 },
    #[error(
        "group {group}: {num_blocks} blocks, at most {MAX_BLOCKS}; register larger blocks or \
         several instances"
    )]
    TooManyBlocks { group: u16, num_blocks: u32 },
    #[error("group {group} segment {segment}: zero bytes; leave an empty segment out")]
    ZeroBytes { group: u16, segment: usize },
    #[error(
        "group {group} segment {segment}: stride too small: block_stride {block_stride} < bytes \
         {bytes}, so neighbouring blocks would share bytes; both are in bytes, not elements"
    )]
    StrideTooSmall {
        group: u16,
        segment: usize,
        block_stride: u64,
        bytes: u64,
    },
    #[error(
        "group {group} segment {segment}: base {base:#x} + {num_blocks} blocks × stride \
         {block_stride} does not fit 64 bits; check that the stride is in bytes"
    )]
    Overflow {
        group: u16,
        segment: usize,
        base: u64,
        num_blocks: u32,
        block_stride: u64,
    },
    #[error(
        "group {group} segment {segment}: region {region} is not registered; \
         register the region before the layout"
    )]
    UnknownRegion {
        group: u16,
        segment: usize,
        region: u32,
    },
    #[error(
        "group {group} segment {segment}: ends at byte {end} of region {region}, which has \
         {region_bytes} bytes; check base, stride and num_blocks"
    )]
    RegionRange {
        group: u16,
        segment: usize,
        region: u32,
        end: u64,
        region_bytes: u64,
    },
    #[error(
        "group {group} segment {segment}: address {address:#x} is null or below \
         {PROCESS_ADDRESS_START:#x}; give the virtual address of block 0"
    )]
    NullAddress {
        group: u16,
        segment: usize,
        address: u64,
    },
    #[error(
        "group {group} segment {segment}: ends at address {end:#x}, beyond user space \
         ({PROCESS_ADDRESS_END:#x}); device memory is no process memory"
    )]
    AddressRange {
        group: u16,
        segment: usize,
        end: u64,
    },
    #[error(
        "group {group} segments {first} and {second}: both use byte {address:#x} of {memory}; \
         every byte may belong to one segment of the group only"
    )]
    Overlap {
        group: u16,
        first: usize,
        second: usize,
        memory: MemoryName,
        address: u64,
    },
    #[error(
        "group {group} segments {first} and {second}: their spans in {memory} cross but their \
         strides differ ({first_stride} and {second_stride}); interleaved segments need one stride"
    )]
    StridesDiffer {
        group: u16,
        first: usize,
        second: usize,
        memory: MemoryName,
        first_stride: u64,
        second_stride: u64,
    },
    #[error(
        "group {group}: a page of {page_bytes} bytes, at most {MAX_PAGE_BYTES}; \
         use smaller blocks"
    )]
    PageTooLarge { group: u16, page_bytes: u64 },
}
