//! A producer that is killed at a random instruction, over real memfds and in a real process.
//!
//! `PEGAFLOW_KILL_TRIALS` sets the number of trials per test (default 200).

#![cfg(all(not(loom), not(miri)))]

mod common;

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::{Random, ring_pair};
use pegaflow_shm::ring::{Body, Consumer, Producer, PushError, RawRing, SharedProducer};

const CAPACITY: u32 = 16;

/// Longest life of a producer after its first message.
const MAX_LIFE_NS: u64 = 300_000;

/// The same for a producer of two threads: a gap shows when one is stopped inside a push and the
/// other runs on, for which the scheduler must have switched between them.
const MAX_SHARED_LIFE_NS: u64 = 6_000_000;

fn trials() -> u64 {
    match std::env::var("PEGAFLOW_KILL_TRIALS") {
        Ok(text) => text.parse().expect("PEGAFLOW_KILL_TRIALS is a number"),
        Err(_) => 200,
    }
}

/// Message `number` of producing thread `who`; every word depends on both.
fn message(who: u64, number: u64) -> Body {
    let key = who << 56 | number;
    core::array::from_fn(|word| key.wrapping_mul(2 * word as u64 + 1))
}

/// Which thread's which message, if the message is whole.
fn decode(body: &Body) -> (u64, u64) {
    let (who, number) = (body[0] >> 56, body[0] & ((1 << 56) - 1));
    assert_eq!(*body, message(who, number), "torn message");
    (who, number)
}

/// Runs `produce` in a child process until it is killed.
struct Child(libc::pid_t);

impl Child {
    fn start(produce: impl FnOnce()) -> Self {
        // SAFETY: the child runs `produce`, which only touches atomics of mappings made before (and
        // may start threads, which glibc allows after a fork), and never returns into the test
        // harness.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            // SAFETY: a plain system call: the child must not outlive a killed test.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(produce));
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(99) };
        }
        Self(pid)
    }

    /// Kills it and waits until the kernel has taken it down: no store of it comes after.
    fn kill(self) {
        let mut status = 0;
        // SAFETY: signals and reaps a child of this process that nobody else reaps.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            assert_eq!(libc::waitpid(self.0, &mut status, 0), self.0);
        }
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
            "the producer ended by itself: status {status:#x}"
        );
    }
}

/// Consumes while the producer lives for `life_ns` more, kills it, and consumes what it left.
/// `seen` gets every message.
fn kill_at_random(
    child: Child,
    life_ns: u64,
    random: &mut Random,
    consumer: &mut Consumer<RawRing>,
    mut seen: impl FnMut(&Body),
) {
    while consumer.position() == 0 {
        if let Some(body) = consumer.try_pop().unwrap() {
            seen(&body);
        }
    }
    let start = Instant::now();
    let life = Duration::from_nanos(life_ns);
    // Sometimes a consumer that pauses, so that producers also die on a full ring.
    let pauses = random.below(4) == 0;
    while start.elapsed() < life {
        if pauses && random.below(64) != 0 {
            std::hint::spin_loop();
            continue;
        }
        if let Some(body) = consumer.try_pop().unwrap() {
            seen(&body);
        }
    }
    child.kill();
    while let Some(body) = consumer.try_pop().unwrap() {
        seen(&body);
    }
}

#[test]
fn a_killed_producer_leaves_whole_messages_in_order_and_then_nothing() {
    let mut random = Random::new(0x5EED_0001);
    let mut total = 0;
    for _ in 0..trials() {
        let pair = ring_pair(CAPACITY);
        let producing = pair.producing.clone();
        let child = Child::start(move || {
            let mut producer = Producer::new(producing);
            let mut number = 0;
            loop {
                match producer.try_push(&message(1, number)) {
                    Ok(()) => number += 1,
                    Err(PushError::Full) => std::hint::spin_loop(),
                    Err(_) => return,
                }
            }
        });
        let mut consumer = Consumer::new(pair.consuming.clone());
        let mut expected = 0;
        let life_ns = random.below(MAX_LIFE_NS);
        kill_at_random(child, life_ns, &mut random, &mut consumer, |body| {
            assert_eq!(decode(body), (1, expected), "lost, repeated or reordered");
            expected += 1;
        });
        assert!(!consumer.stalled(), "a single producer leaves no gap");
        total += expected;
    }
    assert!(total > trials());
}

/// One thread of a shared producer: numbered messages for ever, alone or in threes.
fn produce_shared(producer: &SharedProducer<RawRing>, who: u64) {
    let mut number = 0;
    loop {
        let batch: [Body; 3] = core::array::from_fn(|ahead| message(who, number + ahead as u64));
        let count = if number.is_multiple_of(2) { 1 } else { 3 };
        match producer.try_push_n(&batch[..count]) {
            Ok(()) => number += count as u64,
            Err(PushError::Full) => std::hint::spin_loop(),
            Err(_) => return,
        }
    }
}

#[test]
fn a_killed_shared_producer_leaves_whole_messages_and_at_most_a_gap_that_shows() {
    let mut random = Random::new(0x5EED_0002);
    let (mut stalls, mut later_gaps) = (0_u64, 0_u64);
    for _ in 0..trials() {
        let pair = ring_pair(CAPACITY);
        let producing = pair.producing.clone();
        let child = Child::start(move || {
            let producer = SharedProducer::new(producing);
            let other = producer.clone();
            let both = Arc::new(Barrier::new(2));
            let meet = both.clone();
            std::thread::spawn(move || {
                meet.wait();
                produce_shared(&other, 2);
            });
            both.wait();
            produce_shared(&producer, 1);
        });
        let mut consumer = Consumer::new(pair.consuming.clone());
        let mut expected = [0; 2];
        let life_ns = random.below(MAX_SHARED_LIFE_NS);
        kill_at_random(child, life_ns, &mut random, &mut consumer, |body| {
            let (who, number) = decode(body);
            let expected = &mut expected[who as usize - 1];
            assert_eq!(number, *expected, "lost, repeated or reordered");
            *expected += 1;
        });
        // Nothing is published beyond an unreported gap: what remains is a stall or an empty ring.
        if consumer.stalled() {
            stalls += 1;
            let position = consumer.position();
            assert_eq!(consumer.try_pop(), Ok(None));
            assert_eq!(consumer.position(), position, "a gap is never skipped");
        } else {
            later_gaps += u64::from(consumer.try_pop().unwrap().is_some());
        }
    }
    assert_eq!(later_gaps, 0);
    println!(
        "{stalls} of {} killed shared producers left a gap",
        trials()
    );
}
