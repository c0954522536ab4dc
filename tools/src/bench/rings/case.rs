//! The cases, each with the part of the asking and of the answering process.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::bell::{Spinner, relax};
use pegaflow_shm::desc::{Body, Completion, Op, Submission};
use pegaflow_shm::ring::{PushError, RingMemory};
use pegaflow_shm::status::Status;
use pegaflow_shm::sync::Ordering;
use rustix::io::{read, write};
use serde::{Deserialize, Serialize};

use super::memory::{Alarm, Rings, SHAPE, Scratch};
use super::spin::Spins;
use crate::error::ToolError;

/// Messages between two looks at the other side's doorbell in a one-way stream.
const MESSAGES_PER_FENCE: u64 = 32;

/// What to run. Both processes get the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Case {
    /// One cache line written by both sides in turn, no pause in the loop: the hardware's limit.
    RawOneLine,
    /// One cache line per direction, with pause.
    RawTwoLines,
    /// The product's rings, both sides spinning, with validation and doorbell checks.
    SpinRoundTrip {
        /// Whether the loops that wait give the CPU its hint, as the product's do; the raw
        /// ping-pong's do not.
        pause: bool,
    },
    /// The product's rings and wait path: the answering side sleeps at once.
    Park {
        /// How long the asking side spins before it sleeps, in nanoseconds.
        spin_ns: u64,
    },
    /// Blocking reads and writes of two eventfds.
    Eventfd,
    /// The product's submission ring one way.
    OneWay,
    /// An unchecked ring with cached head and tail indices, one way.
    TextbookCached,
    /// The same, but each operation loads the other side's index.
    TextbookIndexed,
}

/// Everything one process needs for any case.
pub struct Side {
    /// Product rings.
    pub rings: Rings,
    /// What wakes this side.
    pub alarm: Alarm,
    /// Raw lines and textbook ring.
    pub scratch: Scratch,
    /// Eventfds of the ping-pong: written by the asking side, written by the answering side.
    pub eventfds: [std::os::fd::OwnedFd; 2],
    /// CPUs the two processes share.
    pub cpus: usize,
}

fn fault(error: impl std::error::Error + Send + Sync + 'static) -> ToolError {
    ToolError::Io {
        what: "ring".into(),
        source: std::io::Error::other(error),
    }
}

fn push(rings: &mut Rings, spins: Spins, body: &Body) -> Result<(), ToolError> {
    spins.until(|| match rings.producer.try_push(body) {
        Ok(()) => Ok(Some(())),
        Err(PushError::Full) => Ok(None),
        Err(error) => Err(fault(error)),
    })
}

fn ring_if_asleep(rings: &mut Rings) -> Result<(), ToolError> {
    if rings.waker.should_ring() {
        rings.bell.ring().map_err(fault)?;
    }
    Ok(())
}

/// The product's wait: spin for the budget, then announce the sleep, look again, sleep.
fn pop_or_sleep(side: &mut Side, spinner: Spinner) -> Result<Body, ToolError> {
    let consumer = &mut side.rings.consumer;
    loop {
        let spun = spinner.spin(|| consumer.try_pop().transpose());
        if let Some(popped) = spun {
            return popped.map_err(fault);
        }
        side.rings.sleeper.arm();
        let missed = consumer.try_pop().map_err(fault)?;
        if missed.is_none() {
            side.alarm.sleep()?;
        }
        side.rings.sleeper.disarm();
        if let Some(body) = missed {
            return Ok(body);
        }
    }
}

fn submission(request_id: u64) -> Submission {
    Submission {
        op: Op::Nop as u8,
        request_id,
        ..Submission::zeroed()
    }
}

/// The answering side's work on one message: validate the copy, make the answer.
#[inline]
fn answer(body: Body) -> Result<Body, ToolError> {
    let submission = Submission::from_body(body);
    let op = submission
        .check(SHAPE.arena_bytes() as u32)
        .map_err(fault)?;
    Ok(Completion::new(op, submission.request_id, Status::Ok).to_body())
}

#[inline]
fn check_answer(body: Body, request_id: u64) -> Result<(), ToolError> {
    let completion = Completion::from_body(body);
    if completion.request_id == request_id && completion.status().is_ok() {
        return Ok(());
    }
    let what = format!("answered request {request_id} with {completion:?}");
    Err(ToolError::Child {
        process: "the answering process".into(),
        what,
    })
}

