//! The lane driven through its rings: real pool, real copies, no socket.

#![forbid(unsafe_code)]

mod counters;
mod drains;
mod hostile;
mod leases;
mod replicas;
mod restart;
mod rig;
mod tier;
