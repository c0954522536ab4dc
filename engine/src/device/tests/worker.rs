//! The thread's work, turn by turn: bytes, turns, waits, cancellations and faults.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fake::{ILLEGAL_ADDRESS, Pace, uuid};
use super::rig::*;
use crate::copy::*;
use crate::device::card::DeviceNews;
use crate::device::worker::Wait;
use crate::device::{DeviceOptions, Devices, ShareHandle};

fn options() -> DeviceOptions {
    DeviceOptions {
        staging_bytes: 1 << 20,
        crossover_bytes: 4096,
        ..DeviceOptions::default()
    }
}

/// Layouts with K and V apart, layers first, blocks first, padded, unaligned, of large pieces.
const LAYOUTS: [&[(u64, u64, u64)]; 6] = [
    &[(0, 1024, 1024)],
    &[
        (0, 512, 512),
        (65536, 512, 512),
        (131_072, 512, 512),
        (196_608, 512, 512),
    ],
    &[(0, 3000, 700), (700, 3000, 1300)],
    &[(1, 777, 333), (100_000, 1001, 7)],
    &[(0, 16384, 16384)],
    &[(0, 16384, 4096), (4096, 16384, 12288)],
];

fn page_bytes(segments: &[(u64, u64, u64)]) -> u64 {
    segments.iter().map(|(_, _, bytes)| bytes).sum()
}

#[test]
fn what_is_saved_from_one_engine_is_loaded_into_another() {
    for (number, segments) in LAYOUTS.iter().enumerate() {
        for pinned in [true, false] {
            for (staging_bytes, apart) in [(1 << 20, 0), (1 << 20, 64), (0, 0), (2 << 20, 20_000)] {
                let options = DeviceOptions {
                    staging_bytes,
                    ..options()
                };
                let mut rig = Rig::new(options, pinned);
                let (from, to) = (rig.engine(1 << 20), rig.engine(1 << 20));
                from.write(&noise(number as u64, from.bytes));
                let (source, target) = (bind(&from, 60, segments), bind(&to, 60, segments));
                let page = page_bytes(segments) + apart;
                let list: Vec<(u64, u32)> =
                    (0..40).map(|n| (n * page, (n as u32 * 7) % 60)).collect();
                rig.submit(task(1, Direction::Save, &source, &list));
                let saved = rig.finish(1);
                let bytes = 40 * page_bytes(segments);
                assert_eq!((&saved[0].result, saved[0].pages_done), (&Ok(bytes), 40));
                rig.submit(task(2, Direction::Load, &target, &list));
                assert_eq!(rig.finish(1)[0].result, Ok(bytes));
                let mut expected = vec![0; to.bytes];
                let original = from.read();
                for (_, block) in &list {
                    for (base, stride, bytes) in *segments {
                        let at = (base + u64::from(*block) * stride) as usize;
                        let piece = at..at + *bytes as usize;
                        expected[piece.clone()].copy_from_slice(&original[piece]);
                    }
                }
                assert!(
                    to.read() == expected,
                    "layout {number}, pinned {pinned}, {apart}"
                );
            }
        }
    }
}

#[test]
fn small_pieces_go_through_kernels_and_large_ones_do_not() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    for (layout, kernels) in [(LAYOUTS[1], 1), (LAYOUTS[4], 1)] {
        let target = bind(&engine, 40, layout);
        let list: Vec<(u64, u32)> = (0..40)
            .map(|n| (n * page_bytes(layout), 39 - n as u32))
            .collect();
        rig.submit(task(1, Direction::Save, &target, &list));
        rig.finish(1);
        assert_eq!(rig.driver.kernels(), kernels);
    }
}

/// Forty pages whose pieces go directly, in chunks of one page.
fn long_task(rig: &Rig, engine: &Engine, session: u64, direction: Direction) -> CopyTask {
    let target = bind(engine, 40, &[(0, 16384, 16384)]);
    let list: Vec<(u64, u32)> = (0..40).map(|n| (n * 16384, n as u32)).collect();
    let _ = rig;
    task(session, direction, &target, &list)
}

