//! Queues between two threads: they cannot be shared between processes.

#![forbid(unsafe_code)]

use std::hint::spin_loop;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use pegaflow_tools::bench::rings::pin;

use crate::{BATCHES, Measured, Message, Outcome, PER_BATCH, STREAM_MESSAGES, round_trips};

const CAPACITY: usize = 1024;
const ROUND_TRIPS: u64 = BATCHES * PER_BATCH;

/// The two ends of one direction.
trait Channel {
    type Sender: Send + 'static;
    type Receiver: Send + 'static;

    fn make() -> (Self::Sender, Self::Receiver);
    fn send(sender: &mut Self::Sender, message: Message) -> bool;
    fn receive(receiver: &mut Self::Receiver) -> Option<Message>;
}

struct Crossbeam;

impl Channel for Crossbeam {
    type Sender = Arc<ArrayQueue<Message>>;
    type Receiver = Arc<ArrayQueue<Message>>;

    fn make() -> (Self::Sender, Self::Receiver) {
        let queue = Arc::new(ArrayQueue::new(CAPACITY));
        (queue.clone(), queue)
    }

    #[inline]
    fn send(sender: &mut Self::Sender, message: Message) -> bool {
        sender.push(message).is_ok()
    }

    #[inline]
    fn receive(receiver: &mut Self::Receiver) -> Option<Message> {
        receiver.pop()
    }
}

struct Rtrb;

impl Channel for Rtrb {
    type Sender = rtrb::Producer<Message>;
    type Receiver = rtrb::Consumer<Message>;

    fn make() -> (Self::Sender, Self::Receiver) {
        rtrb::RingBuffer::new(CAPACITY)
    }

    #[inline]
    fn send(sender: &mut Self::Sender, message: Message) -> bool {
        sender.push(message).is_ok()
    }

    #[inline]
    fn receive(receiver: &mut Self::Receiver) -> Option<Message> {
        receiver.pop().ok()
    }
}

fn send<C: Channel>(sender: &mut C::Sender, message: Message) {
    while !C::send(sender, message) {
        spin_loop();
    }
}

fn receive<C: Channel>(receiver: &mut C::Receiver) -> Message {
    loop {
        if let Some(message) = C::receive(receiver) {
            return message;
        }
        spin_loop();
    }
}

fn message(number: u64) -> Message {
    [number, 1, 2, 3, 4, 5, 6, 7]
}

/// Measures with the calling thread on its present CPU and a second one on `peer_cpu`.
fn measure<C: Channel>(peer_cpu: Option<usize>) -> Outcome<Measured> {
    let (mut out, mut peer_in) = C::make();
    let (mut peer_out, mut back) = C::make();
    let peer = std::thread::spawn(move || -> Outcome<u64> {
        if let Some(cpu) = peer_cpu {
            pin(cpu)?;
        }
        for _ in 0..ROUND_TRIPS {
            let message = receive::<C>(&mut peer_in);
            send::<C>(&mut peer_out, message);
        }
        let mut sum = 0_u64;
        for _ in 0..STREAM_MESSAGES {
            sum = sum.wrapping_add(receive::<C>(&mut peer_in)[0]);
        }
        send::<C>(&mut peer_out, message(sum));
        Ok(sum)
    });
    let rtt_ns = round_trips(|number| {
        send::<C>(&mut out, message(number));
        assert_eq!(receive::<C>(&mut back)[0], number);
        Ok(())
    })?;
    let start = Instant::now();
    for number in 1..=STREAM_MESSAGES {
        send::<C>(&mut out, message(number));
    }
    let sum = receive::<C>(&mut back)[0];
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(sum, STREAM_MESSAGES * (STREAM_MESSAGES + 1) / 2);
    peer.join().map_err(|_| "the second thread panicked")??;
    Ok(Measured {
        rtt_ns,
        oneway_mps: STREAM_MESSAGES as f64 / seconds / 1e6,
    })
}

/// crossbeam's bounded MPMC queue.
///
/// # Errors
/// The second thread cannot be pinned.
pub fn crossbeam(peer_cpu: Option<usize>) -> Outcome<Measured> {
    measure::<Crossbeam>(peer_cpu)
}

/// rtrb, a wait-free SPSC ring.
///
/// # Errors
/// The second thread cannot be pinned.
pub fn rtrb(peer_cpu: Option<usize>) -> Outcome<Measured> {
    measure::<Rtrb>(peer_cpu)
}
