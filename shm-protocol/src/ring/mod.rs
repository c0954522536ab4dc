//! Rings of 64-byte slots, sequence number inside the slot.
//!
//! A ring has one producing process and one consuming process. The slots lie in the producer's
//! segment, which the consumer maps read-only; the consumer's progress (`consumed`) lies in the
//! consumer's segment, which the producer maps read-only. Everything else (positions, masks,
//! caches) is private memory, so nothing that a peer writes is ever used as an index: it is only
//! compared.
//!
//! * Slot of position `p` is `p & (capacity - 1)`.
//! * `seq == p + 1`: position `p` is published.
//! * `seq == p + 1 - capacity` (or 0 on the first lap): not yet published.
//! * anything else: a [`RingFault`]. The session is over; the handle stays safe to call.
//!
//! [`spsc`] serves one thread per side, [`mpmc`] several threads of one process per side. Both
//! speak the same format, so each side picks its handle without the other knowing.
//!
//! When an owner dies: a producer killed at any instruction leaves whole messages followed by
//! nothing. A shared producer may also leave a position that was claimed and never published in
//! front of published ones; the consumer's `stalled()` tells, and the session ends after a bound. A
//! consumer killed at any instruction leaves the producer with a ring that fills up and answers
//! [`PushError::Full`].
//!
//! Synchronisation pairs:
//!
//! * `SYNC: ring-publish`: the producer's release store of `seq`, the consumer's acquire fence
//!   after it read that value. Orders the body words.
//! * `SYNC: ring-consumed`: the consumer's release store of `consumed`, the producer's acquire
//!   fence after it read that value. Orders the consumer's reads of a body before the producer's
//!   next writes of it.
//!
//! Loads of the peer's words are relaxed loads followed by an acquire fence, because Rust promises
//! only for relaxed loads that they work on memory that is mapped read-only.

mod fault;
mod heap;
pub mod mpmc;
#[cfg(not(loom))]
mod raw;
mod slot;
pub mod spsc;

pub use fault::{PushError, RingFault};
pub use heap::HeapRing;
pub use mpmc::{SharedConsumer, SharedProducer};
#[cfg(not(loom))]
pub use raw::RawRing;
pub use slot::{BODY_WORDS, Body, SLOT_BYTES, Slot};
pub use spsc::{Consumer, Producer};

use crate::sync::{Arc, AtomicU64};

/// Fewest slots a ring may have; with one slot no side could ever work ahead of the other.
pub const MIN_CAPACITY: u32 = 2;

/// Most slots a ring may have (64 MiB of slots).
pub const MAX_CAPACITY: u32 = 1 << 20;

/// True for a capacity that a ring may have: a power of two between [`MIN_CAPACITY`] and
/// [`MAX_CAPACITY`].
#[must_use]
pub const fn is_valid_capacity(capacity: u32) -> bool {
    capacity.is_power_of_two() && capacity >= MIN_CAPACITY && capacity <= MAX_CAPACITY
}

/// The memory one ring lies in, as seen by one side.
///
/// Implementations must answer the same capacity and the same words on every call. A slot's
/// contents and `consumed` may change at any time and to any value.
pub trait RingMemory {
    /// Number of slots; valid by [`is_valid_capacity`].
    fn capacity(&self) -> u32;

    /// Slot number `index`, which is below the capacity.
    fn slot(&self, index: u32) -> &Slot;

    /// Count of positions that the consumer has read completely; in the consumer's segment.
    fn consumed(&self) -> &AtomicU64;
}

impl<M: RingMemory + ?Sized> RingMemory for &M {
    #[inline]
    fn capacity(&self) -> u32 {
        (**self).capacity()
    }

    #[inline]
    fn slot(&self, index: u32) -> &Slot {
        (**self).slot(index)
    }

    #[inline]
    fn consumed(&self) -> &AtomicU64 {
        (**self).consumed()
    }
}

impl<M: RingMemory> RingMemory for Arc<M> {
    #[inline]
    fn capacity(&self) -> u32 {
        (**self).capacity()
    }

    #[inline]
    fn slot(&self, index: u32) -> &Slot {
        (**self).slot(index)
    }

    #[inline]
    fn consumed(&self) -> &AtomicU64 {
        (**self).consumed()
    }
}

/// Capacity arithmetic that both kinds of handle share, fixed at construction.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    capacity: u64,
    mask: u64,
}

impl Geometry {
    /// # Panics
    /// If the memory's capacity is not valid. That is the caller's own configuration, never peer
    /// data.
    fn of(memory: &impl RingMemory) -> Self {
        let capacity = memory.capacity();
        assert!(
            is_valid_capacity(capacity),
            "ring capacity {capacity} is not a power of two in range"
        );
        Self {
            capacity: u64::from(capacity),
            mask: u64::from(capacity) - 1,
        }
    }

    #[inline]
    const fn index(self, position: u64) -> u32 {
        (position & self.mask) as u32
    }

    /// The sequence value of a slot that waits for `position`.
    #[inline]
    const fn empty_seq(self, position: u64) -> u64 {
        if position < self.capacity {
            0
        } else {
            position + 1 - self.capacity
        }
    }

    /// The consumer tells its progress each time this many positions were read since it last did.
    const fn report_every(self) -> u64 {
        let quarter = self.capacity / 4;
        if quarter == 0 { 1 } else { quarter }
    }

    /// Judges a sequence value that is not `position + 1`: `Ok` is "not yet", anything else a
    /// fault.
    fn judge_unpublished(self, position: u64, found: u64) -> Result<(), RingFault> {
        let expected = self.empty_seq(position);
        if found == expected {
            return Ok(());
        }
        Err(RingFault::Sequence {
            position,
            expected,
            found,
        })
    }

    /// True when `position` is unpublished although a later one is published: a producer claimed it
    /// and has not (yet) come back. Reads at most `capacity` slots.
    fn stalled_at(self, memory: &impl RingMemory, position: u64) -> bool {
        use crate::sync::{Ordering, fence};
        let head = memory.slot(self.index(position));
        if head.seq.load(Ordering::Relaxed) == position + 1 {
            return false;
        }
        for ahead in 1..self.capacity {
            let later = position + ahead;
            if memory.slot(self.index(later)).seq.load(Ordering::Relaxed) != later + 1 {
                continue;
            }
            // The head was read before the later slot: read it again, ordered after, so that a
            // producer which published both in order is not mistaken for one that left a gap.
            fence(Ordering::Acquire); // SYNC: ring-publish
            return head.seq.load(Ordering::Relaxed) != position + 1;
        }
        false
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
