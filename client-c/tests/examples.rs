//! The C examples compile without a warning and run clean: plainly, under AddressSanitizer with
//! leak detection, and under valgrind where it is installed.

mod fake;
mod tools;

use std::path::{Path, PathBuf};
use std::process::Command;

use fake::Fake;
use tools::{client_dir, compile, has};

/// The static library that was built together with this test.
fn library() -> PathBuf {
    let path = std::env::current_exe()
        .unwrap()
        .with_file_name("libpegaflow.a");
    assert!(
        path.exists(),
        "{} is missing: run through cargo test",
        path.display()
    );
    path
}

const SYSTEM: [&str; 4] = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];

fn build(name: &str, folder: &Path, sanitize: bool) -> PathBuf {
    build_file(&client_dir().join("examples").join(name), folder, sanitize)
}

fn build_file(source: &Path, folder: &Path, sanitize: bool) -> PathBuf {
    let program = folder.join(source.file_stem().unwrap());
    let library = library();
    let mut libraries = vec![library.to_str().unwrap()];
    libraries.extend(SYSTEM);
    let flags: &[&str] = if sanitize {
        &["-std=c11", "-fsanitize=address,undefined"]
    } else {
        &["-std=c11"]
    };
    let flags: Vec<&str> = flags
        .iter()
        .copied()
        .chain(["-D_POSIX_C_SOURCE=200809L"])
        .collect();
    compile("cc", source, &program, &flags, &libraries);
    program
}

fn run(mut command: Command, socket: &Path) -> String {
    command
        .env("PEGAFLOW_SOCKET", socket)
        .env_remove("PEGAFLOW_AUTOSTART");
    command.env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0");
    let done = command.output().unwrap();
    let (out, said) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(
        done.status.success(),
        "{command:?}: {}\n{out}\n{said}",
        done.status
    );
    out.into_owned()
}

fn run_all(wrap: impl Fn(&Path) -> Command, sanitize: bool) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("daemon.sock");
    let [save, load, events] =
        ["save.c", "load.c", "events.c"].map(|name| build(name, folder.path(), sanitize));
    for memory in ["shared", "own"] {
        let _fake = Fake::start(&socket);
        let with = |program: &Path| {
            let mut command = wrap(program);
            command.arg(memory);
            command
        };
        assert!(run(with(&save), &socket).starts_with("saved 64 blocks, 0 were there"));
        assert!(run(with(&save), &socket).starts_with("saved 0 blocks, 64 were there"));
        let said = run(with(&load), &socket);
        assert!(
            said.contains("probe: 64 of 65") && said.contains("every byte is right"),
            "{said}"
        );
        assert_eq!(run(wrap(&events), &socket), "100 requests finished\n");
    }
}

#[test]
fn examples_run() {
    run_all(|program| Command::new(program), false);
}

#[test]
fn examples_run_under_address_sanitizer() {
    run_all(|program| Command::new(program), true);
}

#[test]
fn examples_run_under_valgrind() {
    if !has("valgrind") {
        eprintln!("skipped: valgrind is not installed");
        return;
    }
    let valgrind = |program: &Path| {
        let mut command = Command::new("valgrind");
        command.args([
            "--error-exitcode=99",
            "--leak-check=full",
            "--show-leak-kinds=definite",
        ]);
        command.args([
            "--errors-for-leak-kinds=definite,indirect,possible",
            "--quiet",
        ]);
        command.arg(program);
        command
    };
    run_all(valgrind, false);
}

#[test]
fn the_program_in_the_documentation_runs() {
    let text = std::fs::read_to_string(client_dir().join("../docs/c-api.md")).unwrap();
    let program = text
        .rsplit("```c\n")
        .next()
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("documented.c");
    std::fs::write(&source, program).unwrap();
    let socket = folder.path().join("daemon.sock");
    let _fake = Fake::start(&socket);
    let said = run(
        Command::new(build_file(&source, folder.path(), true)),
        &socket,
    );
    assert_eq!(said, "stored 1, skipped 0\nloaded 1: right\n");
}

#[test]
fn without_a_daemon_an_example_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let save = build("save.c", folder.path(), false);
    let mut command = Command::new(save);
    command.env("PEGAFLOW_SOCKET", folder.path().join("nobody.sock"));
    let done = command.env_remove("PEGAFLOW_AUTOSTART").output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1));
    assert!(
        said.starts_with("pega_connect: no_daemon: no daemon answers on"),
        "{said}"
    );
}
