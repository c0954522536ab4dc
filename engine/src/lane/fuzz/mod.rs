//! The fuzz target `descriptors`: hostile clients at a real lane, turned step by step.
//!
//! Two clients of one user write descriptors, arena and progress words as the input says; a third,
//! of another user, is honest. The machine runs copies and lets time pass as the input says, too.
//! What must hold: no panic, no answer without a question, no page touched by two copies, counts
//! that agree with the pool, nothing left of a session that ended, and the honest client's blocks
//! as they were.

#![forbid(unsafe_code)]

mod client;
mod machine;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;
use std::sync::Arc;

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Op, Submission, flags};
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::segment::{CONSUMED_OFFSET, SLEEP_EPOCH_OFFSET, SLOT_BYTES, SLOTS_OFFSET};
use pegaflow_shm::status::Status;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use self::client::{BLOCKS, Client, PAGE, SHAPE};
use self::machine::{FuzzClock, FuzzCopies, FuzzMachine};
use crate::cache::adopt::open_cache;
use crate::cache::block::Shard;
use crate::fuzz::input::Input;
use crate::fuzz::place::{Place, lane_options};
use crate::lane::LaneWake;
use crate::lane::api::{CloseReason, LaneCommand, LaneEvent, LaneHandle};
use crate::lane::options::LaneOptions;
use crate::lane::run::{Lane, Round};
use crate::lane::start::{MachineParts, build};
#[cfg(test)]
pub(crate) use seeds::seeds;

/// Steps of one input at most.
const MAX_STEPS: usize = 2048;
const HONEST: usize = 2;
/// Blocks that the honest client saves.
const HONEST_BLOCKS: u32 = 4;
/// Longer than every lease, list and half-saved block may last.
const LONG_MS: u64 = 200_000;

struct Rig {
    lane: Lane<FuzzMachine>,
    /// The lane ends when nobody is left to command it.
    _handle: LaneHandle,
    events: UnboundedReceiver<LaneEvent>,
    clock: FuzzClock,
    copies: FuzzCopies,
    clients: Vec<Client>,
    sessions: u64,
    /// The last lease that anybody was given.
    lease: u64,
}

/// See the module's text.
pub fn descriptors(data: &[u8]) {
    let place = Place::new();
    let options = lane_options(place.path());
    let mut input = Input::new(data);
    let shared = input.below(2) == 1;
    let mut rig = Rig::new(&options, shared);
    rig.save_honestly();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        rig.step(&mut input);
        rig.check();
    }
    rig.finish();
    let sealed = rig.lane.cache.figures().sealed;
    drop(rig);
    let again = open_cache(&options, NonZeroUsize::MIN, &|_| {}).expect("the next one starts");
    assert_eq!((again.adopted_blocks, again.discarded_pages), (sealed, 0));
}

impl Rig {
    fn new(options: &LaneOptions, shared: bool) -> Rig {
        let opened = open_cache(options, NonZeroUsize::MIN, &|_| {}).expect("an empty folder");
        let clock = FuzzClock::new();
        let copies = FuzzCopies::new(opened.pool_memory.clone());
        let parts = MachineParts::<FuzzMachine> {
            clock: clock.clone(),
            workers: copies.clone(),
            wake: Arc::new(LaneWake::new().expect("a descriptor is left")),
            store: None,
            crowded: false,
        };
        let built = build(options.clone(), opened, parts).expect("the lane starts");
        let mut rig = Rig {
            lane: built.lane,
            _handle: built.handle,
            events: built.events,
            clock,
            copies,
            clients: Vec::new(),
            sessions: 0,
            lease: 0,
        };
        for (uid, rank) in [(1000, 0), (1000, 1), (1001, 0)] {
            let client = rig.connect(uid);
            rig.clients.push(client);
            let who = rig.clients.len() - 1;
            let rank = (shared && who != HONEST).then_some(rank);
            rig.register(who, rank);
        }
        rig
    }

    fn command<T>(&mut self, make: impl FnOnce(oneshot::Sender<T>) -> LaneCommand) -> Option<T> {
        let (reply, mut answer) = oneshot::channel();
        assert!(self.lane.command(make(reply)));
        answer.try_recv().ok()
    }

