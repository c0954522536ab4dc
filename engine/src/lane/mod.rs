//! The lane: the one thread that owns the cache and polls every session's ring.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`api`] | commands and events between the control thread and the lane |
//! | [`wake`] | waking the lane when it sleeps |
//! | `run` | the loop: poll, copy results, timers, sleep |
//! | [`machine`] | the clock and the copy threads, which a simulation replaces |
//! | `session` | one session's rings, registrations and unfinished requests |
//! | `commands` | sessions and registrations come and go |
//! | `submit` | a submission is checked and its chunks put together |
//! | `query`, `save`, `load`, `lease_ops` | the operations |
//! | `tier`, `prefetch`, `below` | the tier below the pool: writing, fetching, queries that wait |
//! | `tasks` | copy tasks out and back |
//! | `backlog` | copy tasks that wait for their session's turn |
//! | `stuck` | copies that a client's process holds up |
//! | `upkeep` | expiry, stalled rings, gauges and tables |
//! | `fuzz` | hostile clients at a lane that is turned by hand |
//! | `tally` | counters gathered between two publications |

#![forbid(unsafe_code)]

pub mod api;
mod backlog;
mod below;
mod commands;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod lease_ops;
mod load;
mod machine;
mod options;
mod prefetch;
mod query;
mod request;
mod run;
mod save;
mod session;
#[cfg(test)]
mod simulated;
mod start;
mod stuck;
mod submit;
mod tally;
mod tasks;
mod tier;
mod upkeep;
mod wake;

#[cfg(test)]
mod tests;

pub use machine::{Machine, RealMachine};
pub use options::LaneOptions;
#[cfg(test)]
pub(crate) use simulated::{SimLane, Turned};
pub use start::{LaneStartError, OpenStore, StartedLane, start};
pub use wake::LaneWake;
