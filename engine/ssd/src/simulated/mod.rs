//! A whole tier over drives in memory, without threads and without a clock: power losses, faults
//! and hangs from a seed.

#![forbid(unsafe_code)]

mod faults;
mod powerloss;
mod rig;
