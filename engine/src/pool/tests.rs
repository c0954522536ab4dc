//! The allocator against a model, and its corner cases.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;

use super::*;

const EXTENT: u64 = 64 << 10;

fn pool(extents: u64) -> Pool {
    Pool::new(extents * EXTENT, EXTENT).expect("the geometry is good")
}

fn alloc(pool: &mut Pool, page_bytes: u32) -> u64 {
    pool.alloc(page_bytes, None)
        .expect("there is room")
        .addr
        .offset()
}

#[test]
fn pages_are_rounded_to_cache_lines_and_never_smaller_than_512_bytes() {
    assert_eq!(
        [1, 512, 513, 576, 4096].map(round_page),
        [512, 512, 576, 576, 4096]
    );
}

#[test]
fn a_page_that_fits_no_extent_is_refused_with_the_way_out() {
    let pool = pool(2);
    let error = pool.check_page(EXTENT + 1).expect_err("too large");
    assert_eq!(
        error,
        PoolError::PageTooLarge {
            page_bytes: EXTENT + 1,
            extent_bytes: EXTENT
        }
    );
    assert!(error.to_string().contains("raise --extent-size"), "{error}");
    assert_eq!(pool.check_page(u64::MAX).map_err(|_| ()), Err(()));
    assert_eq!(pool.check_page(EXTENT), Ok(EXTENT as u32));
    assert_eq!(pool.check_page(0), Err(PoolError::PageEmpty));
}

#[test]
fn geometry_that_cannot_work_is_refused() {
    for (pool_bytes, extent_bytes) in [
        (0, 4096),
        (4096, 0),
        (8192, 1000),
        (10_000, 4096),
        (1 << 40, 4 << 30),
        (u64::MAX, 4096),
        (4096, 8192),
    ] {
        assert!(
            Pool::new(pool_bytes, extent_bytes).is_err(),
            "{pool_bytes} / {extent_bytes}"
        );
    }
}

#[test]
fn consecutive_allocations_lie_side_by_side_across_extents_too() {
    let mut pool = pool(4);
    let addrs: Vec<u64> = (0..32).map(|_| alloc(&mut pool, 4096)).collect();
    let expected: Vec<u64> = (0..32).map(|at| at * 4096).collect();
    assert_eq!(addrs, expected);
}

#[test]
fn the_first_page_of_an_extent_says_so_and_the_last_freed_gives_it_back() {
    let mut pool = pool(2);
    let first = pool.alloc(20_000, None).expect("room");
    assert_eq!(first.opened, Some(0));
    let second = pool.alloc(20_000, None).expect("room");
    assert_eq!(second.opened, None);
    assert_eq!(pool.free_extents(), 1);
    assert_eq!(pool.free(first.addr).expect("allocated").emptied, None);
    let freed = pool.free(second.addr).expect("allocated");
    assert_eq!((freed.emptied, freed.page_bytes), (Some(0), 20_032));
    assert_eq!((pool.free_extents(), pool.free_bytes()), (2, 2 * EXTENT));
}

#[test]
fn sizes_share_the_pool_by_whole_extents() {
    let mut pool = pool(2);
    alloc(&mut pool, 4096);
    alloc(&mut pool, 8192);
    assert_eq!(pool.available(4096), 15);
    assert_eq!(pool.available(8192), 7);
    assert_eq!(pool.available(16_384), 0);
    assert!(pool.alloc(16_384, None).is_none());
    let stats = pool.stats();
    assert_eq!(stats.classes.len(), 2);
    assert_eq!(
        (stats.used_bytes, stats.free_bytes),
        (12_288, 2 * EXTENT - 12_288)
    );
}

#[test]
fn wrong_frees_are_named_and_change_nothing() {
    let mut pool = pool(2);
    let addr = pool.alloc(4096, None).expect("room").addr;
    let keep = pool.alloc(4096, None).expect("room").addr;
    let at = PageAddr::from_offset;
    pool.free(addr).expect("allocated");
    let before = pool.stats();
    assert_eq!(pool.free(addr), Err(PoolError::NotAllocated { addr }));
    assert_eq!(
        pool.free(at(1)),
        Err(PoolError::NotAPage {
            addr: at(1),
            page_bytes: 4096
        })
    );
    assert_eq!(
        pool.free(at(EXTENT)),
        Err(PoolError::NotAllocated { addr: at(EXTENT) })
    );
    for outside in [2 * EXTENT, u64::MAX] {
        let addr = at(outside);
        assert_eq!(
            pool.free(addr),
            Err(PoolError::OutsidePool {
                addr,
                pool_bytes: 2 * EXTENT
            })
        );
    }
    assert_eq!(pool.stats(), before);
    assert_eq!(pool.page_bytes_of(keep), Ok(4096));
    assert_eq!(
        pool.page_bytes_of(addr),
        Err(PoolError::NotAllocated { addr })
    );
}

