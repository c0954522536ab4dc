//! Loom models of the rings and the doorbell. Build with `RUSTFLAGS="--cfg loom"` and run in
//! release.
//!
//! Each model explores every execution within a bound on preemptions (see each `model` call), at
//! capacity 2 and over at least three laps, so that every slot is reused twice.

#![cfg(loom)]

use loom::thread;
use pegaflow_shm::bell::{SharedWaker, Sleeper, Waker};
use pegaflow_shm::ring::{
    BODY_WORDS, Body, Consumer, HeapRing, Producer, PushError, RingMemory, SharedConsumer,
    SharedProducer, Slot,
};
use pegaflow_shm::sync::{Arc, AtomicU32, AtomicU64, Ordering};

const CAPACITY: u32 = 2;

/// Three laps and one more.
const LAPS_AND_ONE: u64 = 3 * CAPACITY as u64 + 1;

fn model(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions));
    builder.max_branches = 50_000;
    builder.check(body);
}

/// A message whose second word is told by its first, so that a torn one shows. Loom copies two
/// words.
fn message(number: u64) -> Body {
    let mut body = [0; BODY_WORDS];
    body[0] = number;
    body[1] = number.wrapping_mul(0x9E37_79B9) ^ 0x55;
    body
}

fn number_of(body: Body) -> u64 {
    assert_eq!(body, message(body[0]), "torn or stale message");
    body[0]
}

/// A ring on which one producer dies: from position `dies_at` on, what it writes goes nowhere,
/// except the first `words` body words of that position.
struct DyingRing {
    real: Arc<HeapRing>,
    nowhere: Slot,
    dies_at: u32,
    words: usize,
}

impl DyingRing {
    fn new(real: &Arc<HeapRing>, dies_at: u32, words: usize) -> Arc<Self> {
        Arc::new(Self {
            real: real.clone(),
            nowhere: Slot::empty(),
            dies_at,
            words,
        })
    }

    /// The writes of the interrupted push that were made.
    fn partial_push(&self, body: &Body) {
        let slot = self.real.slot(self.dies_at);
        for (word, value) in slot.body.iter().zip(body).take(self.words) {
            word.store(*value, Ordering::Relaxed);
        }
    }
}

impl RingMemory for DyingRing {
    fn capacity(&self) -> u32 {
        self.real.capacity()
    }

    fn slot(&self, index: u32) -> &Slot {
        if index == self.dies_at {
            &self.nowhere
        } else {
            self.real.slot(index)
        }
    }

    fn consumed(&self) -> &AtomicU64 {
        self.real.consumed()
    }
}

