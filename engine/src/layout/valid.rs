//! A checked layout, with neighbouring segments merged.
#![forbid(unsafe_code)]

use super::error::LayoutError;
use super::overlap::check_overlaps;
use super::{
    GroupLayout, MAX_BLOCKS, MAX_PAGE_BYTES, MAX_SEGMENTS, MemoryRef, PROCESS_ADDRESS_END,
    PROCESS_ADDRESS_START, SegmentLayout,
};

/// One strided copy: `bytes` at `base + block * block_stride` of `memory` are the page's bytes
/// `page_offset .. page_offset + bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where the part lies.
    pub memory: MemoryRef,
    /// Byte offset of block 0's piece inside the region, or its virtual address in the process.
    pub base: u64,
    /// Bytes from one block's piece to the next block's.
    pub block_stride: u64,
    /// Bytes of one block's piece.
    pub bytes: u64,
    /// Where the piece starts within the page, in bytes.
    pub page_offset: u64,
}

/// A layout that keeps every rule of this module.
///
/// What holds: at least one part, at most [`MAX_SEGMENTS`]; every piece of every block lies inside
/// its region (as long as the caller named it) or inside user space; no two pieces share a byte;
/// the parts tile the page `0..page_bytes` in order; `page_bytes <= MAX_PAGE_BYTES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidLayout {
    group: u16,
    num_blocks: u32,
    page_bytes: u64,
    parts: Vec<Part>,
    segment_bytes: Vec<u64>,
    replicated: bool,
}

impl ValidLayout {
    /// Checks `layout`. `region_bytes` gives the size of a registered region, `None` for an id that
    /// the session never registered.
    pub fn new(
        layout: &GroupLayout,
        region_bytes: impl Fn(u32) -> Option<u64>,
    ) -> Result<Self, LayoutError> {
        let GroupLayout {
            group,
            num_blocks,
            ref segments,
            replicated,
        } = *layout;
        if segments.is_empty() {
            return Err(LayoutError::NoSegments { group });
        }
        if segments.len() > MAX_SEGMENTS {
            return Err(LayoutError::TooManySegments {
                group,
                count: segments.len(),
            });
        }
        if num_blocks == 0 {
            return Err(LayoutError::ZeroBlocks { group });
        }
        if num_blocks > MAX_BLOCKS {
            return Err(LayoutError::TooManyBlocks { group, num_blocks });
        }
        for (index, segment) in segments.iter().enumerate() {
            check_segment(group, num_blocks, index, segment, &region_bytes)?;
        }
        // The sum cannot wrap: MAX_SEGMENTS sizes below 2^47 or one region's length each.
        let page_bytes = segments
            .iter()
            .fold(0u64, |sum, s| sum.saturating_add(s.bytes));
        if page_bytes > MAX_PAGE_BYTES {
            return Err(LayoutError::PageTooLarge { group, page_bytes });
        }
        check_overlaps(group, num_blocks, segments)?;
        Ok(Self {
            group,
            num_blocks,
            page_bytes,
            parts: merge(segments),
            segment_bytes: segments.iter().map(|s| s.bytes).collect(),
            replicated,
        })
    }

    /// The cache group.
    pub fn group(&self) -> u16 {
        self.group
    }

    /// Block ids run from 0 to one less than this.
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The copies that make up one page, in page order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// All ranks hold the same bytes: they are stored once.
    pub fn is_replicated(&self) -> bool {
        self.replicated
    }

    /// The segments' sizes in bytes as registered, before merging.
    pub fn segment_bytes(&self) -> &[u64] {
        &self.segment_bytes
    }

    /// True when a run of blocks is one contiguous range of memory, so that a run of pages can be
    /// copied at once.
    pub fn is_dense(&self) -> bool {
        matches!(self.parts[..], [part] if part.block_stride == part.bytes)
    }

