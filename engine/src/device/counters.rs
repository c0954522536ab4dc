//! What a device's thread has done, for the node file.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::copy::Direction;

/// How a chunk went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkPlan {
    pub(super) staged: bool,
    pub(super) bounced: bool,
}

/// Written by the device's thread and by who hands tasks to it, read by who publishes them.
#[derive(Debug, Default)]
pub(super) struct CardCounters {
    /// Loads, then saves.
    bytes: [AtomicU64; 2],
    busy_nanos: [AtomicU64; 2],
    direct_bytes: AtomicU64,
    staged_bytes: AtomicU64,
    bounced_bytes: AtomicU64,
    tasks: AtomicU64,
    staging_bytes: AtomicU64,
    downs: AtomicU64,
}

/// One reading of [`CardCounters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CardFigures {
    pub(super) saved_bytes: u64,
    pub(super) loaded_bytes: u64,
    pub(super) save_busy_nanos: u64,
    pub(super) load_busy_nanos: u64,
    pub(super) direct_bytes: u64,
    pub(super) staged_bytes: u64,
    pub(super) bounced_bytes: u64,
    pub(super) tasks: u64,
    pub(super) staging_bytes: u64,
    pub(super) downs: u64,
}

fn at(direction: Direction) -> usize {
    match direction {
        Direction::Load => 0,
        Direction::Save => 1,
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl CardCounters {
    /// A chunk has gone over the bus; `busy` is the time that no chunk before it accounts for.
    pub(super) fn chunk_done(
        &self,
        direction: Direction,
        plan: ChunkPlan,
        bytes: u64,
        busy: Duration,
    ) {
        add(&self.bytes[at(direction)], bytes);
        add(&self.busy_nanos[at(direction)], busy.as_nanos() as u64);
        let by_plan = if plan.staged {
            &self.staged_bytes
        } else {
            &self.direct_bytes
        };
        add(by_plan, bytes);
        if plan.bounced {
            add(&self.bounced_bytes, bytes);
        }
    }

    /// A task is on its way to the thread.
    pub(super) fn task_in(&self) {
        add(&self.tasks, 1);
    }

    /// A task has gone back.
    pub(super) fn task_out(&self) {
        self.tasks.fetch_sub(1, Ordering::Relaxed);
    }

    /// Device memory that the slots have in all.
    pub(super) fn set_staging(&self, bytes: u64) {
        self.staging_bytes.store(bytes, Ordering::Relaxed);
    }

    /// The device went down, and with it what it had.
    pub(super) fn went_down(&self) {
        self.set_staging(0);
        add(&self.downs, 1);
    }

    pub(super) fn read(&self) -> CardFigures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CardFigures {
            saved_bytes: read(&self.bytes[1]),
            loaded_bytes: read(&self.bytes[0]),
            save_busy_nanos: read(&self.busy_nanos[1]),
            load_busy_nanos: read(&self.busy_nanos[0]),
            direct_bytes: read(&self.direct_bytes),
            staged_bytes: read(&self.staged_bytes),
            bounced_bytes: read(&self.bounced_bytes),
            tasks: read(&self.tasks),
            staging_bytes: read(&self.staging_bytes),
            downs: read(&self.downs),
        }
    }
}