#[test]
fn a_cancelled_task_comes_back_only_when_its_chunks_are_done() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    let save = long_task(&rig, &engine, 1, Direction::Save);
    let cancelled = save.cancelled.clone();
    rig.driver.set_pace(Pace::Held);
    rig.submit(save);
    rig.turn_many(3);
    assert!(rig.driver.pending() > 0);
    cancelled.store(true, Ordering::Relaxed);
    rig.turn_many(10);
    assert!(rig.done().is_empty(), "its chunks are under way");
    rig.driver.set_pace(Pace::Looked);
    let done = rig.finish(1);
    assert_eq!(rig.driver.pending(), 0);
    // All of it was in the first chunk.
    assert_eq!(done[0].result, Ok(40 * 16384));
}

#[test]
fn a_task_cancelled_before_its_turn_copies_nothing() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    engine.write(&noise(3, engine.bytes));
    let save = long_task(&rig, &engine, 1, Direction::Save);
    save.cancelled.store(true, Ordering::Relaxed);
    rig.submit(save);
    let done = rig.finish(1);
    assert_eq!(
        (&done[0].result, done[0].pages_done),
        (&Err(CopyError::Cancelled), 0)
    );
    assert!(rig.pool_bytes().iter().all(|byte| *byte == 0));
}

#[test]
fn an_event_that_never_happens_holds_up_its_session_alone() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    let handle = rig.driver.export_event();
    let events = rig.events(&[handle]);
    let mut waits = long_task(&rig, &engine, 1, Direction::Save);
    waits.after = after(&events, 0);
    rig.submit(waits);
    rig.submit(long_task(&rig, &engine, 1, Direction::Save));
    rig.submit(long_task(&rig, &engine, 2, Direction::Save));
    let done = rig.finish(1);
    assert_eq!(done[0].tag, 2);
    rig.turn_many(100);
    assert!(rig.done().is_empty(), "the first session waits");
    let wait = rig.turn().unwrap();
    assert!(
        matches!(wait, Wait::No)
            || matches!(wait, Wait::For(time) if time < Duration::from_millis(1)),
        "{wait:?}"
    );
    let worker = rig.worker.as_ref().unwrap();
    let stuck = worker.stuck(
        Instant::now() + Duration::from_secs(9),
        Duration::from_secs(5),
    );
    assert_eq!(
        stuck,
        [StuckCopies {
            session: 1,
            tasks: 2
        }]
    );
    rig.driver.happen(&handle);
    std::thread::sleep(Duration::from_millis(1));
    let done = rig.finish(2);
    assert!(done.iter().all(|done| done.tag == 1 && done.result.is_ok()));
}

#[test]
fn a_task_whose_event_never_happens_can_be_cancelled_and_does_not_hold_up_the_stop() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    let events = rig.events(&[rig.driver.export_event()]);
    for cancels in [true, false] {
        let mut save = long_task(&rig, &engine, 1, Direction::Save);
        save.after = after(&events, 0);
        let cancelled = save.cancelled.clone();
        rig.submit(save);
        rig.turn_many(2);
        if cancels {
            cancelled.store(true, Ordering::Relaxed);
        } else {
            rig.worker.as_mut().unwrap().cancel_waiting();
        }
        assert_eq!(rig.finish(1)[0].result, Err(CopyError::Cancelled));
        assert!(rig.worker.as_ref().unwrap().is_idle());
    }
}