    /// The bytes of the page from `start` to `end` as a layout of their own.
    ///
    /// # Panics
    /// There is none: the range is empty or does not lie in the page.
    pub fn slice(&self, start: u64, end: u64) -> ValidLayout {
        assert!(
            start < end && end <= self.page_bytes,
            "{start}..{end} of a page of {}",
            self.page_bytes
        );
        let clipped = |part: &Part| {
            let from = part.page_offset.max(start);
            let to = (part.page_offset + part.bytes).min(end);
            (from < to).then(|| Part {
                base: part.base + (from - part.page_offset),
                bytes: to - from,
                page_offset: from - start,
                ..*part
            })
        };
        ValidLayout {
            page_bytes: end - start,
            parts: self.parts.iter().filter_map(clipped).collect(),
            segment_bytes: vec![end - start],
            ..*self
        }
    }

    /// The registered segment that holds byte `page_offset` of the page; `page_offset` must be
    /// smaller than `page_bytes`.
    pub fn segment_at(&self, page_offset: u64) -> usize {
        assert!(
            page_offset < self.page_bytes,
            "offset {page_offset} is outside the page"
        );
        let mut end = 0;
        let holds = |bytes: &u64| {
            end += bytes;
            page_offset < end
        };
        self.segment_bytes
            .iter()
            .position(holds)
            .unwrap_or(self.segment_bytes.len() - 1)
    }
}

/// The end of `segment`'s last block, or `None` when it does not fit 64 bits.
fn span_end(segment: &SegmentLayout, num_blocks: u32) -> Option<u64> {
    let last = segment
        .block_stride
        .checked_mul(u64::from(num_blocks) - 1)?;
    segment.base.checked_add(last)?.checked_add(segment.bytes)
}

fn check_segment(
    group: u16,
    num_blocks: u32,
    index: usize,
    segment: &SegmentLayout,
    region_bytes: &impl Fn(u32) -> Option<u64>,
) -> Result<(), LayoutError> {
    let SegmentLayout {
        memory,
        base,
        block_stride,
        bytes,
    } = *segment;
    if bytes == 0 {
        return Err(LayoutError::ZeroBytes {
            group,
            segment: index,
        });
    }
    if block_stride < bytes {
        return Err(LayoutError::StrideTooSmall {
            group,
            segment: index,
            block_stride,
            bytes,
        });
    }
    let Some(end) = span_end(segment, num_blocks) else {
        return Err(LayoutError::Overflow {
            group,
            segment: index,
            base,
            num_blocks,
            block_stride,
        });
    };
    match memory {
        MemoryRef::Region(id) => {
            let Some(region_bytes) = region_bytes(id) else {
                return Err(LayoutError::UnknownRegion {
                    group,
                    segment: index,
                    region: id,
                });
            };
            if end > region_bytes {
                return Err(LayoutError::RegionRange {
                    group,
                    segment: index,
                    region: id,
                    end,
                    region_bytes,
                });
            }
        }
        MemoryRef::Process => {
            if base < PROCESS_ADDRESS_START {
                return Err(LayoutError::NullAddress {
                    group,
                    segment: index,
                    address: base,
                });
            }
            if end > PROCESS_ADDRESS_END {
                return Err(LayoutError::AddressRange {
                    group,
                    segment: index,
                    end,
                });
            }
        }
    }
    Ok(())
}

/// Joins a segment to the one before it when it continues the same piece of memory in every block.
fn merge(segments: &[SegmentLayout]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut page_offset = 0;
    for s in segments {
        match parts.last_mut() {
            Some(last)
                if last.memory == s.memory
                    && last.block_stride == s.block_stride
                    && last.base + last.bytes == s.base =>
            {
                last.bytes += s.bytes;
            }
            _ => parts.push(Part {
                memory: s.memory,
                base: s.base,
                block_stride: s.block_stride,
                bytes: s.bytes,
                page_offset,
            }),
        }
        page_offset += s.bytes;
    }
    parts
}
