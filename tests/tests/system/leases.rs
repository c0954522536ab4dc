//! Every lease ends, and is good for exactly what it was given for.

use std::time::Duration;

use pegaflow::Status;
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};
use pegaflow_tests::{WorkerProcess, eventually};

use crate::WORKER;

fn one_rank(daemon: &Daemon) -> Worker {
    Worker::ready(daemon.options(), WorkerSpec::default())
}

/// All of the leases that were granted so far, a number that is given, have ended.
#[track_caller]
fn assert_nothing_held(daemon: &Daemon, granted: u64) {
    let ended = [
        Counter::LeasesConsumed,
        Counter::LeasesReleased,
        Counter::LeasesExpired,
        Counter::LeasesReplaced,
        Counter::LeasesOwnerGone,
    ];
    assert!(
        daemon.counter_becomes(Counter::LeasesGranted, granted),
        "leases granted"
    );
    let total = || {
        ended
            .iter()
            .map(|counter| daemon.counter(*counter))
            .sum::<u64>()
    };
    assert!(
        eventually(|| total() == granted),
        "{} of {granted} have ended",
        total()
    );
    assert!(
        daemon.gauge_becomes(Gauge::Leases, 0),
        "leases: {}",
        daemon.gauge(Gauge::Leases)
    );
    assert!(
        daemon.gauge_becomes(Gauge::BlocksPinned, 0),
        "pins return to zero"
    );
}

#[test]
fn each_worker_consumes_a_lease_once() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let first = Worker::open(daemon.options(), base.rank(0, 2)).expect("open");
    let second = Worker::ready(daemon.options(), base.rank(1, 2));
    first.wait_ready();
    let names = hashes(1, 6);
    first.save(&names);
    second.save(&names);
    let lease = first.query(1, &names).lease;
    first.load_and_verify(lease, &names);
    assert_eq!(
        first.load_in(0, lease, 0, &[0]).status,
        Status::LeaseConsumed
    );
    second.load_and_verify(lease, &names);
    assert_nothing_held(&daemon, 1);
    let late = second.load_in(0, lease, 0, &[0]).status;
    assert!(
        matches!(late, Status::LeaseConsumed | Status::UnknownLease),
        "{late}"
    );
    assert!(daemon.counter_reaches(Counter::LeasesConsumed, 1));
}

#[test]
fn a_rejected_load_consumes_nothing() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 6);
    worker.save(&names);
    let lease = worker.query(1, &names).lease;
    let range = worker.load_in(0, lease, 0, &[0, 64]);
    assert_eq!(
        (range.status, range.arg0, range.count),
        (Status::BlockOutOfRange, 64, 0)
    );
    let twice = worker.load_in(0, lease, 0, &[5, 5]);
    assert_eq!((twice.status, twice.arg0), (Status::DuplicateBlock, 5));
    for (first, blocks) in [(0, first_blocks(7)), (6, vec![0]), (u32::MAX, vec![0])] {
        assert_eq!(
            worker.load_in(0, lease, first, &blocks).status,
            Status::TooMany
        );
    }
    worker.load_and_verify(lease, &names);
}

#[test]
fn an_unknown_lease_is_refused() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    for lease in [0, 1, 0xFFFF_FFFF, 1 << 32, u64::MAX] {
        let (client, registration) = (&worker.client, worker.registration);
        assert_eq!(
            worker.load_in(0, lease, 0, &[0]).status,
            Status::UnknownLease,
            "{lease:#x}"
        );
        assert_eq!(worker.release(lease).status, Status::UnknownLease);
        let renewed = worker.finish(client.renew(registration, lease, 1000));
        assert_eq!(renewed.status, Status::UnknownLease);
    }
}

#[test]
fn a_lease_of_another_instance_is_refused() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let other = Worker::ready(daemon.options(), WorkerSpec::default().instance("other"));
    let names = hashes(1, 3);
    worker.save(&names);
    let lease = worker.query(1, &names).lease;
    assert_eq!(
        other.load_in(0, lease, 0, &[0]).status,
        Status::UnknownLease
    );
    assert_eq!(other.release(lease).status, Status::UnknownLease);
    worker.load_and_verify(lease, &names);
}

#[test]
fn a_released_lease_is_gone() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 3);
    worker.save(&names);
    let lease = worker.query(1, &names).lease;
    assert_eq!(worker.release(lease).status, Status::Ok);
    assert_nothing_held(&daemon, 1);
    assert_eq!(
        worker.load_in(0, lease, 0, &[0]).status,
        Status::UnknownLease
    );
    assert_eq!(worker.release(lease).status, Status::UnknownLease);
}