    fn connect(&mut self, uid: u32) -> Client {
        self.sessions += 1;
        let (client, new) = Client::new(self.sessions, uid);
        let opened = self.command(|reply| LaneCommand::OpenSession(Box::new(new), reply));
        assert!(opened.is_some_and(|opened| opened.is_ok()));
        client
    }

    fn register(&mut self, who: usize, rank: Option<u32>) {
        let client = &self.clients[who];
        let instance = match rank {
            Some(_) => "shared".to_owned(),
            None => format!("own-{who}"),
        };
        let (session, new) = (client.id, client.registration(&instance, rank));
        let id = self.command(|reply| LaneCommand::Register(session, Box::new(new), reply));
        if let Some(Ok(id)) = id {
            self.clients[who].registrations = id;
        }
    }

    fn save_honestly(&mut self) {
        let mut payload = Vec::new();
        for block in 0..HONEST_BLOCKS {
            self.clients[HONEST].fill(block, 0xa0 + block as u8);
            payload.extend_from_slice(&[block as u8 + 1; 32]);
        }
        (0..HONEST_BLOCKS).for_each(|block| payload.extend_from_slice(&block.to_le_bytes()));
        let save = honest(Op::Save, 1, payload.len(), 0);
        let saved = self.ask_honestly(&payload, &save);
        assert_eq!(saved.map(|saved| saved.count), Some(HONEST_BLOCKS));
    }

    fn ask_honestly(
        &mut self,
        payload: &[u8],
        submission: &Submission,
    ) -> Option<pegaflow_shm::desc::Completion> {
        self.clients[HONEST].write_arena(0, payload);
        self.clients[HONEST].publish(submission, None);
        self.settle();
        self.clients[HONEST].completion()
    }

