//! One producing thread, one consuming thread.

#![forbid(unsafe_code)]

use super::{Body, Geometry, PushError, RingFault, RingMemory};
use crate::sync::{Ordering, fence};

/// The producing end. One per ring, in the process that owns the slots.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    geometry: Geometry,
    /// Next position to publish.
    position: u64,
    /// What the consumer said last, validated. Reloaded only when it makes the ring look full.
    consumed: u64,
}

impl<M: RingMemory> Producer<M> {
    /// Takes the producing end of a fresh (zeroed) ring.
    ///
    /// # Panics
    /// If the memory's capacity is not valid.
    #[must_use]
    pub fn new(memory: M) -> Self {
        let geometry = Geometry::of(&memory);
        Self {
            memory,
            geometry,
            position: 0,
            consumed: 0,
        }
    }

    /// Publishes one message.
    ///
    /// # Errors
    /// [`PushError::Full`] or [`PushError::Fault`]; the ring is unchanged.
    #[inline]
    pub fn try_push(&mut self, body: &Body) -> Result<(), PushError> {
        if self.position - self.consumed >= self.geometry.capacity {
            self.make_room(1)?;
        }
        self.publish_next(body);
        Ok(())
    }

    /// Publishes as many leading messages of `bodies` as fit and returns how many.
    ///
    /// # Errors
    /// [`PushError::Full`] if not even the first fits, [`PushError::Fault`]; the ring is unchanged.
    pub fn push_slice(&mut self, bodies: &[Body]) -> Result<usize, PushError> {
        if bodies.is_empty() {
            return Ok(0);
        }
        let wanted = (bodies.len() as u64).min(self.geometry.capacity);
        if self.known_room() < wanted {
            self.reload_consumed()?;
        }
        let count = self.known_room().min(wanted) as usize;
        if count == 0 {
            return Err(PushError::Full);
        }
        for body in &bodies[..count] {
            self.publish_next(body);
        }
        Ok(count)
    }

    /// Publishes all of `bodies` or nothing.
    ///
    /// # Errors
    /// [`PushError::Full`], [`PushError::TooMany`] or [`PushError::Fault`]; the ring is unchanged.
    pub fn try_push_n(&mut self, bodies: &[Body]) -> Result<(), PushError> {
        let count = bodies.len() as u64;
        if count > self.geometry.capacity {
            let capacity = self.geometry.capacity as u32;
            return Err(PushError::TooMany {
                count: bodies.len(),
                capacity,
            });
        }
        if self.known_room() < count {
            self.make_room(count)?;
        }
        for body in bodies {
            self.publish_next(body);
        }
        Ok(())
    }

    /// Slots that are free now, from the consumer's latest word.
    ///
    /// # Errors
    /// A fault in the consumer's word.
    pub fn free_slots(&mut self) -> Result<u32, RingFault> {
        self.reload_consumed()?;
        Ok(self.known_room() as u32)
    }

    /// Number of messages published so far; the next one gets this position.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Slots of the ring.
    #[inline]
    pub fn capacity(&self) -> u32 {
        self.geometry.capacity as u32
    }

    #[inline]
    fn publish_next(&mut self, body: &Body) {
        self.memory
            .slot(self.geometry.index(self.position))
            .publish(self.position, body);
        self.position += 1;
    }

    #[inline]
    fn known_room(&self) -> u64 {
        self.geometry.capacity - (self.position - self.consumed)
    }

    #[cold]
    fn make_room(&mut self, count: u64) -> Result<(), PushError> {
        self.reload_consumed()?;
        if self.known_room() < count {
            Err(PushError::Full)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn reload_consumed(&mut self) -> Result<(), RingFault> {
        let found = self.memory.consumed().load(Ordering::Relaxed);
        fence(Ordering::Acquire); // SYNC: ring-consumed
        let position = self.position;
        if found > position {
            return Err(RingFault::ConsumedAhead {
                position,
                expected: position,
                found,
            });
        }
        if found < self.consumed {
            let expected = self.consumed;
            return Err(RingFault::ConsumedBackwards {
                position,
                expected,
                found,
            });
        }
        self.consumed = found;
        Ok(())
    }
}

/// The consuming end. One per ring, in the process that owns the `consumed` word.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    geometry: Geometry,
    /// Next position to read.
    position: u64,
    /// What the producer was told last.
    reported: u64,
    report_every: u64,
}

impl<M: RingMemory> Consumer<M> {
    /// Takes the consuming end of a fresh (zeroed) ring.
    ///
    /// # Panics
    /// If the memory's capacity is not valid.
    #[must_use]
    pub fn new(memory: M) -> Self {
        let geometry = Geometry::of(&memory);
        Self {
            memory,
            geometry,
            position: 0,
            reported: 0,
            report_every: geometry.report_every(),
        }
    }

    /// Takes the next message, if one is published.
    ///
    /// Progress is told to the producer every quarter of a lap and whenever the ring is found
    /// empty.
    ///
    /// # Errors
    /// A [`RingFault`] if the slot's sequence word is impossible; the consumer does not move.
    #[inline]
    pub fn try_pop(&mut self) -> Result<Option<Body>, RingFault> {
        let slot = self.memory.slot(self.geometry.index(self.position));
        let seq = slot.seq.load(Ordering::Relaxed);
        if seq != self.position + 1 {
            return self.nothing(seq);
        }
        fence(Ordering::Acquire); // SYNC: ring-publish
        let body = slot.read();
        self.position += 1;
        if self.position - self.reported >= self.report_every {
            self.report();
        }
        Ok(Some(body))
    }

    /// True when [`Self::try_pop`] has something to say: a message or a fault. Costs one relaxed
    /// load.
    #[inline]
    pub fn ready(&self) -> bool {
        let seq = self
            .memory
            .slot(self.geometry.index(self.position))
            .seq
            .load(Ordering::Relaxed);
        self.geometry.judge_unpublished(self.position, seq).is_err()
    }

    /// True when the next message is missing although a later one is there: a producing thread
    /// claimed a slot and has not published it. Normal for the moment that a push takes; a thread
    /// or process that vanished if it lasts. Reads up to a whole lap of slots, so ask on a timer,
    /// not in a poll loop.
    pub fn stalled(&self) -> bool {
        self.geometry.stalled_at(&self.memory, self.position)
    }

    /// Tells the producer about every message read so far.
    #[inline]
    pub fn report(&mut self) {
        self.memory
            .consumed()
            .store(self.position, Ordering::Release); // SYNC: ring-consumed
        self.reported = self.position;
    }

    /// Number of messages read so far; the next one has this position.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Slots of the ring.
    #[inline]
    pub fn capacity(&self) -> u32 {
        self.geometry.capacity as u32
    }

    #[inline]
    fn nothing(&mut self, seq: u64) -> Result<Option<Body>, RingFault> {
        self.geometry.judge_unpublished(self.position, seq)?;
        if self.reported != self.position {
            self.report();
        }
        Ok(None)
    }
}
