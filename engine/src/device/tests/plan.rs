//! Plans move every byte of every page exactly once, between the right places, within their limits.
#![forbid(unsafe_code)]

use proptest::prelude::*;

use crate::copy::{NO_CHECKSUM, PageCopy};
use crate::device::part::DevicePart;
use crate::device::pin_map::PinMap;
use crate::device::plan::{Chunk, Cursor, Limits, Source};

/// A task to plan, at a small scale: every limit is met within a few KiB.
#[derive(Debug, Clone)]
struct Case {
    parts: Vec<DevicePart>,
    page_bytes: u64,
    pages: Vec<PageCopy>,
    pool_bytes: u64,
    range_bytes: u64,
    pinned: Vec<bool>,
    limits: Limits,
}

impl Case {
    fn pins(&self) -> PinMap {
        let map = PinMap::new(self.pool_bytes, self.range_bytes);
        for number in 0..map.ranges() {
            map.set(number, self.pinned[number % self.pinned.len()]);
        }
        map
    }

    /// Where each byte of the task lies: device address by pool offset, in task order.
    fn expected(&self) -> Vec<(u64, u64)> {
        let mut bytes = Vec::new();
        for page in &self.pages {
            for part in &self.parts {
                let piece = part.base + u64::from(page.block) * part.block_stride;
                let packed = page.pool_offset + u64::from(part.page_offset);
                bytes.extend((0..u64::from(part.bytes)).map(|i| (piece + i, packed + i)));
            }
        }
        bytes
    }

    /// Plans to the end and returns what the chunks move, in the form of `expected`.
    fn planned(&self) -> Vec<(u64, u64)> {
        let pins = self.pins();
        let source = Source {
            parts: &self.parts,
            page_bytes: self.page_bytes,
            pages: &self.pages,
            pins: &pins,
        };
        let (mut at, mut chunk, mut moved) = (Cursor::default(), Chunk::default(), Vec::new());
        while at.page < self.pages.len() {
            self.limits.plan(&source, at, &mut chunk);
            assert!(chunk.to > at, "a chunk goes on: {chunk:?}");
            assert_eq!(chunk.from, at);
            self.check_limits(&chunk, &pins);
            let before = moved.len();
            self.resolve(&chunk, &mut moved);
            assert_eq!(chunk.bytes, (moved.len() - before) as u64, "{chunk:?}");
            let done = at.page as u64 * self.page_bytes + at.offset + chunk.bytes;
            at = chunk.to;
            assert_eq!(
                done,
                at.page as u64 * self.page_bytes + at.offset,
                "{chunk:?}"
            );
        }
        moved
    }

    fn check_limits(&self, chunk: &Chunk, pins: &PinMap) {
        let limits = &self.limits;
        assert!(!chunk.copies.is_empty() && chunk.copies.len() <= limits.max_copies.max(1) + 1);
        if let Some(staged) = chunk.staged {
            assert!(chunk.bytes <= limits.staging_bytes, "{chunk:?}");
            assert!(staged.pages <= limits.max_pages);
        }
        if chunk.bounced {
            assert!(chunk.bytes <= limits.bounce_bytes, "{chunk:?}");
        } else {
            assert!(chunk.moves.is_empty());
            for copy in &chunk.copies {
                let range = pins.at(copy.host);
                assert!(range.pinned, "{chunk:?}");
                assert!(
                    copy.host + copy.bytes <= range.end,
                    "in one range: {chunk:?}"
                );
            }
        }
        if chunk.bytes > limits.chunk_bytes {
            assert!(chunk.bytes <= limits.long_bytes, "{chunk:?}");
            assert!(chunk.staged.is_none() && !chunk.bounced, "{chunk:?}");
            assert!(chunk.copies.len() <= limits.few_copies, "{chunk:?}");
        }
    }

