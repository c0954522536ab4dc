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

/// Fills a cache, kills its daemon, lets `change` happen, and expects the next daemon to start
/// empty, with one warning that has these words, and to work.
#[track_caller]
fn starts_empty(change: impl FnOnce(&mut Daemon), words: &[&str]) {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    daemon.kill();
    change(&mut daemon);
    let before = daemon.log().len();
    daemon.launch();
    wait_back(&worker);
    assert_eq!(worker.query(1, &names).count, 0);
    let log = daemon.log()[before..].to_owned();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    for word in words {
        assert!(
            warnings[0].contains(word),
            "no `{word}` in: {}",
            warnings[0]
        );
    }
    worker.save(&names);
    assert_eq!(worker.fetch(2, &names), 10);
}

#[test]
fn a_pool_of_another_size_starts_empty_and_says_so_with_both() {
    starts_empty(
        |daemon| daemon.set_argument("--pool-size", "32MiB"),
        &["pool size is 67108864 bytes", "configured are 33554432"],
    );
}

#[test]
fn a_pool_of_another_extent_size_starts_empty_and_says_so_with_both() {
    starts_empty(
        |daemon| daemon.set_argument("--extent-size", "2MiB"),
        &["extent size is 4194304 bytes", "configured are 2097152"],
    );
}

#[test]
fn all_that_differs_is_in_one_line() {
    starts_empty(
        |daemon| {
            daemon.set_argument("--pool-size", "32MiB");
            daemon.set_argument("--extent-size", "2MiB");
        },
        &[
            "pool size is 67108864",
            "33554432; its extent size is 4194304",
            "2097152",
        ],
    );
}

#[test]
fn a_pool_of_another_layout_version_starts_empty_and_says_so_with_both() {
    starts_empty(
        |daemon| write_at(&daemon.shm().join("catalog"), 8, &99u32.to_le_bytes()),
        &["layout version is 99, this daemon's is 3"],
    );
}

#[test]
fn a_catalog_with_a_damaged_header_is_not_believed() {
    starts_empty(
        |daemon| write_at(&daemon.shm().join("catalog"), 17, &[0xA5]),
        &["the checksum of its header is wrong"],
    );
    starts_empty(
        |daemon| write_at(&daemon.shm().join("catalog"), 0, b"CATALOG?"),
        &["its magic is", "not 0x"],
    );
    starts_empty(
        |daemon| std::fs::remove_file(daemon.shm().join("catalog")).expect("removed"),
        &["it has no catalog"],
    );
}

#[test]
fn the_pool_of_another_node_starts_empty_and_says_whose_it_was() {
    let mut other = Daemon::start();
    let worker = Worker::ready(other.options(), WorkerSpec::default());
    worker.save(&hashes(1, 10));
    drop(worker);
    other.stop();
    let was = format!("it is of node `{}`", other.node());
    starts_empty(
        |daemon| {
            for file in ["pool", "catalog"] {
                std::fs::rename(other.shm().join(file), daemon.shm().join(file)).expect("moved");
            }
        },
        &[&was, ", not `test-"],
    );
}

#[test]
fn a_fresh_pool_is_empty_and_says_so() {
    let mut daemon = Daemon::start_with(Config::with(&["--pool", "fresh"]));
    assert!(!daemon.log().contains("--pool fresh:"), "{}", daemon.log());
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    daemon.stop();
    daemon.launch();
    wait_back(&worker);
    assert_eq!(worker.query(1, &names).count, 0);
    assert!(daemon.log().contains("--pool fresh:"), "{}", daemon.log());
}

#[test]
fn a_lock_file_left_behind_keeps_nobody_out_whoever_it_names() {
    let mut daemon = Daemon::start();
    daemon.kill();
    // The number of the dead daemon now belongs to a living process.
    let lock = daemon.shm().join("lock");
    std::fs::write(&lock, format!("{}\n", std::process::id())).expect("written");
    daemon.launch();
    let holder = std::fs::read_to_string(&lock).expect("a lock file");
    assert_eq!(holder.trim(), daemon.pid().to_string());
}

/// Runs a second daemon on the node of `daemon` with a socket of its own, which must be refused.
#[track_caller]
fn second_is_refused(daemon: &Daemon, node: &str, words: &[&str]) {
    let socket = daemon.folder().join("second.sock");
    let output = std::process::Command::new("timeout")
        .arg("60")
        .arg(pegaflow_tests::binaries::pegaflowd())
        .args(["--node", node, "--http", "off", "--pool-size", "64MiB"])
        .args(["--extent-size", "4MiB", "--socket"])
        .arg(&socket)
        .output()
        .expect("pegaflowd runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn two_daemons_never_share_a_pool() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    let own = daemon.pid().to_string();
    second_is_refused(&daemon, daemon.node(), &["already served", &own]);
    // The same folder under another name, and the folder without its lock file.
    let renamed = format!("{}-moved", daemon.node());
    let folder = daemon.shm();
    let moved = folder.with_file_name(&renamed);
    std::fs::rename(&folder, &moved).expect("renamed");
    second_is_refused(&daemon, &renamed, &["already served", &own]);
    std::fs::rename(&moved, &folder).expect("renamed");
    std::fs::remove_file(folder.join("lock")).expect("removed");
    second_is_refused(&daemon, daemon.node(), &["in use by another pegaflowd"]);
    assert_eq!(
        worker.fetch(1, &names),
        10,
        "the first daemon did not notice"
    );
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
        write_at(&path, 0, &bytes);
        daemon.launch();
        wait_back(&worker);
        worker.fetch(round, &names);
        worker.save(&names);
    }
}

/// Overwrites bytes of a file in place, as a wild write would.
fn write_at(path: &std::path::Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("opened");
    file.write_all_at(bytes, at).expect("written");
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
