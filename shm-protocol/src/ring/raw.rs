//! A ring over mapped memory.

use std::ptr::NonNull;
use std::sync::Arc;

use super::{RingMemory, SLOT_BYTES, Slot, is_valid_capacity};
use crate::mapping::{Mapping, MappingError};
use crate::sync::AtomicU64;

/// Slots in one mapping, the `consumed` word in another. Keeps both mapped for as long as it lives.
#[derive(Clone, Debug)]
pub struct RawRing {
    slots: NonNull<Slot>,
    capacity: u32,
    consumed: NonNull<AtomicU64>,
    _keep_alive: [Arc<Mapping>; 2],
}

// SAFETY: the pointers stay valid until `_keep_alive` drops, wherever the value lives, and lead
// only to atomics, which any thread may access.
unsafe impl Send for RawRing {}
// SAFETY: as for `Send`; shared access offers nothing but references to atomics.
unsafe impl Sync for RawRing {}

impl RawRing {
    /// The producer's view: its own slots, writable, and the peer's `consumed` word. Offsets in
    /// bytes.
    ///
    /// # Errors
    /// An offset outside its mapping or misaligned, or slots in a read-only mapping.
    ///
    /// # Panics
    /// If `capacity` is not valid by [`is_valid_capacity`].
    pub fn for_producer(
        slots: &Arc<Mapping>,
        slots_offset: usize,
        capacity: u32,
        consumed: &Arc<Mapping>,
        consumed_offset: usize,
    ) -> Result<Self, MappingError> {
        slots.require_writable()?;
        Self::over(slots, slots_offset, capacity, consumed, consumed_offset)
    }

    /// The consumer's view: the peer's slots and its own `consumed` word, writable. Offsets in
    /// bytes.
    ///
    /// # Errors
    /// An offset outside its mapping or misaligned, or `consumed` in a read-only mapping.
    ///
    /// # Panics
    /// If `capacity` is not valid by [`is_valid_capacity`].
    pub fn for_consumer(
        slots: &Arc<Mapping>,
        slots_offset: usize,
        capacity: u32,
        consumed: &Arc<Mapping>,
        consumed_offset: usize,
    ) -> Result<Self, MappingError> {
        consumed.require_writable()?;
        Self::over(slots, slots_offset, capacity, consumed, consumed_offset)
    }

    fn over(
        slots: &Arc<Mapping>,
        slots_offset: usize,
        capacity: u32,
        consumed: &Arc<Mapping>,
        consumed_offset: usize,
    ) -> Result<Self, MappingError> {
        assert!(
            is_valid_capacity(capacity),
            "ring capacity {capacity} is not a power of two in range"
        );
        let bytes = capacity as usize * SLOT_BYTES;
        let first = slots
            .aligned_ptr(slots_offset, bytes, align_of::<Slot>())?
            .cast::<Slot>();
        let word = consumed
            .aligned_ptr(consumed_offset, 8, 8)?
            .cast::<AtomicU64>();
        // SAFETY: `aligned_ptr` checked that `capacity` slots from `first` and the word lie,
        // aligned, inside their mappings, and the two `Arc`s keep those mapped.
        Ok(unsafe { Self::new(first, capacity, word, [slots.clone(), consumed.clone()]) })
    }

    /// A ring over raw memory.
    ///
    /// # Safety
    /// `slots` must lead to `capacity` contiguous slots and `consumed` to a word, all mapped for as
    /// long as `keep_alive` is held, and accessed by this process only through atomics. Whoever
    /// produces needs the slots writable, whoever consumes the word.
    ///
    /// # Panics
    /// If `capacity` is not valid by [`is_valid_capacity`].
    pub unsafe fn new(
        slots: NonNull<Slot>,
        capacity: u32,
        consumed: NonNull<AtomicU64>,
        keep_alive: [Arc<Mapping>; 2],
    ) -> Self {
        assert!(
            is_valid_capacity(capacity),
            "ring capacity {capacity} is not a power of two in range"
        );
        Self {
            slots,
            capacity,
            consumed,
            _keep_alive: keep_alive,
        }
    }
}

impl RingMemory for RawRing {
    #[inline]
    fn capacity(&self) -> u32 {
        self.capacity
    }

    #[inline]
    fn slot(&self, index: u32) -> &Slot {
        // The mask costs nothing next to the access and keeps a wrong index inside the ring.
        let index = (index & (self.capacity - 1)) as usize;
        // SAFETY: `new`'s caller vouched for `capacity` slots here, `index` is below the capacity
        // (a power of two), and a slot is all atomics, so a peer that writes meanwhile breaks no
        // rule of references.
        unsafe { self.slots.add(index).as_ref() }
    }

    #[inline]
    fn consumed(&self) -> &AtomicU64 {
        // SAFETY: `new`'s caller vouched for the word; it is an atomic, so the peer may write
        // meanwhile.
        unsafe { self.consumed.as_ref() }
    }
}