/// Lets time pass: a short one without giving the CPU away, which would put it to sleep.
fn pass(gap: Duration) {
    const SHORT: Duration = Duration::from_micros(100);
    if gap > SHORT {
        std::thread::sleep(gap);
        return;
    }
    let start = Instant::now();
    while start.elapsed() < gap {
        relax();
    }
}

impl Side {
    /// Before a case, by the asking side: the words that start from zero.
    pub fn reset(&self) {
        for word in [&self.scratch.lines[0], &self.scratch.lines[1]] {
            word.store(0, Ordering::Relaxed);
        }
        self.scratch.head.store(0, Ordering::Relaxed);
        self.scratch.tail.store(0, Ordering::Release);
    }

    /// One round trip of the asking side; `number` counts from 1.
    #[inline(always)]
    fn ask(&mut self, case: Case, number: u64) -> Result<(), ToolError> {
        match case {
            Case::RawOneLine => {
                let line = &self.scratch.lines[0];
                line.store(2 * number - 1, Ordering::Release);
                Spins::new(self.cpus, false)
                    .until(|| Ok((line.load(Ordering::Acquire) == 2 * number).then_some(())))
            }
            Case::RawTwoLines => {
                let [out, back] = &self.scratch.lines;
                out.store(number, Ordering::Release);
                Spins::new(self.cpus, true)
                    .until(|| Ok((back.load(Ordering::Acquire) == number).then_some(())))
            }
            Case::SpinRoundTrip { pause } => {
                let spins = Spins::new(self.cpus, pause);
                push(&mut self.rings, spins, &submission(number).to_body())?;
                ring_if_asleep(&mut self.rings)?;
                let consumer = &mut self.rings.consumer;
                let body = spins.until(|| consumer.try_pop().map_err(fault))?;
                check_answer(body, number)
            }
            Case::Park { spin_ns } => {
                let spins = Spins::new(self.cpus, true);
                push(&mut self.rings, spins, &submission(number).to_body())?;
                ring_if_asleep(&mut self.rings)?;
                let body = pop_or_sleep(self, Spinner::with_cpus(spin_ns, self.cpus))?;
                check_answer(body, number)
            }
            Case::Eventfd => {
                let failed = ToolError::errno("eventfd");
                write(&self.eventfds[0], &1_u64.to_ne_bytes())
                    .and_then(|_| read(&self.eventfds[1], &mut [0_u8; 8]))
                    .map(|_| ())
                    .map_err(failed)
            }
            Case::OneWay | Case::TextbookCached | Case::TextbookIndexed => Ok(()),
        }
    }

    /// Times `batches` batches of `per_batch` round trips, pausing for `gap` before each; the mean
    /// nanoseconds of one round trip in each batch.
    pub fn ask_batches(
        &mut self,
        case: Case,
        batches: u64,
        per_batch: u64,
        gap: Option<Duration>,
    ) -> Result<Vec<f64>, ToolError> {
        let mut number = 0;
        let mut means = Vec::with_capacity(batches as usize);
        for _ in 0..batches {
            if let Some(gap) = gap {
                pass(gap);
            }
            let start = Instant::now();
            for _ in 0..per_batch {
                number += 1;
                self.ask(case, number)?;
            }
            means.push(start.elapsed().as_nanos() as f64 / per_batch as f64);
        }
        Ok(means)
    }

    /// The answering side of `total` round trips.
    pub fn answer_all(&mut self, case: Case, total: u64) -> Result<(), ToolError> {
        for number in 1..=total {
            match case {
                Case::RawOneLine => {
                    let line = &self.scratch.lines[0];
                    Spins::new(self.cpus, false).until(|| {
                        Ok((line.load(Ordering::Acquire) == 2 * number - 1).then_some(()))
                    })?;
                    line.store(2 * number, Ordering::Release);
                }
                Case::RawTwoLines => {
                    let [out, back] = &self.scratch.lines;
                    Spins::new(self.cpus, true)
                        .until(|| Ok((out.load(Ordering::Acquire) == number).then_some(())))?;
                    back.store(number, Ordering::Release);
                }
                Case::SpinRoundTrip { pause } => {
                    let spins = Spins::new(self.cpus, pause);
                    let consumer = &mut self.rings.consumer;
                    let body = spins.until(|| consumer.try_pop().map_err(fault))?;
                    push(&mut self.rings, spins, &answer(body)?)?;
                    ring_if_asleep(&mut self.rings)?;
                }
                Case::Park { .. } => {
                    let body = pop_or_sleep(self, Spinner::with_cpus(0, self.cpus))?;
                    push(&mut self.rings, Spins::new(self.cpus, true), &answer(body)?)?;
                    ring_if_asleep(&mut self.rings)?;
                }
                Case::Eventfd => {
                    let failed = ToolError::errno("eventfd");
                    read(&self.eventfds[0], &mut [0_u8; 8])
                        .and_then(|_| write(&self.eventfds[1], &1_u64.to_ne_bytes()))
                        .map_err(failed)?;
                }
                Case::OneWay | Case::TextbookCached | Case::TextbookIndexed => {}
            }
        }
        Ok(())
    }

