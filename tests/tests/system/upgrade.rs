//! Rolling upgrades: each released version of the protocol, frozen as a client and as a daemon in C
//! that share nothing with the crates, against the other side as it is today.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pegaflow::{Client, Options, State, Status};
use pegaflow_shm::control::{DaemonMessage, PROTOCOL_MAX};
use pegaflow_tests::binaries::repository;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::Config;
use pegaflow_tests::raw::{RawSocket, hello};
use pegaflow_tests::{Daemon, Worker, WorkerSpec, eventually, procfs};

/// Compiles a frozen program, clean under the sanitizers.
fn frozen(name: &str) -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().expect("a folder"));
    let source = repository().join("tests/frozen").join(name);
    // A file of its own for each test that asks.
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let program = folder.path().join(format!("frozen-{number}"));
    let output = Command::new("cc")
        .args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"])
        .args(["-fsanitize=address,undefined", "-o"])
        .args([&program, &source])
        .output()
        .expect("the compiler runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", source.display());
    program
}

fn sanitized(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")
        .env("ASAN_OPTIONS", "detect_leaks=0");
    command
}

/// A daemon that speaks protocol 1 and nothing else.
struct FrozenDaemon {
    child: Child,
}

impl FrozenDaemon {
    fn start(socket: &Path) -> FrozenDaemon {
        let child = sanitized(&frozen("v1/daemon.c"))
            .arg(socket)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the frozen daemon starts");
        assert!(eventually(|| procfs::listens(socket)), "it listens");
        FrozenDaemon { child }
    }

    /// Ends it; it must have had nothing to complain about.
    fn stop(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("it lives");
        let status = self.child.wait().expect("wait");
        let mut said = String::new();
        let errors = self.child.stderr.as_mut().expect("piped");
        errors.read_to_string(&mut said).expect("text");
        assert!(status.success(), "{status}: {said}");
    }
}

impl Drop for FrozenDaemon {
    fn drop(&mut self) {
        // Ended by `stop` already, unless the test fails.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn protocol(client: &Client) -> Option<u32> {
    client.session_info().map(|welcome| welcome.protocol)
}

/// Saves, is told of the hits, loads into other blocks, finds every byte right.
fn save_and_load(worker: &Worker, key: u64, count: u32) {
    let names = hashes(key * 1000, count as usize);
    worker.save(&names);
    let answer = worker.query(key, &names);
    assert_eq!((answer.status, answer.count), (Status::Ok, count));
    let blocks: Vec<u32> = (0..count).map(|block| 63 - block).collect();
    let request = worker
        .client
        .load(worker.registration, 0, answer.lease, 0, &blocks);
    let done = worker.finish(request);
    assert_eq!((done.status, done.count), (Status::Ok, count));
    for (block, name) in blocks.iter().zip(&names) {
        assert_eq!(worker.verify(0, *block, name), Ok(()));
    }
}

#[test]
fn a_client_of_protocol_1_gets_every_answer_from_this_daemon() {
    let daemon = Daemon::start();
    let output = sanitized(&frozen("v1/client.c"))
        .arg(daemon.socket())
        .output()
        .expect("the frozen client runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", daemon.log());
}

#[test]
fn a_client_of_protocol_1_hears_of_a_stop_in_words_that_it_knows() {
    let mut daemon = Daemon::start();
    let mut child = sanitized(&frozen("v1/client.c"))
        .arg(daemon.socket())
        .arg("wait")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the frozen client runs");
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("text");
    if line.trim() == "waiting" {
        assert!(daemon.stop().success());
    }
    let output = child.wait_with_output().expect("wait");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", daemon.log());
    assert_eq!(line, "waiting\n");
}

#[test]
fn this_library_works_with_a_daemon_of_protocol_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("daemon.sock");
    let frozen = FrozenDaemon::start(&socket);
    let options = Options {
        socket: Some(socket),
        autostart: Some(false),
        ..Options::default()
    };
    let worker = Worker::ready(options, WorkerSpec::default());
    assert_eq!(protocol(&worker.client), Some(1));
    for key in 1..5 {
        save_and_load(&worker, key, 5 * key as u32);
    }
    drop(worker);
    frozen.stop();
}

#[test]
fn engines_stay_while_the_daemon_goes_up_and_down_between_protocol_1_and_this_one() {
    let mut daemon = Daemon::prepare(Config::default());
    let mut frozen = Some(FrozenDaemon::start(&daemon.socket()));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    for round in 0..3u64 {
        let before = worker.client.stats().reconnects;
        save_and_load(&worker, 10 + round, 8);
        // Up: nobody tells the old daemon's clients; the end of the socket does.
        if let Some(old) = frozen.take() {
            assert_eq!(protocol(&worker.client), Some(1));
            old.stop();
            daemon.launch();
        } else {
            // Down again, after a word of goodbye.
            assert_eq!(protocol(&worker.client), Some(PROTOCOL_MAX));
            assert!(daemon.stop().success());
            frozen = Some(FrozenDaemon::start(&daemon.socket()));
        }
        let is_back = || {
            worker.client.stats().reconnects > before && worker.client.state() == State::Connected
        };
        assert!(eventually(is_back), "round {round}");
        worker.wait_ready();
    }
    save_and_load(&worker, 20, 8);
    drop(worker);
    if let Some(old) = frozen {
        old.stop();
    }
}

#[test]
fn a_client_without_a_common_version_is_refused_by_name() {
    let daemon = Daemon::start();
    let socket = RawSocket::connect(&daemon.socket());
    let mut newer = hello(4096);
    (newer.protocol_min, newer.protocol_max) = (PROTOCOL_MAX + 1, PROTOCOL_MAX + 2);
    socket.send(&pegaflow_shm::control::ClientMessage::Hello(newer), &[]);
    let Some((DaemonMessage::Refused { status, message }, _)) = socket.receive() else {
        panic!("not refused");
    };
    assert_eq!(status, Status::VersionMismatch, "{message}");
    let theirs = format!("{} to {}", PROTOCOL_MAX + 1, PROTOCOL_MAX + 2);
    assert!(
        message.contains(&theirs) && message.contains("upgrade"),
        "{message}"
    );
    // The refusal of a version is no fault of the daemon's: the next client is served.
    drop(daemon.connect());
}
