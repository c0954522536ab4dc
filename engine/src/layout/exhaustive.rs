//! Every layout of a small world against byte sets, and every extreme one against 128-bit numbers.

#![forbid(unsafe_code)]

use super::*;

fn segment(memory: MemoryRef, base: u64, block_stride: u64, bytes: u64) -> SegmentLayout {
    SegmentLayout {
        memory,
        base,
        block_stride,
        bytes,
    }
}

fn layout(num_blocks: u32, segments: Vec<SegmentLayout>) -> GroupLayout {
    GroupLayout {
        group: 0,
        num_blocks,
        segments,
        replicated: false,
    }
}

/// Bases, strides, lengths and counts at which a sum or product passes a limit or wraps.
const EXTREMES: [u64; 24] = [
    0,
    1,
    4095,
    4096,
    4097,
    (1 << 24) - 1,
    1 << 24,
    MAX_PAGE_BYTES - 1,
    MAX_PAGE_BYTES,
    MAX_PAGE_BYTES + 1,
    (1 << 32) - 1,
    1 << 32,
    (1 << 40) - 1,
    1 << 40,
    (1 << 47) - 4096,
    (1 << 47) - 1,
    1 << 47,
    (1 << 47) + 1,
    1 << 63,
    u64::MAX / 3,
    u64::MAX - (1 << 24),
    u64::MAX - 4096,
    u64::MAX - 1,
    u64::MAX,
];

#[test]
fn every_extreme_segment_lies_in_its_memory_or_is_refused() {
    const REGION: u64 = 1 << 40;
    let counts = [
        0,
        1,
        2,
        3,
        MAX_BLOCKS - 1,
        MAX_BLOCKS,
        MAX_BLOCKS + 1,
        u32::MAX,
    ];
    for memory in [
        MemoryRef::Region(0),
        MemoryRef::Region(1),
        MemoryRef::Process,
    ] {
        for base in EXTREMES {
            for stride in EXTREMES {
                for bytes in EXTREMES {
                    for num_blocks in counts {
                        let one = layout(num_blocks, vec![segment(memory, base, stride, bytes)]);
                        let valid = ValidLayout::new(&one, |id| (id == 0).then_some(REGION));
                        let (start, limit) = match memory {
                            MemoryRef::Region(0) => (0, u128::from(REGION)),
                            // An end that nothing reaches: the region is not there.
                            MemoryRef::Region(_) => (0, 0),
                            MemoryRef::Process => (4096, 1 << 47),
                        };
                        let [wide_base, wide_stride, wide_bytes] =
                            [base, stride, bytes].map(u128::from);
                        let last = u128::from(num_blocks).saturating_sub(1) * wide_stride;
                        let expected = (1..=MAX_BLOCKS).contains(&num_blocks)
                            && bytes > 0
                            && bytes <= MAX_PAGE_BYTES
                            && stride >= bytes
                            && base >= start
                            && wide_base + last + wide_bytes <= limit;
                        assert_eq!(valid.is_ok(), expected, "{one:?}");
                        if let Ok(valid) = valid {
                            assert_eq!(valid.page_bytes(), bytes);
                            assert_eq!(valid.is_dense(), stride == bytes);
                        }
                    }
                }
            }
        }
    }
}

/// Bytes that a segment uses, and its span from its first to its last.
fn bytes_of(segment: &SegmentLayout, num_blocks: u32) -> (u64, u64, u64) {
    let mut used = 0u64;
    let mut end = 0;
    for block in 0..u64::from(num_blocks) {
        let start = segment.base + block * segment.block_stride;
        end = start + segment.bytes;
        (start..end).for_each(|byte| used |= 1 << byte);
    }
    (used, segment.base, end)
}

#[test]
fn every_two_segments_of_a_small_world_are_apart_or_refused() {
    let region = |id: u32| (id == 0).then_some(64u64);
    let mut accepted = 0;
    for num_blocks in 1..=4 {
        let mut segments = Vec::new();
        for base in 0..10 {
            for stride in 1..=6 {
                for bytes in 1..=stride.min(4) {
                    segments.push(segment(MemoryRef::Region(0), base, stride, bytes));
                }
            }
        }
        for first in &segments {
            let (used, start, end) = bytes_of(first, num_blocks);
            for second in &segments {
                let (other_used, other_start, other_end) = bytes_of(second, num_blocks);
                let spans_cross = start < other_end && other_start < end;
                let expected = used & other_used == 0
                    && (!spans_cross || first.block_stride == second.block_stride);
                let two = layout(num_blocks, vec![*first, *second]);
                let valid = ValidLayout::new(&two, region);
                assert_eq!(valid.is_ok(), expected, "{two:?}");
                let Ok(valid) = valid else { continue };
                accepted += 1;
                // The page is the two pieces one behind the other, merged or not.
                let parts: Vec<_> = valid.parts().iter().map(|part| part.bytes).collect();
                assert_eq!(parts.iter().sum::<u64>(), first.bytes + second.bytes);
                assert_eq!(valid.page_bytes(), first.bytes + second.bytes);
                let joined = valid.parts().len() == 1;
                let next = first.base + first.bytes == second.base;
                assert_eq!(joined, next && first.block_stride == second.block_stride);
            }
        }
    }
    assert!(accepted > 10_000, "only {accepted} layouts were accepted");
}

#[test]
fn three_interleaved_segments_are_accepted_exactly_when_no_byte_is_shared() {
    const STRIDE: u64 = 6;
    let region = |id: u32| (id == 0).then_some(64u64);
    let all = || (0..12u64).flat_map(|base| (1..=3).map(move |bytes| (base, bytes)));
    for first in all() {
        for second in all() {
            for third in all() {
                let three = [first, second, third]
                    .map(|(base, bytes)| segment(MemoryRef::Region(0), base, STRIDE, bytes));
                let used = three.map(|segment| bytes_of(&segment, 3).0);
                let shared = used[0] & used[1] | used[0] & used[2] | used[1] & used[2];
                let valid = ValidLayout::new(&layout(3, three.to_vec()), region);
                assert_eq!(valid.is_ok(), shared == 0, "{three:?}");
            }
        }
    }
}
