//! The checks of offsets and lengths against oracles in 128-bit arithmetic, over every combination
//! of the values at which they could go wrong.

#![cfg(not(loom))]
#![forbid(unsafe_code)]

use bytemuck::Zeroable;
use pegaflow_shm::desc::{DescriptorFault, Op, Submission};
use pegaflow_shm::index::{HEADER_BYTES, HeapMemory, IndexLayout, IndexReader, IndexWriter};
use pegaflow_shm::payload::{
    CHUNK_BYTES, LOAD_CHUNK_BLOCKS, QUERY_CHUNK_HASHES, SAVE_CHUNK_BLOCKS, decode_blocks,
    encode_blocks, query_hashes, split_save,
};
use pegaflow_shm::segment::{
    C2D_MAGIC, MAX_ARENA_CHUNKS, MAX_RING_SLOTS, MIN_RING_SLOTS, SLOT_BYTES, SLOTS_OFFSET,
    SegmentHeader, SegmentShape,
};
use pegaflow_shm::sync::Arc;

/// Every value next to one of `edges`, each once.
fn around(edges: &[u64], most: u64) -> Vec<u64> {
    let near = |edge: &u64| {
        let start = edge.saturating_sub(9);
        start..=edge.saturating_add(9).min(most)
    };
    let mut values: Vec<u64> = edges.iter().flat_map(near).collect();
    values.sort_unstable();
    values.dedup();
    values
}

#[test]
fn every_operation_and_flag_byte_is_judged_as_the_table_says() {
    for op in 0..=u8::MAX {
        for flags in 0..=u8::MAX {
            for (payload_bytes, total) in [(0, 0), (0, 1), (8, 0), (8, 8)] {
                let submission = Submission {
                    op,
                    flags,
                    request_id: 1,
                    payload_bytes,
                    total,
                    ..Submission::zeroed()
                };
                let takes_a_list = matches!(op, 2..=4);
                let bare = payload_bytes == 0 && flags == 0 && total == 0;
                // A query takes one of the two words on what it does about a slower tier.
                let most = if op == 2 { 12 } else { 4 };
                let known = (1..=7).contains(&op);
                let expected = known && flags < most && (takes_a_list || bare);
                let checked = submission.check(4096);
                assert_eq!(checked.is_ok(), expected, "{submission:?}");
                match checked {
                    Ok(known) => assert_eq!(known as u8, op),
                    Err(DescriptorFault::Op(named)) => {
                        assert!(named == op && !(1..=7).contains(&op))
                    }
                    Err(DescriptorFault::Flags(named)) => {
                        assert!(named == flags && flags >= most)
                    }
                    Err(fault) => assert!(flags < most, "{fault}"),
                }
            }
        }
    }
}

#[test]
fn every_payload_near_an_edge_lies_in_the_arena_or_is_refused() {
    let arenas = [0, 1, 8, 16_384, 1 << 20, 1 << 30, u32::MAX - 7, u32::MAX];
    for arena_bytes in arenas {
        let arena = u64::from(arena_bytes);
        let edges = [0, 4096, arena / 2, arena, 1 << 31, u64::from(u32::MAX)];
        let values = around(&edges, u64::from(u32::MAX));
        for offset in &values {
            for bytes in &values {
                let submission = Submission {
                    op: Op::Save as u8,
                    request_id: 1,
                    payload_offset: *offset as u32,
                    payload_bytes: *bytes as u32,
                    ..Submission::zeroed()
                };
                let end = u128::from(*offset) + u128::from(*bytes);
                let expected = end <= u128::from(arena_bytes) && offset % 8 == 0;
                let accepted = submission.check(arena_bytes).is_ok();
                assert_eq!(accepted, expected, "{offset} + {bytes} of {arena_bytes}");
            }
        }
    }
}

#[test]
fn a_chunk_never_counts_more_than_its_request() {
    let values = around(
        &[0, 1 << 16, 1 << 31, u64::from(u32::MAX)],
        u64::from(u32::MAX),
    );
    for count in &values {
        for total in &values {
            let submission = Submission {
                op: Op::Load as u8,
                request_id: u64::MAX,
                count: *count as u32,
                total: *total as u32,
                ..Submission::zeroed()
            };
            assert_eq!(
                submission.check(0).is_ok(),
                count <= total,
                "{count} of {total}"
            );
        }
    }
}

