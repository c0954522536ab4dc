//! Finds two segments of a group that would share a byte.
//!
//! Segments whose spans do not touch need no more. Spans that cross must have one stride `s`, and
//! then a byte at `s * row + column` makes the memory a table: a segment takes a run of columns in
//! one row per block, so it is a rectangle (two, when its columns run past the end of a row). A
//! sweep over the rows keeps the rectangles that are open now ordered by column; since those never
//! overlap, a new one needs a look only at the last that starts before its end. `n` segments cost
//! `n log n`: a client cannot make registration slow.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::error::{LayoutError, MemoryName};
use super::{MemoryRef, SegmentLayout};

/// A segment's place in its group, and the bytes from its first block's start to its last's end.
#[derive(Clone, Copy)]
struct Span {
    index: usize,
    start: u64,
    end: u64,
}

/// Columns `column..column_end` in the rows `row..row_end` belong to segment `index`.
#[derive(Clone, Copy)]
struct Rectangle {
    index: usize,
    row: u64,
    row_end: u64,
    column: u64,
    column_end: u64,
}

/// Refuses two segments that share a byte, and crossing spans of unequal strides. The segments'
/// spans must fit 64 bits (checked before).
pub(super) fn check_overlaps(
    group: u16,
    num_blocks: u32,
    segments: &[SegmentLayout],
) -> Result<(), LayoutError> {
    let mut spans: Vec<Span> = segments
        .iter()
        .enumerate()
        .map(|(index, s)| {
            let end = s.base + (u64::from(num_blocks) - 1) * s.block_stride + s.bytes;
            Span {
                index,
                start: s.base,
                end,
            }
        })
        .collect();
    spans.sort_unstable_by_key(|span| {
        (
            memory_order(segments[span.index].memory),
            span.start,
            span.index,
        )
    });

    let mut first = 0;
    while first < spans.len() {
        let after = cluster_end(group, segments, &spans, first)?;
        if after - first > 1 {
            check_cluster(group, num_blocks, segments, &spans[first..after])?;
        }
        first = after;
    }
    Ok(())
}

/// One past the last span that is tied to `spans[first]` by a chain of crossing spans.
///
/// Each span added crosses the one that reaches farthest, so equal strides there make all strides
/// of the chain equal.
fn cluster_end(
    group: u16,
    segments: &[SegmentLayout],
    spans: &[Span],
    first: usize,
) -> Result<usize, LayoutError> {
    let mut farthest = spans[first];
    let mut next = first + 1;
    while let Some(span) = spans.get(next) {
        let (a, b) = (&segments[farthest.index], &segments[span.index]);
        if a.memory != b.memory || span.start >= farthest.end {
            break;
        }
        if a.block_stride != b.block_stride {
            return Err(LayoutError::StridesDiffer {
                group,
                first: farthest.index,
                second: span.index,
                memory: MemoryName(a.memory),
                first_stride: a.block_stride,
                second_stride: b.block_stride,
            });
        }
        if span.end > farthest.end {
            farthest = *span;
        }
        next += 1;
    }
    Ok(next)
}

/// Looks for a shared byte among segments of one memory and one stride.
fn check_cluster(
    group: u16,
    num_blocks: u32,
    segments: &[SegmentLayout],
    spans: &[Span],
) -> Result<(), LayoutError> {
    let stride = segments[spans[0].index].block_stride;
    let origin = spans[0].start;
    let mut rectangles = Vec::with_capacity(spans.len() * 2);
    for span in spans {
        let index = span.index;
        let row = (span.start - origin) / stride;
        let column = (span.start - origin) % stride;
        let row_end = row + u64::from(num_blocks);
        let column_end = column + segments[index].bytes;
        let whole = Rectangle {
            index,
            row,
            row_end,
            column,
            column_end: column_end.min(stride),
        };
        rectangles.push(whole);
        if column_end > stride {
            let (row, row_end) = (row + 1, row_end + 1);
            let column_end = column_end - stride;
            rectangles.push(Rectangle {
                index,
                row,
                row_end,
                column: 0,
                column_end,
            });
        }
    }
    let Some((a, b)) = sweep(&rectangles) else {
        return Ok(());
    };
    let address = origin + a.row.max(b.row) * stride + a.column.max(b.column);
    let (first, second) = (a.index.min(b.index), a.index.max(b.index));
    let memory = MemoryName(segments[first].memory);
    Err(LayoutError::Overlap {
        group,
        first,
        second,
        memory,
        address,
    })
}

/// Any two rectangles with a cell in common.
fn sweep(rectangles: &[Rectangle]) -> Option<(Rectangle, Rectangle)> {
    // At one row, closing (false) sorts before opening (true).
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(rectangles.len() * 2);
    for (i, r) in rectangles.iter().enumerate() {
        events.push((r.row, true, i));
        events.push((r.row_end, false, i));
    }
    events.sort_unstable();
    let mut open: BTreeMap<u64, Rectangle> = BTreeMap::new();
    for (_, opens, i) in events {
        let r = rectangles[i];
        if !opens {
            open.remove(&r.column);
            continue;
        }
        let left = open
            .range(..r.column_end)
            .next_back()
            .map(|(_, other)| *other);
        if let Some(other) = left.filter(|other| other.column_end > r.column) {
            return Some((other, r));
        }
        open.insert(r.column, r);
    }
    None
}

/// Any total order will do: it only brings the segments of one memory together.
fn memory_order(memory: MemoryRef) -> u64 {
    match memory {
        MemoryRef::Region(id) => u64::from(id),
        MemoryRef::Process => u64::MAX,
    }
}
