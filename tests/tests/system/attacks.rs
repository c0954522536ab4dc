//! Attacks as often as one process can: whoever else is connected is served meanwhile, sessions end
//! with a named reason, and the daemon keeps nothing.

use std::time::Duration;

use pegaflow_shm::node::Gauge;
use pegaflow_tests::attack::Attack;
use pegaflow_tests::chaos::leftovers::Usage;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::raw::RawSocket;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{eventually, procfs, trials};

/// What the daemon's allocator may keep, in KiB, whatever the number of attacks.
const MEMORY_SLACK_KIB: u64 = 16 << 10;
/// Each attack takes so long.
const ATTACK: Duration = Duration::from_millis(400);

/// Words with which the log names why sessions of an attack end; nothing where they end well.
fn reason(attack: Attack) -> Option<&'static str> {
    match attack {
        Attack::Scribble => Some("submission ring"),
        Attack::Descriptors => Some("descriptor:"),
        Attack::ReadsNothing => Some("messages wait for the client to read its socket"),
        _ => None,
    }
}

fn daemon() -> Daemon {
    Daemon::start_with(Config {
        pool: "128MiB".into(),
        extent: "2MiB".into(),
        ..Config::with(&["--incomplete-ttl", "1s"])
    })
}

fn alone(daemon: &Daemon, after: &str) {
    let expected = [
        (Gauge::Sessions, 1),
        (Gauge::Instances, 1),
        (Gauge::Leases, 0),
        (Gauge::BlocksPinned, 0),
        (Gauge::CopyTasks, 0),
        (Gauge::Requests, 0),
    ];
    for (gauge, value) in expected {
        assert!(
            daemon.gauge_becomes(gauge, value),
            "after {after}: {gauge:?} is {}",
            daemon.gauge(gauge)
        );
    }
}

#[test]
fn no_attack_keeps_others_from_being_served_or_leaves_anything() {
    let daemon = daemon();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 8);
    worker.save(&names);
    let mut key = 0;
    let mut serve = || {
        key += 1;
        // A flood of saves may evict the blocks; it may not change them.
        if worker.fetch(key, &names) < names.len() {
            worker.save(&names);
        }
    };
    serve();
    let before = Usage::of(&daemon).expect("it runs");
    for attack in Attack::ALL {
        let socket = daemon.socket();
        let seen = daemon.log().len();
        let attacker = std::thread::spawn(move || attack.run(&socket, ATTACK));
        let mut served = 0;
        while !attacker.is_finished() {
            serve();
            served += 1;
        }
        let attacked = attacker.join().expect("no panic").expect("it could begin");
        assert!(
            attacked > 0 && served > 0,
            "{attack:?}: {attacked} {served}"
        );
        alone(&daemon, attack.label());
        // Connections that never became sessions hold places, too, until they are closed.
        eventually(|| procfs::descriptors(daemon.pid()) <= before.descriptors);
        if let Some(reason) = reason(attack) {
            assert!(
                eventually(|| daemon.log()[seen..].contains(reason)),
                "{attack:?} ends without `{reason}`:\n{}",
                &daemon.log()[seen..]
            );
        }
    }
    let after = Usage::settled(&daemon, before.threads).expect("it runs");
    assert!(
        after.descriptors <= before.descriptors
            && after.threads <= before.threads
            && after.memory_kib <= before.memory_kib + MEMORY_SLACK_KIB,
        "before {before:?}, after {after:?}"
    );
    assert_eq!(worker.client.stats().disconnects, 0);
}

#[test]
fn any_number_of_connections_that_come_and_go_leaves_nothing() {
    let daemon = daemon();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 8);
    worker.save(&names);
    worker.fetch(1, &names);
    let before = Usage::of(&daemon).expect("it runs");
    for connection in 0..trials("PEGAFLOW_HOSTILE_TRIALS", 500) {
        drop(RawSocket::connect(&daemon.socket()));
        if connection % 100 == 0 {
            assert_eq!(worker.fetch(2 + connection, &names), 8);
        }
    }
    alone(&daemon, "connections");
    eventually(|| procfs::descriptors(daemon.pid()) <= before.descriptors);
    let after = Usage::settled(&daemon, before.threads).expect("it runs");
    assert!(
        after.descriptors <= before.descriptors
            && after.memory_kib <= before.memory_kib + MEMORY_SLACK_KIB,
        "before {before:?}, after {after:?}"
    );
    assert_eq!(worker.client.stats().disconnects, 0);
}