#[test]
fn spsc_delivers_each_message_once_whole_and_in_order() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producing = ring.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(producing);
            for number in 0..LAPS_AND_ONE {
                loop {
                    match producer.try_push(&message(number)) {
                        Ok(()) => break,
                        Err(PushError::Full) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
        let mut consumer = Consumer::new(ring);
        for number in 0..LAPS_AND_ONE {
            let body = loop {
                match consumer.try_pop().unwrap() {
                    Some(body) => break body,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(number_of(body), number);
        }
        producer.join().unwrap();
        assert_eq!(consumer.try_pop(), Ok(None));
    });
}

#[test]
fn spsc_batches_arrive_whole_and_in_order() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producing = ring.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(producing);
            let all: Vec<Body> = (0..LAPS_AND_ONE - 1).map(message).collect();
            let mut rest = &all[..4];
            while !rest.is_empty() {
                match producer.push_slice(rest) {
                    Ok(count) => rest = &rest[count..],
                    Err(PushError::Full) => thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
            while let Err(error) = producer.try_push_n(&all[4..]) {
                assert_eq!(error, PushError::Full);
                thread::yield_now();
            }
        });
        let mut consumer = Consumer::new(ring);
        for number in 0..LAPS_AND_ONE - 1 {
            let body = loop {
                match consumer.try_pop().unwrap() {
                    Some(body) => break body,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(number_of(body), number);
        }
        producer.join().unwrap();
    });
}

/// Message `count` numbers of producer `who`, whole, in the order of each producer.
fn push_all(producer: &SharedProducer<Arc<HeapRing>>, who: u64, count: u64) {
    for number in 0..count {
        while let Err(error) = producer.try_push(&message(who * 100 + number)) {
            assert_eq!(error, PushError::Full);
            thread::yield_now();
        }
    }
}

/// Two laps by one thread, so that the concurrent part of a model with three threads is short and
/// yet runs on slots that were used before, into the fourth lap.
fn two_laps(push: impl Fn(&Body) -> Result<(), PushError>, mut pop: impl FnMut() -> Option<Body>) {
    for number in 0..2 * u64::from(CAPACITY) {
        push(&message(number)).unwrap();
        assert_eq!(pop().map(number_of), Some(number));
    }
}

#[test]
fn two_producers_lose_nothing_repeat_nothing_and_keep_their_order() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producer = SharedProducer::new(ring.clone());
        let mut consumer = Consumer::new(ring);
        two_laps(
            |body| producer.try_push(body),
            || consumer.try_pop().unwrap(),
        );
        producer.try_push(&message(200)).unwrap();
        let threads: Vec<_> = [0, 1]
            .into_iter()
            .map(|who| {
                let producer = producer.clone();
                thread::spawn(move || push_all(&producer, who, 1))
            })
            .collect();
        let mut next = [0, 0, 0];
        for _ in 0..3 {
            let body = loop {
                match consumer.try_pop().unwrap() {
                    Some(body) => break body,
                    None => thread::yield_now(),
                }
            };
            let number = number_of(body);
            let (who, number) = ((number / 100) as usize, number % 100);
            assert_eq!(number, next[who]);
            next[who] += 1;
        }
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(next, [1, 1, 1]);
        assert_eq!(consumer.try_pop(), Ok(None));
        assert!(!consumer.stalled());
    });
}

#[test]
fn claims_of_several_positions_are_contiguous() {
    model(2, || {
        let ring = Arc::new(HeapRing::new(4));
        let producer = SharedProducer::new(ring.clone());
        let other = producer.clone();
        let single = thread::spawn(move || push_all(&other, 1, 2));
        while let Err(error) = producer.try_push_n(&[message(0), message(1)]) {
            assert_eq!(error, PushError::Full);
            thread::yield_now();
        }
        single.join().unwrap();
        let mut consumer = Consumer::new(ring);
        let mut numbers = Vec::new();
        while let Some(body) = consumer.try_pop().unwrap() {
            numbers.push(number_of(body));
        }
        assert_eq!(numbers.len(), 4);
        let first = numbers.iter().position(|number| *number == 0).unwrap();
        assert_eq!(numbers[first + 1], 1);
    });
}

/// Takes `count` messages, waiting for them.
fn pop_count(consumer: &SharedConsumer<Arc<HeapRing>>, count: usize) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.len() < count {
        match consumer.try_pop().unwrap() {
            Some(body) => numbers.push(number_of(body)),
            None => thread::yield_now(),
        }
    }
    numbers
}

#[test]
fn two_consumers_get_each_message_exactly_once() {
    model(2, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producer = SharedProducer::new(ring.clone());
        let consumer = SharedConsumer::new(ring);
        two_laps(
            |body| producer.try_push(body),
            || consumer.try_pop().unwrap(),
        );
        push_all(&producer, 0, 2);
        let threads: Vec<_> = [2, 1]
            .into_iter()
            .map(|count| {
                let consumer = consumer.clone();
                thread::spawn(move || pop_count(&consumer, count))
            })
            .collect();
        while let Err(error) = producer.try_push(&message(2)) {
            assert_eq!(error, PushError::Full);
            thread::yield_now();
        }
        let mut all: Vec<u64> = Vec::new();
        for thread in threads {
            let numbers = thread.join().unwrap();
            assert!(numbers.is_sorted(), "a consumer sees the ring's order");
            all.extend(numbers);
        }
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2]);
        assert_eq!(consumer.try_pop(), Ok(None));
    });
}

