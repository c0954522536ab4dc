//! Clients killed at any instruction: nobody else notices, and nothing of them stays.

use std::time::Duration;

use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::content::{Stream, hashes};
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{WorkerProcess, procfs, trials};

use crate::WORKER;

#[test]
fn kill_9_of_clients_at_random_leaves_no_trace_and_no_wrong_byte() {
    let rounds = trials("PEGAFLOW_KILL_TRIALS", 40);
    let config = Config {
        pool: "16MiB".into(),
        extent: "1MiB".into(),
        ..Config::default()
    };
    let daemon = Daemon::start_with(config);
    let spec = WorkerSpec {
        half_bytes: 2 << 10,
        blocks: 32,
        ..WorkerSpec::default()
    };
    let standing = Worker::ready(daemon.options(), spec.instance("standing"));
    let names = hashes(1, 16);
    let mut random = Stream::new(&[1]);
    let mut descriptors = 0;
    for round in 0..rounds {
        let memory = MemoryKind::ALL[round as usize % 2];
        let spec = WorkerSpec {
            memory,
            ..spec.instance(&format!("victim-{round}"))
        };
        let mut victim = WorkerProcess::start(WORKER, &daemon, &spec);
        victim.tell(&Task::Churn { seed: round });
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        assert!(
            victim.is_running(),
            "round {round}: a byte differed\n{}",
            daemon.log()
        );
        victim.kill();
        standing.save(&names);
        standing.fetch(round, &names);
        if round == 4 {
            assert!(daemon.gauge_becomes(Gauge::Sessions, 1));
            descriptors = procfs::settled_descriptors(daemon.pid());
        }
    }
    assert!(daemon.gauge_becomes(Gauge::Sessions, 1), "{}", daemon.log());
    assert!(daemon.gauge_becomes(Gauge::Leases, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    assert!(daemon.gauge_becomes(Gauge::CopyTasks, 0));
    assert!(daemon.gauge_becomes(Gauge::Instances, 1));
    assert!(
        daemon.counter_reaches(Counter::SessionsDied, rounds),
        "{} of {rounds} died, {} left, {} faulted\n{}",
        daemon.counter(Counter::SessionsDied),
        daemon.counter(Counter::SessionsLeft),
        daemon.counter(Counter::SessionsFaulted),
        daemon.log()
    );
    let now = procfs::settled_descriptors(daemon.pid());
    assert!(
        rounds <= 4 || now <= descriptors,
        "descriptors leak: {descriptors} then {now}"
    );
}

#[test]
fn a_client_killed_in_the_middle_of_large_copies_takes_nobody_along() {
    let daemon = Daemon::start_with(Config {
        pool: "128MiB".into(),
        ..Config::default()
    });
    let standing = Worker::ready(daemon.options(), WorkerSpec::default().instance("standing"));
    let names = hashes(1, 16);
    for (round, memory) in MemoryKind::ALL.into_iter().cycle().take(6).enumerate() {
        let spec = WorkerSpec {
            half_bytes: 512 << 10,
            layers: 1,
            blocks: 64,
            memory,
            ..WorkerSpec::default()
        };
        let mut victim = WorkerProcess::start(WORKER, &daemon, &spec.instance("victim"));
        victim.tell(&Task::Save {
            first: round as u64 * 1000,
            count: 64,
        });
        // Filling the blocks takes the victim longer in a debug build than copying them.
        let sealed = daemon.counter(Counter::BlocksSealed);
        for _ in 0..2000 {
            if daemon.counter(Counter::BlocksSealed) > sealed || daemon.gauge(Gauge::CopyTasks) > 0
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        victim.kill();
        standing.save(&names);
        assert_eq!(standing.fetch(round as u64, &names), 16);
    }
    assert!(
        daemon.gauge_becomes(Gauge::CopyTasks, 0),
        "{}",
        daemon.log()
    );
    assert!(daemon.gauge_becomes(Gauge::Sessions, 1));
}

#[test]
fn an_idle_client_is_never_taken_for_a_dead_one() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    std::thread::sleep(Duration::from_secs(3));
    let names = hashes(1, 4);
    assert_eq!(worker.save(&names).count, 4);
    assert_eq!(worker.client.stats().disconnects, 0);
}
