use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rustix::fs::SealFlags;

use super::support::*;
use crate::copy::*;
use crate::layout::{GroupLayout, MemoryRef, SegmentLayout, ValidLayout};

const R0: MemoryRef = MemoryRef::Region(0);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_layouts_round_trip_and_touch_nothing_else(
        num_blocks in 1..6u32,
        sizes in prop::collection::vec((1..70u64, 0..9u64, 0..2u32), 1..6),
        large in prop::bool::ANY,
        seed in any::<u64>(),
    ) {
        // Alternately inside one stride of region 0 and each in a run of its own in region 1.
        let scale = if large { 777 } else { 1 };
        let stride: u64 = sizes.iter().map(|(bytes, gap, _)| bytes * scale + gap).sum();
        let (mut inside, mut apart, mut list) = (0, 5, Vec::new());
        for &(bytes, gap, memory) in &sizes {
            let own = (apart, bytes * scale);
            let (base, block_stride) = if memory == 0 { (inside, stride) } else { own };
            inside += bytes * scale + gap;
            apart += bytes * scale * u64::from(num_blocks) + gap;
            let memory = MemoryRef::Region(memory);
            list.push(SegmentLayout { memory, base, block_stride, bytes: bytes * scale });
        }
        let regions = [region(stride * u64::from(num_blocks)), region(apart + 3)];
        let page: u64 = sizes.iter().map(|(bytes, ..)| bytes * scale).sum();
        let pool_map = region(3 + page * u64::from(num_blocks));
        let before = [noise(regions[0].bytes(), seed), noise(regions[1].bytes(), seed ^ 1)];
        write(&regions[0], &before[0]);
        write(&regions[1], &before[1]);
        let target = bind(num_blocks, list.clone(), &regions, None);
        // Block b in page n-1-b when odd seed, in page b when even: runs and no runs.
        let place = |b: u32| if seed % 2 == 0 { b } else { num_blocks - 1 - b };
        let pages: Vec<_> = (0..num_blocks).map(|b| (3 + u64::from(place(b)) * page, b)).collect();
        let total = page * u64::from(num_blocks);

        let (result, done) = run(&pool(&pool_map), &task(Direction::Save, &target, &pages));
        prop_assert_eq!((result, done), (Ok(total), num_blocks));
        let saved = read(&pool_map);
        for &(offset, block) in &pages {
            let mut at = offset as usize;
            for s in &list {
                let MemoryRef::Region(r) = s.memory else { unreachable!() };
                let from = (s.base + u64::from(block) * s.block_stride) as usize;
                let bytes = s.bytes as usize;
                prop_assert_eq!(&saved[at..at + bytes], &before[r as usize][from..from + bytes]);
                at += bytes;
            }
        }
        prop_assert_eq!(&saved[..3], &[0; 3]);

        // Load into memory of all ones: the segments' bytes come back, the gaps stay.
        let mut expected = [vec![0xFF; before[0].len()], vec![0xFF; before[1].len()]];
        for s in &list {
            let MemoryRef::Region(r) = s.memory else { unreachable!() };
            for block in 0..u64::from(num_blocks) {
                let at = (s.base + block * s.block_stride) as usize;
                let range = at..at + s.bytes as usize;
                expected[r as usize][range.clone()].copy_from_slice(&before[r as usize][range]);
            }
        }
        for r in &regions {
            write(r, &vec![0xFF; r.bytes() as usize]);
        }
        let (result, done) = run(&pool(&pool_map), &task(Direction::Load, &target, &pages));
        prop_assert_eq!((result, done), (Ok(total), num_blocks));
        prop_assert_eq!(&read(&regions[0]), &expected[0]);
        prop_assert_eq!(&read(&regions[1]), &expected[1]);
        prop_assert_eq!(&read(&pool_map), &saved);
    }
}

#[test]
fn large_pages_and_long_runs_round_trip() {
    for (page, blocks) in [
        (2u64 << 20, 3u32),
        (1024, 5000),
        (16 << 10, 70),
        (65_537, 9),
    ] {
        let bytes = page * u64::from(blocks);
        let (memory, pool_map) = (region(bytes), region(bytes));
        let data = noise(bytes, page);
        write(&memory, &data);
        let target = bind(
            blocks,
            segments(R0, &[(0, page, page)]),
            std::slice::from_ref(&memory),
            None,
        );
        let pages: Vec<_> = (0..blocks).map(|b| (u64::from(b) * page, b)).collect();
        assert_eq!(
            run(&pool(&pool_map), &task(Direction::Save, &target, &pages)).0,
            Ok(bytes)
        );
        assert!(read(&pool_map) == data, "saved bytes differ");
        write(&memory, &vec![0; bytes as usize]);
        assert_eq!(
            run(&pool(&pool_map), &task(Direction::Load, &target, &pages)).0,
            Ok(bytes)
        );
        assert!(read(&memory) == data, "loaded bytes differ");
    }
}