#[test]
fn sessions_take_turns_and_both_directions_run_at_once() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    rig.driver.set_pace(Pace::Held);
    for session in [1, 1, 1, 2] {
        rig.submit(long_task(&rig, &engine, session, Direction::Load));
    }
    rig.submit(long_task(&rig, &engine, 3, Direction::Save));
    rig.turn().unwrap();
    rig.driver.set_pace(Pace::Looked);
    let order: Vec<u64> = rig.finish(5).iter().map(|done| done.tag).collect();
    let second = order.iter().position(|tag| *tag == 2).unwrap();
    let save = order.iter().position(|tag| *tag == 3).unwrap();
    assert!(second < 3 && save < 4, "{order:?}");
}

#[test]
fn what_lies_outside_the_pool_ends_a_long_list_before_it_is_touched() {
    const BYTES: u64 = 512;
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(4 << 20);
    let target = bind(&engine, 8000, &[(0, BYTES, BYTES)]);
    // Behind the pages that are looked at before the first chunk.
    for (bad, wrong) in [
        (5000, (POOL_BYTES as u64 - BYTES + 1, 5000)),
        (5000, (0, 8000)),
        (0, (u64::MAX, 0)),
    ] {
        engine.write(&noise(bad, engine.bytes));
        let before = rig.pool_bytes();
        let mut list: Vec<(u64, u32)> = (0..8000).map(|n| (n * BYTES, n as u32)).collect();
        list[bad as usize] = wrong;
        rig.submit(task(1, Direction::Save, &target, &list));
        let done = &rig.finish(1)[0];
        assert!(
            matches!(
                done.result,
                Err(CopyError::PoolRange { page, .. }) if page as u64 == bad
            ) || matches!(done.result, Err(CopyError::BlockRange { block: 8000, .. })),
            "{done:?}"
        );
        let pages_done = u64::from(done.pages_done);
        assert!(
            pages_done <= bad && (bad == 0 || pages_done > 0),
            "{pages_done}"
        );
        let (after, end) = (rig.pool_bytes(), (pages_done * BYTES) as usize);
        assert!(after[..end] == engine.read()[..end]);
        assert!(
            after[end..] == before[end..],
            "nothing behind {pages_done} pages"
        );
    }
}

#[test]
fn a_page_that_has_changed_ends_a_long_load_before_it() {
    const BYTES: u64 = 512;
    let mut rig = Rig::new(options(), true);
    let (from, to) = (rig.engine(4 << 20), rig.engine(4 << 20));
    from.write(&noise(7, from.bytes));
    let segments = [(0, BYTES, BYTES)];
    let (source, target) = (bind(&from, 8000, &segments), bind(&to, 8000, &segments));
    let list: Vec<(u64, u32)> = (0..8000).map(|n| (n * BYTES, n as u32)).collect();
    let mut save = task(1, Direction::Save, &source, &list);
    for page in &mut save.pages {
        page.checksum = TAKE_CHECKSUM;
    }
    rig.submit(save);
    let saved = rig.finish(1).remove(0);
    assert_eq!(saved.pages_done, 8000);
    for bad in [0, 1, 3000, 7999] {
        let mut load = task(2, Direction::Load, &target, &list);
        load.pages.clone_from(&saved.pages);
        load.pages[bad].checksum ^= 2;
        to.write(&vec![0; to.bytes]);
        rig.submit(load);
        let done = &rig.finish(1)[0];
        assert_eq!(done.pages_done as usize, bad);
        assert!(
            matches!(done.result, Err(CopyError::Checksum { .. })),
            "{done:?}"
        );
        let end = bad * BYTES as usize;
        let loaded = to.read();
        assert!(loaded[..end] == from.read()[..end]);
        assert!(
            loaded[end..].iter().all(|byte| *byte == 0),
            "nothing from {bad} on"
        );
    }
}

