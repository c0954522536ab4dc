//! Loom models of the node file's rows, and of rings whose consumer dies. Build with
//! `RUSTFLAGS="--cfg loom"` and run in release.

#![cfg(loom)]
#![forbid(unsafe_code)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use pegaflow_shm::ring::{
    BODY_WORDS, Body, Consumer, HeapRing, Producer, PushError, SharedProducer,
};
use pegaflow_shm::row;

fn model(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions));
    builder.max_branches = 50_000;
    builder.check(body);
}

type Row = Arc<[AtomicU64; 3]>;

fn empty_row() -> Row {
    Arc::new(core::array::from_fn(|_| AtomicU64::new(0)))
}

/// Both words are one number; zero is a row that was never written.
fn check(words: &Row) {
    let mut row = [u64::MAX; 2];
    if row::read(&words[..], &mut row) {
        assert!(
            row[0] == row[1] && row[0] < 3,
            "a torn row was read: {row:?}"
        );
    }
}

#[test]
fn a_row_is_never_read_torn() {
    model(3, || {
        let words = empty_row();
        let written = words.clone();
        let writer = thread::spawn(move || {
            row::write(&written[..], &[1, 1]);
            row::write(&written[..], &[2, 2]);
        });
        let reader = thread::spawn({
            let words = words.clone();
            move || check(&words)
        });
        reader.join().unwrap();
        writer.join().unwrap();
        let mut row = [0; 2];
        assert!(row::read(&words[..], &mut row) && row == [2, 2]);
    });
}

/// The writer's stores up to some point of its second row: before the odd version, after it, after
/// the first word, after all words.
fn write_and_die(words: &Row, stores: usize) {
    row::write(&words[..], &[1, 1]);
    if stores > 0 {
        words[0].store(3, Ordering::Relaxed);
        loom::sync::atomic::fence(Ordering::Release);
    }
    for word in words[1..].iter().take(stores.saturating_sub(1)) {
        word.store(2, Ordering::Relaxed);
    }
}

#[test]
fn a_writer_that_dies_costs_its_readers_the_row_and_no_hang() {
    for stores in 0..=3 {
        model(3, move || {
            let words = empty_row();
            let written = words.clone();
            let writer = thread::spawn(move || write_and_die(&written, stores));
            let reader = thread::spawn({
                let words = words.clone();
                move || check(&words)
            });
            reader.join().unwrap();
            writer.join().unwrap();
            let mut row = [0; 2];
            let is_whole = row::read(&words[..], &mut row);
            assert_eq!(is_whole, stores == 0, "{row:?}");
            // Whoever writes the row next makes it whole.
            row::write(&words[..], &[2, 2]);
            assert!(row::read(&words[..], &mut row) && row == [2, 2]);
        });
    }
}

fn message(number: u64) -> Body {
    let mut body = [0; BODY_WORDS];
    (body[0], body[1]) = (number, !number);
    body
}

/// A consumer that takes `taken` messages and dies, with or without a last word of its progress.
fn consumer_that_dies(mut push: impl FnMut(u64) -> Result<(), PushError>, ring: Arc<HeapRing>) {
    let consumer = thread::spawn(move || {
        let mut consumer = Consumer::new(ring);
        let mut taken = 0;
        for _ in 0..2 {
            if let Some(body) = consumer.try_pop().unwrap() {
                assert_eq!((body[0], body[1]), (taken, !taken));
                taken += 1;
            }
        }
        taken
    });
    let mut pushed = 0;
    for _ in 0..4 {
        match push(pushed) {
            Ok(()) => pushed += 1,
            Err(PushError::Full) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let taken = consumer.join().unwrap();
    assert!(
        pushed <= taken + 2,
        "a message nobody read was written over"
    );
    // Nobody reads any more: a bounded number of messages fits, then the ring stays full.
    let mut full = 0;
    for _ in 0..4 {
        match push(pushed) {
            Ok(()) => pushed += 1,
            Err(PushError::Full) => full += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(full >= 2 && pushed <= taken + 2);
}

#[test]
fn a_consumer_that_dies_leaves_its_producer_with_a_full_ring() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(2));
        let mut producer = Producer::new(ring.clone());
        consumer_that_dies(|number| producer.try_push(&message(number)), ring);
    });
}

#[test]
fn a_consumer_that_dies_leaves_sharing_producers_with_a_full_ring() {
    model(3, || {
        let ring = Arc::new(HeapRing::new(2));
        let producer = SharedProducer::new(ring.clone());
        consumer_that_dies(|number| producer.try_push(&message(number)), ring);
    });
}
