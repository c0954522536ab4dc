//! One simulated connection: real rings, real bells, and what the client is waiting for.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker as TaskWaker};
use std::time::Duration;

use pegaflow_shm::bell::{BellFd, BellListener, Sleeper, Waker};
use pegaflow_shm::desc::{Completion, Op, Submission};
use pegaflow_shm::index::{IndexReader, RawReadMemory};
use pegaflow_shm::mapping::{Mapping, SharedU32, create_segment};
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::ring::{Consumer, Producer, PushError, RawRing, RingFault};
use pegaflow_shm::segment::{CONSUMED_OFFSET, SLEEP_EPOCH_OFFSET, SLOTS_OFFSET, SegmentShape};

use crate::isolation::IsolationDomain;
use crate::lane::api::{NewSession, Refusal, SessionOpened};

/// An answer of the lane that has not come yet.
pub type Answer<T> = Pin<Box<dyn Future<Output = T>>>;

/// The answer, if it is there.
pub fn poll_once<T>(answer: &mut Answer<T>) -> Option<T> {
    let mut context = Context::from_waker(TaskWaker::noop());
    match answer.as_mut().poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Chunks of a simulated client's arena.
const CHUNKS: u32 = 24;

/// What a request asked for.
#[derive(Clone, Debug)]
pub enum Asked {
    Nop,
    Query {
        group: u16,
        key: u64,
        /// Of the submission.
        flags: u8,
        hashes: Vec<u64>,
        result_offset: u64,
    },
    Save {
        /// Position of the group in the memory.
        at: usize,
        blocks: Vec<u32>,
    },
    Load {
        at: usize,
        group: u16,
        lease: u64,
        first: usize,
        blocks: Vec<u32>,
    },
    Release(u64),
    Renew(u64),
    Cancel,
}

/// An unfinished request.
#[derive(Debug)]
pub struct Unfinished {
    pub asked: Asked,
    /// Submissions of the list that are still to be sent.
    pub rest: VecDeque<Submission>,
    chunks: Vec<u32>,
}

/// The control thread's and the client's view of a connection.
pub struct Session {
    pub id: u64,
    submissions: Producer<RawRing>,
    completions: Consumer<RawRing>,
    pub c2d: Arc<Mapping>,
    pub d2c: Arc<Mapping>,
    pub shape: SegmentShape,
    bell: BellFd,
    waker: Waker<SharedU32>,
    sleeper: Sleeper<SharedU32>,
    bell_end: BellListener,
    rung: bool,
    free_chunks: Vec<u32>,
    next_request: u64,
    pub requests: BTreeMap<u64, Unfinished>,
    pub opening: Option<Answer<Result<SessionOpened, Refusal>>>,
    pub registering: Option<Answer<Result<u32, Refusal>>>,
    pub unregistering: Option<Answer<Result<(), Refusal>>>,
    pub closing: Option<Answer<Result<(), Refusal>>>,
    pub index: Option<IndexReader<RawReadMemory<Arc<Mapping>>>>,
    pub registration: Option<u32>,
    /// Namespace, while the instance is complete.
    pub ready: Option<u32>,
    /// The client waits on its bell.
    pub asleep: bool,
    /// The lane said that it broke the protocol.
    pub faulted: bool,
}

impl Session {
    /// The client's half, and what the lane gets.
    pub fn new(id: u64, uid: u32, slots: u32) -> (Session, NewSession) {
        let shape = SegmentShape {
            slots,
            arena_chunks: CHUNKS,
        };
        let bytes = shape.total_bytes() as u64;
        let (_, c2d) = create_segment("C2D segment", bytes).expect("a segment");
        let (_, d2c) = create_segment("D2C segment", bytes).expect("a segment");
        let (c2d, d2c) = (Arc::new(c2d), Arc::new(d2c));
        let bell = BellFd::eventfd().expect("a bell");
        let lane_bell: OwnedFd = bell.as_fd().try_clone_to_owned().expect("a descriptor");
        let (client_bell, bell_end) = BellFd::pipe().expect("a pipe");
        let new = NewSession {
            id,
            uid,
            domain: Arc::new(IsolationDomain::of_user(uid)),
            pid: std::process::id(),
            client_name: format!("simulated {id}"),
            c2d: c2d.clone(),
            c2d_shape: shape,
            d2c: d2c.clone(),
            d2c_shape: shape,
            lane_bell,
            client_bell,
        };
        let submissions = RawRing::for_producer(&c2d, SLOTS_OFFSET, slots, &d2c, CONSUMED_OFFSET);
        let completions = RawRing::for_consumer(&d2c, SLOTS_OFFSET, slots, &c2d, CONSUMED_OFFSET);
        let word = |mapping| SharedU32::new(mapping, SLEEP_EPOCH_OFFSET).expect("a word");
        let session = Session {
            id,
            submissions: Producer::new(submissions.expect("a ring")),
            completions: Consumer::new(completions.expect("a ring")),
            waker: Waker::new(word(&d2c)),
            sleeper: Sleeper::new(word(&c2d)),
            c2d,
            d2c,
            shape,
            bell,
            bell_end: BellListener::new(bell_end),
            rung: false,
            free_chunks: (0..CHUNKS).rev().collect(),
            next_request: 1,
            requests: BTreeMap::new(),
            opening: None,
            registering: None,
            unregistering: None,
            closing: None,
            index: None,
            registration: None,
            ready: None,
            asleep: false,
            faulted: false,
        };
        (session, new)
    }

    /// True while the client can use it.
    pub fn is_open(&self) -> bool {
        self.opening.is_none() && self.closing.is_none() && !self.faulted
    }

    /// True while the client keeps within its credit.
    pub fn has_credit(&self) -> bool {
        self.requests.len() < self.shape.slots as usize
    }

    /// The id of the next request.
    pub fn next_request(&self) -> u64 {
        self.next_request
    }

    pub fn free_chunks(&self) -> usize {
        self.free_chunks.len()
    }

    /// Takes a request in and sends its first submission. `parts` are payloads with their
    /// submissions; an operation without payload has one with none. Nothing when the arena is full.
    pub fn begin(&mut self, asked: Asked, parts: Vec<(Vec<u8>, Submission)>) -> Option<u64> {
        let id = self.next_request;
        let mut chunks = Vec::new();
        let mut rest = VecDeque::new();
        for (payload, mut submission) in parts {
            submission.request_id = id;
            if !payload.is_empty() {
                let chunk = self.free_chunks.pop()?;
                chunks.push(chunk);
                let offset = chunk as usize * CHUNK_BYTES;
                submission.payload_offset = offset as u32;
                submission.payload_bytes = payload.len() as u32;
                let arena = self.shape.arena_offset();
                self.c2d.copy_in(arena + offset, &payload).expect("inside");
            }
            rest.push_back(submission);
        }
        self.next_request += 1;
        let unfinished = Unfinished {
            asked,
            rest,
            chunks,
        };
        self.requests.insert(id, unfinished);
        Some(id)
    }

    /// Sends the next submission of a request; false when there is none or no room.
    pub fn send_next(&mut self, id: u64) -> bool {
        let Some(request) = self.requests.get_mut(&id) else {
            return false;
        };
        let Some(submission) = request.rest.front() else {
            return false;
        };
        match self.submissions.try_push(&submission.to_body()) {
            Ok(()) => {
                request.rest.pop_front();
                true
            }
            Err(PushError::Full) => false,
            Err(error) => panic!("the daemon's progress word is wrong: {error}"),
        }
    }

    /// Publishes any words at all.
    pub fn push_raw(&mut self, body: [u64; 7]) -> bool {
        self.submissions.try_push(&body).is_ok()
    }

    /// Rings the lane if it sleeps; a lost bell is not rung. True when it should be.
    pub fn ring(&mut self, lost: bool) -> bool {
        let wanted = self.waker.should_ring();
        if wanted && !lost {
            self.bell.ring().expect("an eventfd");
        }
        wanted
    }

    /// Rings whether anybody sleeps or not.
    pub fn ring_anyway(&mut self) {
        self.bell.ring().expect("an eventfd");
    }

    /// The next completion.
    pub fn pop(&mut self) -> Result<Option<Completion>, RingFault> {
        Ok(self.completions.try_pop()?.map(Completion::from_body))
    }

    /// Tells the lane how far this side has read: only then has the client room for new requests.
    pub fn report(&mut self) {
        self.completions.report();
    }

    /// True when a completion waits.
    pub fn has_completion(&self) -> bool {
        self.completions.ready()
    }

    /// Ends a request and frees its part of the arena.
    pub fn end(&mut self, id: u64) -> Option<Unfinished> {
        let request = self.requests.remove(&id)?;
        self.free_chunks.extend(&request.chunks);
        Some(request)
    }

    /// Announces a sleep, unless there is something to do.
    pub fn fall_asleep(&mut self) {
        self.sleeper.arm();
        self.asleep = !self.completions.ready();
        if !self.asleep {
            self.sleeper.disarm();
        }
    }

    /// True when the bell was rung, or its ringing end is gone.
    pub fn is_rung(&mut self) -> bool {
        self.rung |= self.bell_end.wait(Duration::ZERO).unwrap_or(true);
        self.rung
    }

    pub fn wake_up(&mut self) {
        self.is_rung();
        self.rung = false;
        self.sleeper.disarm();
        self.asleep = false;
    }

    /// A bitmap of the result arena.
    pub fn result_bits(&self, offset: u64, count: usize) -> Vec<bool> {
        let mut bytes = vec![0; count.div_ceil(64) * 8];
        let at = self.shape.arena_offset() + offset as usize;
        self.d2c.copy_out(at, &mut bytes).expect("inside");
        (0..count)
            .map(|bit| bytes[bit / 8] >> (bit % 8) & 1 == 1)
            .collect()
    }
}

impl Asked {
    pub fn op(&self) -> Op {
        match self {
            Asked::Nop => Op::Nop,
            Asked::Query { .. } => Op::Query,
            Asked::Save { .. } => Op::Save,
            Asked::Load { .. } => Op::Load,
            Asked::Release(_) => Op::Release,
            Asked::Renew(_) => Op::Renew,
            Asked::Cancel => Op::Cancel,
        }
    }

    /// The memory that the request's copies touch.
    pub fn blocks(&self) -> Option<(usize, &[u32])> {
        match self {
            Asked::Save { at, blocks } | Asked::Load { at, blocks, .. } => Some((*at, blocks)),
            _ => None,
        }
    }
}