#[test]
fn a_copy_that_the_driver_refuses_fails_its_task_once_the_rest_has_drained() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    let target = bind(&engine, 40, &[(0, 20000, 16384)]);
    let list: Vec<(u64, u32)> = (0..40).map(|n| (n * 16384, n as u32)).collect();
    rig.driver.fail_copy_in(5);
    rig.driver.set_pace(Pace::Held);
    rig.submit(task(1, Direction::Save, &target, &list));
    rig.turn_many(5);
    assert!(rig.done().is_empty() && rig.driver.pending() > 0);
    rig.driver.set_pace(Pace::Looked);
    let done = rig.finish(1);
    assert!(
        matches!(&done[0].result, Err(CopyError::Device { device, .. }) if *device == uuid()),
        "{:?}",
        done[0].result
    );
    assert_eq!((done[0].pages_done, rig.driver.pending()), (0, 0));
}

#[test]
fn a_sticky_error_ends_all_tasks_tells_it_and_a_new_context_serves_new_memory() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    rig.driver.set_pace(Pace::Held);
    for session in 1..4 {
        rig.submit(long_task(&rig, &engine, session, Direction::Save));
    }
    rig.turn_many(2);
    rig.driver.break_context(ILLEGAL_ADDRESS);
    let error = rig.turn().expect_err("the context is broken");
    assert!(error.is_sticky());
    rig.worker.take().unwrap().give_up(error);
    assert_eq!(
        rig.driver.pending(),
        0,
        "nothing runs any more when tasks come back"
    );
    let done = rig.done();
    assert_eq!(done.len(), 3);
    assert!(
        done.iter()
            .all(|done| done.result.is_err() && done.pages_done == 0)
    );
    let bytes = 64;
    let refused = rig.devices.import(uuid(), bytes, ShareHandle::Ipc([0; 64]));
    assert!(refused.unwrap_err().to_string().contains("is down"));

    let (context, generation) = rig.card().reopen().unwrap();
    drop(context);
    rig.make_worker();
    rig.card().come_up(generation);
    assert_eq!(
        rig.news(),
        [
            DeviceNews::Down {
                device: uuid(),
                message: format!("GPU {} failed: {error}", uuid()),
            },
            DeviceNews::Up { device: uuid() },
        ]
    );
    rig.driver.set_pace(Pace::Looked);
    rig.submit(long_task(&rig, &engine, 1, Direction::Save));
    let void = rig.finish(1);
    assert_eq!(
        void[0].result,
        Err(CopyError::DeviceReset { device: uuid() })
    );
    let fresh = rig.engine(1 << 20);
    rig.submit(long_task(&rig, &fresh, 1, Direction::Save));
    assert!(rig.finish(1)[0].result.is_ok());
}

#[test]
fn an_allocation_is_mapped_once_and_unmapped_when_the_last_handle_goes() {
    let rig = Rig::new(options(), true);
    let (handle, _) = rig.driver.export(4096);
    let before = wait_for_mapped(&rig, 0);
    let import = || {
        rig.devices
            .import(uuid(), 4096, ShareHandle::Ipc(handle))
            .unwrap()
    };
    let (first, second) = (import(), import());
    assert_eq!(rig.driver.mapped(), before + 1);
    drop(first);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(rig.driver.mapped(), before + 1);
    drop(second);
    wait_for_mapped(&rig, before);
}

/// The engine of the rig itself has gone already, or is about to.
fn wait_for_mapped(rig: &Rig, count: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.driver.mapped() > count {
        assert!(Instant::now() < deadline, "memory stays mapped");
        std::thread::sleep(Duration::from_millis(1));
    }
    count
}

#[test]
fn more_than_the_allocation_has_is_refused() {
    let rig = Rig::new(options(), true);
    let (handle, _) = rig.driver.export(4096);
    let refused = rig.devices.import(uuid(), 4097, ShareHandle::Ipc(handle));
    assert!(refused.unwrap_err().to_string().contains("4097"));
}

