//! Ring handles against a peer that writes anything anywhere, checked by a naive model.

#![forbid(unsafe_code)]

use pegaflow_shm::ring::{
    Body, Consumer, HeapRing, Producer, PushError, RingMemory, SharedConsumer, SharedProducer,
};
use pegaflow_shm::sync::{Arc, Ordering};

use super::input::Input;

/// Operations of one input at most.
const MAX_STEPS: usize = 4096;

/// One handle, picked by the first byte, lives through the rest of the bytes.
pub fn ring(data: &[u8]) {
    let mut input = Input::new(data);
    let capacity = 2 << input.below(4);
    let ring = Arc::new(HeapRing::new(capacity));
    match input.below(4) {
        0 => consume(&ring, &mut input, OneConsumer(Consumer::new(ring.clone()))),
        1 => consume(
            &ring,
            &mut input,
            ManyConsumers(SharedConsumer::new(ring.clone())),
        ),
        2 => produce(&ring, &mut input, OneProducer(Producer::new(ring.clone()))),
        _ => produce(
            &ring,
            &mut input,
            ManyProducers(SharedProducer::new(ring.clone())),
        ),
    }
}

/// A word as a peer that knows the protocol would bend it: near the handle's position, or anything.
fn word(input: &mut Input<'_>, position: u64, capacity: u64) -> u64 {
    let near = u64::from(input.u8() & 7);
    match input.below(5) {
        0 => position + near,
        1 => (position + near).saturating_sub(capacity),
        2 => (position + near).saturating_sub(4),
        3 => u64::MAX - near,
        _ => input.u64(),
    }
}

fn slot_words(ring: &HeapRing, index: u32) -> (u64, Body) {
    let slot = ring.slot(index);
    let body = std::array::from_fn(|at| slot.body[at].load(Ordering::Relaxed));
    (slot.seq.load(Ordering::Relaxed), body)
}

trait Pops {
    fn try_pop(&mut self) -> Result<Option<Body>, ()>;
    fn position(&self) -> u64;
    fn stalled(&self) -> bool;
    fn ready(&self) -> Option<bool>;
}

struct OneConsumer(Consumer<Arc<HeapRing>>);
struct ManyConsumers(SharedConsumer<Arc<HeapRing>>);

impl Pops for OneConsumer {
    fn try_pop(&mut self) -> Result<Option<Body>, ()> {
        self.0.try_pop().map_err(drop)
    }
    fn position(&self) -> u64 {
        self.0.position()
    }
    fn stalled(&self) -> bool {
        self.0.stalled()
    }
    fn ready(&self) -> Option<bool> {
        Some(self.0.ready())
    }
}

impl Pops for ManyConsumers {
    fn try_pop(&mut self) -> Result<Option<Body>, ()> {
        self.0.try_pop().map_err(drop)
    }
    fn position(&self) -> u64 {
        self.0.position()
    }
    fn stalled(&self) -> bool {
        self.0.stalled()
    }
    fn ready(&self) -> Option<bool> {
        None
    }
}

/// The peer owns the slots. The consumer takes exactly what the sequence word allows, tells its
/// progress truly and never backwards.
fn consume(ring: &HeapRing, input: &mut Input<'_>, mut consumer: impl Pops) {
    let capacity = u64::from(ring.capacity());
    let mut position = 0;
    let mut told = 0;
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            return;
        }
        match input.below(4) {
            0 => {
                let index = u32::from(input.u8()) & (ring.capacity() - 1);
                let word = word(input, position, capacity);
                ring.slot(index).seq.store(word, Ordering::Relaxed);
            }
            1 => {
                let index = u32::from(input.u8()) & (ring.capacity() - 1);
                let at = usize::from(input.below(7));
                ring.slot(index).body[at].store(input.u64(), Ordering::Relaxed);
            }
            2 => {
                let (seq, body) = slot_words(ring, (position % capacity) as u32);
                let empty = (u128::from(position) + 1).saturating_sub(u128::from(capacity)) as u64;
                let expected = match seq {
                    seq if seq == position + 1 => Ok(Some(body)),
                    seq if seq == empty => Ok(None),
                    _ => Err(()),
                };
                if let Some(ready) = consumer.ready() {
                    assert_eq!(ready, expected != Ok(None), "ready and try_pop disagree");
                }
                assert_eq!(
                    consumer.try_pop(),
                    expected,
                    "position {position}, seq {seq}"
                );
                position += u64::from(matches!(expected, Ok(Some(_))));
            }
            _ => {
                let published = |at: u64| slot_words(ring, (at % capacity) as u32).0 == at + 1;
                let gap =
                    !published(position) && (1..capacity).any(|ahead| published(position + ahead));
                assert_eq!(consumer.stalled(), gap, "position {position}");
            }
        }
        assert_eq!(consumer.position(), position);
        let tells = ring.consumed().load(Ordering::Relaxed);
        assert!(
            tells >= told && tells <= position && position - tells < capacity,
            "told {told}, then {tells}, at {position}"
        );
        told = tells;
    }
}