    /// Sends `total` messages one way.
    pub fn stream(&mut self, case: Case, total: u64) -> Result<(), ToolError> {
        match case {
            Case::OneWay => self.stream_product(total),
            Case::TextbookCached => self.stream_textbook(total, true),
            _ => self.stream_textbook(total, false),
        }
    }

    /// Receives `total` messages and gives the sum of their numbers.
    pub fn drain(&mut self, case: Case, total: u64) -> Result<u64, ToolError> {
        match case {
            Case::OneWay => self.drain_product(total),
            Case::TextbookCached => self.drain_textbook(total, true),
            _ => self.drain_textbook(total, false),
        }
    }

    fn stream_product(&mut self, total: u64) -> Result<(), ToolError> {
        let spins = Spins::new(self.cpus, true);
        for number in 1..=total {
            let body = submission(number).to_body();
            // The plain push first: the loop around a full ring stays out of the fast path.
            match self.rings.producer.try_push(&body) {
                Ok(()) => {}
                Err(PushError::Full) => push(&mut self.rings, spins, &body)?,
                Err(error) => return Err(fault(error)),
            }
            if number.is_multiple_of(MESSAGES_PER_FENCE) {
                ring_if_asleep(&mut self.rings)?;
            }
        }
        ring_if_asleep(&mut self.rings)
    }

    fn drain_product(&mut self, total: u64) -> Result<u64, ToolError> {
        let spins = Spins::new(self.cpus, true);
        let arena_bytes = SHAPE.arena_bytes() as u32;
        let mut sum = 0_u64;
        for _ in 0..total {
            let consumer = &mut self.rings.consumer;
            let body = match consumer.try_pop().map_err(fault)? {
                Some(body) => body,
                None => spins.until(|| consumer.try_pop().map_err(fault))?,
            };
            let submission = Submission::from_body(body);
            submission.check(arena_bytes).map_err(fault)?;
            sum = sum.wrapping_add(submission.request_id);
        }
        Ok(sum)
    }

    fn stream_textbook(&mut self, total: u64, cached: bool) -> Result<(), ToolError> {
        let spins = Spins::new(self.cpus, true);
        let Scratch {
            head, tail, slots, ..
        } = &self.scratch;
        let capacity = u64::from(slots.capacity());
        let mut seen_tail = 0;
        for at in 0..total {
            if !cached || at - seen_tail >= capacity {
                seen_tail = spins.until(|| {
                    let tail = tail.load(Ordering::Acquire);
                    Ok((at - tail < capacity).then_some(tail))
                })?;
            }
            let slot = slots.slot((at % capacity) as u32);
            let body = submission(at + 1).to_body();
            slot.seq.store(at, Ordering::Relaxed);
            for (word, value) in slot.body.iter().zip(body) {
                word.store(value, Ordering::Relaxed);
            }
            head.store(at + 1, Ordering::Release);
        }
        Ok(())
    }

    fn drain_textbook(&mut self, total: u64, cached: bool) -> Result<u64, ToolError> {
        let spins = Spins::new(self.cpus, true);
        let Scratch {
            head, tail, slots, ..
        } = &self.scratch;
        let capacity = u64::from(slots.capacity());
        let mut seen_head = 0;
        let mut sum = 0_u64;
        for at in 0..total {
            if !cached || at >= seen_head {
                seen_head = spins.until(|| {
                    let head = head.load(Ordering::Acquire);
                    Ok((head > at).then_some(head))
                })?;
            }
            let slot = slots.slot((at % capacity) as u32);
            let mut body: Body = [0; 7];
            for (value, word) in body.iter_mut().zip(&slot.body) {
                *value = word.load(Ordering::Relaxed);
            }
            let message = std::hint::black_box((slot.seq.load(Ordering::Relaxed), body));
            tail.store(at + 1, Ordering::Release);
            sum = sum.wrapping_add(Submission::from_body(message.1).request_id);
        }
        Ok(sum)
    }
}
