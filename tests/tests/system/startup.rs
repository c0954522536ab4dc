//! Starting: bad input is refused by name and value, and nothing else is disturbed.

use std::fs;
use std::process::{Command, Output, Stdio};

use pegaflow_shm::paths;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon, private_node};
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{binaries, eventually};

/// Runs `pegaflowd` to its end, which a bound of the caller's patience makes sure of.
fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command
        .arg("20")
        .arg(binaries::pegaflowd())
        .args(arguments)
        .stdin(Stdio::null());
    command
        .env_remove("PEGAFLOW_CONFIG")
        .output()
        .expect("pegaflowd runs")
}

/// Runs it on a node of its own and expects a refusal with these words.
#[track_caller]
fn refused(arguments: &[&str], status: i32, words: &[&str]) {
    let node = private_node();
    let socket = std::env::temp_dir().join(format!("{node}.sock"));
    let socket = socket.to_str().expect("a path of text");
    let mut all = vec!["--node", &node, "--socket", socket];
    all.extend_from_slice(arguments);
    if !arguments.contains(&"--http") {
        all.extend_from_slice(&["--http", "off"]);
    }
    let output = run(&all);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
    for word in words {
        assert!(
            said.contains(word),
            "{arguments:?} does not say `{word}`: {said}"
        );
    }
    assert!(
        !fs::exists(socket).expect("asked"),
        "a refused start leaves no socket"
    );
    let left = fs::read_dir(paths::node_dir(&node)).map_or(0, Iterator::count);
    fs::remove_dir_all(paths::node_dir(&node)).ok();
    assert!(left <= 1, "a refused start leaves {left} files");
}

#[test]
fn unknown_flags_and_bad_values_are_named() {
    refused(&["--pool-sice", "1GiB"], 2, &["--pool-sice", "--pool-size"]);
    refused(&["--pool-size", "many"], 2, &["pool-size", "many", "1GiB"]);
    refused(&["--pool-size", "12"], 2, &["pool-size", "1MiB"]);
    refused(
        &["--policy", "random"],
        2,
        &["policy", "random", "lru", "s3-fifo"],
    );
    refused(&["--lease-ttl", "20"], 2, &["lease-ttl", "30s"]);
    refused(
        &["--lease-ttl", "20m", "--lease-ttl-max", "10m"],
        2,
        &["lease-ttl", "lease-ttl-max"],
    );
    refused(&["--max-sessions", "0"], 2, &["max-sessions", "1 to 256"]);
    refused(&["--max-sessions", "257"], 2, &["max-sessions", "1 to 256"]);
    refused(&["--copy-threads", "-1"], 2, &["copy-threads"]);
    refused(
        &["--allow-uid", "no-such-user"],
        2,
        &["allow-uid", "no-such-user"],
    );
    refused(
        &["--http", "0.0.0.0:1"],
        2,
        &["http", "--http-allow-remote"],
    );
    refused(&["--extent-size", "1000"], 2, &["extent-size"]);
    refused(
        &["--config", "/nonexistent.toml"],
        2,
        &["/nonexistent.toml"],
    );
    refused(&["surplus"], 2, &["surplus"]);
}

#[test]
fn several_mistakes_are_reported_at_once() {
    refused(
        &["--pool-size", "x", "--policy", "y"],
        2,
        &["pool-size", "policy"],
    );
}

#[test]
fn a_pool_larger_than_its_file_system_is_refused_with_the_sizes() {
    refused(&["--pool-size", "4000000GiB"], 2, &["pool-size", "remount"]);
}

#[test]
fn a_bad_node_name_or_socket_is_refused() {
    let output = run(&["--node", "../evil", "--socket", "/tmp/x.sock"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said.contains("../evil") && said.contains("letters, digits"),
        "{said}"
    );
    let output = run(&["--socket", "relative.sock"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("absolute"));
}

#[test]
fn an_unknown_key_of_the_file_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("pegaflow.toml");
    fs::write(&file, "pool-sise = \"1GiB\"\n").expect("written");
    let file = file.to_str().expect("text");
    refused(&["--config", file], 2, &["pool-sise", "pool-size", file]);
}

#[test]
fn check_prints_the_effective_configuration_which_reads_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let arguments = [
        "--check",
        "--pool-size",
        "256MiB",
        "--policy",
        "s3-fifo",
        "--node",
        "checked",
    ];
    let first = run(&arguments);
    assert_eq!(
        first.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&first.stderr)
    );
    let text = String::from_utf8(first.stdout).expect("text");
    assert!(
        text.contains("pool-size") && text.contains("256MiB"),
        "{text}"
    );
    assert!(
        text.contains("s3-fifo") && text.contains("checked"),
        "{text}"
    );
    let file = folder.path().join("pegaflow.toml");
    fs::write(&file, &text).expect("written");
    let again = run(&["--check", "--config", file.to_str().expect("text")]);
    assert_eq!(
        again.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    let values = |text: &str| -> Vec<String> {
        let kept = |line: &&str| !line.starts_with('#') && !line.trim().is_empty();
        let value = |line: &str| line.split('#').next().unwrap_or("").trim().to_owned();
        text.lines().filter(kept).map(value).collect()
    };
    assert_eq!(
        values(&text),
        values(&String::from_utf8(again.stdout).expect("text"))
    );
}

