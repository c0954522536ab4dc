//! Every named maximum has its answer, and nothing is lost or hung.

use std::time::Duration;

use pegaflow::{Client, Completion, Error, MissReason, Options, Status};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::SOON;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

/// A pool of 64 pages of 64 KiB.
fn small_pool() -> (Daemon, WorkerSpec) {
    let config = Config {
        pool: "4MiB".into(),
        extent: "1MiB".into(),
        ..Config::default()
    };
    let spec = WorkerSpec {
        half_bytes: 16 << 10,
        layers: 2,
        blocks: 80,
        ..WorkerSpec::default()
    };
    (Daemon::start_with(config), spec)
}

#[test]
fn a_pool_full_of_leased_blocks_refuses_saves_and_loses_nothing() {
    let (daemon, spec) = small_pool();
    let worker = Worker::ready(daemon.options(), spec);
    let names = hashes(1, 64);
    assert_eq!(worker.save(&names).count, 64);
    let lease = worker.query(1, &names).lease;
    let more = hashes(1000, 10);
    let full = worker.save(&more);
    assert_eq!(
        (full.status, full.count, full.dropped),
        (Status::NoSpace, 0, 10)
    );
    assert!(daemon.counter_reaches(Counter::SaveNoSpace, 10));
    worker.load_and_verify(lease, &names);
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    assert_eq!(
        worker.save(&more).count,
        10,
        "room again when the lease has ended"
    );
    assert_eq!(worker.fetch(2, &more), 10);
}

#[test]
fn a_save_larger_than_the_pool_stores_what_fits() {
    let (daemon, spec) = small_pool();
    let worker = Worker::ready(daemon.options(), spec);
    let names = hashes(1, 80);
    let saved = worker.save(&names);
    assert_eq!(saved.count + saved.dropped, 80);
    assert!(saved.count >= 64, "{saved:?}");
    for (number, name) in names.iter().enumerate() {
        let answer = worker.query(number as u64, std::slice::from_ref(name));
        if answer.count == 1 {
            worker.load_and_verify(answer.lease, std::slice::from_ref(name));
        }
    }
}

#[test]
fn pages_of_another_size_get_whole_extents() {
    let (daemon, spec) = small_pool();
    let large = Worker::ready(daemon.options(), spec.clone());
    let names = hashes(1, 64);
    assert_eq!(large.save(&names).count, 64);
    let tiny = WorkerSpec {
        half_bytes: 512,
        layers: 1,
        ..spec.instance("tiny")
    };
    let tiny = Worker::ready(daemon.options(), tiny);
    let more = hashes(5000, 80);
    assert_eq!(tiny.save(&more).count, 80, "{}", daemon.log());
    assert_eq!(tiny.fetch(1, &more), 80);
    assert!(daemon.counter_reaches(Counter::EvictedExtent, 1));
    let mut left = 0;
    for (number, name) in names.iter().enumerate() {
        let answer = large.query(number as u64, std::slice::from_ref(name));
        if answer.count == 1 {
            large.load_and_verify(answer.lease, std::slice::from_ref(name));
            left += 1;
        }
    }
    assert_eq!(left, 48, "one extent of sixteen pages was handed over");
}

#[test]
fn eviction_takes_the_least_recently_used() {
    let (daemon, spec) = small_pool();
    let worker = Worker::ready(daemon.options(), spec);
    let old = hashes(1, 32);
    let used = hashes(100, 32);
    worker.save(&used);
    worker.save(&old);
    assert_eq!(
        worker.fetch(1, &used),
        32,
        "makes them the more recent ones"
    );
    worker.save(&hashes(200, 32));
    assert_eq!(worker.query(2, &used).count, 32);
    assert_eq!(worker.query(3, &old).count, 0);
}

#[test]
fn a_full_ring_says_again_and_loses_nothing() {
    let daemon = Daemon::start();
    for (ring_slots, completion_slots) in [(64, 16), (16, 64), (16, 16)] {
        let options = Options {
            ring_slots,
            completion_slots,
            ..daemon.options()
        };
        fill_ring(&Client::connect(options).expect("connect"));
    }
}

fn fill_ring(client: &Client) {
    let most = client.limits().requests;
    let mut accepted = Vec::new();
    let refused = loop {
        match client.nop() {
            Ok(request) => accepted.push(request),
            Err(error) => break error,
        }
        assert!(
            accepted.len() <= most,
            "more than the completion ring has room for"
        );
    };
    assert!(matches!(refused, Error::Again(_)), "{refused}");
    assert!(accepted.len() >= 8, "{} of {most}", accepted.len());
    let mut out = vec![Completion::default(); 100];
    let mut done = Vec::new();
    let began = std::time::Instant::now();
    while done.len() < accepted.len() && began.elapsed() < SOON {
        let count = client.poll(&mut out);
        done.extend(out[..count].iter().map(|completion| completion.request));
    }
    done.sort_unstable();
    assert_eq!(done, accepted);
    assert!(client.nop().is_ok());
}

