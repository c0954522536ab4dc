//! A ring in ordinary memory: for threads of one process, tests, loom and Miri.

#![forbid(unsafe_code)]

use super::{RingMemory, Slot, is_valid_capacity};
use crate::sync::AtomicU64;

/// Slots and the `consumed` word on the heap. Share it by `Arc` or by reference.
#[derive(Debug)]
pub struct HeapRing {
    slots: Box<[Slot]>,
    consumed: AtomicU64,
}

impl HeapRing {
    /// An empty ring of `capacity` slots.
    ///
    /// # Panics
    /// If `capacity` is not valid by [`is_valid_capacity`].
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        assert!(
            is_valid_capacity(capacity),
            "ring capacity {capacity} is not a power of two in range"
        );
        Self {
            slots: (0..capacity).map(|_| Slot::empty()).collect(),
            consumed: AtomicU64::new(0),
        }
    }
}

impl RingMemory for HeapRing {
    #[inline]
    fn capacity(&self) -> u32 {
        self.slots.len() as u32
    }

    #[inline]
    fn slot(&self, index: u32) -> &Slot {
        &self.slots[index as usize]
    }

    #[inline]
    fn consumed(&self) -> &AtomicU64 {
        &self.consumed
    }
}
