//! Saying that a test could not run on this machine.

#![forbid(unsafe_code)]

use std::io::Write;

/// Notes that `test` did not run, and why: on stderr, and in the file that `PEGAFLOW_TEST_SKIPS`
/// names, which the summary of a CI run counts. The caller returns after it.
pub fn skip(test: &str, why: &str) {
    let line = format!("{test}: {why}\n");
    eprint!("skipped: {line}");
    let Some(path) = std::env::var_os("PEGAFLOW_TEST_SKIPS") else {
        return;
    };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    if let Ok(mut file) = file {
        // One write: lines of tests that run at the same time do not mix.
        if let Err(error) = file.write_all(line.as_bytes()) {
            eprintln!("the skip cannot be noted: {error}");
        }
    }
}
