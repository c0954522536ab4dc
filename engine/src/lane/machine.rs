//! What the lane takes from the machine that it runs on.

#![forbid(unsafe_code)]

use crate::clock::{Clock, SystemClock};
use crate::copy::{CopyThreads, CopyWorkers};

/// The time and the copy threads: all that happens to the lane without its doing. A simulation
/// brings its own of both.
pub trait Machine: 'static {
    /// Tells the time.
    type Clock: Clock;
    /// Runs copies.
    type Copies: CopyThreads;
}

/// A real machine.
#[derive(Clone, Copy, Debug)]
pub struct RealMachine;

impl Machine for RealMachine {
    type Clock = SystemClock;
    type Copies = CopyWorkers;
}
