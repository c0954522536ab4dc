//! What is asked for is counted exactly once.

use pegaflow_shm::desc::Op;
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::status::Status;

use super::rig::*;

const SAVES: &[Counter] = &[
    Counter::SaveStored,
    Counter::SaveHeld,
    Counter::SaveInFlight,
    Counter::SaveNoSpace,
    Counter::SaveRejected,
    Counter::SaveFailed,
    Counter::SaveCancelled,
];
const LOADS: &[Counter] = &[
    Counter::LoadLoaded,
    Counter::LoadFailed,
    Counter::LoadCancelled,
];

#[test]
fn every_shard_of_a_save_is_counted_once_whatever_became_of_it() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    let names = hashes(0..8);
    let good = client.save(worker, 0, &names, &[0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((good.status(), good.count), (Status::Ok, 8));
    // A block id out of range refuses its chunk and what follows.
    let bad = client.save(worker, 0, &hashes(8..12), &[8, BLOCKS, 10, 11]);
    assert_eq!((bad.status(), bad.dropped), (Status::BlockOutOfRange, 4));
    rig.expect_sum(SAVES, 12);
    let unknown = client.save(worker + 9, 0, &hashes(12..14), &[0, 1]);
    assert_eq!(unknown.status(), Status::UnknownRegistration);
    rig.expect_sum(SAVES, 14);

    // Cancelled between two chunks: the second one's shards are cancelled ones.
    let chunk = |from: u64| save_payload(&hashes(from..from + 4), &[0, 1, 2, 3]);
    let head = list(Op::Save, worker, 0, 4);
    client.submit_list(0, &chunk(20), part(head, 1000, 8, true));
    assert_eq!(client.simple(Op::Cancel, worker, 1000), Status::Ok);
    client.submit_list(1, &chunk(24), part(head, 1000, 8, false));
    let cancelled = client.completion();
    assert_eq!(cancelled.status(), Status::Cancelled);
    assert_eq!(cancelled.count + cancelled.dropped, 8);
    rig.expect_sum(SAVES, 22);
    rig.expect_gauge(Gauge::Requests, 0);
    rig.expect_gauge(Gauge::BlocksUnfinished, 0);
}

#[test]
fn every_shard_of_a_load_is_counted_once_also_when_it_is_refused() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    let names = hashes(0..4);
    client.save(worker, 0, &names, &[0, 1, 2, 3]);
    let lease = client.query(worker, 0, &names).lease;
    let refused = client.load(worker, 0, lease, &[4, 5, 5, 6]);
    assert_eq!(refused.status(), Status::DuplicateBlock);
    rig.expect_sum(LOADS, 4);
    let loaded = client.load(worker, 0, lease, &[4, 5, 6, 7]);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, 4));
    rig.expect_sum(LOADS, 8);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn hits_and_misses_are_what_was_asked_for() {
    const ASKED: &[Counter] = &[
        Counter::QueryHit,
        Counter::QueryHitSsd,
        Counter::QueryMissAbsent,
        Counter::QueryMissIncomplete,
        Counter::QueryMissInFlight,
        Counter::QueryMissAfterMiss,
        Counter::QueryMissNoLease,
    ];
    let dir = folder();
    let mut rig = Rig::with(dir.path(), 1, |options| options.max_leases = 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..3), &[0, 1, 2]);
    client.save(worker, 1, &[hash(1), hash(3)], &[1, 3]);
    let first = client.query_key(worker, 0, 1, &hashes(0..6));
    assert_eq!((first.count, first.status()), (3, Status::Ok));
    rig.expect_sum(ASKED, 6);
    let full = client.query_key(worker, 1, 2, &hashes(0..5));
    assert_eq!((full.count, full.lease, client.result_word()), (0, 0, 0));
    rig.expect_sum(ASKED, 11);
    rig.expect_sum(&[Counter::QueryMissNoLease], 2);
    assert_eq!(client.simple(Op::Release, worker, first.lease), Status::Ok);
    let members = client.query_key(worker, 1, 2, &hashes(0..5));
    assert_eq!((members.count, client.result_word()), (2, 0b01010));
    rig.expect_sum(ASKED, 16);
    rig.expect_sum(&[Counter::QueryHit], 5);
}
