//! Several threads of ONE process on a side of a ring.
//!
//! The threads of a side share a private position word and move it by compare-and-swap; the shared
//! memory sees the same format as from the [`spsc`](super::spsc) handles. Never share a side across
//! processes: the position word is private memory.
//!
//! Producers claim first, then write, then publish; a thread that vanishes in between leaves a gap,
//! which the consumer finds by `stalled()`. Consumers read first, then claim: a copy whose claim
//! fails is thrown away, and the position word never runs ahead of what has been read completely,
//! so any thread may report it.

#![forbid(unsafe_code)]

use super::{Body, Geometry, PushError, RingFault, RingMemory};
use crate::sync::{Arc, AtomicU64, Ordering, fence, hint};

/// Keeps a word that several threads hammer away from its neighbours (two lines: the adjacent-line
/// prefetcher pairs them).
#[derive(Debug)]
#[repr(align(128))]
struct Line(AtomicU64);

impl Line {
    fn zero() -> Self {
        Self(AtomicU64::new(0))
    }
}

#[derive(Debug)]
struct ProducerState<M> {
    memory: M,
    geometry: Geometry,
    /// Next position to claim.
    position: Line,
    /// Largest validated value of the consumer's word.
    consumed: Line,
}

/// The producing end for several threads of one process; clones share it.
#[derive(Debug)]
pub struct SharedProducer<M> {
    state: Arc<ProducerState<M>>,
}

impl<M> Clone for SharedProducer<M> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
        }
    }
}

impl<M: RingMemory> SharedProducer<M> {
    /// Takes the producing end of a fresh (zeroed) ring.
    ///
    /// # Panics
    /// If the memory's capacity is not valid.
    #[must_use]
    pub fn new(memory: M) -> Self {
        let geometry = Geometry::of(&memory);
        let state = ProducerState {
            memory,
            geometry,
            position: Line::zero(),
            consumed: Line::zero(),
        };
        Self {
            state: Arc::new(state),
        }
    }

    /// Publishes one message.
    ///
    /// # Errors
    /// [`PushError::Full`] or [`PushError::Fault`]; the ring is unchanged.
    #[inline]
    pub fn try_push(&self, body: &Body) -> Result<(), PushError> {
        let position = self.state.claim(1)?;
        self.state.publish(position, body);
        Ok(())
    }

    /// Publishes all of `bodies` at contiguous positions, or nothing.
    ///
    /// # Errors
    /// [`PushError::Full`], [`PushError::TooMany`] or [`PushError::Fault`]; the ring is unchanged.
    pub fn try_push_n(&self, bodies: &[Body]) -> Result<(), PushError> {
        let capacity = self.capacity();
        if bodies.len() > capacity as usize {
            return Err(PushError::TooMany {
                count: bodies.len(),
                capacity,
            });
        }
        if bodies.is_empty() {
            return Ok(());
        }
        let first = self.state.claim(bodies.len() as u64)?;
        for (position, body) in (first..).zip(bodies) {
            self.state.publish(position, body);
        }
        Ok(())
    }

    /// Number of positions claimed so far, by all threads.
    pub fn position(&self) -> u64 {
        self.state.position.0.load(Ordering::Relaxed)
    }

    /// Slots of the ring.
    pub fn capacity(&self) -> u32 {
        self.state.geometry.capacity as u32
    }
}

impl<M: RingMemory> ProducerState<M> {
    #[inline]
    fn publish(&self, position: u64, body: &Body) {
        self.memory
            .slot(self.geometry.index(position))
            .publish(position, body);
    }

    /// Claims `count` (1 to capacity) contiguous positions and returns the first.
    #[inline]
    fn claim(&self, count: u64) -> Result<u64, PushError> {
        let mut position = self.position.0.load(Ordering::Relaxed);
        loop {
            // Acquire: whoever put this value there had acquired it from the consumer, so the
            // consumer's reads of the slots it frees come before this thread's writes.
            let mut consumed = self.consumed.0.load(Ordering::Acquire); // SYNC: ring-consumed-cache
            // `consumed` may even be ahead of a stale `position`; then the compare-and-swap below
            // fails and brings the fresh one.
            if position + count > consumed + self.geometry.capacity {
                consumed = self.reload_consumed(consumed)?;
                if position + count > consumed + self.geometry.capacity {
                    // Is it full, or did other threads move on while this one looked?
                    let now = self.position.0.load(Ordering::Relaxed);
                    if now == position {
                        return Err(PushError::Full);
                    }
                    position = now;
                    continue;
                }
            }
            // Relaxed: the word hands out numbers; the slots carry the data, and `consumed` orders
            // reuse.
            match self.position.0.compare_exchange_weak(
                position,
                position + count,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(position),
                Err(now) => {
                    position = now;
                    hint::spin_loop();
                }
            }
        }
    }

