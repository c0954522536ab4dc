//! An engine that outlives its daemon, in every order of events.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use nix::sys::signal::Signal;
use pegaflow::{Client, Completion, Error, Options, State, Status};
use pegaflow_shm::control::{ClientMessage, DaemonMessage, Mode, RegisterSpec};
use pegaflow_shm::desc::{Op, Submission};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::raw::RawClient;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};
use pegaflow_tests::{SOON, WorkerProcess, eventually, procfs};

use crate::WORKER;

/// Options of an engine that does not wait for its daemon.
fn early(daemon: &Daemon) -> Options {
    Options {
        start_without_daemon: Some(true),
        ..daemon.options()
    }
}

fn is_back(client: &Client) -> bool {
    eventually(|| client.state() == State::Connected)
}

/// Registers a scheduler of the instance without the library.
fn raw_scheduler(daemon: &Daemon, spec: &WorkerSpec) -> (RawClient, u32) {
    let client = RawClient::open(&daemon.socket());
    let registration = RegisterSpec {
        instance: spec.instance.clone(),
        namespace: spec.namespace(),
        world_size: spec.world_size,
        rank: None,
        mode: Mode::ReadWrite,
        groups: Vec::new(),
    };
    let registration = Box::new(registration);
    let message = ClientMessage::Register {
        seq: 1,
        registration,
        signals: None,
    };
    client.socket.send(&message, &[]);
    match client.socket.receive() {
        Some((DaemonMessage::Registered { registration, .. }, _)) => (client, registration),
        other => panic!("not registered: {other:?}"),
    }
}

/// What the daemon says to an operation on a lease that comes without the library.
fn raw_lease(client: &mut RawClient, op: Op, registration: u32, lease: u64) -> Status {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    client.push(Submission {
        op: op as u8,
        registration,
        request_id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
        arg0: lease,
        ..Submission::zeroed()
    });
    client.ring();
    client.pop(SOON).expect("an answer").status()
}

#[test]
fn a_lease_of_another_boot_names_nothing_whoever_presents_it() {
    let mut daemon = Daemon::start();
    let spec = WorkerSpec {
        world_size: 1,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec.clone());
    let names = hashes(1, 40);
    worker.save(&names);
    let leases = |keys: std::ops::Range<u64>| -> Vec<u64> {
        keys.map(|key| worker.query(key, &names).lease).collect()
    };
    let old = leases(1..20);
    assert!(old.iter().all(|lease| *lease != 0));
    daemon.kill();
    daemon.launch();
    assert!(eventually(|| worker.client.stats().reconnects == 1));
    worker.wait_ready();
    // As many leases in the same places, so that an id without a boot would name one of them.
    let new = leases(1..20);
    assert!(new.iter().all(|lease| *lease != 0 && !old.contains(lease)));
    let (mut raw, registration) = raw_scheduler(&daemon, &spec);
    for lease in &old {
        assert_eq!(
            worker.load_in(0, *lease, 0, &[7]).status,
            Status::UnknownLease
        );
        for op in [Op::Renew, Op::Release] {
            let said = raw_lease(&mut raw, op, registration, *lease);
            assert_eq!(said, Status::UnknownLease, "{op:?}");
        }
    }
    for lease in &new {
        let said = raw_lease(&mut raw, Op::Renew, registration, *lease);
        assert_eq!(said, Status::Ok, "the new ones live");
    }
    worker.load_and_verify(new[0], &names);
}

#[test]
fn an_engine_that_starts_before_any_daemon_is_served_by_the_first_one() {
    for kind in MemoryKind::ALL {
        let mut daemon = Daemon::prepare(Config::default());
        let spec = WorkerSpec {
            memory: kind,
            ..WorkerSpec::default()
        };
        let scheduler = Worker::open(early(&daemon), spec.rank(0, 2).scheduler()).expect("open");
        let ranks = [0, 1].map(|rank| {
            Worker::open(early(&daemon), spec.rank(rank, 2)).expect("opens without a daemon")
        });
        let names = hashes(1, 20);
        let answer = scheduler.query(1, &names);
        assert_eq!((answer.status, answer.count), (Status::Disconnected, 0));
        daemon.launch();
        for rank in &ranks {
            rank.wait_ready();
            assert_eq!(rank.save(&names).count, 20);
        }
        scheduler.wait_ready();
        let hit = scheduler.query(2, &names);
        assert_eq!(hit.count, 20);
        for rank in &ranks {
            rank.load_and_verify(hit.lease, &names);
            assert_eq!(rank.client.stats().disconnects, 0);
        }
    }
}

