//! An engine worker as a process of its own: see `pegaflow_tests::process`.

#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    pegaflow_tests::process::serve()
}