#[test]
fn a_draining_extent_hands_out_nothing_and_serves_another_size_once_empty() {
    let mut pool = pool(1);
    let kept: Vec<_> = (0..3)
        .map(|_| pool.alloc(4096, None).expect("room").addr)
        .collect();
    pool.drain(0).expect("in use");
    assert_eq!(pool.available(4096), 0);
    assert!(pool.alloc(4096, None).is_none());
    assert_eq!(pool.live_pages(0).collect::<Vec<_>>(), kept);
    pool.undrain(0).expect("in use");
    assert_eq!(alloc(&mut pool, 4096), 3 * 4096);
    pool.drain(0).expect("in use");
    for addr in pool.live_pages(0).collect::<Vec<_>>() {
        pool.free(addr).expect("allocated");
    }
    assert_eq!(pool.page_bytes_of_extent(0), None);
    assert_eq!(pool.drain(0), Err(PoolError::ExtentNotInUse { extent: 0 }));
    assert_eq!(alloc(&mut pool, 8192), 0);
}

#[test]
fn claimed_pages_are_allocated_and_the_gaps_between_them_are_not() {
    let mut pool = pool(3);
    let at = PageAddr::from_offset;
    pool.claim(at(EXTENT + 4096), 4096).expect("free");
    pool.claim(at(EXTENT + 12_288), 4096).expect("free");
    let twice = at(EXTENT + 4096);
    assert_eq!(
        pool.claim(twice, 4096),
        Err(PoolError::AlreadyAllocated { addr: twice })
    );
    assert!(matches!(
        pool.claim(at(EXTENT), 8192),
        Err(PoolError::OtherClass { .. })
    ));
    assert!(matches!(
        pool.claim(at(100), 4096),
        Err(PoolError::NotAPage { .. })
    ));
    assert!(matches!(
        pool.claim(at(3 * EXTENT), 4096),
        Err(PoolError::OutsidePool { .. })
    ));
    assert!(matches!(
        pool.claim(at(0), 100),
        Err(PoolError::NotAPage { .. })
    ));
    assert!(matches!(
        pool.claim(at(2 * 40_000), 40_000),
        Err(PoolError::NotAPage { .. })
    ));
    let next: Vec<u64> = (0..3).map(|_| alloc(&mut pool, 4096) - EXTENT).collect();
    assert_eq!(next, [0, 8192, 16_384]);
}

