//! What `/health` says: the daemon's phase, and how long ago the lane gave a sign of life.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::lane::api::LaneHandle;

/// How often the lane is asked for a sign of life.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);

/// Life of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Phase {
    /// The pool is being brought up.
    Starting = 0,
    /// Clients are served.
    Ok = 1,
    /// Running requests are completed, new ones refused.
    Draining = 2,
}

/// The phase and the heartbeat.
#[derive(Debug)]
pub struct Health {
    phase: AtomicU8,
    started: Instant,
    /// Milliseconds from `started` to the lane's last answer, and 1 more; 0 before the first.
    beat_ms: AtomicU64,
}

/// The body of `/health`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Phase.
    pub status: Phase,
    /// Milliseconds since the lane last answered; `null` before its first answer.
    pub lane_heartbeat_age_ms: Option<u64>,
    /// Milliseconds since the daemon started.
    pub uptime_ms: u64,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            phase: AtomicU8::new(Phase::Starting as u8),
            started: Instant::now(),
            beat_ms: AtomicU64::new(0),
        }
    }
}

impl Health {
    /// Sets the phase.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Starting,
            1 => Phase::Ok,
            _ => Phase::Draining,
        }
    }

    /// The lane gave a sign of life.
    pub fn beat(&self) {
        self.beat_ms.store(self.uptime_ms() + 1, Ordering::Relaxed);
    }

    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// What to answer now.
    pub fn report(&self) -> Report {
        let uptime_ms = self.uptime_ms();
        let beat = self.beat_ms.load(Ordering::Relaxed).checked_sub(1);
        Report {
            status: self.phase(),
            lane_heartbeat_age_ms: beat.map(|beat| uptime_ms.saturating_sub(beat)),
            uptime_ms,
        }
    }

    /// Asks the lane again and again and notes when it answered. Ends with the lane.
    pub async fn watch_lane(&self, lane: &LaneHandle) {
        while lane.ping().await.is_ok() {
            self.beat();
            tokio::time::sleep(HEARTBEAT_EVERY).await;
        }
    }
}