#[test]
fn a_consumer_that_comes_late_takes_no_old_lap_for_a_fault() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let mut producer = Producer::new(ring.clone());
        let consumer = SharedConsumer::new(ring);
        for number in 0..u64::from(CAPACITY) {
            producer.try_push(&message(number)).unwrap();
            consumer.try_pop().unwrap().unwrap();
        }
        // It knows the first lap only; the other thread runs it through the second and into the
        // third.
        let late = consumer.clone();
        let late = thread::spawn(move || u64::from(late.try_pop().unwrap().is_some()));
        let busy = consumer.clone();
        let busy = thread::spawn(move || {
            (0..2).filter(|_| busy.try_pop().unwrap().is_some()).count() as u64
        });
        for number in 0..u64::from(CAPACITY) {
            producer.try_push(&message(number)).unwrap();
        }
        let popped = late.join().unwrap() + busy.join().unwrap();
        assert_eq!(consumer.position(), u64::from(CAPACITY) + popped);
    });
}

#[test]
fn a_producer_that_comes_late_takes_no_old_progress_for_a_fault() {
    model(2, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producer = SharedProducer::new(ring.clone());
        let mut consumer = Consumer::new(ring);
        let push_times = |times: u64| {
            let producer = producer.clone();
            thread::spawn(move || {
                (0..times)
                    .filter(|number| match producer.try_push(&message(*number)) {
                        Ok(()) => true,
                        Err(PushError::Full) => false,
                        Err(error) => panic!("{error}"),
                    })
                    .count() as u64
            })
        };
        let busy = push_times(4);
        let late = push_times(1);
        for _ in 0..4 {
            consumer.try_pop().unwrap().map(number_of);
        }
        let pushed = busy.join().unwrap() + late.join().unwrap();
        assert_eq!(producer.position(), pushed);
    });
}

#[test]
fn consumers_that_report_out_of_order_never_take_progress_back() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let mut producer = Producer::new(ring.clone());
        let consumer = SharedConsumer::new(ring);
        for number in 0..u64::from(CAPACITY) {
            producer.try_push(&message(number)).unwrap();
        }
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let consumer = consumer.clone();
                thread::spawn(move || consumer.try_pop().unwrap().map(number_of))
            })
            .collect();
        let mut push = |number| match producer.try_push(&message(number)) {
            Ok(()) | Err(PushError::Full) => {}
            Err(error) => panic!("{error}"),
        };
        (2..5).for_each(&mut push);
        for thread in threads {
            thread.join().unwrap();
        }
        (5..8).for_each(&mut push);
    });
}

/// Producer A claims position 0 and dies after `words` of its body; producer B publishes position
/// 1.
fn producer_that_stops_after(words: usize) {
    model(3, move || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let dying = DyingRing::new(&ring, 0, words);
        let producer = SharedProducer::new(dying.clone());
        let other = producer.clone();
        producer.try_push(&message(7)).unwrap();
        let dead = thread::spawn(move || dying.partial_push(&message(7)));
        let alive = thread::spawn(move || other.try_push(&message(8)).unwrap());
        let mut consumer = Consumer::new(ring);
        assert_eq!(
            consumer.try_pop(),
            Ok(None),
            "nothing of the dead producer is seen"
        );
        dead.join().unwrap();
        alive.join().unwrap();
        assert_eq!(consumer.try_pop(), Ok(None), "nobody overtakes the gap");
        assert!(consumer.stalled(), "the gap is seen");
        assert_eq!(consumer.position(), 0);
    });
}

#[test]
fn a_producer_that_stops_before_the_body_is_seen_as_stalled() {
    producer_that_stops_after(0);
}

#[test]
fn a_producer_that_stops_inside_the_body_is_seen_as_stalled() {
    producer_that_stops_after(1);
}

#[test]
fn a_producer_that_stops_before_the_sequence_is_seen_as_stalled() {
    producer_that_stops_after(2);
}