#[test]
fn a_vacant_class_is_used_again_for_another_size() {
    let mut pool = pool(1);
    for round in 0..1000_u32 {
        let page = pool
            .alloc(512 + 64 * (round % 50), None)
            .expect("room")
            .addr;
        assert_eq!(pool.free(page).expect("allocated").emptied, Some(0));
    }
    assert!(pool.stats().classes.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(u32, Option<u32>),
    Free(prop::sample::Index),
    Drain(u32),
    Undrain(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![
        Just(4096),
        Just(8192),
        Just(20_000),
        Just(65_536),
        1..70_000_u32
    ];
    let near = prop_oneof![Just(None), Just(Some(0)), Just(Some(3)), Just(Some(9))];
    prop_oneof![
        6 => (size, near).prop_map(|(bytes, near)| Step::Alloc(bytes, near)),
        5 => any::<prop::sample::Index>().prop_map(Step::Free),
        1 => (0..6_u32).prop_map(Step::Drain),
        1 => (0..6_u32).prop_map(Step::Undrain),
    ]
}

/// No two pages overlap, sums are exact, and the pages of each extent are those handed out there.
fn check(pool: &Pool, live: &BTreeMap<u64, u32>) {
    let mut end = 0;
    for (addr, page_bytes) in live {
        assert!(*addr >= end, "pages overlap at {addr}");
        end = addr + u64::from(*page_bytes);
        assert_eq!(
            pool.page_bytes_of(PageAddr::from_offset(*addr)),
            Ok(*page_bytes)
        );
        assert_eq!(
            addr / EXTENT,
            (end - 1) / EXTENT,
            "a page crosses its extent's end"
        );
    }
    assert!(end <= pool.pool_bytes());
    let listed: BTreeSet<u64> = (0..6)
        .flat_map(|extent| pool.live_pages(extent))
        .map(PageAddr::offset)
        .collect();
    assert_eq!(listed, live.keys().copied().collect());
    let stats = pool.stats();
    assert_eq!(
        stats.used_bytes,
        live.values().map(|bytes| u64::from(*bytes)).sum::<u64>()
    );
    let in_classes: u32 = stats.classes.iter().map(|class| class.extents).sum();
    assert_eq!(in_classes + stats.extents_free, stats.extents);
    for class in &stats.classes {
        let per_extent = EXTENT / u64::from(class.page_bytes);
        assert_eq!(
            class.pages_used + class.pages_free,
            per_extent * u64::from(class.extents)
        );
    }
}

proptest! {
    #[test]
    fn pages_never_overlap_and_nothing_is_lost(
        steps in prop::collection::vec(step(), 0..200),
        cut in prop::sample::select(vec![&[][..], &[(0, 0..6)], &[(0, 0..2), (3, 2..6)]]),
    ) {
        let mut pool = parted(6, cut);
        let mut live = BTreeMap::new();
        let mut draining = BTreeSet::new();
        for step in steps {
            match step {
                Step::Alloc(bytes, near) => {
                    let available = pool.available(bytes);
                    let page = pool.alloc(bytes, near);
                    assert_eq!(page.is_some(), available > 0);
                    if let Some(page) = page {
                        let extent = pool.extent_of(page.addr).expect("inside");
                        assert!(!draining.contains(&extent));
                        live.insert(page.addr.offset(), round_page(bytes.into()) as u32);
                        assert_eq!(pool.available(bytes), available - 1);
                    }
                }
                Step::Free(index) if !live.is_empty() => {
                    let addr = *live.keys().nth(index.index(live.len())).expect("in range");
                    live.remove(&addr);
                    let freed = pool.free(PageAddr::from_offset(addr)).expect("allocated");
                    if let Some(extent) = freed.emptied {
                        draining.remove(&extent);
                    }
                }
                Step::Free(_) => {}
                Step::Drain(extent) => {
                    if pool.drain(extent).is_ok() {
                        draining.insert(extent);
                    }
                }
                Step::Undrain(extent) => {
                    if pool.undrain(extent).is_ok() {
                        draining.remove(&extent);
                    }
                }
            }
            check(&pool, &live);
        }
        let mut copy = Pool::new(pool.pool_bytes(), EXTENT).expect("the geometry is good");
        for (addr, page_bytes) in &live {
            copy.claim(PageAddr::from_offset(*addr), *page_bytes).expect("one owner per page");
        }
        check(&copy, &live);
        for addr in live.keys() {
            pool.free(PageAddr::from_offset(*addr)).expect("allocated");
        }
        assert_eq!((pool.free_bytes(), pool.free_extents()), (pool.pool_bytes(), 6));
    }
}

/// A pool in parts, each of a memory node and its extents.
fn parted(extents: u32, parts: &[(u32, Range<u32>)]) -> Pool {
    let part = |(node, extents): &(u32, Range<u32>)| NodePart {
        node: *node,
        extents: extents.clone(),
        cpus: Vec::new(),
    };
    let cut = |count| {
        assert_eq!(count, extents);
        parts.iter().map(part).collect()
    };
    Pool::with_parts(u64::from(extents) * EXTENT, EXTENT, cut).expect("sizes that fit")
}

/// Two parts of two extents each, near the memory nodes 0 and 3.
fn cut_pool() -> Pool {
    parted(4, &[(0, 0..2), (3, 2..4)])
}

#[test]
fn pages_come_from_the_part_that_is_near_as_long_as_it_has_some_and_else_say_so() {
    let mut pool = cut_pool();
    let per_extent = EXTENT / 8192;
    let mut take = |near| {
        let page = pool.alloc(8192, near).expect("room");
        (page.addr.offset() / EXTENT, page.is_far)
    };
    assert_eq!(take(Some(3)), (2, false));
    assert_eq!(take(Some(0)), (0, false), "each part fills one of its own");
    assert_eq!(take(Some(7)), (0, false), "no such node: anywhere is near");
    assert_eq!(take(None), (0, false));
    for _ in 1..2 * per_extent {
        assert!(matches!(take(Some(3)), (2 | 3, false)));
    }
    assert_eq!(take(Some(3)), (0, true), "its part is full");
    for _ in 4..2 * per_extent {
        assert!(matches!(take(Some(0)), (0 | 1, false)));
    }
    assert!(pool.alloc(8192, Some(3)).is_none());
    assert!(pool.alloc(8192, None).is_none());
    let freed = PageAddr::from_offset(3 * EXTENT);
    pool.free(freed).expect("allocated");
    let page = pool.alloc(8192, Some(0)).expect("one is free");
    assert_eq!((page.addr, page.is_far), (freed, true));
}

#[test]
fn an_emptied_extent_goes_back_to_its_own_part() {
    let mut pool = cut_pool();
    let first = pool.alloc(4096, Some(3)).expect("room").addr;
    assert_eq!(pool.free(first).expect("allocated").emptied, Some(2));
    assert_eq!(pool.free_extents(), 4);
    let other = pool.alloc(16_384, Some(3)).expect("room");
    assert_eq!((other.opened, other.is_far), (Some(2), false));
    pool.claim(PageAddr::from_offset(3 * EXTENT), 4096)
        .expect("of a previous daemon");
    let beside = pool.alloc(4096, Some(3)).expect("room").addr;
    assert_eq!(beside.offset(), 3 * EXTENT + 4096);
}