#[test]
fn a_list_that_can_never_fit_is_refused_with_the_limit() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        blocks: 2000,
        half_bytes: 64,
        layers: 1,
        ..WorkerSpec::default()
    };
    let options = Options {
        arena_bytes: 32 << 10,
        ..daemon.options()
    };
    let worker = Worker::ready(options, spec);
    let limits = worker.client.limits();
    assert!(
        limits.query_hashes < 2000 && limits.save_blocks < 2000,
        "{limits:?}"
    );
    let names = hashes(1, 2000);
    let (client, registration) = (&worker.client, worker.registration);
    let query = client
        .query(registration, 0, 1, &names, 0)
        .expect_err("too many");
    let save = client
        .save(registration, 0, &names, &first_blocks(2000))
        .expect_err("too many");
    for error in [query, save] {
        assert_eq!(error.status(), Status::TooMany);
        assert!(error.to_string().contains("split the list"), "{error}");
    }
    let most = limits.save_blocks.min(limits.query_hashes);
    assert_eq!(worker.save(&names[..most]).count as usize, most);
    assert_eq!(worker.fetch(2, &names[..most]), most);
}

#[test]
fn an_arena_in_use_says_again_until_completions_are_consumed() {
    let daemon = Daemon::start();
    let options = Options {
        arena_bytes: 64 << 10,
        ..daemon.options()
    };
    let worker = Worker::ready(options, WorkerSpec::default());
    let names = hashes(1, 500);
    let mut waiting = Vec::new();
    let mut again = 0;
    for key in 0..200 {
        match worker.client.query(worker.registration, 0, key, &names, 0) {
            Ok(request) => waiting.push(request),
            Err(Error::Again(_)) => {
                again += 1;
                for request in waiting.drain(..) {
                    assert_eq!(worker.finish(Ok(request)).status, Status::Ok);
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    for request in waiting {
        assert_eq!(worker.finish(Ok(request)).status, Status::Ok);
    }
    assert!(
        again > 0,
        "an arena of four chunks cannot take 200 queries at once"
    );
}

#[test]
fn a_full_lease_table_answers_with_a_named_miss() {
    let daemon = Daemon::start_with(Config::with(&["--max-leases", "4"]));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 3);
    worker.save(&names);
    let leases: Vec<u64> = (0..4).map(|key| worker.query(key, &names).lease).collect();
    assert!(leases.iter().all(|lease| *lease != 0));
    let refused = worker.query(9, &names);
    assert_eq!(
        (refused.count, refused.lease, refused.reason),
        (0, 0, MissReason::NoLease)
    );
    assert_eq!(worker.release(leases[0]).status, Status::Ok);
    assert_eq!(worker.fetch(10, &names), 3);
}

#[test]
fn one_session_too_many_is_refused_by_the_limit_and_the_others_go_on() {
    let daemon = Daemon::start_with(Config::with(&["--max-sessions", "3"]));
    let clients: Vec<Client> = (0..3).map(|_| daemon.connect()).collect();
    let refused = Client::connect(daemon.options()).expect_err("the fourth of three");
    assert_eq!(refused.status(), Status::Limit, "{refused}");
    assert!(refused.to_string().contains("--max-sessions"), "{refused}");
    for client in &clients {
        let request = client.nop().expect("submitted");
        assert_eq!(
            client.wait(request, SOON).expect("answered").status,
            Status::Ok
        );
    }
    drop(clients);
    let back = pegaflow_tests::eventually(|| Client::connect(daemon.options()).is_ok());
    assert!(back, "places are free again");
}

#[test]
fn one_instance_too_many_is_refused_by_the_limit() {
    let daemon = Daemon::start_with(Config::with(&["--max-instances", "1"]));
    let _first = Worker::ready(daemon.options(), WorkerSpec::default());
    let second = Worker::open(daemon.options(), WorkerSpec::default().instance("second"));
    let refused = second.err().expect("the second of one");
    assert_eq!(refused.status(), Status::Limit, "{refused}");
    assert!(refused.to_string().contains("--max-instances"), "{refused}");
}

#[test]
fn an_index_full_of_blocks_evicts() {
    let daemon = Daemon::start_with(Config::with(&["--max-blocks", "64"]));
    let spec = WorkerSpec {
        half_bytes: 256,
        layers: 1,
        blocks: 64,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    for round in 0..5 {
        let names = hashes(round * 100, 40);
        let saved = worker.save(&names);
        assert_eq!(
            (saved.status, saved.count),
            (Status::Ok, 40),
            "round {round}"
        );
        assert_eq!(worker.fetch(round, &names), 40);
    }
    assert!(daemon.gauge(Gauge::BlocksHeld) <= 64);
}

#[test]
fn no_wait_lasts_longer_than_its_bound() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        half_bytes: 1 << 20,
        layers: 1,
        blocks: 16,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let (client, registration) = (&worker.client, worker.registration);
    daemon.signal(nix::sys::signal::Signal::SIGSTOP);
    let names = hashes(1, 16);
    let request = client
        .save(registration, 0, &names, &first_blocks(16))
        .expect("submitted");
    let began = std::time::Instant::now();
    let late = client
        .wait(request, Duration::from_millis(100))
        .expect_err("the daemon is stopped");
    let waited = began.elapsed();
    daemon.signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(late.status(), Status::Timeout);
    assert!(waited < Duration::from_secs(2), "{waited:?}");
    assert_eq!(
        client.wait(request, SOON).expect("it goes on").status,
        Status::Ok
    );
}
