//! Queries that share a prefetch, since they have one request key and the same hashes: each waits
//! as long as it said itself.

use super::*;

/// Two blocks of the pool, then two below that do not come up.
fn held() -> (Below, Memory, Client, u32, [u64; 4]) {
    held_with(Duration::from_secs(30))
}

fn held_with(lease_ttl: Duration) -> (Below, Memory, Client, u32, [u64; 4]) {
    let patient = tier(|tier| tier.patience = Duration::from_secs(600));
    let mut below = Below::with(|options| {
        patient(options);
        options.lease_ttl = lease_ttl;
    });
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.store.hold();
    (below, memory, client, worker, [last - 2, last - 1, 0, 1])
}

fn ask(client: &mut Client, worker: u32, request_id: u64, flag: u8, names: &[u64], limit_ms: u64) {
    let query = Submission {
        request_id,
        ..reach(worker, 9, flag, names.len(), limit_ms)
    };
    client.submit_list(0, &hashes(names.iter().copied()).concat(), query);
}

/// All that was asked comes to those who wait for it, and nothing is left.
fn expect_rest(
    (below, memory, mut client, worker, names): (Below, Memory, Client, u32, [u64; 4]),
    early: &Completion,
    waiting: &[u64],
) {
    assert!(client.try_completion().is_none(), "the others still wait");
    assert_eq!((early.status(), early.count), (Status::Ok, 2));
    below.store.release();
    let mut leases = vec![early.lease];
    for _ in waiting {
        let answer = client.completion();
        assert!(waiting.contains(&answer.request_id));
        assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
        leases.push(answer.lease);
    }
    // The early one's lease is its own, whoever came after it.
    let early_blocks = [128, 129];
    let loaded = client.load(worker, 0, early.lease, &early_blocks);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, 2));
    assert!(memory.holds(128, names[0] as u8) && memory.holds(129, names[1] as u8));
    let all = [128, 129, 130, 131];
    let loaded = client.load(worker, 0, leases[1], &all);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, 4));
    for (block, name) in all.iter().zip(names) {
        assert!(memory.holds(*block, name as u8));
    }
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Leases, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_gauge(Gauge::Requests, 0);
    // Each query's blocks count once.
    let repeated = waiting.len() as u64 - 1;
    below.rig.expect_sum(&[Counter::QueryRepeated], repeated);
    let asked = 4 * (1 + waiting.len() as u64);
    let counted = [
        Counter::QueryHit,
        Counter::QueryHitSsd,
        Counter::QueryMissAbsent,
        Counter::QueryMissInFlight,
        Counter::QueryMissAfterMiss,
    ];
    below.rig.expect_sum(&counted, asked - 4 * repeated);
}

#[test]
fn a_deadline_ends_nobody_elses_wait() {
    let (below, memory, mut client, worker, names) = held();
    ask(&mut client, worker, 1000, flags::WAIT, &names, 0);
    ask(&mut client, worker, 1001, flags::WAIT, &names, 50);
    ask(&mut client, worker, 1002, flags::WAIT, &names, 600_000);
    let early = client.completion();
    assert_eq!(early.request_id, 1001);
    assert_eq!(early.reason, MissReason::InFlight as u16);
    let all = (below, memory, client, worker, names);
    expect_rest(all, &early, &[1000, 1002]);
}

#[test]
fn who_comes_after_a_deadline_waits_as_it_said() {
    let (below, memory, mut client, worker, names) = held();
    ask(&mut client, worker, 1000, flags::WAIT, &names, 0);
    ask(&mut client, worker, 1001, flags::WAIT, &names, 50);
    let early = client.completion();
    assert_eq!(early.request_id, 1001);
    ask(&mut client, worker, 1002, flags::WAIT, &names, 0);
    // A lane that has answered this has taken in what came before.
    let seen = client.simple(Op::Renew, worker, early.lease);
    assert_eq!(seen, Status::Ok);
    let all = (below, memory, client, worker, names);
    expect_rest(all, &early, &[1000, 1002]);
}

#[test]
fn a_deadline_beyond_the_time_of_a_lease_still_gives_what_is_there() {
    let (below, _memory, mut client, worker, names) = held_with(Duration::from_millis(30));
    ask(&mut client, worker, 1000, flags::WAIT, &names, 200);
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 2));
    assert_eq!(answer.reason, MissReason::InFlight as u16);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
}

#[test]
fn who_wants_it_now_ends_nobody_elses_wait() {
    let (below, memory, mut client, worker, names) = held();
    ask(&mut client, worker, 1000, flags::WAIT, &names, 0);
    ask(&mut client, worker, 1001, flags::NOW, &names, 0);
    let early = client.completion();
    assert_eq!(early.request_id, 1001);
    assert_eq!(early.reason, MissReason::Absent as u16);
    let all = (below, memory, client, worker, names);
    expect_rest(all, &early, &[1000]);
}

#[test]
fn the_last_deadline_of_several_takes_what_is_there_and_leaves_nothing() {
    let (below, _memory, mut client, worker, names) = held();
    for (id, limit_ms) in [(1000, 60), (1001, 30)] {
        ask(&mut client, worker, id, flags::WAIT, &names, limit_ms);
    }
    for _ in 0..2 {
        let answer = client.completion();
        assert_eq!((answer.status(), answer.count), (Status::Ok, 2));
        assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    }
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn a_session_that_ends_leaves_the_blocks_to_those_who_wait_for_them_too() {
    let (mut below, memory, mut client, worker, names) = held();
    let mut other = below.rig.connect();
    let scheduler = below
        .rig
        .register(&other, spec("a", "", 1, None), &[], &memory);
    let scheduler = scheduler.unwrap();
    ask(&mut other, scheduler, 1000, flags::WAIT, &names, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 1);
    ask(&mut client, worker, 1001, flags::WAIT, &names, 0);
    client.flush();
    below.rig.close(&other);
    assert!(client.try_completion().is_none(), "it waits on");
    below.store.release();
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 0..0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Leases, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_sum(&[Counter::PrefetchAbandoned], 0);
}