#[test]
fn a_page_whose_checksum_is_wrong_ends_the_load_before_it() {
    let mut rig = Rig::new(options(), true);
    let engine = rig.engine(1 << 20);
    engine.write(&noise(5, engine.bytes));
    let mut save = long_task(&rig, &engine, 1, Direction::Save);
    save.pages
        .iter_mut()
        .for_each(|page| page.checksum = TAKE_CHECKSUM);
    rig.submit(save);
    let saved = rig.finish(1);
    let target = rig.engine(1 << 20);
    let mut load = long_task(&rig, &target, 2, Direction::Load);
    load.pages.clone_from(&saved[0].pages);
    load.pages[3].checksum ^= 2;
    rig.submit(load);
    let done = rig.finish(1);
    assert_eq!(done[0].pages_done, 3);
    assert!(matches!(done[0].result, Err(CopyError::Checksum { .. })));
    let loaded = target.read();
    assert_eq!(loaded[..3 * 16384], engine.read()[..3 * 16384]);
    assert!(loaded[3 * 16384..].iter().all(|byte| *byte == 0));
}

/// Copies of 4 MiB under way, with both slots of a direction taken.
fn copies_of_two_chunks(rig: &mut Rig) -> usize {
    rig.turn_many(4);
    // Behind each chunk there is its event.
    rig.driver.pending() - 2
}

#[test]
fn a_save_that_no_other_waits_for_goes_in_longer_chunks_than_a_load_or_several() {
    const PAGE: usize = 4 << 20;
    // Twice the longest chunk, over one page, which is all that the lists can name here.
    let list = [(0, 0); 200];
    let chunk_of = |directions: &[Direction]| {
        let mut rig = Rig::with_ranges(options(), true, POOL_BYTES as u64);
        let engine = rig.engine(PAGE);
        let target = bind(&engine, 1, &[(0, PAGE as u64, PAGE as u64)]);
        rig.driver.set_pace(Pace::Held);
        let mut cancelled = Vec::new();
        for (session, direction) in directions.iter().enumerate() {
            let copies = task(session as u64, *direction, &target, &list);
            cancelled.push(copies.cancelled.clone());
            rig.submit(copies);
        }
        let copies = copies_of_two_chunks(&mut rig);
        assert!(copies.is_multiple_of(2), "both chunks are alike");
        // What has begun ends, and nothing more.
        cancelled
            .iter()
            .for_each(|task| task.store(true, Ordering::Relaxed));
        rig.driver.set_pace(Pace::Looked);
        let done = rig.finish(directions.len());
        let pages: u32 = done.iter().map(|done| done.pages_done).sum();
        assert_eq!(pages as usize * PAGE, copies * PAGE);
        (copies / 2 * PAGE) >> 20
    };
    assert_eq!(chunk_of(&[Direction::Save]), 256);
    assert_eq!(chunk_of(&[Direction::Load]), 64);
    assert_eq!(chunk_of(&[Direction::Save; 2]), 32);
    assert_eq!(chunk_of(&[Direction::Load; 2]), 32);
}

#[test]
fn on_a_slow_bus_chunks_are_shorter() {
    const PAGE: usize = 4 << 20;
    let mut rig = Rig::with_ranges(options(), true, POOL_BYTES as u64);
    let engine = rig.engine(PAGE);
    let target = bind(&engine, 1, &[(0, PAGE as u64, PAGE as u64)]);
    let list = [(0, 0); 128];
    let chunk = (0..100).find_map(|_| {
        // Copied by this process, a page for each look: far below any bus.
        rig.submit(task(1, Direction::Save, &target, &list[..64]));
        rig.finish(1);
        rig.driver.set_pace(Pace::Held);
        let copies = task(1, Direction::Save, &target, &list);
        let cancelled = copies.cancelled.clone();
        rig.submit(copies);
        let copies = copies_of_two_chunks(&mut rig);
        cancelled.store(true, Ordering::Relaxed);
        rig.driver.set_pace(Pace::Looked);
        rig.finish(1);
        (copies < list.len()).then_some(copies * PAGE / 2)
    });
    let chunk = chunk.expect("chunks that take as long as on a fast bus");
    assert!(chunk.is_multiple_of(32 << 20), "{chunk}");
}