#[test]
fn loads_and_saves_under_way_at_a_kill_end_with_their_blocks_named_and_nothing_sealed_is_lost() {
    let mut daemon = Daemon::start_with(Config {
        pool: "128MiB".into(),
        ..Config::default()
    });
    let spec = WorkerSpec {
        half_bytes: 64 << 10,
        layers: 1,
        blocks: 64,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let (client, id) = (&worker.client, worker.registration);
    let names = hashes(1, 32);
    worker.save(&names);
    for round in 0..5 {
        let lease = worker.query(round, &names).lease;
        assert_ne!(lease, 0, "round {round}: sealed blocks are hits");
        let upper: Vec<u32> = (32..64).collect();
        worker.wipe(0, &upper);
        let load = client.load(id, 0, lease, 0, &upper).expect("submitted");
        let fresh = hashes(1000 + 32 * round, 32);
        let lower = first_blocks(32);
        for (block, name) in lower.iter().zip(&fresh) {
            worker.compute(0, *block, name);
        }
        let save = client.save(id, 0, &fresh, &lower).expect("submitted");
        std::thread::sleep(Duration::from_millis(round));
        daemon.kill();
        let done = client.wait(load, SOON).expect("answered");
        match done.status {
            Status::Ok => {
                for (block, name) in upper.iter().zip(&names) {
                    assert_eq!(worker.verify(0, *block, name), Ok(()));
                }
                let none = client.unloaded_blocks(load);
                assert!(matches!(none, Err(Error::NoBlockList(_))));
            }
            status => {
                assert_eq!(status, Status::Disconnected);
                assert_eq!(client.unloaded_blocks(load).expect("kept"), upper);
            }
        }
        let saved = client.wait(save, SOON).expect("answered");
        let known = matches!(saved.status, Status::Ok | Status::Disconnected);
        assert!(known, "{}", saved.status);
        daemon.launch();
        assert!(is_back(client));
        worker.wait_ready();
        if saved.status == Status::Ok {
            assert_eq!(worker.fetch(100 + round, &fresh), saved.count as usize);
        }
        assert_eq!(worker.fetch(200 + round, &names), 32);
    }
}

#[test]
fn a_stopped_daemon_holds_no_call_beyond_its_bound_and_goes_on_where_it_was() {
    let daemon = Daemon::start();
    let options = || Options {
        control_timeout: Duration::from_millis(200),
        connect_timeout: Duration::from_millis(200),
        ring_slots: 16,
        ..daemon.options()
    };
    let worker = Worker::ready(options(), WorkerSpec::default());
    let leaving = Worker::ready(options(), WorkerSpec::default().instance("other"));
    let (client, id) = (&worker.client, worker.registration);
    let names = hashes(1, 10);
    worker.save(&names);
    daemon.signal(Signal::SIGSTOP);
    let began = Instant::now();
    let mut pending = Vec::new();
    let full = loop {
        match client.query(id, 0, pending.len() as u64, &names, 0) {
            Ok(request) => pending.push(request),
            Err(error) => break error,
        }
    };
    assert_eq!(full.status(), Status::Again);
    let bound = Duration::from_millis(50);
    let waited = client.wait(pending[0], bound).expect_err("nobody answers");
    assert_eq!(waited.status(), Status::Timeout);
    assert_eq!(client.poll(&mut [Completion::default()]), 0);
    assert_eq!(client.probe(id, 0, &names).expect("memory is read"), 10);
    let refused = client.alloc_host(4096).expect_err("nobody answers");
    assert_eq!(refused.status(), Status::Timeout);
    let refused = client.unregister(id).expect_err("nobody answers");
    assert_eq!(refused.status(), Status::Timeout);
    client.wait_ready(id, bound).expect("it is");
    drop(leaving);
    let refused = Client::connect(options()).expect_err("nobody answers");
    assert_eq!(refused.status(), Status::Timeout, "{refused}");
    let late = Client::connect(Options {
        start_without_daemon: Some(true),
        ..options()
    });
    let late = late.expect("begins without");
    assert_eq!(late.state(), State::Disconnected);
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(client.state(), State::Connected, "it is stopped, not gone");
    daemon.signal(Signal::SIGCONT);
    for request in pending {
        let done = client.wait(request, SOON).expect("it goes on");
        // The unregistration was in its hands all the same, and may come first.
        let status = done.status;
        assert!(
            matches!(status, Status::Ok | Status::UnknownRegistration),
            "{status}"
        );
    }
    assert!(is_back(&late));
    assert_eq!(client.stats().disconnects, 0);
}

#[test]
fn engines_come_through_a_storm_of_restarts() {
    let mut daemon = Daemon::start();
    let workers: Vec<Worker> = (0..8)
        .map(|number| {
            let spec = WorkerSpec::default().instance(&format!("engine-{number}"));
            Worker::ready(daemon.options(), spec)
        })
        .collect();
    let names = hashes(1, 30);
    workers[0].save(&names);
    for round in 0..10 {
        daemon.kill();
        daemon.launch();
        // Every other time the next restart does not wait for them.
        if round % 2 == 0 {
            continue;
        }
        for worker in &workers {
            assert!(is_back(&worker.client), "round {round}");
            worker.wait_ready();
            assert_eq!(worker.fetch(round, &names), 30, "round {round}");
        }
    }
    for worker in &workers {
        let stats = worker.client.stats();
        assert!(stats.disconnects <= 10 && stats.reconnects == stats.disconnects);
        assert_eq!(stats.refused_registrations, 0);
    }
}

#[test]
fn the_daemon_of_another_node_in_its_place_serves_its_own_blocks() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    worker.save(&names);
    let old = worker.query(1, &names).lease;
    let other = Daemon::start();
    daemon.kill();
    assert!(eventually(|| worker.client.state() != State::Connected));
    fs::remove_file(daemon.socket()).expect("its dead socket");
    fs::hard_link(other.socket(), daemon.socket()).expect("another one in its place");
    assert!(is_back(&worker.client));
    worker.wait_ready();
    let node = worker.client.session_info().expect("connected").node;
    assert_eq!(node, other.node());
    assert_eq!(worker.load_in(0, old, 0, &[7]).status, Status::UnknownLease);
    assert_eq!(worker.query(1, &names).count, 0, "it has other blocks");
    worker.save(&names);
    assert_eq!(worker.fetch(2, &names), 10);
    // The first one comes back, and the second one goes.
    fs::remove_file(daemon.socket()).expect("the link");
    drop(other);
    daemon.launch();
    assert!(is_back(&worker.client));
    worker.wait_ready();
    assert_eq!(worker.fetch(3, &names), 10);
}

