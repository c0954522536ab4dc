use std::collections::HashSet;

use pegaflow_shm::namespace::{NamespaceSpec, PackedGroup};
use proptest::prelude::*;

use super::*;

fn segment(base: u64, block_stride: u64, bytes: u64) -> SegmentLayout {
    SegmentLayout {
        memory: MemoryRef::Region(1),
        base,
        block_stride,
        bytes,
    }
}

fn group(num_blocks: u32, segments: Vec<SegmentLayout>) -> GroupLayout {
    GroupLayout {
        group: 3,
        num_blocks,
        segments,
        replicated: false,
    }
}

/// Validates against a region 1 of 1 TiB and no other.
fn validate(layout: &GroupLayout) -> Result<ValidLayout, LayoutError> {
    ValidLayout::new(layout, |id| (id == 1).then_some(1 << 40))
}

#[test]
fn layouts_of_real_engines_are_accepted_and_merged() {
    const N: u64 = 1000;
    let layers_first = |layers: u64| {
        (0..layers * 2)
            .map(|l| segment(l * N * 64, 64, 64))
            .collect::<Vec<_>>()
    };
    let blocks_first = |layers: u64| {
        (0..layers * 2)
            .map(|l| segment(l * 64, layers * 128, 64))
            .collect()
    };
    let logical_128 = (0..4).map(|l| segment(l * N * 128, 128, 128)).collect();
    let physical_64 = (0..4)
        .flat_map(|l| {
            [
                segment(l * N * 128, 128, 64),
                segment(l * N * 128 + 64, 128, 64),
            ]
        })
        .collect();
    let with_gap = vec![segment(0, 100, 30), segment(40, 100, 30)];
    let kv_apart = vec![segment(0, 64, 64), segment(1 << 30, 64, 64)];
    let kv_interleaved = vec![segment(0, 128, 64), segment(64, 128, 64)];
    let v_before_k = vec![segment(64, 128, 64), segment(0, 128, 64)];
    let unequal_disjoint = vec![segment(0, 64, 64), segment(64 * N, 16, 16)];
    let wrapping = vec![
        segment(0, 100, 40),
        segment(80, 100, 20),
        segment(1040, 100, 40),
    ];
    let across = vec![
        segment(0, 100, 40),
        segment(90, 100, 10),
        segment(40, 100, 50),
    ];
    let table: Vec<(&str, Vec<SegmentLayout>, u64, usize)> = vec![
        ("MLA, one segment", vec![segment(0, 1152, 1152)], 1152, 1),
        ("layers first", layers_first(4), 512, 8),
        ("80 layers of K and V", layers_first(80), 10_240, 160),
        ("blocks first", blocks_first(4), 512, 1),
        ("80 layers inside a block", blocks_first(80), 10_240, 1),
        ("K and V apart", kv_apart, 128, 2),
        ("K and V interleaved inside a block", kv_interleaved, 128, 1),
        ("V before K is another page", v_before_k, 128, 2),
        ("logical blocks of 128", logical_128, 512, 4),
        ("physical 64 rows within logical 128", physical_64, 512, 4),
        ("a gap between pieces", with_gap, 60, 2),
        ("unequal strides, disjoint spans", unequal_disjoint, 80, 2),
        ("shifted by ten blocks into other columns", wrapping, 100, 3),
        ("order of the page differs from memory", across, 100, 3),
    ];
    for (name, segments, page_bytes, parts) in table {
        let blocks = if name.starts_with("shifted") {
            9
        } else {
            N as u32
        };
        let valid = validate(&group(blocks, segments)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            (valid.page_bytes(), valid.parts().len()),
            (page_bytes, parts),
            "{name}"
        );
        let tiled = valid.parts().iter().fold(0, |offset, part| {
            assert_eq!(part.page_offset, offset, "{name}: parts tile the page");
            offset + part.bytes
        });
        assert_eq!(tiled, page_bytes, "{name}");
    }
}

#[test]
fn only_a_dense_layout_says_so() {
    assert!(
        validate(&group(9, vec![segment(0, 64, 32), segment(32, 64, 32)]))
            .unwrap()
            .is_dense()
    );
    assert!(
        !validate(&group(9, vec![segment(0, 64, 32)]))
            .unwrap()
            .is_dense()
    );
    let apart = vec![segment(0, 64, 64), segment(4096, 64, 64)];
    assert!(!validate(&group(9, apart)).unwrap().is_dense());
}

