//! `pegaflowd`: reads the configuration, checks it, runs the daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use pegaflow_engine::{config, daemon, fault};

/// The daemon failed while running.
const FAILED: u8 = 1;
/// The configuration was refused, on the command line or elsewhere.
const BAD_CONFIGURATION: u8 = 2;

fn main() -> ExitCode {
    // clap exits with 0 after --help and --version, and with 2 for an unknown flag.
    let matches = config::command().get_matches();
    let environment = std::env::vars_os().filter_map(|(name, value)| {
        // A value that is not UTF-8 is kept visible, so that its check refuses it by name.
        Some((
            name.into_string().ok()?,
            value.to_string_lossy().into_owned(),
        ))
    });
    let loaded = match config::load(&matches, environment) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if loaded.check_only {
        print!("{}", loaded.effective_toml());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = fault::check_environment() {
        eprintln!("error: {error}");
        return ExitCode::from(BAD_CONFIGURATION);
    }
    daemon::log::start(&loaded.config);
    match daemon::run(&loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if tracing::enabled!(tracing::Level::ERROR) {
                tracing::error!("{error}");
            } else {
                eprintln!("error: {error}");
            }
            ExitCode::from(FAILED)
        }
    }
}
