//! Random layouts, block lists, cancels, evictions and deaths of engines over GPU memory, for as
//! long as is wanted: see `pegaflow_tests::gpu::conductor`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use pegaflow_tests::gpu::conductor::{Settings, run};

fn main() -> anyhow::Result<ExitCode> {
    let settings = Settings::from_environment()?;
    let summary = run(&settings)?;
    println!("{}", serde_json::to_string(&summary)?);
    Ok(if summary.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
