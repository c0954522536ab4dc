//! Isolation domains: who shares blocks by rule, and that nothing else reaches them.

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use pegaflow::{MissReason, Status};
use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::node::{Counter, field_text};
use pegaflow_tests::WorkerProcess;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::process::Task;
use pegaflow_tests::raw::RawClient;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use tempfile::NamedTempFile;

use crate::WORKER;
use crate::users::{OTHER_USER, as_other_user, as_user, open};

const THIRD_USER: &str = "54322";
const GROUP: &str = "54400";

/// A configuration file, and the arguments that name it.
fn rules(text: &str) -> (NamedTempFile, Config) {
    let mut file = NamedTempFile::new().expect("a file");
    file.write_all(text.as_bytes()).expect("written");
    let path = file.path().to_str().expect("a path").to_owned();
    (file, Config::with(&["--config", &path]))
}

fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn save(worker: &mut WorkerProcess, first: u64) -> u32 {
    worker.run(&Task::Save { first, count: 5 }).count
}

fn hits(worker: &mut WorkerProcess, key: u64, first: u64) -> (u32, u64) {
    let query = Task::Query {
        key,
        first,
        count: 5,
    };
    let answer = worker.run(&query);
    (answer.count, answer.lease)
}

fn probes(worker: &mut WorkerProcess, first: u64) -> u32 {
    worker.run(&Task::Probe { first, count: 5 }).count
}

#[test]
fn users_of_one_domain_share_blocks_and_no_other_user_reaches_them() {
    let text = format!(
        "allow-uid = [{THIRD_USER}]\n[[domain]]\nname = \"shared\"\nuids = [{}, {OTHER_USER}]\n",
        own_user()
    );
    let (_file, config) = rules(&text);
    let daemon = Daemon::start_with(config);
    let Some(mut other) = as_other_user("domains::shared", &daemon) else {
        return;
    };
    let third = as_user("domains::shared", &daemon, THIRD_USER, None);
    let mut third = third.expect("as before");
    let mut own = WorkerProcess::start(WORKER, &daemon, &WorkerSpec::default());
    for worker in [&mut other, &mut third] {
        let opened = worker.run(&open(&daemon));
        assert!(opened.is_ok(), "{opened:?}");
    }
    assert_eq!(save(&mut own, 1), 5);
    assert_eq!((probes(&mut other, 1), probes(&mut third, 1)), (5, 0));
    let (count, lease) = hits(&mut other, 1, 1);
    assert_eq!(count, 5, "the same domain");
    let load = Task::Load {
        lease,
        first: 1,
        count: 5,
    };
    assert_eq!(hits(&mut third, 1, 1), (0, 0), "another domain");
    let stolen = third.run(&load);
    assert_eq!(stolen.status, "unknown_lease", "a lease of another domain");
    assert!(other.run(&load).is_ok(), "it was not consumed by the thief");
    let node = daemon.node_reader().expect("running");
    let named: Vec<String> = node
        .sessions()
        .iter()
        .map(|row| field_text(&row.domain))
        .collect();
    assert_eq!(named.iter().filter(|name| *name == "shared").count(), 2);
    assert!(named.contains(&format!("uid-{THIRD_USER}")), "{named:?}");
}

#[test]
fn a_supplementary_group_admits_and_chooses_the_domain() {
    let text = format!("[[domain]]\nname = \"team\"\ngids = [{GROUP}]\n");
    let (_file, config) = rules(&text);
    let daemon = Daemon::start_with(config);
    let test = "domains::group";
    let Some(mut one) = as_user(test, &daemon, OTHER_USER, Some(GROUP)) else {
        return;
    };
    let mut two = as_user(test, &daemon, THIRD_USER, Some(GROUP)).expect("as before");
    let mut stranger = as_user(test, &daemon, THIRD_USER, None).expect("as before");
    assert!(one.run(&open(&daemon)).is_ok());
    let refused = stranger.run(&open(&daemon));
    assert_eq!(refused.status, "permission_denied", "{refused:?}");
    let spec = WorkerSpec::default().instance("two");
    let opened = two.run(&Task::Open {
        socket: daemon.socket(),
        spec,
    });
    assert!(opened.is_ok(), "{opened:?}");
    assert_eq!(save(&mut one, 1), 5);
    assert_eq!(hits(&mut two, 1, 1).0, 5);
}

#[test]
fn a_model_that_the_domain_may_not_use_is_refused_by_name() {
    let domain = |patterns| {
        format!(
            "[[domain]]\nname = \"some\"\nuids = [{}]\nnamespaces = [{patterns}]\n",
            own_user()
        )
    };
    let (_file, config) = rules(&domain("\"meta-llama/*\", \"test-\""));
    let daemon = Daemon::start_with(config);
    let refused = Worker::open(daemon.options(), WorkerSpec::default());
    let refused = refused.err().expect("a model of no pattern");
    assert_eq!(refused.status(), Status::PermissionDenied, "{refused}");
    for word in ["`test-model`", "`some`", "`meta-llama/*`"] {
        assert!(refused.to_string().contains(word), "{refused}");
    }
    let (_file, config) = rules(&domain("\"test-mode?\""));
    let daemon = Daemon::start_with(config);
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 5);
    worker.save(&names);
    assert_eq!(worker.fetch(1, &names), 5);
}

