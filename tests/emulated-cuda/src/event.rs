//! Events: how often one was recorded and how far that has come, in memory that several processes
//! may share.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::storage::Object;

/// `CU_EVENT_DISABLE_TIMING`.
pub const DISABLE_TIMING: u32 = 2;
/// `CU_EVENT_INTERPROCESS`.
pub const INTERPROCESS: u32 = 4;
/// Every flag: with `CU_EVENT_BLOCKING_SYNC`.
pub const FLAGS: u32 = 7;
/// Bytes of the memory behind an event.
pub const BYTES: usize = 4096;
/// How often a waiting thread looks.
pub const LOOK: Duration = Duration::from_micros(20);

const RECORDED: usize = 0;
const COMPLETED: usize = 1;

/// An event of this process, or one that it opened.
pub struct Event {
    /// The context in which it was made or opened.
    pub context: u64,
    /// The device to which it belongs.
    pub device: usize,
    /// As it was made.
    pub flags: u32,
    /// Opened from a handle.
    pub imported: bool,
    /// Its memory.
    pub object: Arc<Object>,
    /// When the last record was reached.
    pub at: Mutex<Option<Instant>>,
}

impl Event {
    fn word(&self, word: usize) -> &AtomicU64 {
        &self.object.mapping.words()[word]
    }

    /// Number of a new record, which is not reached yet.
    pub fn record(&self) -> u64 {
        self.word(RECORDED).fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Number of the last record.
    pub fn recorded(&self) -> u64 {
        self.word(RECORDED).load(Ordering::SeqCst)
    }

    /// The stream has reached a record.
    pub fn complete(&self, record: u64) {
        *self.at.lock().expect("no panic while locked") = Some(Instant::now());
        self.word(COMPLETED).fetch_max(record, Ordering::SeqCst);
    }

    /// True if a record was reached.
    pub fn has_reached(&self, record: u64) -> bool {
        self.word(COMPLETED).load(Ordering::SeqCst) >= record
    }
}
