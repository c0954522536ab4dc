//! Ring guarantees that need no second process, over heap memory (so Miri can run them).

#![forbid(unsafe_code)]

use super::*;
use crate::sync::Ordering;

fn message(number: u64) -> Body {
    core::array::from_fn(|word| number.wrapping_mul(word as u64 + 1))
}

/// Laps that a test drives a ring through.
const LAPS: u64 = 5;

#[test]
fn slots_of_zeroed_memory_are_an_empty_ring() {
    let ring = HeapRing::new(4);
    assert_eq!(Consumer::new(&ring).try_pop(), Ok(None));
    assert_eq!(SharedConsumer::new(&ring).try_pop(), Ok(None));
}

#[test]
fn spsc_fills_to_capacity_and_drains_in_order_lap_after_lap() {
    for capacity in [2, 4, 64] {
        let ring = HeapRing::new(capacity);
        let mut producer = Producer::new(&ring);
        let mut consumer = Consumer::new(&ring);
        for lap in 0..LAPS {
            let first = lap * u64::from(capacity);
            for number in first..first + u64::from(capacity) {
                producer.try_push(&message(number)).unwrap();
            }
            assert_eq!(producer.try_push(&message(0)), Err(PushError::Full));
            assert!(!consumer.stalled());
            for number in first..first + u64::from(capacity) {
                assert_eq!(consumer.try_pop(), Ok(Some(message(number))));
            }
            assert_eq!(consumer.try_pop(), Ok(None));
            assert_eq!(producer.position(), consumer.position());
            assert_eq!(producer.free_slots(), Ok(capacity));
        }
    }
}

#[test]
fn progress_is_reported_each_quarter_and_when_empty() {
    let ring = HeapRing::new(16);
    let mut producer = Producer::new(&ring);
    let mut consumer = Consumer::new(&ring);
    for number in 0..6 {
        producer.try_push(&message(number)).unwrap();
    }
    let consumed = || ring.consumed().load(Ordering::Relaxed);
    for (pops, reported) in [(1, 0), (2, 0), (3, 0), (4, 4), (5, 4), (6, 4)] {
        consumer.try_pop().unwrap().unwrap();
        assert_eq!(consumed(), reported, "after {pops} pops");
    }
    consumer.try_pop().unwrap();
    assert_eq!(consumed(), 6);
}

#[test]
fn push_slice_takes_what_fits_and_try_push_n_all_or_nothing() {
    let ring = HeapRing::new(4);
    let mut producer = Producer::new(&ring);
    let mut consumer = Consumer::new(&ring);
    let bodies: Vec<Body> = (0..6).map(message).collect();
    assert_eq!(producer.push_slice(&[]), Ok(0));
    assert_eq!(producer.push_slice(&bodies), Ok(4));
    assert_eq!(producer.push_slice(&bodies), Err(PushError::Full));
    for body in &bodies[..3] {
        assert_eq!(consumer.try_pop(), Ok(Some(*body)));
    }
    assert_eq!(producer.try_push_n(&bodies[..4]), Err(PushError::Full));
    assert_eq!(
        producer.try_push_n(&bodies),
        Err(PushError::TooMany {
            count: 6,
            capacity: 4
        }),
        "what can never fit is not called full"
    );
    assert_eq!(producer.position(), 4);
    producer.try_push_n(&bodies[..3]).unwrap();
    assert_eq!(consumer.try_pop(), Ok(Some(bodies[3])));
    assert_eq!(consumer.try_pop(), Ok(Some(bodies[0])));
}

#[test]
fn shared_handles_fill_drain_and_batch_like_single_ones() {
    let ring = HeapRing::new(4);
    let producer = SharedProducer::new(&ring);
    let consumer = SharedConsumer::new(&ring);
    let bodies: Vec<Body> = (0..5).map(message).collect();
    assert_eq!(
        producer.try_push_n(&bodies),
        Err(PushError::TooMany {
            count: 5,
            capacity: 4
        })
    );
    for _ in 0..LAPS {
        producer.try_push_n(&[]).unwrap();
        producer.clone().try_push_n(&bodies[..3]).unwrap();
        assert_eq!(producer.try_push_n(&bodies[..2]), Err(PushError::Full));
        producer.try_push(&bodies[3]).unwrap();
        assert_eq!(producer.try_push(&bodies[3]), Err(PushError::Full));
        for body in &bodies[..4] {
            assert_eq!(consumer.clone().try_pop(), Ok(Some(*body)));
        }
        assert_eq!(consumer.try_pop(), Ok(None));
        assert!(!consumer.stalled());
        assert_eq!(producer.position(), consumer.position());
    }
}

#[test]
fn single_and_shared_handles_speak_one_format() {
    let ring = HeapRing::new(2);
    let producer = SharedProducer::new(&ring);
    let mut consumer = Consumer::new(&ring);
    let back = HeapRing::new(2);
    let mut answering = Producer::new(&back);
    let answers = SharedConsumer::new(&back);
    for number in 0..2 * LAPS {
        producer.try_push(&message(number)).unwrap();
        answering
            .try_push(&consumer.try_pop().unwrap().unwrap())
            .unwrap();
        assert_eq!(answers.try_pop(), Ok(Some(message(number))));
        assert_eq!(consumer.try_pop(), Ok(None));
        assert_eq!(answers.try_pop(), Ok(None));
    }
}

