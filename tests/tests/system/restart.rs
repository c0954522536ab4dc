//! The daemon dies and comes back: the cache, the clients and the folders with it.

use pegaflow::{MissReason, State, Status};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::content::{Stream, hashes};
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{WorkerProcess, eventually, trials};

use crate::WORKER;

/// Waits until the worker is registered at the daemon's successor.
fn wait_back(worker: &Worker) {
    assert!(
        eventually(|| worker.client.state() == State::Connected),
        "reconnects by itself"
    );
    worker.wait_ready();
}

#[test]
fn sealed_blocks_survive_kill_9_and_the_client_comes_back_by_itself() {
    let mut daemon = Daemon::start();
    for kind in MemoryKind::ALL {
        let spec = WorkerSpec {
            memory: kind,
            ..WorkerSpec::default().salt(&format!("{kind:?}"))
        };
        let worker = Worker::ready(daemon.options(), spec);
        let names = hashes(1, 40);
        worker.save(&names);
        let before = worker.client.session_info().expect("connected").boot_id;
        daemon.kill();
        assert!(eventually(|| worker.client.state() != State::Connected));
        let away = worker.query(1, &names);
        assert_eq!((away.count, away.lease), (0, 0));
        assert_eq!(away.reason, MissReason::Disconnected);
        assert_eq!(away.status, Status::Disconnected);
        daemon.launch();
        wait_back(&worker);
        assert_ne!(
            worker.client.session_info().expect("connected").boot_id,
            before
        );
        assert_eq!(
            worker
                .client
                .probe(worker.registration, 0, &names)
                .expect("probe"),
            40
        );
        assert_eq!(worker.fetch(2, &names), 40);
        assert_eq!(worker.save(&names).skipped, 40, "nothing is copied twice");
    }
    assert!(daemon.counter(Counter::AdoptedBlocks) >= 40);
}

#[test]
fn sealed_blocks_survive_a_clean_restart() {
    let mut daemon = Daemon::start();
    let base = WorkerSpec::default();
    let first = Worker::open(daemon.options(), base.rank(0, 2)).expect("open");
    let second = Worker::ready(daemon.options(), base.rank(1, 2));
    first.wait_ready();
    let names = hashes(1, 20);
    first.save(&names);
    second.save(&names[..15]);
    daemon.stop();
    daemon.launch();
    wait_back(&first);
    wait_back(&second);
    let hit = first.query(1, &names);
    assert_eq!(
        hit.count, 15,
        "a block without all its shards is not adopted as a hit"
    );
    first.load_and_verify(hit.lease, &names[..15]);
    second.load_and_verify(hit.lease, &names[..15]);
}

#[test]
fn a_request_in_the_daemons_hands_ends_with_an_answer_when_it_dies() {
    let mut daemon = Daemon::start_with(Config {
        pool: "256MiB".into(),
        ..Config::default()
    });
    let spec = WorkerSpec {
        half_bytes: 1 << 20,
        layers: 1,
        blocks: 64,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let names = hashes(1, 64);
    let blocks = pegaflow_tests::worker::first_blocks(64);
    let request = worker
        .client
        .save(worker.registration, 0, &names, &blocks)
        .expect("submitted");
    daemon.kill();
    let done = worker
        .client
        .wait(request, pegaflow_tests::SOON)
        .expect("no hang");
    assert!(
        matches!(done.status, Status::Ok | Status::Disconnected),
        "{}",
        done.status
    );
}

#[test]
fn what_a_killed_daemon_leaves_the_next_one_adopts_or_removes() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    worker.save(&hashes(1, 10));
    daemon.kill();
    assert!(
        daemon.socket().exists(),
        "a killed daemon cannot unlink its socket"
    );
    drop(worker);
    daemon.launch();
    assert!(daemon.gauge_becomes(Gauge::Sessions, 0));
    assert!(daemon.stop().success());
    assert_eq!(daemon.leftovers(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn another_pool_size_starts_empty_and_says_why() {
    let config = Config::default();
    let mut daemon = Daemon::start_with(config);
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    daemon.kill();
    daemon.set_argument("--pool-size", "32MiB");
    daemon.launch();
    wait_back(&worker);
    assert_eq!(worker.query(1, &names).count, 0);
    assert!(daemon.log().contains("bytes"), "{}", daemon.log());
    worker.save(&names);
    assert_eq!(worker.fetch(2, &names), 10);
}

#[test]
fn adoption_can_be_switched_off() {
    let mut daemon = Daemon::start_with(Config::with(&["--no-adopt"]));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    daemon.stop();
    daemon.launch();
    wait_back(&worker);
    assert_eq!(worker.query(1, &names).count, 0);
}

#[test]
fn damaged_files_are_not_believed() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 40);
    worker.save(&names);
    let mut random = Stream::new(&[7]);
    for round in 0..5 {
        daemon.kill();
        let path = daemon.shm().join("catalog");
        let mut bytes = std::fs::read(&path).expect("the catalog");
        for _ in 0..200 {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= random.next() as u8;
        }
        write_over(&path, &bytes);
        daemon.launch();
        wait_back(&worker);
        worker.fetch(round, &names);
        worker.save(&names);
    }
}

/// Overwrites a file in place, as a wild write would.
fn write_over(path: &std::path::Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("opened");
    file.write_all_at(bytes, 0).expect("written");
}

#[test]
fn kill_9_of_a_busy_daemon_at_random_never_gives_wrong_bytes() {
    let rounds = trials("PEGAFLOW_KILL_TRIALS", 12).div_ceil(4);
    let config = Config {
        pool: "8MiB".into(),
        extent: "1MiB".into(),
        ..Config::default()
    };
    let mut daemon = Daemon::start_with(config);
    let spec = WorkerSpec {
        half_bytes: 4 << 10,
        blocks: 32,
        ..WorkerSpec::default()
    };
    let mut workers: Vec<WorkerProcess> = (0..2)
        .map(|number| {
            let memory = MemoryKind::ALL[number % 2];
            let spec = WorkerSpec {
                memory,
                ..spec.instance(&format!("churn-{number}"))
            };
            let mut worker = WorkerProcess::start(WORKER, &daemon, &spec);
            worker.tell(&Task::Churn {
                seed: number as u64,
            });
            worker
        })
        .collect();
    let mut random = Stream::new(&[42]);
    for round in 0..rounds {
        std::thread::sleep(std::time::Duration::from_millis(20 + random.below(300)));
        for worker in &mut workers {
            assert!(
                worker.is_running(),
                "round {round}: a byte differed\n{}",
                daemon.log()
            );
        }
        daemon.kill();
        daemon.launch();
    }
    for worker in &mut workers {
        assert!(worker.is_running(), "a byte differed\n{}", daemon.log());
        worker.kill();
    }
    assert!(daemon.gauge_becomes(Gauge::Sessions, 0));
    assert!(
        daemon.gauge_becomes(Gauge::BlocksPinned, 0),
        "pins return to zero"
    );
}
