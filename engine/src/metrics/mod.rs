//! The HTTP pages: `/metrics` for Prometheus, `/health` for probes.
//!
//! Both are made from the node file and a heartbeat, without asking the lane: they answer while it
//! is busy.
//!
//! | file | what it does |
//! | --- | --- |
//! | `devices` | the GPUs' rows of the node file |
//! | [`exposition`] | the text of `/metrics` |
//! | [`health`] | phase of the daemon, age of the lane's last sign of life |
//! | `ssds` | the SSD tier's shards on the page |
//! | `server` | connections, bounded; routes |

#![forbid(unsafe_code)]

mod devices;
pub mod exposition;
pub mod health;
mod server;
mod ssds;

#[cfg(test)]
mod tests;

pub use devices::publish_devices;
pub use health::{Health, Phase};
pub use server::{HttpError, HttpServer, MAX_HTTP_CONNECTIONS};
