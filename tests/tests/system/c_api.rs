//! C and C++ programs against the installed library and a real daemon: plainly, under the address
//! and undefined-behaviour sanitizers, and under valgrind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use pegaflow_tests::binaries::{self, repository};
use pegaflow_tests::{Daemon, skip};

/// What `build-so.sh` laid out: `include/pegaflow.h`, `lib/libpegaflow.so`, `lib/pkgconfig`.
fn dist() -> &'static Path {
    static DIST: OnceLock<PathBuf> = OnceLock::new();
    DIST.get_or_init(|| {
        // Its own: cargo would find the library of a running `cargo test` replaced.
        let target = binaries::target().join("test-so");
        let dist = target.join("dist");
        let output = Command::new(repository().join("client-c/build-so.sh"))
            .arg("--debug")
            .env("DIST", &dist)
            .env("PREFIX", &dist)
            .env("CARGO_TARGET_DIR", target)
            .output()
            .expect("build-so.sh runs");
        assert!(output.status.success(), "{}", text(&output));
        dist
    })
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

/// Compiles a program of one file as pkg-config says, without a warning.
fn compile(compiler: &str, source: &Path, flags: &[&str], folder: &Path) -> PathBuf {
    let program = folder.join(source.file_stem().expect("a file"));
    let library = dist().join("lib");
    let asked = Command::new("pkg-config")
        .args(["--cflags", "--libs", "pegaflow"])
        .env("PKG_CONFIG_PATH", library.join("pkgconfig"))
        .output()
        .expect("pkg-config is installed");
    assert!(asked.status.success(), "{}", text(&asked));
    let told = String::from_utf8_lossy(&asked.stdout).into_owned();
    let output = Command::new(compiler)
        .args(flags)
        .args([
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-D_POSIX_C_SOURCE=200809L",
            "-o",
        ])
        .args([&program, source])
        .args(told.split_whitespace())
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .output()
        .expect("the compiler runs");
    assert!(
        output.status.success(),
        "{}: {}",
        source.display(),
        text(&output)
    );
    program
}

/// Runs a program, given as a command line, as a client of the daemon.
#[track_caller]
fn run(daemon: &Daemon, line: &[&str]) -> String {
    let output = Command::new(line[0])
        .args(&line[1..])
        .env("PEGAFLOW_SOCKET", daemon.socket())
        .env("PEGAFLOW_NODE", daemon.node())
        .env("ASAN_OPTIONS", "detect_leaks=1")
        .env("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")
        .output()
        .expect("the program runs");
    let said = text(&output);
    assert!(
        output.status.success(),
        "{line:?}: {}\n{said}\n{}",
        output.status,
        daemon.log()
    );
    said
}

/// Saves in one process and loads in another, with both kinds of memory.
fn save_and_load(flags: &[&str], runner: &[&str]) {
    let examples = repository().join("client-c/examples");
    let folder = tempfile::tempdir().expect("a folder");
    let program = |name: &str| compile("cc", &examples.join(name), flags, folder.path());
    let (save, load) = (program("save.c"), program("load.c"));
    let (save, load) = (save.to_str().expect("text"), load.to_str().expect("text"));
    for kind in [&[][..], &["own"]] {
        let daemon = Daemon::start();
        let saved = run(&daemon, &[runner, &[save], kind].concat());
        assert!(saved.contains("saved 64 blocks"), "{saved}");
        let loaded = run(&daemon, &[runner, &[load], kind].concat());
        assert!(loaded.contains("query: 64 hits"), "{loaded}");
        let again = run(&daemon, &[runner, &[save], kind].concat());
        assert!(
            again.contains("saved 0 blocks, 64 were there already"),
            "{again}"
        );
    }
}

#[test]
fn a_c_program_saves_and_another_one_loads() {
    save_and_load(&["-std=c11"], &[]);
}

#[test]
fn c_programs_are_clean_under_sanitizers() {
    save_and_load(&["-std=c11", "-fsanitize=address,undefined"], &[]);
}

#[test]
fn c_programs_are_clean_under_valgrind() {
    let present = Command::new("valgrind").arg("--version").output();
    if !present.is_ok_and(|output| output.status.success()) {
        skip("c_api::valgrind", "valgrind is not installed");
        return;
    }
    let runner = [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
    ];
    save_and_load(&["-std=c11"], &runner);
}