    /// Turns the lane until it has nothing to do, with all copies run.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let ran = self.copies.run_one(0, None);
            let worked = self.turn();
            if !ran && !worked {
                return;
            }
        }
        panic!("the lane never comes to rest");
    }

    fn turn(&mut self) -> bool {
        let round = self.lane.round();
        assert_ne!(round, Round::Stopped);
        let now = crate::clock::Clock::now(&self.clock);
        self.lane.upkeep(now);
        round == Round::Worked
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.u8();
        let who = usize::from(kind >> 4 & 1);
        match kind & 15 {
            0 => {
                let mut body = [0; 56];
                let taken = input.bytes(56);
                body[..taken.len()].copy_from_slice(taken);
                self.clients[who].publish(&bytemuck::cast(body), None);
            }
            1..=5 => {
                let submission = self.submission(input, who);
                self.clients[who].publish(&submission, None);
            }
            6 | 7 => write_list(input, &self.clients[who]),
            8 => {
                for _ in 0..=input.below(8) {
                    self.turn();
                }
            }
            9 => {
                let how = input.u8();
                let part = (how & 3 == 3).then_some(usize::from(how >> 4));
                self.copies.run_one(usize::from(how >> 2), part);
            }
            10 => self.settle(),
            11 => {
                while let Some(completion) = self.clients[who].completion() {
                    if completion.lease != 0 {
                        self.lease = completion.lease;
                    }
                }
            }
            12 => self.scribble(input, who),
            13 => self
                .clock
                .advance([1, 60, 500, 11_000, 31_000, 61_000, 0, 5][usize::from(input.below(8))]),
            14 => {
                let asleep = self.lane.fall_asleep();
                let rung = asleep && input.below(2) == 1;
                self.lane.wake_up(rung);
            }
            _ => self.control(input, who),
        }
    }

    /// A descriptor near the protocol.
    fn submission(&self, input: &mut Input<'_>, who: usize) -> Submission {
        let (head, size) = (input.u8(), input.u8());
        let mut submission = Submission {
            op: (head & 7).max(1),
            flags: head >> 3 & flags::KNOWN,
            group: u16::from(head >> 5 & 1),
            registration: self.clients[who].registrations,
            request_id: u64::from(input.below(6)) + 1,
            count: u32::from(size & 31),
            total: u32::from(size & 31),
            arg0: self.lease,
            ..Submission::zeroed()
        };
        if size & 32 != 0 {
            submission.total = input.u8().into();
        }
        if size & 64 != 0 {
            submission.payload_offset = input.u16().into();
        }
        let item = match (submission.op, submission.flags & flags::BLOCK_RUNS) {
            (4, _) => 36,
            (3, 0) => 4,
            (2, _) => 32,
            (3, _) => 0,
            _ => 0,
        };
        submission.payload_bytes = submission.count * item;
        if submission.op == 3 && submission.flags & flags::BLOCK_RUNS != 0 {
            submission.payload_bytes = 8;
        }
        if size & 128 == 0 {
            return submission;
        }
        match input.below(8) {
            0 => submission.payload_bytes = input.u16().into(),
            1 => submission.registration = input.u8().into(),
            2 => submission.group = input.u16(),
            3 => submission.arg0 = input.u64(),
            4 => submission.arg1 = input.u16().into(),
            5 => submission.arg2 = input.u16().into(),
            6 => submission.request_id = input.u64(),
            _ => submission.flags = input.u8(),
        }
        submission
    }

    /// Words that the daemon reads besides descriptors, and slots that break the ring.
    fn scribble(&mut self, input: &mut Input<'_>, who: usize) {
        let client = &mut self.clients[who];
        match input.below(5) {
            0 => client.write(CONSUMED_OFFSET, &input.u64().to_le_bytes()),
            1 => client.write(SLEEP_EPOCH_OFFSET, &[input.u8(), 0, 0, 0]),
            2 => {
                let slot = usize::from(input.u8()) % SHAPE.slots as usize;
                client.write(SLOTS_OFFSET + slot * SLOT_BYTES, &input.u64().to_le_bytes());
            }
            // A slot that is claimed and never published.
            3 => client.position += 1,
            _ => {
                let at = usize::from(input.u16());
                client.write(at, input.bytes(64));
            }
        }
    }

    fn control(&mut self, input: &mut Input<'_>, who: usize) {
        let session = self.clients[who].id;
        match input.below(6) {
            0 => self.register(who, None),
            1 => self.register(who, Some(u32::from(input.below(2)))),
            2 => {
                let id = input.below(4).into();
                self.command(|reply| LaneCommand::Unregister(session, id, reply));
            }
            3 => self.reconnect(who),
            4 => while self.events.try_recv().is_ok() {},
            _ => {
                let pong = self.command(LaneCommand::Ping);
                assert_eq!(pong, Some(()));
            }
        }
    }

    /// A new session in place of the old one, whose end is answered when its copies have drained.
    fn reconnect(&mut self, who: usize) {
        self.close(who);
        let uid = self.clients[who].uid;
        self.clients[who] = self.connect(uid);
    }

    fn close(&mut self, who: usize) {
        let session = self.clients[who].id;
        let (reply, mut answer) = oneshot::channel();
        let close = LaneCommand::CloseSession(session, CloseReason::Died, reply);
        assert!(self.lane.command(close));
        self.settle();
        assert_eq!(answer.try_recv(), Ok(()), "a session that ended stays");
        assert!(!self.lane.by_id.contains_key(&session));
    }

    /// The honest client finds its blocks, or misses; everybody leaves; nothing remains of them.
    fn finish(&mut self) {
        self.settle();
        for who in [0, 1] {
            self.close(who);
        }
        for block in 0..HONEST_BLOCKS {
            let held = self.clients[HONEST].holds(block, 0xa0 + block as u8);
            assert!(held, "block {block} of the honest client changed");
        }
        self.clock.advance(LONG_MS);
        self.settle();
        self.load_honestly();
        self.close(HONEST);
        self.clock.advance(LONG_MS);
        self.settle();
        self.check();
        let figures = self.lane.cache.figures();
        assert_eq!((figures.pinned, figures.unfinished), (0, 0));
        assert_eq!((self.lane.leases.len(), self.lane.tasks.len()), (0, 0));
        assert!(self.lane.backlog.is_empty() && self.lane.by_id.is_empty());
        assert_eq!(self.lane.registry.iter().count(), 0);
    }

    fn load_honestly(&mut self) {
        let hashes: Vec<u8> = (1..=HONEST_BLOCKS as u8).flat_map(|at| [at; 32]).collect();
        let query = Submission {
            arg0: 7,
            ..honest(Op::Query, 2, hashes.len(), 0)
        };
        let found = self.ask_honestly(&hashes, &query).expect("an answer");
        assert_eq!(found.status(), Status::Ok);
        if found.count == 0 {
            return;
        }
        let blocks: Vec<u8> = (0..found.count)
            .flat_map(|at| (8 + at).to_le_bytes())
            .collect();
        let load = Submission {
            count: found.count,
            total: found.count,
            ..honest(Op::Load, 3, blocks.len(), found.lease)
        };
        let loaded = self.ask_honestly(&blocks, &load).expect("an answer");
        assert_eq!((loaded.status(), loaded.count), (Status::Ok, found.count));
        for block in 0..found.count {
            let held = self.clients[HONEST].holds(8 + block, 0xa0 + block as u8);
            assert!(held, "block {block} came back changed");
        }
    }

    /// What the cache counts is what lies in the pool; no page belongs to two shards.
    fn check(&self) {
        let cache = &self.lane.cache;
        let mut used = std::collections::HashSet::new();
        let mut bytes = 0;
        for home in (0..2).map(|domain| cache.domain_ref(domain)) {
            for block in home.blocks.iter().filter(|block| block.shards > 0) {
                for shard in 0..block.shards {
                    let page = match block.shard(shard, &home.runs) {
                        Shard::Empty => {
                            assert!(!block.sealed, "sealed without a shard");
                            continue;
                        }
                        Shard::In(page) => page,
                        Shard::Copying(page) => {
                            assert!(!block.sealed, "sealed during a copy");
                            page
                        }
                    };
                    assert!(used.insert(page), "{page} belongs to two shards");
                    let size = cache.pool().page_bytes_of(page).expect("an allocated page");
                    bytes += u64::from(size);
                }
            }
        }
        assert_eq!(cache.figures().used_bytes, bytes);
        assert_eq!(cache.pool().stats().used_bytes, bytes);
        assert!(self.lane.leases.len() <= self.lane.options.max_leases);
        for session in self.lane.sessions.iter().flatten() {
            assert!(session.requests.len() <= SHAPE.slots as usize);
        }
        assert!(
            self.clients
                .iter()
                .all(|client| client.d2c().len() == SHAPE.total_bytes())
        );
    }
}