#[test]
fn broken_layouts_are_refused_with_the_values_that_broke_them() {
    let process = |base, stride, bytes| SegmentLayout {
        memory: MemoryRef::Process,
        ..segment(base, stride, bytes)
    };
    let elsewhere = SegmentLayout {
        memory: MemoryRef::Region(7),
        ..segment(0, 8, 8)
    };
    let table: Vec<(u32, Vec<SegmentLayout>, &str)> = vec![
        (4, vec![], "group 3: no segments"),
        (0, vec![segment(0, 8, 8)], "zero blocks"),
        (
            4,
            vec![segment(0, 8, 8), segment(64, 8, 0)],
            "segment 1: zero bytes",
        ),
        (
            4,
            vec![segment(0, 7, 8)],
            "stride too small: block_stride 7 < bytes 8",
        ),
        (4, vec![segment(u64::MAX - 9, 8, 8)], "does not fit 64 bits"),
        (
            MAX_BLOCKS + 1,
            vec![segment(0, 8, 8)],
            "16777217 blocks, at most 16777216",
        ),
        (
            1 << 20,
            vec![segment(0, u64::MAX / 3, 8)],
            "does not fit 64 bits",
        ),
        (4, vec![segment(u64::MAX - 7, 8, 8)], "does not fit 64 bits"),
        (4, vec![elsewhere], "region 7 is not registered"),
        (
            4,
            vec![segment((1 << 40) - 31, 8, 8)],
            "ends at byte 1099511627777 of region 1",
        ),
        (4, vec![process(0, 8, 8)], "address 0x0 is null"),
        (4, vec![process(4095, 8, 8)], "below 0x1000"),
        (4, vec![process((1 << 47) - 31, 8, 8)], "beyond user space"),
        (
            1,
            vec![segment(0, 1 << 30, 1 << 30), segment(1 << 31, 1, 1)],
            "at most 1073741824",
        ),
        (
            4,
            vec![segment(0, 8, 8), segment(0, 8, 8)],
            "segments 0 and 1: both use byte 0x0",
        ),
        (
            4,
            vec![segment(0, 16, 8), segment(7, 16, 8)],
            "both use byte 0x7 of region 1",
        ),
        (
            4,
            vec![segment(8, 16, 9), segment(0, 16, 8)],
            "both use byte 0x10 of region 1",
        ),
        (
            4,
            vec![process(4096, 16, 8), process(4096 + 48, 16, 8)],
            "0x1030 of process memory",
        ),
        (
            4,
            vec![segment(0, 64, 8), segment(8, 32, 8)],
            "strides differ (64 and 32)",
        ),
        (
            4,
            vec![segment(0, 1, 1); MAX_SEGMENTS + 1],
            "segments, at most",
        ),
    ];
    for (num_blocks, segments, expected) in table {
        let shown = format!("{:?}…", &segments[..segments.len().min(2)]);
        let error = validate(&group(num_blocks, segments))
            .expect_err(&shown)
            .to_string();
        assert!(
            error.contains(expected),
            "{shown}: {error:?} lacks {expected:?}"
        );
    }
}

#[test]
fn limits_themselves_are_accepted() {
    let segments = (0..MAX_SEGMENTS as u64)
        .map(|i| segment(i * 16, 8, 8))
        .collect();
    assert_eq!(
        validate(&group(2, segments)).unwrap().page_bytes(),
        8 * MAX_SEGMENTS as u64
    );
    let whole = validate(&group(1, vec![segment(0, MAX_PAGE_BYTES, MAX_PAGE_BYTES)])).unwrap();
    assert_eq!(whole.page_bytes(), MAX_PAGE_BYTES);
    let top = SegmentLayout {
        memory: MemoryRef::Process,
        ..segment((1 << 47) - 32, 8, 8)
    };
    assert!(validate(&group(4, vec![top])).is_ok());
    assert!(validate(&group(4, vec![segment((1 << 40) - 32, 8, 8)])).is_ok());
}

#[test]
fn the_fingerprint_knows_sizes_and_order_but_not_places() {
    let fingerprint = |segments| {
        let valid = validate(&group(4, segments)).unwrap();
        let packed = PackedGroup {
            rank: 0,
            group: valid.group(),
            segment_bytes: valid.segment_bytes().to_vec(),
            replicated: valid.is_replicated(),
        };
        NamespaceSpec::default().digest(1, &[packed])
    };
    let merged = fingerprint(vec![segment(0, 96, 32), segment(32, 96, 64)]);
    assert_eq!(
        merged,
        fingerprint(vec![segment(4096, 32, 32), segment(0, 640, 64)])
    );
    assert_ne!(
        merged,
        fingerprint(vec![segment(0, 96, 64), segment(64, 96, 32)])
    );
    assert_ne!(merged, fingerprint(vec![segment(0, 96, 96)]));
}