#[test]
fn whatever_lies_at_the_sockets_place_the_daemon_is_found_when_it_comes() {
    let mut daemon = Daemon::start();
    let folder = daemon.folder().join("later");
    let socket = folder.join("daemon.sock");
    let client = Client::connect(Options {
        socket: Some(socket.clone()),
        ..early(&daemon)
    })
    .expect("begins without");
    let tried = |times: u64| {
        let before = client.stats().failed_attempts;
        assert!(eventually(|| {
            client.stats().failed_attempts >= before + times
        }));
        assert_eq!(client.state(), State::Disconnected);
    };
    tried(3);
    fs::create_dir(&folder).expect("a folder");
    tried(3);
    fs::write(&socket, "no socket").expect("a file");
    tried(3);
    fs::remove_file(&socket).expect("removed");
    fs::create_dir(&socket).expect("a folder in its place");
    tried(3);
    fs::remove_dir(&socket).expect("removed");
    fs::hard_link(daemon.socket(), &socket).expect("the daemon's");
    assert!(is_back(&client));
    daemon.kill();
    assert!(eventually(|| client.state() == State::Disconnected));
    // A socket that nobody listens on any more, and then the folder is gone.
    tried(3);
    fs::remove_dir_all(&folder).expect("removed");
    tried(3);
    fs::create_dir(&folder).expect("a folder");
    daemon.launch();
    fs::hard_link(daemon.socket(), &socket).expect("the daemon's");
    assert!(is_back(&client));
    assert_eq!(client.stats().disconnects, 1);
}

#[test]
fn an_engine_without_its_daemon_costs_next_to_no_cpu_and_leaves_nothing_when_killed() {
    let mut daemon = Daemon::prepare(Config::default());
    let mut command = Command::new(WORKER);
    command
        .env("PEGAFLOW_START_WITHOUT_DAEMON", "1")
        .env("PEGAFLOW_CLIENT_LOG", "off");
    let mut engine = WorkerProcess::spawn(command);
    let answer = engine.run(&Task::Open {
        socket: daemon.socket(),
        spec: WorkerSpec::default(),
    });
    assert!(answer.is_ok(), "{answer:?}");
    let before = procfs::cpu_time(engine.pid()).expect("alive");
    std::thread::sleep(Duration::from_secs(2));
    let used = procfs::cpu_time(engine.pid()).expect("alive") - before;
    assert!(used < Duration::from_millis(300), "{used:?} in two seconds");
    engine.kill();
    let left: Vec<PathBuf> = fs::read_dir(daemon.folder())
        .expect("the folder")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new());
    assert!(!daemon.shm().exists());
    daemon.launch();
    assert_eq!(daemon.gauge(pegaflow_shm::node::Gauge::Sessions), 0);
}
