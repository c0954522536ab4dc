//! Peers of the product's rings, measured beside them in the same run.
//!
//! | module | peer | between |
//! | --- | --- | --- |
//! | `threads` | crossbeam's `ArrayQueue`, rtrb | two threads of one process |
//! | `iceoryx` | iceoryx2 publish-subscribe, polled | two processes |

#![forbid(unsafe_code)]

#[cfg(feature = "peers")]
pub mod iceoryx;
#[cfg(feature = "peers")]
pub mod threads;

use std::error::Error;

/// A 64-byte message, as large as the product's slot.
pub type Message = [u64; 8];

/// Batches of round trips, and round trips in each.
pub const BATCHES: u64 = 200;
/// See [`BATCHES`].
pub const PER_BATCH: u64 = 100;
/// Messages of a one-way stream.
pub const STREAM_MESSAGES: u64 = 1_000_000;

/// Result of a bench.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What one peer came to in one round.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Median round trip in nanoseconds.
    pub rtt_ns: f64,
    /// One way, millions of messages per second.
    pub oneway_mps: f64,
}

/// Times batches of round trips; the median mean in nanoseconds.
///
/// # Errors
/// What the round trip fails with.
pub fn round_trips(mut round_trip: impl FnMut(u64) -> Outcome<()>) -> Outcome<f64> {
    let mut number = 0;
    let mut means = Vec::with_capacity(BATCHES as usize);
    for _ in 0..BATCHES {
        let start = std::time::Instant::now();
        for _ in 0..PER_BATCH {
            number += 1;
            round_trip(number)?;
        }
        means.push(start.elapsed().as_nanos() as f64 / PER_BATCH as f64);
    }
    Ok(pegaflow_tools::replay::latency::median(&means))
}
