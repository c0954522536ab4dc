//! Every lease ends, and its pins with it.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::desc::{MissReason, Op, Submission};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::status::Status;

use super::rig::*;
use crate::copy::ChecksumMode;

#[test]
fn a_query_abandoned_in_the_middle_of_its_list_leaves_no_pin() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    let names = hashes(0..4);
    client.save(worker, 0, &names, &[0, 1, 2, 3]);
    let mut other = rig.connect();
    let spec = spec("a", "", 1, None);
    let scheduler = rig.register(&other, spec, &[], &memory).unwrap();
    let head = list(Op::Query, scheduler, 0, 4);
    other.submit_list(0, &names.concat(), part(head, 1000, 8, true));
    other.flush();
    rig.expect_gauge(Gauge::BlocksPinned, 4);
    rig.close(&other);
    rig.expect_gauge(Gauge::BlocksPinned, 0);

    // The same by a contradiction instead of an end: the fault itself keeps the pins until the
    // close.
    let other = &mut rig.connect();
    let again = rig.register(other, self::spec("a", "", 1, None), &[], &memory);
    let head = list(Op::Query, again.unwrap(), 0, 4);
    other.submit_list(0, &names.concat(), part(head, 1000, 8, true));
    other.submit_list(0, &names.concat(), part(head, 1000, 9, false));
    rig.expect_gauge(Gauge::BlocksPinned, 4);
    rig.close(other);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    rig.expect_gauge(Gauge::Requests, 0);
}

#[test]
fn a_lease_expires_while_the_lane_sleeps() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..2), &[0, 1]);
    let query = Submission {
        arg0: 5,
        arg2: 100,
        ..list(Op::Query, worker, 0, 2)
    };
    client.submit_list(0, &hashes(0..2).concat(), query);
    let answer = client.completion();
    assert_eq!((answer.count, answer.arg0), (2, 100));
    rig.expect_gauge(Gauge::Leases, 1);
    rig.expect_gauge(Gauge::Leases, 0);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    rig.expect_sum(&[Counter::LeasesExpired], 1);
    let late = client.load(worker, 0, answer.lease, &[2, 3]);
    assert_eq!(late.status(), Status::LeaseExpired);
}

#[test]
fn a_repeated_query_keeps_its_lease_alive() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..2), &[0, 1]);
    let query = Submission {
        arg0: 5,
        arg2: 400,
        ..list(Op::Query, worker, 0, 2)
    };
    let mut leases = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1000) {
        client.submit_list(0, &hashes(0..2).concat(), query);
        let answer = client.completion();
        assert_eq!((answer.count, answer.arg0), (2, 400));
        leases.push(answer.lease);
        std::thread::sleep(Duration::from_millis(50));
    }
    leases.dedup();
    assert_eq!(leases.len(), 1, "what was promised for 400 ms ended sooner");
}

#[test]
fn a_load_cancelled_before_its_list_is_complete_consumes_nothing() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    let names = hashes(0..4);
    client.save(worker, 0, &names, &[0, 1, 2, 3]);
    let lease = client.query(worker, 0, &names).lease;
    let head = Submission {
        arg0: lease,
        ..list(Op::Load, worker, 0, 2)
    };
    let ids = |from: u32| bytemuck::cast_slice(&[from, from + 1]).to_vec();
    client.submit_list(0, &ids(4), part(head, 1000, 4, true));
    assert_eq!(client.simple(Op::Cancel, worker, 1000), Status::Ok);
    client.submit_list(1, &ids(6), part(head, 1000, 4, false));
    assert_eq!(client.completion().status(), Status::Cancelled);
    let loaded = client.load(worker, 0, lease, &[4, 5, 6, 7]);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, 4));
    rig.expect_gauge(Gauge::Leases, 0);
}

#[test]
fn leases_of_an_instance_end_with_its_last_process() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..2), &[0, 1]);
    assert_ne!(client.query(worker, 0, &hashes(0..2)).lease, 0);
    let gone = rig.lane.handle.unregister(client.id, worker);
    rig.runtime.block_on(gone).unwrap();
    rig.expect_gauge(Gauge::Leases, 0);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn leases_of_a_session_end_with_it_while_its_instance_lives_on() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..2), &[0, 1]);
    let mut other = rig.connect();
    let scheduler = rig.register(&other, spec("a", "", 1, None), &[], &memory);
    let scheduler = scheduler.unwrap();
    assert_ne!(other.query(scheduler, 0, &hashes(0..2)).lease, 0);
    rig.expect_gauge(Gauge::Leases, 1);
    rig.close(&other);
    rig.expect_gauge(Gauge::Leases, 0);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    assert_ne!(client.query(worker, 0, &hashes(0..2)).lease, 0);
}