#[test]
fn the_operations_page_knows_every_flag() {
    let help = run(&["--help"]);
    let help = String::from_utf8(help.stdout).expect("text");
    let page = binaries::repository().join("docs/operations.md");
    let page = fs::read_to_string(page).expect("the page");
    let table: Vec<&str> = page
        .lines()
        .filter(|line| line.starts_with("| `--"))
        .filter_map(|line| line.split(" | ").next())
        .collect();
    let listed: Vec<&str> = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'))
        .collect();
    let ignored = ["--help", "--version"];
    let mut known = flags(&listed);
    known.retain(|flag| !ignored.contains(&flag.as_str()));
    assert!(known.len() > 15, "{known:?}");
    assert_eq!(flags(&table), known, "the table and --help differ");
}

/// The flags that these lines begin with, `--no-` forms included.
fn flags(lines: &[&str]) -> Vec<String> {
    let flags = lines.iter().flat_map(|line| {
        let words = line.split([' ', '`', ',', '[', '=', '|', '<']);
        words
            .filter(|word| word.starts_with("--") && word.len() > 2)
            .take(2)
    });
    let mut flags: Vec<String> = flags.map(str::to_owned).collect();
    flags.sort_unstable();
    flags.dedup();
    flags
}

#[test]
fn a_second_daemon_on_the_node_is_refused_and_the_first_goes_on() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 5);
    worker.save(&names);
    let other = daemon.folder().join("other.sock");
    let socket = other.to_str().expect("text");
    let output = run(&[
        "--node",
        daemon.node(),
        "--socket",
        socket,
        "--pool-size",
        "8MiB",
        "--http",
        "off",
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains(daemon.node()), "names the node: {said}");
    assert!(
        said.contains(&daemon.pid().to_string()),
        "names the process that holds it: {said}"
    );
    assert!(!other.exists());
    assert_eq!(worker.fetch(1, &names), 5);
}

#[test]
fn a_second_daemon_on_the_socket_is_refused_and_the_first_goes_on() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 5);
    worker.save(&names);
    let (socket, node) = (daemon.socket(), private_node());
    let socket = socket.to_str().expect("text");
    let output = run(&[
        "--node",
        &node,
        "--socket",
        socket,
        "--pool-size",
        "8MiB",
        "--http",
        "off",
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains(socket), "names the socket: {said}");
    assert!(daemon.socket().exists());
    assert_eq!(worker.fetch(1, &names), 5);
    assert_eq!(
        Worker::ready(daemon.options(), WorkerSpec::default().instance("new")).fetch(1, &names),
        5
    );
    fs::remove_dir_all(paths::node_dir(&node)).ok();
}

#[test]
fn a_file_that_is_no_socket_is_not_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("precious");
    fs::write(&file, "data").expect("written");
    let node = private_node();
    let path = file.to_str().expect("text");
    let output = run(&[
        "--node",
        &node,
        "--socket",
        path,
        "--pool-size",
        "8MiB",
        "--http",
        "off",
    ]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(path));
    assert_eq!(fs::read_to_string(&file).expect("still there"), "data");
    fs::remove_dir_all(paths::node_dir(&node)).ok();
}

#[test]
fn a_daemon_tells_systemd_when_it_serves() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notify");
    let notify = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
    notify
        .set_read_timeout(Some(pegaflow_tests::SOON))
        .expect("a bound");
    let environment = vec![(
        "NOTIFY_SOCKET".to_owned(),
        path.to_str().expect("text").to_owned(),
    )];
    let daemon = Daemon::start_with(Config {
        environment,
        ..Config::default()
    });
    let mut heard = [0; 4096];
    let mut said = String::new();
    let ready = eventually(|| {
        let count = notify.recv(&mut heard).unwrap_or(0);
        said.push_str(&String::from_utf8_lossy(&heard[..count]));
        said.contains("READY=1")
    });
    assert!(ready, "heard `{said}`");
    drop(daemon);
    let stopping = eventually(|| {
        let count = notify.recv(&mut heard).unwrap_or(0);
        said.push_str(&String::from_utf8_lossy(&heard[..count]));
        said.contains("STOPPING=1")
    });
    assert!(stopping, "heard `{said}`");
}