#[test]
fn every_byte_of_a_page_knows_its_segment() {
    let valid = validate(&group(4, vec![segment(0, 64, 10), segment(10, 64, 1)])).unwrap();
    let at: Vec<usize> = (0..11).map(|offset| valid.segment_at(offset)).collect();
    assert_eq!(at, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
}

/// Every byte address that `segment` uses.
fn addresses(segment: &SegmentLayout, num_blocks: u32) -> impl Iterator<Item = u64> {
    let SegmentLayout {
        base,
        block_stride,
        bytes,
        ..
    } = *segment;
    (0..u64::from(num_blocks))
        .flat_map(move |b| (0..bytes).map(move |i| base + b * block_stride + i))
}

/// The rule said plainly: no byte twice, no crossing spans of unequal strides.
fn is_allowed(num_blocks: u32, segments: &[SegmentLayout]) -> bool {
    let mut used = HashSet::new();
    let distinct = segments.iter().all(|s| {
        addresses(s, num_blocks)
            .all(|address| used.insert((s.memory == MemoryRef::Region(1), address)))
    });
    let span = |s: &SegmentLayout| {
        (
            s.base,
            s.base + (u64::from(num_blocks) - 1) * s.block_stride + s.bytes,
        )
    };
    let crosses = |a: &SegmentLayout, b: &SegmentLayout| {
        a.memory == b.memory && span(a).0 < span(b).1 && span(b).0 < span(a).1
    };
    let even = segments.iter().enumerate().all(|(i, a)| {
        segments[..i]
            .iter()
            .all(|b| !crosses(a, b) || a.block_stride == b.block_stride)
    });
    distinct && even
}

fn any_segments() -> impl Strategy<Value = (u32, Vec<SegmentLayout>)> {
    let one = (0..2u32, 0..160u64, 1..4u64, 1..9u64, 0..8u8);
    (1..6u32, 6..24u64, prop::collection::vec(one, 1..7)).prop_map(|(num_blocks, stride, list)| {
        let segments = list.into_iter().map(|(region, base, factor, bytes, odd)| {
            let block_stride = if odd == 0 { stride * factor } else { stride };
            let bytes = bytes.min(block_stride);
            SegmentLayout {
                memory: MemoryRef::Region(region),
                base,
                block_stride,
                bytes,
            }
        });
        (num_blocks, segments.collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn overlaps_are_found_exactly((num_blocks, segments) in any_segments()) {
        let layout = group(num_blocks, segments);
        let verdict = ValidLayout::new(&layout, |_| Some(1 << 20));
        prop_assert_eq!(verdict.is_ok(), is_allowed(num_blocks, &layout.segments), "{:?}", verdict);
        if let Err(LayoutError::Overlap { first, second, address, .. }) = verdict {
            for index in [first, second] {
                let mut used = addresses(&layout.segments[index], num_blocks);
                prop_assert!(used.any(|a| a == address), "byte {address} is not in {index}");
            }
        }
    }

    #[test]
    fn merged_parts_pack_like_the_segments_and_unpack_to_the_same(
        (num_blocks, segments) in any_segments(),
        seed in any::<u8>(),
    ) {
        let layout = group(num_blocks, segments);
        let Ok(valid) = ValidLayout::new(&layout, |_| Some(1 << 20)) else { return Ok(()) };
        let region = |memory| usize::from(memory == MemoryRef::Region(1));
        let memory: Vec<Vec<u8>> = (0..2u8)
            .map(|r| {
                let byte = |i: u32| (i * 7) as u8 ^ seed ^ (i >> 6) as u8 ^ (r << 7);
                (0..1024).map(byte).collect()
            })
            .collect();
        let mut restored = vec![vec![0u8; 1024]; 2];
        for block in 0..u64::from(num_blocks) {
            let mut naive = Vec::new();
            for s in &layout.segments {
                let at = (s.base + block * s.block_stride) as usize;
                naive.extend_from_slice(&memory[region(s.memory)][at..at + s.bytes as usize]);
            }
            let mut page = vec![0u8; valid.page_bytes() as usize];
            for part in valid.parts() {
                let at = (part.base + block * part.block_stride) as usize;
                let (offset, bytes) = (part.page_offset as usize, part.bytes as usize);
                page[offset..offset + bytes]
                    .copy_from_slice(&memory[region(part.memory)][at..at + bytes]);
                restored[region(part.memory)][at..at + bytes]
                    .copy_from_slice(&page[offset..offset + bytes]);
            }
            prop_assert_eq!(page, naive);
        }
        for s in &layout.segments {
            for address in addresses(s, num_blocks) {
                let (r, at) = (region(s.memory), address as usize);
                prop_assert_eq!(restored[r][at], memory[r][at]);
            }
        }
    }
}