#[test]
fn pins_have_a_maximum_and_the_rest_is_a_miss() {
    let dir = folder();
    let mut rig = Rig::with(dir.path(), 1, |options| options.max_blocks = 16);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..16), &Vec::from_iter(0..16));
    let mut granted = 0;
    for key in 0..64 {
        let answer = client.query_key(worker, 0, key, &hashes(0..16));
        assert_eq!(answer.status(), Status::Ok);
        granted += answer.count;
        if answer.count < 16 {
            assert_eq!(answer.reason, MissReason::NoLease as u16);
        }
    }
    // Of 128 pins: a lease more would leave less than an eighth of what the session has.
    assert_eq!(granted, 7 * 16);
    let (mut second, other) = rig.worker("b", "", &memory);
    assert_eq!(second.query(other, 0, &hashes(0..1)).count, 1);
    rig.close(&second);
    rig.close(&client);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    let (mut client, worker) = rig.worker("a", "", &memory);
    assert_eq!(client.query(worker, 0, &hashes(0..16)).count, 16);
}

#[test]
fn a_lease_given_before_the_instance_came_back_with_other_pages_loads_nothing() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let (memory, other) = (Memory::new(), Memory::with_page(2 * PAGE));
    let scheduler = rig.connect();
    let spec_of = |rank| spec("a", "", 1, rank);
    let seen = rig.register(&scheduler, spec_of(None), &[], &memory);
    let (mut scheduler, seen) = (scheduler, seen.unwrap());
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..2), &[0, 1]);
    let lease = scheduler.query(seen, 0, &hashes(0..2)).lease;
    assert_ne!(lease, 0);
    rig.close(&client);
    let gone = scheduler.query(seen, 0, &hashes(0..2));
    assert_eq!(gone.status(), Status::NotReady);
    let (mut client, worker) = rig.worker("a", "", &other);
    let load = client.load(worker, 0, lease, &[0, 1]);
    assert_eq!(load.status(), Status::UnknownLease);
    assert_eq!(scheduler.query(seen, 0, &hashes(0..2)).count, 0);
    rig.close(&scheduler);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    assert!(client.try_completion().is_none());
    let nop = Submission {
        op: Op::Nop as u8,
        ..Submission::zeroed()
    };
    client.submit(nop);
    assert_eq!(client.completion().status(), Status::Ok);
}

#[test]
fn a_repeated_query_does_not_answer_a_block_that_was_withdrawn_meanwhile() {
    let dir = folder();
    let mut rig = Rig::with(dir.path(), 1, |options| {
        options.checksum = ChecksumMode::Always;
    });
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    let names = hashes(0..4);
    (0..4).for_each(|block| memory.fill(block, 0xA0 + block as u8));
    client.save(worker, 0, &names, &[0, 1, 2, 3]);
    let first = client.query_key(worker, 0, 1, &names);
    let second = client.query_key(worker, 0, 2, &names);
    assert_eq!((first.count, second.count), (4, 4));
    // The page of the third block changes.
    let path = dir.path().join("pool");
    let pool = std::fs::File::options().read(true).write(true).open(path);
    let pool = pool.unwrap();
    let mut bytes = vec![0; PAGE as usize];
    let at = (0..16 * EXTENT).step_by(PAGE as usize).find(|at| {
        pool.read_exact_at(&mut bytes, *at).unwrap();
        bytes.iter().all(|byte| *byte == 0xA2)
    });
    pool.write_all_at(&[0x5A], at.expect("the page") + 7)
        .unwrap();

    let failed = client.load(worker, 0, first.lease, &[4, 5, 6, 7]);
    assert_eq!((failed.status(), failed.count), (Status::CopyFailed, 2));
    let again = client.query_key(worker, 0, 2, &names);
    assert_eq!(again.count, 2, "a miss from there on");
    assert_ne!(again.lease, second.lease);
    let loaded = client.load(worker, 0, again.lease, &[8, 9]);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, 2));
    let old = client.load(worker, 0, second.lease, &[10, 11, 12, 13]);
    assert_eq!(old.status(), Status::UnknownLease);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    rig.expect_gauge(Gauge::BlocksHeld, 3);
}