fn honest(op: Op, request_id: u64, payload_bytes: usize, arg0: u64) -> Submission {
    Submission {
        op: op as u8,
        registration: 1,
        request_id,
        payload_bytes: payload_bytes as u32,
        count: HONEST_BLOCKS,
        total: HONEST_BLOCKS,
        arg0,
        ..Submission::zeroed()
    }
}

/// Hashes, block ids, or anything, at the start of a chunk or behind it.
fn write_list(input: &mut Input<'_>, client: &Client) {
    let (kind, count) = (input.u8(), usize::from(input.below(32)));
    let at = usize::from(kind & 1) * CHUNK_BYTES;
    let mut list = Vec::new();
    if kind & 2 != 0 {
        for _ in 0..count {
            list.extend_from_slice(&[input.below(24) + 1; 32]);
        }
    }
    match kind >> 2 & 3 {
        0 => (0..count).for_each(|block| {
            list.extend_from_slice(&(block as u32 % BLOCKS).to_le_bytes());
        }),
        1 => (0..count).for_each(|_| {
            list.extend_from_slice(&u32::from(input.u8() & 31).to_le_bytes());
        }),
        2 => {
            list.extend_from_slice(&u32::from(input.u8()).to_le_bytes());
            list.extend_from_slice(&(count as u32).to_le_bytes());
        }
        _ => list.extend_from_slice(input.bytes(count * 8)),
    }
    client.write_arena(at, &list);
    const { assert!(PAGE * 2 * BLOCKS as u64 <= u32::MAX as u64) };
}