#[test]
fn a_c_event_loop_sleeps_on_the_completion_descriptor() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().expect("a folder");
    let source = repository().join("client-c/examples/events.c");
    let program = compile("cc", &source, &["-std=c11"], folder.path());
    run(&daemon, &[program.to_str().expect("text")]);
}

#[test]
fn cpp_programs_compile_and_run() {
    let examples = repository().join("client-c/examples");
    let files = std::fs::read_dir(examples).expect("the examples").flatten();
    let is_cpp = |path: &PathBuf| {
        path.extension()
            .is_some_and(|end| end == "cc" || end == "cpp")
    };
    let sources: Vec<PathBuf> = files.map(|file| file.path()).filter(is_cpp).collect();
    assert!(!sources.is_empty(), "there is an example in C++");
    for source in sources {
        let daemon = Daemon::start();
        let folder = tempfile::tempdir().expect("a folder");
        let flags = ["-std=c++17", "-fsanitize=address,undefined"];
        let program = compile("c++", &source, &flags, folder.path());
        run(&daemon, &[program.to_str().expect("text")]);
    }
}

#[test]
fn the_shared_library_has_its_name_and_versions() {
    let library = dist().join("lib/libpegaflow.so");
    let output = Command::new("readelf")
        .args(["--dynamic", "--dyn-syms", "--wide"])
        .arg(library)
        .output()
        .expect("readelf runs");
    let said = text(&output);
    assert!(
        said.contains("Library soname: [libpegaflow.so.0]"),
        "{said}"
    );
    assert!(said.contains("pega_connect@@PEGAFLOW_0.1"), "{said}");
}

#[test]
fn a_program_starts_a_daemon_itself_when_it_is_asked_to() {
    let daemon = Daemon::prepare(pegaflow_tests::daemon::Config::default());
    let folder = tempfile::tempdir().expect("a folder");
    let source = repository().join("client-c/examples/events.c");
    let program = compile("cc", &source, &["-std=c11"], folder.path());
    let start = || {
        Command::new(&program)
            .env("PEGAFLOW_AUTOSTART", "1")
            .env("PEGAFLOW_DAEMON", binaries::pegaflowd())
            .env("PEGAFLOW_NODE", daemon.node())
            .env("PEGAFLOW_SOCKET", daemon.socket())
            .env("PEGAFLOW_POOL_SIZE", "16MiB")
            .env("PEGAFLOW_HTTP", "off")
            .output()
            .expect("the program runs")
    };
    let first = start();
    assert!(first.status.success(), "{}", text(&first));
    let pid = daemon
        .node_reader()
        .expect("a daemon was started")
        .header()
        .pid;
    let second = start();
    assert!(second.status.success(), "{}", text(&second));
    assert_eq!(
        daemon.node_reader().expect("still there").header().pid,
        pid,
        "no second one"
    );
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
    let ended =
        pegaflow_tests::eventually(|| !pegaflow_tests::procfs::is_alive(pid.as_raw() as u32));
    assert!(ended, "it ends when it is told to");
    assert!(daemon.leftovers().is_empty(), "{:?}", daemon.leftovers());
}

#[test]
fn a_c_engine_starts_before_its_daemon_and_outlives_it() {
    let mut daemon = Daemon::prepare(pegaflow_tests::daemon::Config::default());
    let folder = tempfile::tempdir().expect("a folder");
    let source = repository().join("client-c/examples/outlive.c");
    let flags = ["-std=c11", "-fsanitize=address,undefined"];
    let program = compile("cc", &source, &flags, folder.path());
    let mut engine = Command::new(program)
        .env("PEGAFLOW_SOCKET", daemon.socket())
        .env("PEGAFLOW_NODE", daemon.node())
        .env("ASAN_OPTIONS", "detect_leaks=1")
        .env("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut lines = BufReader::new(engine.stdout.take().expect("piped")).lines();
    let mut until = |words: &str| {
        let found = lines.by_ref().find(|line| {
            let line = line.as_ref().expect("the engine goes on");
            line.starts_with(words)
        });
        assert!(found.is_some(), "{words}: the engine has ended");
    };
    until("loaded 0, away 0 times");
    daemon.launch();
    until("loaded 8, away 0 times");
    for round in 1..=3 {
        daemon.kill();
        until(&format!("loaded 0, away {round} times"));
        daemon.launch();
        until(&format!("loaded 8, away {round} times"));
    }
    drop(engine.stdin.take());
    let status = engine.wait().expect("wait");
    assert!(status.success(), "{status}");
}