#[test]
fn the_last_block_and_page_work_and_the_next_ones_are_refused_untouched() {
    let (memory, pool_map) = (region(64 * 10), region(64 * 4));
    write(&memory, &noise(640, 1));
    let pool = pool(&pool_map);
    let target = bind(
        10,
        segments(R0, &[(0, 64, 64)]),
        std::slice::from_ref(&memory),
        None,
    );
    assert_eq!(
        run(&pool, &task(Direction::Save, &target, &[(192, 9)])),
        (Ok(64), 1)
    );
    let saved = read(&pool_map);
    assert_eq!(saved[192..], read(&memory)[576..]);
    for (page, expected) in [
        (
            (0, 10),
            CopyError::BlockRange {
                block: 10,
                num_blocks: 10,
            },
        ),
        (
            (0, u32::MAX),
            CopyError::BlockRange {
                block: u32::MAX,
                num_blocks: 10,
            },
        ),
        (
            (193, 0),
            CopyError::PoolRange {
                page: 1,
                offset: 193,
                pool_bytes: 256,
            },
        ),
        (
            (256, 0),
            CopyError::PoolRange {
                page: 1,
                offset: 256,
                pool_bytes: 256,
            },
        ),
        (
            (u64::MAX, 0),
            CopyError::PoolRange {
                page: 1,
                offset: u64::MAX,
                pool_bytes: 256,
            },
        ),
    ] {
        let task = task(Direction::Save, &target, &[(0, 0), page]);
        assert_eq!(run(&pool, &task), (Err(expected), 0));
        assert_eq!(read(&pool_map), saved, "a refused task touches nothing");
    }
    assert_eq!(run(&pool, &task(Direction::Load, &target, &[])), (Ok(0), 0));
}

#[test]
fn a_cancelled_task_copies_nothing_more() {
    let (memory, pool_map) = (region(4096), region(4096));
    write(&memory, &noise(4096, 5));
    let target = bind(4, segments(R0, &[(0, 1024, 1000)]), &[memory], None);
    let task = task(Direction::Save, &target, &[(0, 0), (1024, 1)]);
    task.cancelled.store(true, Ordering::Relaxed);
    assert_eq!(run(&pool(&pool_map), &task), (Err(CopyError::Cancelled), 0));
    assert!(read(&pool_map).iter().all(|&b| b == 0));
}

#[test]
fn regions_that_could_crash_the_daemon_are_refused() {
    let map = |fd: &std::os::fd::OwnedFd, bytes| RegionMapping::map(fd.as_fd(), bytes);
    let open = memfd(4096, SealFlags::GROW);
    assert!(matches!(
        map(&open, 4096),
        Err(MemoryError::NotSealed { .. })
    ));
    let sealed = memfd(4096, SealFlags::SHRINK);
    assert!(matches!(map(&sealed, 0), Err(MemoryError::EmptyRegion)));
    assert!(matches!(
        map(&sealed, 4097),
        Err(MemoryError::RegionTooSmall {
            asked_bytes: 4097,
            file_bytes: 4096
        })
    ));
    let write_sealed = memfd(4096, SealFlags::SHRINK | SealFlags::WRITE);
    assert!(matches!(
        map(&write_sealed, 4096),
        Err(MemoryError::Region { call: "mmap", .. })
    ));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(matches!(
        map(&pipe, 4096),
        Err(MemoryError::NotTmpfs { .. })
    ));
}

#[test]
fn a_layout_binds_only_to_memory_it_fits() {
    let layout = GroupLayout {
        group: 0,
        num_blocks: 4,
        segments: segments(R0, &[(0, 64, 64)]),
        replicated: false,
    };
    let valid = std::sync::Arc::new(ValidLayout::new(&layout, |_| Some(256)).unwrap());
    let bind = |memory: Option<ClientMemory>| BoundLayout::bind(valid.clone(), |_| memory.clone());
    assert!(matches!(
        bind(None),
        Err(BindError::Missing { part: 0, .. })
    ));
    let short = Some(ClientMemory::Region(region(255)));
    assert!(matches!(
        bind(short),
        Err(BindError::OutOfRange { end: 256, .. })
    ));
    let other = Some(ClientMemory::Process(Child::fork().memory()));
    assert!(matches!(bind(other), Err(BindError::WrongKind { .. })));
}

#[test]
fn neighbours_on_one_side_only_are_no_run() {
    const BLOCKS: u32 = 64;
    let bytes = u64::from(BLOCKS) * 512;
    let data = noise(bytes, 11);
    // Steps that wrap around: 1 and 1 is one run, the others join pages or blocks but not both.
    for (page_step, block_step) in [(1, 1), (1, 5), (5, 1), (1, 63), (63, 1), (3, 3), (7, 9)] {
        let (memory, pool_map) = (region(bytes), region(bytes));
        write(&memory, &data);
        let list = segments(R0, &[(0, 512, 512)]);
        let target = bind(BLOCKS, list, std::slice::from_ref(&memory), None);
        let page = |i: u32| {
            (
                u64::from(i * page_step % BLOCKS) * 512,
                i * block_step % BLOCKS,
            )
        };
        let pages: Vec<_> = (0..BLOCKS).map(page).collect();
        assert_eq!(
            run(&pool(&pool_map), &task(Direction::Save, &target, &pages)).0,
            Ok(bytes)
        );
        let saved = read(&pool_map);
        for (offset, block) in pages {
            let from = block as usize * 512;
            let page = &saved[offset as usize..offset as usize + 512];
            assert_eq!(
                page,
                &data[from..from + 512],
                "steps {page_step} and {block_step}"
            );
        }
    }
}