#[test]
fn a_bandwidth_limit_spreads_saves_out_and_leaves_loads_alone() {
    let options = DeviceOptions {
        d2h_limit: Some(1 << 20),
        ..options()
    };
    let mut rig = Rig::new(options, true);
    let engine = rig.engine(1 << 20);
    rig.submit(long_task(&rig, &engine, 1, Direction::Save));
    rig.submit(long_task(&rig, &engine, 2, Direction::Load));
    let done = rig.finish(1);
    assert_eq!(done[0].tag, 2);
    // 640 KiB at 1 MiB a second: after the first quarter of a MiB there is a pause.
    rig.turn_many(1000);
    let wait = rig.turn().unwrap();
    assert!(
        matches!(wait, Wait::For(time) if time > Duration::from_millis(100)),
        "{wait:?}"
    );
    assert!(rig.done().is_empty());
}

#[test]
fn a_load_that_comes_while_the_limit_holds_saves_up_does_not_take_the_place_of_the_last_save() {
    const PAUSE: Duration = Duration::from_millis(125);
    let options = DeviceOptions {
        // Eight pages, and a pause of that long behind them.
        staging_bytes: 16 << 10,
        d2h_limit: Some(128 << 10),
        ..options()
    };
    let mut rig = Rig::new(options, true);
    let (from, to) = (rig.engine(1 << 20), rig.engine(1 << 20));
    from.write(&noise(1, from.bytes));
    to.write(&noise(2, to.bytes));
    let (source, target) = (bind(&from, 60, LAYOUTS[1]), bind(&to, 60, LAYOUTS[1]));
    let list: Vec<(u64, u32)> = (0..40).map(|n| (n * 2048, n as u32)).collect();
    rig.submit(task(1, Direction::Save, &source, &list[..8]));
    assert!(rig.finish(1)[0].result.is_ok());
    let pool = rig.pool_bytes();
    // Most of it has not begun when saves may go on.
    rig.driver.set_pace(Pace::Held);
    rig.submit(task(2, Direction::Load, &target, &list));
    rig.turn_many(3);
    std::thread::sleep(PAUSE);
    rig.turn_many(3);
    rig.driver.set_pace(Pace::Looked);
    assert_eq!(rig.finish(1)[0].result, Ok(40 * 2048));
    assert!(rig.pool_bytes() == pool, "a load writes to no page");
    let (saved, loaded) = (from.read(), to.read());
    assert!(loaded[..8 * 512] == saved[..8 * 512] && loaded[8 * 512..40 * 512] == [0; 32 * 512]);
}

#[test]
fn tasks_run_through_the_threads_of_the_daemon_and_come_back() {
    let rig = Rig::new(options(), true);
    let devices: Devices = rig.devices.clone();
    let engine = rig.engine(1 << 20);
    engine.write(&noise(8, engine.bytes));
    let pool = rig.place.pool.clone();
    let mut workers = CopyWorkers::start(CopyOptions::default(), pool.clone(), || ()).unwrap();
    workers.serve_devices(devices, pool);
    workers
        .submit(long_task(&rig, &engine, 1, Direction::Save))
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let done = loop {
        if let Some(done) = workers.pop_done() {
            break done;
        }
        assert!(Instant::now() < deadline, "no result");
    };
    assert_eq!(done.result, Ok(40 * 16384));
    workers.stop();
    assert_eq!(rig.pool_bytes()[..40 * 16384], engine.read()[..40 * 16384]);

    let row = rig.devices.rows()[0];
    assert_eq!((row.state, row.tasks), (1, 0));
    assert_eq!((row.saved_bytes, row.loaded_bytes), (40 * 16384, 0));
    assert_eq!(row.direct_bytes + row.staged_bytes, row.saved_bytes);
    assert!(row.save_busy_nanos > 0 && row.load_busy_nanos == 0);
    assert!(row.staging_bytes > 0);
}