/// Counts and lengths at which a list of `item` bytes each could be misjudged.
fn lists(item: usize, most: usize) -> Vec<(u32, usize)> {
    let mut lists = Vec::new();
    let counts = [
        0,
        1,
        2,
        3,
        most - 1,
        most,
        most + 1,
        1 << 16,
        1 << 27,
        1 << 29,
        1 << 31,
    ];
    for count in counts
        .into_iter()
        .chain([u32::MAX as usize / item + 1, u32::MAX as usize])
    {
        for near in -9isize..=9 {
            let bytes = (count * item).checked_add_signed(near);
            // What wraps in 32 bits, too.
            let wrapped = (count * item) as u32 as usize;
            lists.extend(bytes.map(|bytes| (count as u32, bytes)));
            lists.extend(
                wrapped
                    .checked_add_signed(near)
                    .map(|bytes| (count as u32, bytes)),
            );
        }
    }
    lists.retain(|(_, bytes)| *bytes <= CHUNK_BYTES + 64);
    lists
}

#[test]
fn a_list_of_hashes_or_ids_has_exactly_the_bytes_of_its_count() {
    // Lengths of a multiple of 32 keep the slices aligned for every view.
    let chunk = vec![7u8; CHUNK_BYTES + 128];
    for (count, bytes) in lists(32, QUERY_CHUNK_HASHES) {
        let exact = u128::from(count) * 32 == bytes as u128;
        let fits = count as usize <= QUERY_CHUNK_HASHES;
        let read = query_hashes(&chunk[..bytes], count);
        assert_eq!(
            read.is_ok(),
            exact && fits,
            "{count} hashes in {bytes} bytes"
        );
        assert!(read.is_err() || read.is_ok_and(|hashes| hashes.len() == count as usize));
    }
    for (count, bytes) in lists(36, SAVE_CHUNK_BLOCKS) {
        let expected =
            u128::from(count) * 32 <= bytes as u128 && count as usize <= SAVE_CHUNK_BLOCKS;
        let split = split_save(&chunk[..bytes], count);
        assert_eq!(split.is_ok(), expected, "{count} blocks in {bytes} bytes");
        if let Ok((hashes, rest)) = split {
            assert_eq!(
                (hashes.len(), hashes.len() * 32 + rest.len()),
                (count as usize, bytes)
            );
        }
    }
    for (count, bytes) in lists(4, LOAD_CHUNK_BLOCKS) {
        let expected =
            u128::from(count) * 4 == bytes as u128 && count as usize <= LOAD_CHUNK_BLOCKS;
        let mut ids = Vec::new();
        let decoded = decode_blocks(&chunk[..bytes], false, count, &mut ids);
        assert_eq!(decoded.is_ok(), expected, "{count} ids in {bytes} bytes");
        assert!(ids.len() <= LOAD_CHUNK_BLOCKS);
    }
}

#[test]
fn every_pair_of_runs_near_an_edge_is_decoded_as_wide_arithmetic_says() {
    let starts = [0, 1, 7, 1 << 24, u32::MAX - 2, u32::MAX - 1, u32::MAX];
    let lengths = [
        0,
        1,
        2,
        3,
        4095,
        4096,
        4097,
        1 << 31,
        u32::MAX - 1,
        u32::MAX,
    ];
    let counts = [0, 1, 2, 3, 4, 4095, 4096, 4097, 1 << 31, u32::MAX];
    let runs = || {
        starts
            .iter()
            .flat_map(|start| lengths.map(|length| (*start, length)))
    };
    for first in runs() {
        for second in runs() {
            let bytes: Vec<u8> = [first, second]
                .iter()
                .flat_map(|(start, length)| [start.to_le_bytes(), length.to_le_bytes()].concat())
                .collect();
            for count in counts {
                let good = |(start, length): (u32, u32)| {
                    length > 0 && u128::from(start) + u128::from(length) <= 1 << 32
                };
                let sum = u128::from(first.1) + u128::from(second.1);
                let expected = good(first)
                    && good(second)
                    && sum == u128::from(count)
                    && count as usize <= LOAD_CHUNK_BLOCKS;
                let mut ids = Vec::new();
                let decoded = decode_blocks(&bytes, true, count, &mut ids);
                assert_eq!(decoded.is_ok(), expected, "{first:?} {second:?} of {count}");
                assert!(
                    ids.len() <= count as usize,
                    "no more than was counted, even on the way"
                );
                if expected {
                    let ends = [first, second].map(|(start, length)| start..=start + (length - 1));
                    assert!(ids.into_iter().eq(ends.into_iter().flatten()));
                }
            }
        }
    }
}

#[test]
fn every_short_list_of_blocks_comes_back_from_its_encoding() {
    const VALUES: [u32; 6] = [0, 1, 2, 3, u32::MAX - 1, u32::MAX];
    for length in 0..=5u32 {
        for mut number in 0..VALUES.len().pow(length) {
            let mut blocks = Vec::new();
            for _ in 0..length {
                blocks.push(VALUES[number % VALUES.len()]);
                number /= VALUES.len();
            }
            let mut bytes = Vec::new();
            let runs = encode_blocks(&blocks, &mut bytes) != 0;
            let mut back = Vec::new();
            decode_blocks(&bytes, runs, length, &mut back).unwrap();
            assert_eq!(back, blocks);
        }
    }
}