    /// Reads and validates the consumer's word. `known` was loaded from the cache with acquire
    /// before, so by coherence a correct consumer's word cannot be seen below it, whatever other
    /// threads do.
    #[cold]
    fn reload_consumed(&self, known: u64) -> Result<u64, RingFault> {
        let found = self.memory.consumed().load(Ordering::Relaxed);
        fence(Ordering::Acquire); // SYNC: ring-consumed
        // Loaded after the fence: a correct consumer read only published positions, whose claims
        // therefore happened before and are visible here.
        let position = self.position.0.load(Ordering::Relaxed);
        if found > position {
            return Err(RingFault::ConsumedAhead {
                position,
                expected: position,
                found,
            });
        }
        if found < known {
            return Err(RingFault::ConsumedBackwards {
                position,
                expected: known,
                found,
            });
        }
        self.consumed.0.fetch_max(found, Ordering::Release); // SYNC: ring-consumed-cache
        Ok(found)
    }
}

#[derive(Debug)]
struct ConsumerState<M> {
    memory: M,
    geometry: Geometry,
    report_every: u64,
    /// Every position below has been read completely by the thread that moved this past it.
    position: Line,
    /// What the producer was told last, at least.
    reported: Line,
}

/// The consuming end for several threads of one process; clones share it.
#[derive(Debug)]
pub struct SharedConsumer<M> {
    state: Arc<ConsumerState<M>>,
}

impl<M> Clone for SharedConsumer<M> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
        }
    }
}

impl<M: RingMemory> SharedConsumer<M> {
    /// Takes the consuming end of a fresh (zeroed) ring.
    ///
    /// # Panics
    /// If the memory's capacity is not valid.
    #[must_use]
    pub fn new(memory: M) -> Self {
        let geometry = Geometry::of(&memory);
        let report_every = geometry.report_every();
        let (position, reported) = (Line::zero(), Line::zero());
        let state = ConsumerState {
            memory,
            geometry,
            report_every,
            position,
            reported,
        };
        Self {
            state: Arc::new(state),
        }
    }

    /// Takes the next message, if one is published. Each message goes to exactly one thread.
    ///
    /// # Errors
    /// A [`RingFault`] if the slot's sequence word is impossible; nothing is consumed.
    pub fn try_pop(&self) -> Result<Option<Body>, RingFault> {
        let state = &*self.state;
        let mut position = state.position.0.load(Ordering::Acquire); // SYNC: ring-position
        loop {
            let slot = state.memory.slot(state.geometry.index(position));
            let seq = slot.seq.load(Ordering::Relaxed);
            fence(Ordering::Acquire); // SYNC: ring-publish
            if seq != position + 1 {
                // If another thread has read this position meanwhile, the slot may belong to the
                // next lap already. The fence makes that thread's move visible whenever its effect
                // was.
                let now = state.position.0.load(Ordering::Acquire); // SYNC: ring-position
                if now != position {
                    position = now;
                    continue;
                }
                state.geometry.judge_unpublished(position, seq)?;
                state.report(position);
                return Ok(None);
            }
            let body = slot.read();
            // Release: the copy above comes before the claim. Acquire: so do the copies of those
            // who claimed before, which a report of this position vouches for.
            match state.position.0.compare_exchange_weak(
                position,
                position + 1,
                Ordering::AcqRel, // SYNC: ring-position
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    let reported = state.reported.0.load(Ordering::Relaxed);
                    if (position + 1).saturating_sub(reported) >= state.report_every {
                        state.report(position + 1);
                    }
                    return Ok(Some(body));
                }
                Err(now) => {
                    position = now;
                    hint::spin_loop();
                }
            }
        }
    }

    /// True when the next message is missing although a later one is there; see
    /// [`Consumer::stalled`](super::Consumer::stalled).
    pub fn stalled(&self) -> bool {
        let position = self.state.position.0.load(Ordering::Acquire); // SYNC: ring-position
        self.state.geometry.stalled_at(&self.state.memory, position) && position == self.position()
    }

    /// Number of messages read so far, by all threads.
    pub fn position(&self) -> u64 {
        self.state.position.0.load(Ordering::Relaxed)
    }

    /// Slots of the ring.
    pub fn capacity(&self) -> u32 {
        self.state.geometry.capacity as u32
    }
}

impl<M: RingMemory> ConsumerState<M> {
    /// Tells the producer that every position below `position` has been read.
    fn report(&self, position: u64) {
        if self.reported.0.load(Ordering::Relaxed) >= position {
            return;
        }
        // A maximum, since threads arrive here out of order and the word must never go back.
        self.memory
            .consumed()
            .fetch_max(position, Ordering::Release); // SYNC: ring-consumed
        self.reported.0.fetch_max(position, Ordering::Relaxed);
    }
}
