//! A peer that writes anything anywhere: the other side answers a message, nothing, or a fault, and
//! never panics, hangs or moves by more than it returned.

#![cfg(all(not(loom), not(miri)))]

mod common;

use std::sync::atomic::AtomicBool;

use common::{HEADER_BYTES, Random, RingPair, ring_pair};
use pegaflow_shm::bell::{SharedWaker, Waker};
use pegaflow_shm::ring::{
    BODY_WORDS, Consumer, HeapRing, Producer, PushError, RingFault, RingMemory, SharedConsumer,
    SharedProducer,
};
use pegaflow_shm::sync::{AtomicU32, Ordering};

const CAPACITY: u32 = 8;

/// Values that come near the possible ones more often than chance would.
fn nasty(random: &mut Random, near: u64) -> u64 {
    match random.below(6) {
        0 => random.next(),
        1 => near.wrapping_add(random.below(4)),
        2 => near.wrapping_sub(random.below(20)),
        3 => u64::MAX - random.below(3),
        4 => random.below(32),
        _ => near + 1,
    }
}

#[test]
fn random_words_in_the_slots_never_upset_a_consumer() {
    let mut random = Random::new(0x5EED_0003);
    let mut faults = 0;
    for _ in 0..200 {
        let RingPair {
            consuming, slots, ..
        } = ring_pair(CAPACITY);
        let mut single = Consumer::new(consuming.clone());
        let shared = SharedConsumer::new(consuming);
        for _ in 0..500 {
            let slot = random.below(u64::from(CAPACITY)) as usize;
            let word = random.below(8) as usize;
            let value = nasty(&mut random, single.position());
            slots
                .atomic_u64(HEADER_BYTES + slot * 64 + word * 8)
                .unwrap()
                .store(value, Ordering::Relaxed);
            let before = single.position();
            let moved = match single.try_pop() {
                Ok(Some(_)) => 1,
                Ok(None) => 0,
                Err(RingFault::Sequence {
                    position, found, ..
                }) => {
                    assert_eq!(position, before);
                    assert_ne!(found, before + 1);
                    faults += 1;
                    0
                }
                Err(other) => panic!("a consumer does not read progress words: {other}"),
            };
            assert_eq!(single.position(), before + moved);
            let _ = shared.try_pop();
            let _ = (single.stalled(), shared.stalled());
        }
    }
    assert!(faults > 0);
}

#[test]
fn random_progress_words_never_upset_a_producer_nor_make_it_overwrite() {
    let mut random = Random::new(0x5EED_0004);
    for _ in 0..2_000 {
        let ring = HeapRing::new(CAPACITY);
        let mut producer = Producer::new(&ring);
        let shared_ring = HeapRing::new(CAPACITY);
        let shared = SharedProducer::new(&shared_ring);
        let mut best = 0;
        for _ in 0..40 {
            let value = nasty(&mut random, producer.position().saturating_sub(2));
            if value <= producer.position() {
                best = best.max(value);
            }
            ring.consumed().store(value, Ordering::Relaxed);
            match producer.try_push(&[0; BODY_WORDS]) {
                Ok(()) | Err(PushError::Full | PushError::Fault(_)) => {}
                Err(other) => panic!("{other}"),
            }
            assert!(
                producer.position() <= best + u64::from(CAPACITY),
                "more in flight than the consumer ever allowed"
            );
            let value = nasty(&mut random, shared.position());
            shared_ring.consumed().store(value, Ordering::Relaxed);
            let _ = shared.try_push_n(&[[0; BODY_WORDS]; 3]);
        }
    }
}

#[test]
fn a_scribbler_that_runs_beside_the_consumer_never_upsets_it() {
    let RingPair {
        consuming, slots, ..
    } = ring_pair(CAPACITY);
    let (started, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(0x5EED_0005);
            let mut writes = 0_u64;
            while !done.load(Ordering::Relaxed) {
                let word = random.below(u64::from(CAPACITY) * 8) as usize;
                let near = writes / 8;
                slots
                    .atomic_u64(HEADER_BYTES + word * 8)
                    .unwrap()
                    .store(nasty(&mut random, near), Ordering::Relaxed);
                writes += 1;
                started.store(true, Ordering::Relaxed);
            }
        });
        // On a busy machine the thread may start later than all the pops below would take.
        while !started.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let shared = SharedConsumer::new(consuming.clone());
        let mut single = Consumer::new(consuming);
        for _ in 0..200_000 {
            let before = single.position();
            let moved = u64::from(matches!(single.try_pop(), Ok(Some(_))));
            assert_eq!(single.position(), before + moved);
            let _ = shared.try_pop();
        }
        let _ = (single.stalled(), shared.stalled());
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_hostile_sleep_word_costs_at_most_one_ring_per_call() {
    let word = AtomicU32::new(0);
    let mut waker = Waker::new(&word);
    let shared = SharedWaker::new(&word);
    let mut random = Random::new(0x5EED_0006);
    let mut rings = 0;
    for _ in 0..10_000 {
        let value = random.below(3) as u32;
        word.store(value, Ordering::Relaxed);
        let rang = waker.should_ring();
        assert!(!(rang && value == 0), "an awake peer is not rung");
        rings += u32::from(rang);
        assert!(!(shared.should_ring() && value == 0));
    }
    assert!(rings <= 10_000);
}
