//! What this process shares with the kernel's view of it: forks, signals, tracers, small waits.

pub(crate) mod process;

use std::time::Duration;

use rustix::event::Timespec;

/// A duration as the kernel takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