#[test]
fn a_single_producer_that_stops_leaves_whole_messages_and_then_nothing() {
    for words in 0..=2 {
        model(3, move || {
            let ring = Arc::new(HeapRing::new(CAPACITY));
            let dying = DyingRing::new(&ring, 1, words);
            let producer = thread::spawn(move || {
                let mut producer = Producer::new(dying.clone());
                producer.try_push(&message(0)).unwrap();
                dying.partial_push(&message(1));
            });
            let mut consumer = Consumer::new(ring);
            let mut seen = 0;
            for _ in 0..3 {
                if let Some(body) = consumer.try_pop().unwrap() {
                    assert_eq!(number_of(body), seen);
                    seen += 1;
                }
                assert!(!consumer.stalled());
            }
            producer.join().unwrap();
            if seen == 0 {
                assert_eq!(consumer.try_pop().unwrap().map(number_of), Some(0));
            }
            assert_eq!(consumer.try_pop(), Ok(None));
        });
    }
}

#[test]
fn a_single_producer_never_looks_stalled() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producing = ring.clone();
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(producing);
            (0..2).for_each(|number| producer.try_push(&message(number)).unwrap());
        });
        let consumer = Consumer::new(ring);
        assert!(!consumer.stalled());
        producer.join().unwrap();
    });
}

#[test]
fn a_slow_producer_is_not_mistaken_for_a_fault() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let producer = SharedProducer::new(ring.clone());
        let threads: Vec<_> = (0..2)
            .map(|who| {
                let producer = producer.clone();
                thread::spawn(move || push_all(&producer, who, 1))
            })
            .collect();
        let mut consumer = Consumer::new(ring);
        // May be true while the first claimer is still writing; must only never be a fault.
        let _ = consumer.stalled();
        consumer.try_pop().unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(!consumer.stalled());
    });
}

/// A bell that loom can see: `wait` is a park until the flag is up.
struct ModelBell {
    rung: loom::sync::Mutex<bool>,
    changed: loom::sync::Condvar,
}

impl ModelBell {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            rung: loom::sync::Mutex::new(false),
            changed: loom::sync::Condvar::new(),
        })
    }

    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    /// Without a ring this never returns, and loom reports a deadlock: a lost wake-up.
    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn sleep_until_all_arrived(
    mut consumer: Consumer<Arc<HeapRing>>,
    word: Arc<AtomicU32>,
    bell: &ModelBell,
    count: usize,
) {
    let mut sleeper = Sleeper::new(word);
    let mut seen = 0;
    while seen < count {
        if let Some(body) = consumer.try_pop().unwrap() {
            number_of(body);
            seen += 1;
            continue;
        }
        sleeper.arm();
        match consumer.try_pop().unwrap() {
            Some(body) => {
                number_of(body);
                seen += 1;
            }
            None => bell.wait(),
        }
        sleeper.disarm();
    }
}

#[test]
fn the_doorbell_loses_no_wake_up() {
    model(4, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let word = Arc::new(AtomicU32::new(0));
        let bell = ModelBell::new();
        let (producing, peer_word, peer_bell) = (ring.clone(), word.clone(), bell.clone());
        let producer = thread::spawn(move || {
            let mut producer = Producer::new(producing);
            let mut waker = Waker::new(peer_word);
            for number in 0..2 {
                producer.try_push(&message(number)).unwrap();
                if waker.should_ring() {
                    peer_bell.ring();
                }
            }
        });
        sleep_until_all_arrived(Consumer::new(ring), word, &bell, 2);
        producer.join().unwrap();
    });
}

#[test]
fn the_shared_doorbell_loses_no_wake_up() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(CAPACITY));
        let word = Arc::new(AtomicU32::new(0));
        let bell = ModelBell::new();
        let producer = SharedProducer::new(ring.clone());
        let waker = Arc::new(SharedWaker::new(word.clone()));
        let threads: Vec<_> = (0..2)
            .map(|who| {
                let (producer, waker, bell) = (producer.clone(), waker.clone(), bell.clone());
                thread::spawn(move || {
                    producer.try_push(&message(who)).unwrap();
                    if waker.should_ring() {
                        bell.ring();
                    }
                })
            })
            .collect();
        sleep_until_all_arrived(Consumer::new(ring), word, &bell, 2);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}
