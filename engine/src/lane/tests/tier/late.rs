//! What is still at a drive when those who wanted it are gone: its pages are nobody's.

use super::*;

/// What becomes of those who wait while the drive holds their blocks.
#[derive(Clone, Copy, Debug)]
enum Ends {
    Patience,
    Cancel,
    Abandon,
    Session,
}

#[test]
fn the_pages_of_a_late_read_are_given_to_nobody_until_the_drive_has_let_go() {
    for ends in [Ends::Patience, Ends::Cancel, Ends::Abandon, Ends::Session] {
        let mut below = Below::with(tier(|tier| {
            if matches!(ends, Ends::Patience) {
                tier.patience = Duration::from_millis(20);
            }
        }));
        let memory = Memory::new();
        let (mut client, worker) = below.rig.worker("a", "", &memory);
        save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
        below.rig.expect_gauge(Gauge::SsdWriting, 0);
        below.store.state().refuse_writes = Some(Refused::Degraded);
        let mut other = below.rig.connect();
        let scheduler = below
            .rig
            .register(&other, spec("a", "", 1, None), &[], &memory);
        let scheduler = scheduler.unwrap();
        // Half of the pool is on its way up.
        let wanted = POOL_BLOCKS / 2;
        below.store.hold();
        let query = Submission {
            request_id: 1000,
            ..reach(scheduler, 9, flags::WAIT, wanted as usize, 0)
        };
        other.submit_list(0, &hashes(0..wanted).concat(), query);
        other.flush();
        below.rig.expect_gauge(Gauge::SsdReading, wanted);
        match ends {
            Ends::Patience => assert_eq!(other.completion().count, 0),
            Ends::Cancel => {
                other.submit(Submission {
                    op: Op::Cancel as u8,
                    registration: scheduler,
                    arg0: 1000,
                    ..Submission::zeroed()
                });
                assert_eq!(other.completion().status(), Status::Cancelled);
                assert_eq!(other.completion().status(), Status::Ok);
            }
            Ends::Abandon => {
                // The same request asks for something else, now.
                other.submit_list(
                    0,
                    &hashes([9999]).concat(),
                    reach(scheduler, 9, flags::NOW, 1, 0),
                );
                assert_eq!(other.completion().count, 0);
                assert_eq!(other.completion().count, 0);
            }
            Ends::Session => below.rig.close(&other),
        }
        below.rig.expect_gauge(Gauge::Prefetches, 0);
        below.rig.expect_gauge(Gauge::SsdReading, wanted);
        // Others use all the room that there is, twice over.
        let fresh = 5000..5000 + POOL_BLOCKS;
        save(&mut client, worker, &memory, fresh.clone());
        let kept = fresh.end - POOL_BLOCKS / 4..fresh.end;
        below.store.release();
        below.rig.expect_gauge(Gauge::SsdReading, 0);
        let answer = client.query_key(worker, 0, 11, &hashes(kept.clone()));
        assert_eq!(answer.count, POOL_BLOCKS as u32 / 4, "{ends:?}");
        load_and_check(&mut client, worker, &memory, &answer, kept);
        // What came late is right, too, and found.
        let answer = settled(&mut client, worker, 12, 0..4);
        assert_eq!((answer.status(), answer.count), (Status::Ok, 4), "{ends:?}");
        load_and_check(&mut client, worker, &memory, &answer, 0..4);
        below.rig.expect_gauge(Gauge::BlocksPinned, 0);
        below.rig.expect_gauge(Gauge::BlocksUnfinished, 0);
    }
}

#[test]
fn a_query_that_waits_loses_its_patience_once_however_many_blocks_it_wants() {
    let mut below = Below::with(tier(|tier| {
        tier.patience = Duration::from_millis(50);
        tier.max_prefetch = 1;
    }));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    below.store.hold();
    below.store.state().reads.clear();
    client.submit_list(
        0,
        &hashes(0..16).concat(),
        reach(worker, 9, flags::WAIT, 16, 0),
    );
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 0));
    let begun = below.store.state().reads.len();
    assert!(
        begun <= 2,
        "it was put off by the beginning of {begun} reads"
    );
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn prefetches_take_no_more_than_half_of_the_pool() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..3 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    below.store.hold();
    for (key, from) in [(1, 0), (2, POOL_BLOCKS / 3)] {
        let names = hashes(from..from + POOL_BLOCKS / 3);
        assert_eq!(
            client.query_key(worker, 0, key, &names).status(),
            Status::Loading
        );
    }
    below.rig.expect_gauge(Gauge::SsdReading, POOL_BLOCKS / 2);
    below.store.release();
    let answers = [(1, 0), (2, POOL_BLOCKS / 3)]
        .map(|(key, from)| settled(&mut client, worker, key, from..from + POOL_BLOCKS / 3));
    let held: u32 = answers.iter().map(|answer| answer.count).sum();
    assert_eq!(u64::from(held), POOL_BLOCKS / 2, "{answers:?}");
    // A miss that says why, and a hit all the same when the others are gone.
    let short = answers.iter().find(|answer| answer.reason != 0).unwrap();
    assert_eq!(short.reason, MissReason::NoLease as u16);
    for answer in &answers {
        assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    }
    let names = POOL_BLOCKS / 3..2 * (POOL_BLOCKS / 3);
    let answer = settled(&mut client, worker, 3, names.clone());
    assert_eq!(u64::from(answer.count), POOL_BLOCKS / 3);
    load_and_check(
        &mut client,
        worker,
        &memory,
        &answer,
        names.start..names.start + 4,
    );
}

#[test]
fn a_stop_answers_the_queries_that_wait_with_what_is_there() {
    let mut below = Below::with(tier(|tier| tier.patience = Duration::from_secs(600)));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    below.store.hold();
    let names = hashes([last - 1, 0, 1]);
    client.submit_list(0, &names.concat(), reach(worker, 9, flags::WAIT, 3, 0));
    client.flush();
    below.rig.expect_gauge(Gauge::Requests, 1);
    let handle = below.rig.lane.handle.clone();
    below.rig.runtime.block_on(handle.drain()).unwrap();
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    assert_eq!(answer.reason, MissReason::InFlight as u16);
    below.store.release();
}
