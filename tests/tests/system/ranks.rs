//! Several ranks, one block: tensor and pipeline parallelism.

use pegaflow::{MissReason, Status};
use pegaflow_shm::node::Gauge;
use pegaflow_tests::WorkerProcess;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::eventually;
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::{Worker, WorkerSpec};

use crate::WORKER;

#[test]
fn a_block_is_a_hit_only_when_the_shards_of_all_ranks_are_in() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let ranks = open_ranks(&daemon, &[base.rank(0, 2), base.rank(1, 2)]);
    let scheduler = Worker::ready(daemon.options(), base.rank(0, 2).scheduler());
    let names = hashes(1, 10);
    assert_eq!(ranks[0].save(&names).count, 10);
    let half = scheduler.query(1, &names);
    assert_eq!(
        (half.count, half.lease, half.reason),
        (0, 0, MissReason::Incomplete)
    );
    assert_eq!(
        scheduler
            .client
            .probe(scheduler.registration, 0, &names)
            .unwrap(),
        0
    );
    assert_eq!(ranks[1].save(&names[..6]).count, 6);
    let some = scheduler.query(2, &names);
    assert_eq!((some.count, some.reason), (6, MissReason::Incomplete));
    assert_eq!(
        scheduler
            .client
            .probe(scheduler.registration, 0, &names)
            .unwrap(),
        6
    );
    for rank in &ranks {
        rank.load_and_verify(some.lease, &names[..6]);
    }
}

/// Opens all ranks, then waits: an instance is complete only with all of them.
fn open_ranks(daemon: &Daemon, specs: &[WorkerSpec]) -> Vec<Worker> {
    let open = |spec: &WorkerSpec| Worker::open(daemon.options(), spec.clone()).expect("open");
    let ranks: Vec<Worker> = specs.iter().map(open).collect();
    ranks.iter().for_each(Worker::wait_ready);
    ranks
}

#[test]
fn pipeline_ranks_may_hold_shards_of_different_size() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let first = WorkerSpec {
        layers: 5,
        ..base.rank(0, 2)
    };
    let second = WorkerSpec {
        layers: 3,
        memory: MemoryKind::Process,
        ..base.rank(1, 2)
    };
    let ranks = open_ranks(&daemon, &[first, second]);
    let names = hashes(1, 12);
    for rank in &ranks {
        let saved = rank.save(&names);
        assert_eq!(
            (saved.count, saved.bytes),
            (12, 12 * rank.spec.page_bytes() as u64)
        );
    }
    let lease = ranks[0].query(1, &names).lease;
    for rank in &ranks {
        rank.load_and_verify(lease, &names);
    }
}

#[test]
fn ranks_in_processes_of_their_own_work_on_one_lease() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let mut ranks: Vec<WorkerProcess> = (0..4)
        .map(|rank| WorkerProcess::start(WORKER, &daemon, &base.rank(rank, 4)))
        .collect();
    let mut scheduler = WorkerProcess::start(WORKER, &daemon, &base.rank(0, 4).scheduler());
    assert!(scheduler.run(&Task::WaitReady).is_ok());
    for rank in &mut ranks {
        assert!(rank.run(&Task::WaitReady).is_ok());
        rank.tell(&Task::Save {
            first: 1,
            count: 30,
        });
    }
    for rank in &mut ranks {
        assert_eq!(rank.hear().count, 30);
    }
    let hit = scheduler.run(&Task::Query {
        key: 9,
        first: 1,
        count: 30,
    });
    assert_eq!(hit.count, 30);
    for rank in &mut ranks {
        rank.tell(&Task::Load {
            lease: hit.lease,
            first: 1,
            count: 30,
        });
    }
    for rank in &mut ranks {
        let loaded = rank.hear();
        assert!(loaded.is_ok() && loaded.count == 30, "{loaded:?}");
    }
    assert!(
        daemon.gauge_becomes(Gauge::Leases, 0),
        "the last rank's load ends the lease"
    );
}

#[test]
fn nothing_is_served_before_all_ranks_have_registered() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let first = Worker::open(daemon.options(), base.rank(0, 2)).expect("open");
    let names = hashes(1, 2);
    let early = first.finish(first.client.query(first.registration, 0, 1, &names, 0));
    assert_eq!((early.status, early.lease), (Status::NotReady, 0));
    let saved = first.save(&names);
    assert_eq!((saved.status, saved.count), (Status::NotReady, 0));
    assert_eq!(
        first.client.probe(first.registration, 0, &names).unwrap(),
        0
    );
    let second = Worker::ready(daemon.options(), base.rank(1, 2));
    first.wait_ready();
    assert_eq!(
        (first.save(&names).count, second.save(&names).count),
        (2, 2)
    );
    assert_eq!(first.query(2, &names).count, 2);
}

#[test]
fn an_instance_that_loses_a_rank_misses_until_the_rank_is_back() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let first = Worker::open(daemon.options(), base.rank(0, 2)).expect("open");
    let mut second = WorkerProcess::start(WORKER, &daemon, &base.rank(1, 2));
    first.wait_ready();
    let names = hashes(1, 5);
    first.save(&names);
    assert_eq!(second.run(&Task::Save { first: 1, count: 5 }).count, 5);
    assert_eq!(first.query(1, &names).count, 5);
    second.kill();
    assert!(
        eventually(|| first.query(2, &names).status == Status::NotReady),
        "{}",
        daemon.log()
    );
    assert!(eventually(|| first
        .client
        .probe(first.registration, 0, &names)
        .unwrap()
        == 0));
    let mut second = WorkerProcess::start(WORKER, &daemon, &base.rank(1, 2));
    assert!(second.run(&Task::WaitReady).is_ok());
    first.wait_ready();
    let hit = first.query(3, &names);
    assert_eq!(hit.count, 5, "its blocks were kept");
    first.load_and_verify(hit.lease, &names);
    assert!(
        second
            .run(&Task::Load {
                lease: hit.lease,
                first: 1,
                count: 5
            })
            .is_ok()
    );
}

#[test]
fn blocks_whose_remaining_shards_never_come_are_thrown_away() {
    let daemon = Daemon::start_with(Config::with(&["--incomplete-ttl", "200ms"]));
    let base = WorkerSpec::default();
    let ranks = open_ranks(&daemon, &[base.rank(0, 2), base.rank(1, 2)]);
    assert_eq!(ranks[0].save(&hashes(1, 10)).count, 10);
    assert!(
        daemon.gauge_becomes(Gauge::BlocksUnfinished, 0),
        "{}",
        daemon.log()
    );
    assert!(daemon.gauge_becomes(Gauge::PoolUsedBytes, 0));
}
