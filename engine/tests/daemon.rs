//! The program `pegaflowd` as an operator meets it: options, errors, start, stop, restart.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pegaflowd");

/// Folders of one test: shared files on tmpfs, sockets elsewhere.
struct Place {
    shm: tempfile::TempDir,
    run: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        Place {
            shm,
            run: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.run.path().join("s.sock")
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PEGAFLOW_") {
                command.env_remove(name);
            }
        }
        command.env_remove("NOTIFY_SOCKET");
        command.env("PEGAFLOW_SHM_DIR", self.shm.path().join("nodes"));
        command.env("PEGAFLOW_SOCKET", self.socket());
        command.args(["--pool-size", "4MiB"]).args(flags);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn output(&self, flags: &[&str]) -> Output {
        self.command(flags).output().unwrap()
    }

    fn daemon(&self, flags: &[&str]) -> Daemon {
        Daemon::ready(self.command(flags))
    }
}

/// A running daemon and what it logged until it was ready.
struct Daemon {
    child: Child,
    lines: BufReader<std::process::ChildStderr>,
    log: String,
}

impl Daemon {
    fn ready(mut command: Command) -> Daemon {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut log = String::new();
        while !log.contains(" ready ") {
            assert_ne!(lines.read_line(&mut log).unwrap(), 0, "never ready:\n{log}");
        }
        Daemon { child, lines, log }
    }

    fn http(&self) -> String {
        let (_, rest) = self.log.split_once("address=").unwrap();
        rest.split_whitespace().next().unwrap().to_owned()
    }

    fn get(&self, page: &str) -> String {
        let mut stream = TcpStream::connect(self.http()).unwrap();
        write!(
            stream,
            "GET {page} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the end; its status and the rest of the log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn entries(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn check_prints_the_effective_configuration_or_every_error() {
    let place = Place::new();
    let good = place.output(&["--check"]);
    assert_eq!(good.status.code(), Some(0), "{}", stderr(&good));
    let text = String::from_utf8(good.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("pool_size"))
        .unwrap();
    assert!(
        line.contains("\"4MiB\"") && line.contains("# flag --pool-size"),
        "{text}"
    );
    let line = text
        .lines()
        .find(|line| line.starts_with("socket "))
        .unwrap();
    assert!(line.contains("# environment PEGAFLOW_SOCKET"), "{text}");

    let bad = place.output(&["--check", "--policy", "x", "--spin-us", "y"]);
    assert_eq!(bad.status.code(), Some(2));
    assert!(stderr(&bad).contains("policy = `x`"), "{}", stderr(&bad));
    assert!(stderr(&bad).contains("spin-us = `y`"), "{}", stderr(&bad));
    assert_eq!(place.output(&["--no-such-flag"]).status.code(), Some(2));
    assert!(
        entries(place.shm.path()).is_empty(),
        "a check leaves nothing behind"
    );
}

#[test]
fn pages_answer_and_sigterm_leaves_only_what_the_next_start_adopts() {
    let place = Place::new();
    for _ in 0..2 {
        let daemon = place.daemon(&["--http", "127.0.0.1:0"]);
        assert!(daemon.get("/health").contains("{\"status\":\"ok\""));
        assert!(
            daemon
                .get("/metrics")
                .contains("pegaflow_pool_bytes{state=\"total\"} 4194304")
        );
        assert!(place.socket().exists());
        daemon.signal(rustix::process::Signal::HUP);
        std::thread::sleep(Duration::from_millis(50));
        daemon.signal(rustix::process::Signal::TERM);
        let (code, log) = daemon.end();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("SIGHUP ignored"), "{log}");
        assert!(!place.socket().exists());
        let node = place.shm.path().join("nodes/default");
        assert_eq!(
            entries(&node),
            ["catalog", "lock", "node", "pool", "sessions"]
        );
        assert!(entries(&node.join("sessions")).is_empty());
    }
}

#[test]
fn a_killed_daemon_leaves_nothing_that_keeps_the_next_one_out() {
    let place = Place::new();
    let daemon = place.daemon(&["--http", "off"]);
    daemon.signal(rustix::process::Signal::KILL);
    daemon.end();
    assert!(place.socket().exists(), "a stale socket");
    let daemon = place.daemon(&["--http", "off"]);
    daemon.signal(rustix::process::Signal::INT);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn a_second_daemon_is_told_what_is_taken_and_by_whom() {
    let place = Place::new();
    let daemon = place.daemon(&["--http", "127.0.0.1:0"]);
    let pid = daemon.child.id().to_string();
    let http = daemon.http();
    let other = place.run.path().join("other.sock");
    let other = other.to_str().unwrap();
    for (flags, words) in [
        (
            vec!["--http", "off", "--socket", other],
            ["node `default`", "--node"],
        ),
        (
            vec!["--http", "off", "--node", "n2"],
            ["s.sock is already served", "--socket"],
        ),
    ] {
        let refused = place.output(&flags);
        let text = stderr(&refused);
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&pid) && words.iter().all(|word| text.contains(word)),
            "{text}"
        );
    }
    let flags = [
        "--node",
        "n2",
        "--socket",
        other,
        "--http",
        &http,
        "--log-level",
        "off",
    ];
    let refused = place.output(&flags);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains(&format!("--http {http}")),
        "{}",
        stderr(&refused)
    );
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn the_service_manager_hears_ready_with_a_status_then_stopping() {
    let place = Place::new();
    let path = place.run.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let hear = || {
        let mut bytes = [0; 1024];
        let length = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let mut command = place.command(&["--http", "off"]);
    command.env("NOTIFY_SOCKET", &path);
    let daemon = Daemon::ready(command);
    let ready = hear();
    assert!(
        ready.contains("READY=1") && ready.contains("STATUS=serving"),
        "{ready}"
    );
    daemon.signal(rustix::process::Signal::TERM);
    assert!(hear().contains("STOPPING=1"));
    assert_eq!(daemon.end().0, Some(0));
}

#[test]
fn json_lines_are_json() {
    let place = Place::new();
    let mut child = place
        .command(&["--http", "off", "--log-format", "json"])
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        if value["message"] == "ready" {
            assert_eq!(value["socket"], place.socket().to_str().unwrap());
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
