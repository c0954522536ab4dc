//! The GPUs' rows of the node file.

#![forbid(unsafe_code)]

use std::time::Duration;

use pegaflow_shm::node::{Gauge, NodeWriter};
use tokio::time::{MissedTickBehavior, interval};

use crate::device::Devices;

/// How old a row is at most.
const EVERY: Duration = Duration::from_millis(500);

/// Writes what the devices have done into the node file, until the future is dropped. Its only
/// writer; without devices there is nothing to write.
pub async fn publish_devices(devices: Devices, node: NodeWriter) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !devices.rows().is_empty() {
        ticks.tick().await;
        node.set(Gauge::PoolPinnedBytes, devices.pinned_bytes());
        for (position, row) in devices.rows().iter().enumerate() {
            node.write_device(position, row);
        }
    }
}
