//! SIGTERM: what was taken is finished, nothing new is taken, nothing is left but the cache.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pegaflow::{State, Status};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::eventually;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

#[test]
fn sigterm_finishes_what_was_taken_and_exits_cleanly() {
    let mut daemon = Daemon::start_with(Config {
        pool: "256MiB".into(),
        ..Config::default()
    });
    let spec = WorkerSpec {
        half_bytes: 512 << 10,
        layers: 1,
        blocks: 128,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let names = hashes(1, 128);
    for (block, name) in names.iter().enumerate() {
        worker.compute(0, block as u32, name);
    }
    let (client, registration) = (&worker.client, worker.registration);
    let save = client
        .save(registration, 0, &names, &first_blocks(128))
        .expect("submitted");
    let status = daemon.stop();
    assert!(status.success(), "{status}\n{}", daemon.log());
    assert_eq!(daemon.leftovers(), Vec::<std::path::PathBuf>::new());
    let done = client
        .wait(save, pegaflow_tests::SOON)
        .expect("answered in any case");
    let taken_or_not = matches!(
        done.status,
        Status::Ok | Status::Draining | Status::Disconnected
    );
    assert!(taken_or_not, "{}", done.status);
    if done.status == Status::Ok {
        assert_eq!(done.count, 128);
    }
}

#[test]
fn clients_of_a_stopped_daemon_fail_fast() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 5);
    worker.save(&names);
    daemon.stop();
    assert!(eventually(|| worker.client.state() != State::Connected));
    let began = Instant::now();
    let answer = worker.query(1, &names);
    assert_eq!((answer.count, answer.lease), (0, 0));
    assert_eq!(
        worker
            .client
            .probe(worker.registration, 0, &names)
            .expect("probe"),
        0
    );
    let save = worker
        .client
        .save(worker.registration, 0, &names, &first_blocks(5));
    assert_eq!(save.expect_err("no daemon").status(), Status::Disconnected);
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn an_idle_daemon_stops_at_once_on_either_signal() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start();
        let client = daemon.connect();
        let began = Instant::now();
        daemon.signal(signal);
        let status = daemon.wait();
        assert!(status.success(), "{signal}: {status}\n{}", daemon.log());
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        assert!(daemon.leftovers().is_empty(), "{:?}", daemon.leftovers());
        drop(client);
    }
}

#[test]
fn a_leased_and_never_loaded_block_does_not_hold_the_end_up() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 5);
    worker.save(&names);
    assert_ne!(worker.query(1, &names).lease, 0);
    let began = Instant::now();
    assert!(daemon.stop().success());
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
}