    /// What a chunk moves, byte by byte.
    fn resolve(&self, chunk: &Chunk, moved: &mut Vec<(u64, u64)>) {
        // What lies where in the staging slot.
        let mut slot = vec![None; self.limits.staging_bytes as usize];
        if let Some(staged) = chunk.staged {
            let parts = &self.parts[staged.first_part..staged.first_part + staged.part_count];
            for number in 0..staged.pages {
                let page = self.pages[staged.first_page + number];
                for part in parts {
                    let piece = part.base + u64::from(page.block) * part.block_stride;
                    let at = number as u64 * staged.page_bytes + u64::from(part.page_offset)
                        - staged.page_offset;
                    for i in 0..u64::from(part.bytes) {
                        let place = &mut slot[(at + i) as usize];
                        assert!(place.replace(piece + i).is_none(), "twice in the slot");
                    }
                }
            }
        }
        let mut bounce = vec![None; self.limits.bounce_bytes as usize];
        for part in &chunk.moves {
            for i in 0..part.bytes {
                let place = &mut bounce[(part.bounce + i) as usize];
                assert!(
                    place.replace(part.pool + i).is_none(),
                    "twice in the buffer"
                );
            }
        }
        for copy in &chunk.copies {
            for i in 0..copy.bytes {
                let device = match chunk.staged {
                    Some(_) => slot[(copy.device + i) as usize]
                        .take()
                        .expect("gathered, once"),
                    None => copy.device + i,
                };
                let pool = match chunk.bounced {
                    true => bounce[(copy.host + i) as usize]
                        .take()
                        .expect("moved, once"),
                    false => copy.host + i,
                };
                moved.push((device, pool));
            }
        }
        assert!(slot.iter().all(Option::is_none), "left in the slot");
        assert!(bounce.iter().all(Option::is_none), "left in the buffer");
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    (
        (1u64..3000, 0u64..3000, 0usize..5),
        prop_oneof![Just(0u64), 1u64..2000],
        1u64..1500,
        1u64..600,
        1u64..200,
        (0usize..6, 1usize..12, 1usize..8),
    )
        .prop_map(
            |((chunk, longer, few_copies), staging, bounce, crossover, small_run, rest)| Limits {
                chunk_bytes: chunk,
                long_bytes: chunk + longer,
                few_copies,
                staging_bytes: staging,
                bounce_bytes: bounce,
                crossover_bytes: crossover,
                small_run_bytes: small_run,
                few: rest.0,
                max_copies: rest.1,
                max_pages: rest.2,
                max_direct_pages: usize::MAX,
            },
        )
}

/// Parts anywhere, pages in runs and out of order, a pool pinned in patches.
fn case() -> impl Strategy<Value = Case> {
    let parts = prop::collection::vec((1u32..300, 0u64..100), 1..6);
    let pages = prop::collection::vec((0usize..40, 0u32..40, any::<bool>()), 1..30);
    let pinned = prop::collection::vec(any::<bool>(), 1..5);
    (parts, pages, pinned, 1u64..4000, limits(), any::<bool>()).prop_map(
        |(shape, order, pinned, range_bytes, limits, layers_first)| {
            let page_bytes: u64 = shape.iter().map(|(bytes, _)| u64::from(*bytes)).sum();
            let (mut parts, mut page_offset, mut base) = (Vec::new(), 0, 1 << 32);
            for (bytes, gap) in &shape {
                let block_stride = if layers_first {
                    u64::from(*bytes) + gap
                } else {
                    page_bytes
                };
                parts.push(DevicePart {
                    base,
                    block_stride,
                    bytes: *bytes,
                    page_offset,
                });
                page_offset += bytes;
                base += if layers_first {
                    block_stride * 80
                } else {
                    u64::from(*bytes)
                };
            }
            // Each page of the pool and each block at most once, often one after the other.
            let (mut free_pages, mut free_blocks): (Vec<u64>, Vec<u32>) =
                ((0..40).collect(), (0..40).collect());
            let (mut page, mut block) = (0, 0);
            let mut pages = Vec::new();
            for (page_step, block_step, follows) in order {
                if !follows {
                    page = page_step;
                    block = block_step as usize;
                }
                page %= free_pages.len();
                block %= free_blocks.len();
                pages.push(PageCopy {
                    pool_offset: free_pages.remove(page) * page_bytes,
                    block: free_blocks.remove(block),
                    checksum: NO_CHECKSUM,
                });
            }
            Case {
                parts,
                page_bytes,
                pages,
                pool_bytes: 40 * page_bytes,
                // A page straddles two ranges at most.
                range_bytes: range_bytes + page_bytes,
                pinned,
                limits,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_byte_moves_exactly_once_between_its_two_places(case in case()) {
        let mut expected = case.expected();
        let mut planned = case.planned();
        expected.sort_unstable();
        planned.sort_unstable();
        prop_assert_eq!(planned, expected);
    }
}

fn pages(list: &[(u64, u32)]) -> Vec<PageCopy> {
    let page = |&(pool_offset, block)| PageCopy {
        pool_offset,
        block,
        checksum: NO_CHECKSUM,
    };
    list.iter().map(page).collect()
}

/// The first chunk of a task in a pinned pool, with the limits of a real device.
fn first_chunk(parts: &[DevicePart], page_bytes: u64, list: &[(u64, u32)]) -> Chunk {
    let pins = PinMap::new(1 << 40, 1 << 40);
    pins.set(0, true);
    let limits = Limits {
        chunk_bytes: 32 << 20,
        long_bytes: 64 << 20,
        few_copies: 64,
        staging_bytes: 32 << 20,
        bounce_bytes: 4 << 20,
        crossover_bytes: 256 << 10,
        small_run_bytes: 16 << 10,
        few: 4,
        max_copies: 2048,
        max_pages: 1 << 17,
        max_direct_pages: usize::MAX,
    };
    let mut chunk = Chunk::default();
    let source = Source {
        parts,
        page_bytes,
        pages: &pages(list),
        pins: &pins,
    };
    limits.plan(&source, Cursor::default(), &mut chunk);
    chunk
}

fn part(base: u64, block_stride: u64, bytes: u32, page_offset: u32) -> DevicePart {
    DevicePart {
        base,
        block_stride,
        bytes,
        page_offset,
    }
}

#[test]
fn large_pages_go_straight_and_neighbours_as_one() {
    let page = 2u64 << 20;
    let list: Vec<(u64, u32)> = [3, 4, 9].map(|n| (n * page, n as u32)).to_vec();
    let chunk = first_chunk(&[part(1 << 30, page, page as u32, 0)], page, &list);
    let bytes: Vec<u64> = chunk.copies.iter().map(|copy| copy.bytes).collect();
    assert_eq!(bytes, [2 * page, page]);
    assert!(chunk.staged.is_none() && !chunk.bounced);
}

#[test]
fn small_pieces_are_gathered_and_their_pages_go_as_one() {
    let layers = 64;
    let parts: Vec<DevicePart> = (0..layers)
        .map(|layer| part(u64::from(layer) << 30, 1024, 1024, layer * 1024))
        .collect();
    let page = u64::from(layers) * 1024;
    let list: Vec<(u64, u32)> = (0..100).map(|n| (n * page, 200 - n as u32)).collect();
    let chunk = first_chunk(&parts, page, &list);
    assert_eq!(chunk.staged.map(|staged| staged.pages), Some(100));
    assert_eq!((chunk.copies.len(), chunk.bounced), (1, false));
}

#[test]
fn small_pages_strewn_over_the_pool_go_through_the_bounce_buffer() {
    let parts = [part(0, 2048, 1024, 0), part(1 << 30, 1024, 1024, 1024)];
    let list: Vec<(u64, u32)> = (0..100).map(|n| (n * 4096, n as u32)).collect();
    let chunk = first_chunk(&parts, 2048, &list);
    assert!(chunk.bounced && chunk.staged.is_some());
    assert_eq!((chunk.copies.len(), chunk.moves.len()), (1, 100));
}

#[test]
fn one_small_block_is_one_copy() {
    let chunk = first_chunk(&[part(0, 4096, 1024, 0)], 1024, &[(8192, 5)]);
    assert!(chunk.staged.is_none());
    assert_eq!(chunk.copies.len(), 1);
}

#[test]
fn a_dense_run_of_small_blocks_is_one_copy() {
    let list: Vec<(u64, u32)> = (0..32768).map(|n| (n * 1024, n as u32)).collect();
    let chunk = first_chunk(&[part(0, 1024, 1024, 0)], 1024, &list);
    assert!(chunk.staged.is_none());
    assert_eq!((chunk.copies.len(), chunk.bytes), (1, 32 << 20));
}

#[test]
fn few_large_copies_make_a_long_chunk_and_many_do_not() {
    let large = 2 << 20;
    let list = |bytes: u64, apart: u64, count: u64| -> Vec<(u64, u32)> {
        (0..count)
            .map(|n| (n * (bytes + apart), n as u32))
            .collect()
    };
    let chunk = |bytes: u32, apart: u64| {
        let parts = [part(0, u64::from(bytes), bytes, 0)];
        first_chunk(
            &parts,
            u64::from(bytes),
            &list(u64::from(bytes), apart, 4096),
        )
    };
    let dense = chunk(large, 0);
    assert_eq!((dense.copies.len(), dense.bytes), (1, 64 << 20));
    let strewn = chunk(large, 4096);
    assert_eq!((strewn.copies.len(), strewn.bytes), (32, 64 << 20));
    let many = chunk(256 << 10, 4096);
    assert_eq!((many.copies.len(), many.bytes), (128, 32 << 20));
}
