//! Whole-system tests: real daemon, real processes, real signals. One file per concept; a test's
//! name is the guarantee that it tries to break.

#![forbid(unsafe_code)]

mod attacks;
mod bytes;
mod c_api;
mod chaos;
mod checksums;
mod crash_points;
mod cycles;
mod domains;
mod footprint;
mod groups;
mod hostile;
mod kills;
mod leases;
mod limits;
mod metrics;
mod namespaces;
mod outlive;
mod ranks;
mod registration;
mod restart;
mod saves;
mod shutdown;
mod ssd;
mod ssd_faults;
mod startup;
mod upgrade;
mod users;
mod withheld;

/// The program of [`pegaflow_tests::WorkerProcess`].
const WORKER: &str = env!("CARGO_BIN_EXE_worker-process");