#[test]
fn a_gap_before_a_published_slot_is_a_stall() {
    let ring = HeapRing::new(8);
    let mut producer = Producer::new(&ring);
    let mut consumer = Consumer::new(&ring);
    let shared = SharedConsumer::new(&ring);
    for number in 0..3 {
        producer.try_push(&message(number)).unwrap();
    }
    ring.slot(1).seq.store(0, Ordering::Relaxed);
    assert!(!consumer.stalled());
    consumer.try_pop().unwrap().unwrap();
    shared.try_pop().unwrap().unwrap();
    assert!(consumer.stalled());
    assert!(shared.stalled());
    assert_eq!(consumer.try_pop(), Ok(None));
    ring.slot(1).publish(1, &message(1));
    assert!(!consumer.stalled());
}

#[test]
fn an_impossible_sequence_is_a_fault_that_names_it() {
    // On the first lap and on a later one; the values next to the possible ones and far away.
    for position in [0_u64, 9] {
        let possible = [if position < 4 { 0 } else { position - 3 }, position + 1];
        for found in [1, 2, 5, 6, 7, 8, 9, 10, 11, 14, 1 << 63, u64::MAX] {
            if possible.contains(&found) {
                continue;
            }
            let ring = HeapRing::new(4);
            let mut producer = Producer::new(&ring);
            let mut consumer = Consumer::new(&ring);
            let shared = SharedConsumer::new(&ring);
            for number in 0..position {
                producer.try_push(&message(number)).unwrap();
                consumer.try_pop().unwrap().unwrap();
                shared.try_pop().unwrap().unwrap();
                consumer.report();
            }
            ring.slot((position % 4) as u32)
                .seq
                .store(found, Ordering::Relaxed);
            let fault = RingFault::Sequence {
                position,
                expected: possible[0],
                found,
            };
            assert_eq!(consumer.try_pop(), Err(fault));
            assert_eq!(shared.try_pop(), Err(fault));
            assert_eq!(
                consumer.position(),
                position,
                "a fault does not move the consumer"
            );
            assert!(fault.to_string().contains(&found.to_string()));
        }
    }
}

#[test]
fn an_impossible_progress_word_is_a_fault_for_single_and_shared_producers() {
    let ring = HeapRing::new(4);
    let mut producer = Producer::new(&ring);
    let shared = SharedProducer::new(&ring);
    let say = |value| ring.consumed().store(value, Ordering::Relaxed);
    for number in 0..4 {
        producer.try_push(&message(number)).unwrap();
        shared.try_push(&message(number)).unwrap();
    }
    for found in [5, u64::MAX] {
        say(found);
        let fault = RingFault::ConsumedAhead {
            position: 4,
            expected: 4,
            found,
        };
        assert_eq!(producer.try_push(&message(4)), Err(PushError::Fault(fault)));
        assert_eq!(shared.try_push(&message(4)), Err(PushError::Fault(fault)));
    }
    say(2);
    for number in 4..6 {
        producer.try_push(&message(number)).unwrap();
        shared.try_push(&message(number)).unwrap();
    }
    say(1);
    let fault = RingFault::ConsumedBackwards {
        position: 6,
        expected: 2,
        found: 1,
    };
    assert_eq!(producer.try_push(&message(6)), Err(PushError::Fault(fault)));
    assert_eq!(producer.free_slots(), Err(fault));
    assert_eq!(shared.try_push(&message(6)), Err(PushError::Fault(fault)));
    assert_eq!(shared.position(), 6);
}

#[test]
fn several_threads_on_both_sides_get_each_message_exactly_once() {
    const PER_PRODUCER: u64 = if cfg!(miri) { 50 } else { 20_000 };
    let ring = HeapRing::new(8);
    let producer = SharedProducer::new(&ring);
    let consumer = SharedConsumer::new(&ring);
    let produce = |who: u64| {
        for number in 0..PER_PRODUCER {
            while let Err(error) = producer.try_push(&message(who * PER_PRODUCER + number)) {
                assert_eq!(error, PushError::Full);
                std::thread::yield_now();
            }
        }
    };
    let consume = || {
        let mut seen = Vec::new();
        while consumer.position() < 2 * PER_PRODUCER {
            match consumer.try_pop().unwrap() {
                Some(body) => {
                    assert_eq!(body, message(body[0]), "torn message");
                    seen.push(body[0]);
                }
                None => std::thread::yield_now(),
            }
        }
        seen
    };
    let mut all = std::thread::scope(|scope| {
        scope.spawn(|| produce(0));
        scope.spawn(|| produce(1));
        let other = scope.spawn(consume);
        let mut mine = consume();
        mine.extend(other.join().unwrap());
        mine
    });
    all.sort_unstable();
    assert!(all.into_iter().eq(0..2 * PER_PRODUCER));
}

#[test]
fn only_powers_of_two_in_range_are_capacities() {
    for capacity in [2, 4, 1024, MAX_CAPACITY] {
        assert!(is_valid_capacity(capacity));
    }
    for capacity in [0, 1, 3, 6, MAX_CAPACITY + 1, MAX_CAPACITY * 2, u32::MAX] {
        assert!(!is_valid_capacity(capacity));
    }
}