#[test]
fn a_restart_keeps_a_domains_blocks_until_its_rules_change() {
    let rule = |patterns| {
        format!(
            "[[domain]]\nname = \"some\"\nuids = [{}]\nnamespaces = [{patterns}]\n",
            own_user()
        )
    };
    let (file, config) = rules(&rule("\"*\""));
    let mut daemon = Daemon::start_with(config);
    let names = hashes(1, 5);
    Worker::ready(daemon.options(), WorkerSpec::default()).save(&names);
    daemon.kill();
    daemon.launch();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    assert_eq!(worker.fetch(1, &names), 5, "the same rules");
    drop(worker);
    daemon.kill();
    std::fs::write(file.path(), rule("\"*\", \"more\"")).expect("written");
    daemon.launch();
    assert_eq!(daemon.counter(Counter::AdoptedBlocks), 0);
    assert_eq!(daemon.counter(Counter::AdoptDiscarded), 5);
    assert!(
        daemon
            .log()
            .contains("isolation domains that the configuration has no more"),
        "{}",
        daemon.log()
    );
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    assert_eq!(worker.query(1, &names).count, 0, "another domain now");
}

#[test]
fn the_index_that_a_client_gets_holds_its_domain_alone_and_cannot_be_written() {
    let daemon = Daemon::start_with(Config::with(&["--allow-uid", OTHER_USER]));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let mine = hashes(1, 5);
    worker.save(&mine);
    let theirs = hashes(100, 5);
    if let Some(mut other) = as_other_user("domains::index", &daemon) {
        assert!(other.run(&open(&daemon)).is_ok());
        assert_eq!(save(&mut other, 100), 5);
    }
    let raw = RawClient::open(&daemon.socket());
    let flags = rustix::fs::fcntl_getfl(&raw.index).expect("open");
    assert!(!flags.intersects(rustix::fs::OFlags::RDWR | rustix::fs::OFlags::WRONLY));
    let file = std::fs::File::from(raw.index.try_clone().expect("a descriptor"));
    let found = file.metadata().expect("fstat");
    assert_eq!(found.mode() & 0o777, 0o400, "nor opened for writing again");
    let named = NamedFile::from_fd(raw.index, "index").expect("on tmpfs");
    assert!(named.map(Access::ReadWrite).is_err(), "nor mapped");
    let mut bytes = vec![0; found.len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    let holds = |hash: &[u8; 32]| bytes.windows(32).step_by(8).any(|window| window == hash);
    assert!(mine.iter().all(holds));
    assert!(!theirs.iter().any(holds));
}

#[test]
fn leases_and_request_keys_of_another_instance_are_of_no_use() {
    let daemon = Daemon::start();
    let spec = WorkerSpec::default();
    let left = Worker::ready(daemon.options(), spec.instance("left"));
    let right = Worker::ready(daemon.options(), spec.instance("right"));
    let salted = Worker::ready(daemon.options(), spec.instance("salted").salt("x"));
    let names = hashes(1, 5);
    left.save(&names);
    let lease = left.query(7, &names).lease;
    let same_key = right.query(7, &names);
    assert!(same_key.lease != 0 && same_key.lease != lease);
    for thief in [&right, &salted] {
        for guess in [lease, lease ^ 1, lease.wrapping_add(1 << 32), 0, u64::MAX] {
            if guess == same_key.lease {
                continue;
            }
            let loaded = thief.load_in(0, guess, 0, &[0, 1, 2, 3, 4]);
            assert_eq!(loaded.status, Status::UnknownLease, "{guess:#x}");
            assert_eq!(thief.release(guess).status, Status::UnknownLease);
        }
    }
    assert_eq!(salted.query(7, &names).count, 0);
    left.load_and_verify(lease, &names);
    right.load_and_verify(same_key.lease, &names);
}

#[test]
fn a_session_that_holds_leases_for_ever_leaves_some_to_others() {
    let daemon = Daemon::start_with(Config::with(&["--max-leases", "90"]));
    let spec = WorkerSpec::default();
    let greedy = Worker::ready(daemon.options(), spec.instance("greedy"));
    let modest = Worker::ready(daemon.options(), spec.instance("modest"));
    let names = hashes(1, 3);
    greedy.save(&names);
    let mut held = Vec::new();
    let refused = loop {
        let answer = greedy.query(held.len() as u64, &names);
        if answer.lease == 0 {
            break answer;
        }
        held.push(answer.lease);
        assert!(held.len() < 90, "all of them");
    };
    assert_eq!(held.len(), 72);
    assert_eq!(refused.reason, MissReason::NoLease);
    for key in 0..5 {
        assert_ne!(
            modest.query(key, &names).lease,
            0,
            "lease {key} of another session"
        );
    }
    assert_eq!(modest.fetch(0, &names), 3);
    for lease in &held[..60] {
        assert_eq!(greedy.release(*lease).status, Status::Ok);
    }
    assert_eq!(greedy.fetch(1000, &names), 3, "less than its share by now");
}

#[test]
fn a_user_who_connects_without_end_leaves_places_to_others() {
    let config = Config::with(&["--allow-uid", OTHER_USER, "--max-sessions", "18"]);
    let daemon = Daemon::start_with(config);
    let Some(mut other) = as_other_user("domains::places", &daemon) else {
        return;
    };
    let mut mine = Vec::new();
    let refused = loop {
        match pegaflow::Client::connect(daemon.options()) {
            Ok(client) => mine.push(client),
            Err(error) => break error,
        }
        assert!(mine.len() < 18, "all of them");
    };
    assert_eq!(mine.len(), 16);
    assert_eq!(refused.status(), Status::Limit, "{refused}");
    assert!(
        refused.to_string().contains("leaves the other 2"),
        "{refused}"
    );
    let opened = other.run(&open(&daemon));
    assert!(opened.is_ok(), "{opened:?}");
}
