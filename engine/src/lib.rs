//! The PegaFlow node daemon as a library; `pegaflowd` is a thin `main` over it.

pub mod cache;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod control;
pub mod copy;
pub mod daemon;
#[allow(dead_code, reason = "pinning and news to the sessions come next")]
pub mod device;
pub mod fault;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod isolation;
pub mod lane;
pub mod layout;
pub mod metrics;
pub use pegaflow_policy as policy;
pub mod pool;
pub mod registry;
pub mod tier;

#[cfg(test)]
mod sim;