#[test]
fn every_shape_near_a_limit_has_the_offsets_of_wide_arithmetic() {
    let slots = (0..=17)
        .map(|bit| 1u64 << bit)
        .chain([0, u64::from(u32::MAX)]);
    let slots = around(&slots.collect::<Vec<_>>(), u64::from(u32::MAX));
    let most = u64::from(MAX_ARENA_CHUNKS);
    let chunks = around(
        &[0, most / 2, most, 1 << 31, u64::from(u32::MAX)],
        u64::from(u32::MAX),
    );
    for slots in &slots {
        for chunks in &chunks {
            let shape = SegmentShape {
                slots: *slots as u32,
                arena_chunks: *chunks as u32,
            };
            let in_range = (u64::from(MIN_RING_SLOTS)..=u64::from(MAX_RING_SLOTS)).contains(slots);
            let power = (0..32).any(|bit| *slots == 1 << bit);
            let expected = in_range && power && *chunks > 0 && *chunks <= most;
            assert_eq!(shape.check().is_ok(), expected, "{shape:?}");
            if !expected {
                continue;
            }
            let slots_end = SLOTS_OFFSET as u128 + u128::from(*slots) * SLOT_BYTES as u128;
            let arena = slots_end.div_ceil(4096) * 4096;
            let total = arena + u128::from(*chunks) * CHUNK_BYTES as u128;
            assert_eq!(shape.arena_offset() as u128, arena);
            assert_eq!(shape.total_bytes() as u128, total);
            // The arena's length goes into 32 bits at the daemon.
            assert!(total - arena <= u128::from(u32::MAX));
        }
    }
}

/// A header that differs in one byte from that of its shape is refused, but for bytes that say who
/// wrote it, and for another number of slots that takes the same room.
#[test]
fn every_changed_byte_of_a_segment_header_is_noticed() {
    let shape = SegmentShape {
        slots: 64,
        arena_chunks: 3,
    };
    let good: [u8; 88] = bytemuck::cast(shape.header(C2D_MAGIC, [5; 16], 6));
    // Minor version, header size, features, boot id, session: told, not judged.
    let told = [10..16, 24..56];
    for at in 0..good.len() {
        for value in 0..=u8::MAX {
            let mut bytes = good;
            bytes[at] = value;
            let header: SegmentHeader = bytemuck::cast(bytes);
            let same_room = at == 64 && matches!(value, 16 | 32);
            let expected =
                bytes == good || same_room || told.iter().any(|range| range.contains(&at));
            let checked = header.check(C2D_MAGIC, shape.total_bytes());
            assert_eq!(checked.is_ok(), expected, "byte {at} = {value}");
            if let Ok(found) = checked {
                assert_eq!(found.total_bytes(), shape.total_bytes());
                assert_eq!(found.slots == shape.slots, !same_room);
            }
        }
    }
}

/// Sizes and offsets of an index header, each set to everything that could overflow.
#[test]
fn every_extreme_index_header_is_refused_or_lies_in_the_mapping() {
    let layout = IndexLayout::with_buckets(64, 8).unwrap();
    let memory = Arc::new(HeapMemory::for_layout(&layout));
    IndexWriter::create(memory.clone(), layout, [1; 16], 2).unwrap();
    let words = memory.snapshot(usize::MAX);
    let mapped = words.len() as u64 * 8;
    let extremes = around(
        &[0, 64, 4096, mapped, 1 << 31, 1 << 32, 1 << 58, u64::MAX - 9],
        u64::MAX,
    );
    // Bucket count, entry capacity, and the offsets of lines, entries and end.
    let fields = [5, 6, 7, 8, 9];
    for first in fields {
        for second in fields {
            for value in extremes.iter().step_by(7) {
                for other in &extremes {
                    let mut changed = words.clone();
                    (changed[first], changed[second]) = (*value, *other);
                    let [buckets, capacity, lines, entries, total] =
                        fields.map(|at| u128::from(changed[at]));
                    let fits = lines >= HEADER_BYTES as u128
                        && lines % 64 == 0
                        && entries % 64 == 0
                        && (1..=u128::from(u32::MAX)).contains(&buckets)
                        && (1..=1 << 31).contains(&capacity)
                        && lines + buckets * 64 <= entries
                        && entries + capacity * 64 <= total
                        && total <= u128::from(mapped);
                    let opened = IndexReader::open(HeapMemory::from_words(&changed));
                    assert_eq!(
                        opened.is_ok(),
                        fits,
                        "{buckets} {capacity} {lines} {entries} {total}"
                    );
                }
            }
        }
    }
}