#[test]
fn a_lease_expires_and_says_so() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 3);
    worker.save(&names);
    let (client, registration) = (&worker.client, worker.registration);
    let answer = worker.finish(client.query(registration, 0, 1, &names, 150));
    assert_eq!((answer.count, answer.arg0), (3, 150));
    assert!(daemon.counter_reaches(Counter::LeasesExpired, 1));
    assert_nothing_held(&daemon, 1);
    assert_eq!(
        worker.load_in(0, answer.lease, 0, &[0]).status,
        Status::LeaseExpired
    );
    assert_eq!(worker.fetch(2, &names), 3, "the blocks are still there");
}

#[test]
fn a_renewed_lease_lives_on() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 3);
    worker.save(&names);
    let (client, registration) = (&worker.client, worker.registration);
    let lease = worker
        .finish(client.query(registration, 0, 1, &names, 400))
        .lease;
    assert_eq!(
        worker
            .finish(client.renew(registration, lease, 60_000))
            .status,
        Status::Ok
    );
    std::thread::sleep(Duration::from_millis(700));
    worker.load_and_verify(lease, &names);
}

#[test]
fn a_wish_for_a_long_life_is_cut_to_the_limit() {
    let daemon = Daemon::start_with(Config::with(&["--lease-ttl-max", "40s"]));
    let worker = one_rank(&daemon);
    let names = hashes(1, 3);
    worker.save(&names);
    let (client, registration) = (&worker.client, worker.registration);
    let answer = worker.finish(client.query(registration, 0, 1, &names, 3_600_000));
    assert_eq!((answer.status, answer.arg0), (Status::Ok, 40_000));
}

#[test]
fn the_leases_of_a_process_that_dies_end() {
    let daemon = Daemon::start();
    let mut worker = WorkerProcess::start(WORKER, &daemon, &WorkerSpec::default());
    assert_eq!(
        worker
            .run(&Task::Save {
                first: 1,
                count: 20
            })
            .count,
        20
    );
    for key in 0..5 {
        let query = Task::Query {
            key,
            first: 1 + key,
            count: 10,
        };
        assert_eq!(worker.run(&query).count, 10);
    }
    assert!(daemon.gauge_becomes(Gauge::Leases, 5));
    worker.kill();
    assert_nothing_held(&daemon, 5);
    assert!(daemon.counter_reaches(Counter::LeasesOwnerGone, 5));
}

#[test]
fn the_same_query_again_gives_the_same_lease_and_no_second_pin() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 6);
    worker.save(&names);
    let first = worker.query(1, &names);
    for _ in 0..10 {
        let again = worker.query(1, &names);
        assert_eq!((again.lease, again.count), (first.lease, first.count));
    }
    assert!(daemon.gauge_becomes(Gauge::Leases, 1));
    worker.load_and_verify(first.lease, &names);
    assert_nothing_held(&daemon, 1);
}

#[test]
fn the_same_key_with_other_hashes_gets_a_new_answer() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let names = hashes(1, 6);
    worker.save(&names);
    let first = worker.query(1, &names[..4]);
    let second = worker.query(1, &names[1..]);
    assert_ne!(first.lease, second.lease);
    assert_eq!(second.count, 5);
    assert_eq!(
        worker.load_in(0, first.lease, 0, &[0]).status,
        Status::UnknownLease
    );
    worker.load_and_verify(second.lease, &names[1..]);
    assert_nothing_held(&daemon, 2);
}

#[test]
fn two_instances_with_one_key_do_not_get_each_others_lease() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let other = Worker::ready(daemon.options(), WorkerSpec::default().instance("other"));
    let names = hashes(1, 6);
    worker.save(&names);
    let (mine, theirs) = (worker.query(7, &names[..2]), other.query(7, &names));
    assert_ne!(mine.lease, theirs.lease);
    assert_eq!((mine.count, theirs.count), (2, 6));
    worker.load_and_verify(mine.lease, &names[..2]);
    other.load_and_verify(theirs.lease, &names);
}

#[test]
fn no_hit_gives_no_lease() {
    let daemon = Daemon::start();
    let worker = one_rank(&daemon);
    let answer = worker.query(1, &hashes(1, 6));
    assert_eq!(
        (answer.status, answer.count, answer.lease),
        (Status::Ok, 0, 0)
    );
    assert_eq!(daemon.gauge(Gauge::Leases), 0);
}

#[test]
fn leased_blocks_survive_pressure_and_come_back_whole() {
    let daemon = Daemon::start_with(Config {
        pool: "4MiB".into(),
        extent: "1MiB".into(),
        ..Config::default()
    });
    let spec = WorkerSpec {
        half_bytes: 16 << 10,
        blocks: 48,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let kept = hashes(1, 24);
    worker.save(&kept);
    let lease = worker.query(1, &kept).lease;
    for round in 1..20 {
        worker.save_in(0, &first_blocks(48), &hashes(round * 1000, 48));
    }
    assert!(eventually(|| daemon.counter(Counter::EvictedCapacity) > 100));
    worker.load_and_verify(lease, &kept);
}
