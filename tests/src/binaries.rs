//! Finding the programs under test, and building them if nobody has.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The daemon.
pub fn pegaflowd() -> PathBuf {
    folder().join("pegaflowd")
}

/// The tool.
pub fn pegactl() -> PathBuf {
    folder().join("pegactl")
}

/// The repository's root.
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the tests folder lies in the repository")
        .to_owned()
}

/// Cargo's target folder of the running test.
///
/// # Panics
/// This program does not lie in one.
pub fn target() -> PathBuf {
    let profile = profile_folder();
    let target = profile.parent().expect("a profile's folder has a parent");
    target.to_owned()
}

/// Folder of this build's programs, such as `target/debug`.
///
/// # Panics
/// The build fails, or this program does not lie in a target folder.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| match std::env::var_os("PEGAFLOW_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => build(),
    })
}

/// Such as `target/debug`, from the place of this program.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("path of this program");
    let above = |folder: &&Path| !folder.ends_with("deps") && !folder.ends_with("examples");
    let folder = test.ancestors().skip(1).find(above);
    folder.expect("the test lies in a target folder").to_owned()
}

/// Builds the workspace's programs in the profile and target folder of the running test. The same
/// command as in the Makefile, down to `--tests`: otherwise the dependencies' features differ, and
/// cargo would replace libraries that the running `cargo test` still needs.
fn build() -> PathBuf {
    let folder = profile_folder();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--quiet",
            "--workspace",
            "--bins",
            "--tests",
            "--target-dir",
        ])
        .arg(target());
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let status = command
        .current_dir(repository())
        .status()
        .expect("cargo runs");
    assert!(
        status.success(),
        "building the programs under test failed: {status}"
    );
    folder
}