trait Pushes {
    fn try_push(&mut self, body: &Body) -> Result<(), PushError>;
    fn try_push_n(&mut self, bodies: &[Body]) -> Result<(), PushError>;
    fn push_slice(&mut self, bodies: &[Body]) -> Option<Result<usize, PushError>>;
    fn position(&self) -> u64;
}

struct OneProducer(Producer<Arc<HeapRing>>);
struct ManyProducers(SharedProducer<Arc<HeapRing>>);

impl Pushes for OneProducer {
    fn try_push(&mut self, body: &Body) -> Result<(), PushError> {
        self.0.try_push(body)
    }
    fn try_push_n(&mut self, bodies: &[Body]) -> Result<(), PushError> {
        self.0.try_push_n(bodies)
    }
    fn push_slice(&mut self, bodies: &[Body]) -> Option<Result<usize, PushError>> {
        Some(self.0.push_slice(bodies))
    }
    fn position(&self) -> u64 {
        self.0.position()
    }
}

impl Pushes for ManyProducers {
    fn try_push(&mut self, body: &Body) -> Result<(), PushError> {
        self.0.try_push(body)
    }
    fn try_push_n(&mut self, bodies: &[Body]) -> Result<(), PushError> {
        self.0.try_push_n(bodies)
    }
    fn push_slice(&mut self, _: &[Body]) -> Option<Result<usize, PushError>> {
        None
    }
    fn position(&self) -> u64 {
        self.0.position()
    }
}

/// The peer owns the `consumed` word. The producer never writes over what a word that made sense
/// has not released, publishes what it was given, and writes nothing when it refuses.
fn produce(ring: &HeapRing, input: &mut Input<'_>, mut producer: impl Pushes) {
    let capacity = u64::from(ring.capacity());
    let mut position = 0;
    // The largest word so far that was possible when the producer may have read it.
    let mut released = 0;
    let mut number = 0;
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            return;
        }
        if input.below(3) == 0 {
            let word = word(input, position, capacity);
            ring.consumed().store(word, Ordering::Relaxed);
            continue;
        }
        let word = ring.consumed().load(Ordering::Relaxed);
        if word <= position {
            released = released.max(word);
        }
        let count = match input.below(8) {
            0 => u64::from(input.below(2 * ring.capacity() as u8 + 2)),
            _ => 1,
        };
        let bodies: Vec<Body> = (0..count).map(|at| [number + at; 7]).collect();
        number += count;
        let before: Vec<_> = (0..ring.capacity())
            .map(|at| slot_words(ring, at))
            .collect();
        let pushed = match input.below(3) {
            0 if count == 1 => producer.try_push(&bodies[0]).map(|()| 1),
            1 => match producer.push_slice(&bodies) {
                Some(pushed) => pushed,
                None => producer.try_push_n(&bodies).map(|()| bodies.len()),
            },
            _ => producer.try_push_n(&bodies).map(|()| bodies.len()),
        };
        let pushed = pushed.unwrap_or(0) as u64;
        assert!(pushed <= count);
        assert!(
            position + pushed <= released + capacity,
            "wrote over {released} at {position}"
        );
        for at in 0..pushed {
            let index = ((position + at) % capacity) as u32;
            let expected = (position + at + 1, bodies[at as usize]);
            assert_eq!(slot_words(ring, index), expected);
        }
        for at in pushed..capacity {
            let index = ((position + at) % capacity) as u32;
            assert_eq!(slot_words(ring, index), before[index as usize]);
        }
        position += pushed;
        assert_eq!(producer.position(), position);
    }
}

/// Laps of an honest peer, then one lie each.
#[cfg(test)]
pub(super) fn seeds() -> Vec<Vec<u8>> {
    use super::input::Seed;
    let mut seeds = Vec::new();
    for capacity in 0..4u8 {
        for lie in 0..5u8 {
            let slots = 2u8 << capacity;
            let mut honest = Seed::default().u8(capacity).u8(lie & 1);
            for number in 0..2 * slots {
                // Publishes the consumer's next position, with a body, and takes it.
                let index = number % slots;
                honest = honest.u8(1).u8(index).u8(0).u64(u64::from(number));
                honest = honest.u8(0).u8(index).u8(1).u8(0).u8(2);
            }
            honest = honest.u8(0).u8(1).u8(lie).u8(lie).u64(77).u8(3).u8(2);
            seeds.push(honest.0);
            let mut honest = Seed::default().u8(capacity).u8(2 + (lie & 1));
            for number in 0..2 * slots {
                honest = honest.u8(1).u8(1).u8(number % 3);
                if number % 2 == 0 {
                    honest = honest.u8(0).u8(0).u8(0);
                }
            }
            honest = honest.u8(0).u8(lie).u8(lie).u64(99).u8(1).u8(0).u8(3).u8(2);
            seeds.push(honest.0);
        }
    }
    seeds
}
