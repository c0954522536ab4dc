//! Running compilers and programs for the tests of the C side.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder of this package.
pub fn client_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles one file, any warning being an error.
pub fn compile(compiler: &str, source: &Path, output: &Path, flags: &[&str], libraries: &[&str]) {
    let mut command = Command::new(compiler);
    command
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-O1"])
        .args(flags);
    command.arg("-I").arg(client_dir().join("include"));
    command.arg("-o").arg(output).arg(source).args(libraries);
    let done = command
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}\n{said}");
}

/// True if the program can be found.
pub fn has(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|done| done.status.success())
}
