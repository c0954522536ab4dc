//! One session of the fake: the handshake, then socket and ring in one loop.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use pegaflow_shm::bell::{BellFd, Sleeper, Waker};
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, Hello, MemoryRef, RegisterSpec, Welcome,
};
use pegaflow_shm::desc::{Completion, MissReason, Op, Submission, flags};
use pegaflow_shm::mapping::{
    Mapping, SharedU32, create_segment, open_peer_kv_region, open_peer_segment,
};
use pegaflow_shm::payload::{decode_blocks, query_hashes, split_save};
use pegaflow_shm::ring::{Consumer, Producer, RawRing};
use pegaflow_shm::segment::*;
use pegaflow_shm::seqpacket::{receive, send};
use pegaflow_shm::status::Status;
use rustix::net::sockopt::socket_peercred;

use super::gpu::Seen;
use super::store::{ClientMemory, NAMESPACE};
use super::{Rudeness, World, wait_readable};

/// Chunks of one request so far.
#[derive(Default)]
struct Open {
    hashes: Vec<BlockHash>,
    blocks: Vec<u32>,
}

struct Session {
    world: Arc<World>,
    socket: OwnedFd,
    c2d: Arc<Mapping>,
    d2c: Arc<Mapping>,
    shape: SegmentShape,
    d2c_shape: SegmentShape,
    submissions: Consumer<RawRing>,
    completions: Producer<RawRing>,
    sleeper: Sleeper<SharedU32>,
    waker: Waker<SharedU32>,
    pipe: BellFd,
    bell: BellFd,
    memory: ClientMemory,
    registrations: HashMap<u32, RegisterSpec>,
    open: HashMap<u64, Open>,
    /// Taken from the ring while nothing was to be answered.
    held: Option<Submission>,
    frozen: bool,
    said_draining: bool,
}

pub fn session(world: &Arc<World>, socket: OwnedFd) {
    let Some(hello) = await_hello(&socket) else {
        return;
    };
    let rudeness = world.rudeness();
    if let Rudeness::Refuse(status) = rudeness {
        let message = format!("refused for the test: {status}");
        let _ = send(
            socket.as_fd(),
            &DaemonMessage::Refused { status, message },
            &[],
        );
        return;
    }
    if rudeness == Rudeness::Silent {
        while !world.stopping() {
            std::thread::sleep(Duration::from_millis(5));
        }
        return;
    }
    if let Some(mut session) = Session::open(world, socket, hello, rudeness) {
        world.sessions.fetch_add(1, Ordering::Relaxed);
        while session.turn() {}
    }
}

fn await_hello(socket: &OwnedFd) -> Option<(Hello, OwnedFd)> {
    if !wait_readable(socket, Duration::from_secs(5)) {
        return None;
    }
    match receive::<ClientMessage>(socket.as_fd()) {
        Ok((ClientMessage::Hello(hello), mut fds)) => Some((hello, fds.pop()?)),
        _ => None,
    }
}

impl Session {
    fn open(
        world: &Arc<World>,
        socket: OwnedFd,
        (hello, memfd): (Hello, OwnedFd),
        rudeness: Rudeness,
    ) -> Option<Session> {
        let c2d = Arc::new(open_peer_segment(memfd.as_fd(), "c2d", hello.c2d_bytes).ok()?);
        let mut header = [0; size_of::<SegmentHeader>()];
        c2d.copy_out(0, &mut header).ok()?;
        let header: SegmentHeader = bytemuck::cast(header);
        let shape = header.check(C2D_MAGIC, c2d.len()).ok()?;
        let d2c_shape = SegmentShape {
            slots: hello.completion_slots,
            arena_chunks: 2,
        };
        let (d2c_fd, d2c) = create_segment("fake d2c", d2c_shape.total_bytes() as u64).ok()?;
        let d2c_header = d2c_shape.header(D2C_MAGIC, world.boot_id, 1);
        d2c.copy_in(0, bytemuck::bytes_of(&d2c_header)).ok()?;
        let active = SessionState::Active as u32;
        d2c.atomic_u32(STATE_OFFSET)
            .ok()?
            .store(active, Ordering::Relaxed);
        let d2c = Arc::new(d2c);
        let (pipe, pipe_reader) = BellFd::pipe().ok()?;
        let bell = BellFd::eventfd().ok()?;
        let (index, index_bytes) = {
            let store = world.store.lock().unwrap();
            (
                store.index.as_fd().try_clone_to_owned().ok()?,
                store.index.bytes(),
            )
        };
        let mut boot_id = world.boot_id;
        if rudeness == Rudeness::OtherBootId {
            boot_id[0] ^= 1;
        }
        let credentials = socket_peercred(&socket).ok()?;
        let welcome = Welcome {
            protocol: if rudeness == Rudeness::FutureProtocol {
                99
            } else {
                hello
                    .protocol_max
                    .min(world.protocol.load(Ordering::Relaxed))
            },
            daemon_version: "fake".into(),
            boot_id: hex::encode(boot_id),
            node: "fake".into(),
            session: 1,
            daemon_pid: std::process::id(),
            d2c_bytes: d2c_shape.total_bytes() as u64,
            index_bytes,
            lease_ttl_ms: 1000,
        };
        let fds = [
            d2c_fd.as_fd(),
            bell.as_fd(),
            pipe_reader.as_fd(),
            index.as_fd(),
        ];
        let count = if rudeness == Rudeness::FewDescriptors {
            2
        } else {
            4
        };
        send(
            socket.as_fd(),
            &DaemonMessage::Welcome(welcome),
            &fds[..count],
        )
        .ok()?;
        let (slots, consumed) = (SLOTS_OFFSET, CONSUMED_OFFSET);
        let incoming = RawRing::for_consumer(&c2d, slots, shape.slots, &d2c, consumed).ok()?;
        let outgoing = RawRing::for_producer(&d2c, slots, d2c_shape.slots, &c2d, consumed).ok()?;
        Some(Session {
            world: world.clone(),
            shape,
            d2c_shape,
            submissions: Consumer::new(incoming),
            completions: Producer::new(outgoing),
            sleeper: Sleeper::new(SharedU32::new(&d2c, SLEEP_EPOCH_OFFSET).ok()?),
            waker: Waker::new(SharedU32::new(&c2d, SLEEP_EPOCH_OFFSET).ok()?),
            pipe,
            bell,
            memory: ClientMemory {
                pid: credentials.pid.as_raw_nonzero().get(),
                regions: HashMap::new(),
            },
            registrations: HashMap::new(),
            open: HashMap::new(),
            held: None,
            frozen: false,
            said_draining: false,
            socket,
            c2d,
            d2c,
        })
    }

    /// One look at everything; false at the end of the session.
    fn turn(&mut self) -> bool {
        let start = Instant::now();
        let mut worked = false;
        if self.world.drain.load(Ordering::Relaxed) && !self.said_draining {
            self.said_draining = true;
            self.reply(&DaemonMessage::Draining { limit_ms: 1000 });
        }
        for notice in std::mem::take(&mut self.world.gpu.lock().unwrap().notices) {
            self.reply(&notice);
        }
        let hold = self.world.hold.load(Ordering::Relaxed);
        self.world.held.store(hold, Ordering::Relaxed);
        while !self.frozen && !hold && start.elapsed() < Duration::from_micros(200) {
            match self.submissions.try_pop() {
                Ok(Some(body)) => {
                    worked = true;
                    self.world.submissions.fetch_add(1, Ordering::Relaxed);
                    self.submission(Submission::from_body(body));
                }
                Ok(None) => std::hint::spin_loop(),
                Err(_) => return false,
            }
        }
        if self.world.rudeness() != Rudeness::Deaf {
            match receive::<ClientMessage>(self.socket.as_fd()) {
                Ok((message, fds)) => self.control(message, fds),
                Err(error) if error.would_block() => {}
                Err(_) => {
                    // Long enough to tell a client that waits for this from one that does not.
                    std::thread::sleep(Duration::from_millis(20));
                    self.world.left.fetch_add(1, Ordering::Relaxed);
                    return false;
                }
            }
        }
        if self.frozen {
            std::thread::sleep(Duration::from_millis(1));
        } else if !worked {
            self.sleep();
        }
        !self.world.stopping()
    }

    fn is_holding(&self) -> bool {
        self.world.hold.load(Ordering::Relaxed)
    }

    /// Answers a submission, unless the test had said that nothing is to be answered before it was
    /// published: a look at that before the ring would not tell.
    fn take(&mut self, submission: Submission) {
        if self.is_holding() {
            self.held = Some(submission);
        } else {
            self.submission(submission);
        }
    }

    fn sleep(&mut self) {
        self.sleeper.arm();
        if self.is_holding() {
            std::thread::sleep(Duration::from_millis(1));
        } else if let Ok(Some(body)) = self.submissions.try_pop() {
            self.sleeper.disarm();
            self.take(Submission::from_body(body));
            return;
        }
        let _ = wait_readable(&self.bell, Duration::from_millis(2));
        // A test's daemon may read its bell; the real one watches it edge-triggered.
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        self.sleeper.disarm();
    }

    fn reply(&self, message: &DaemonMessage) {
        let _ = send(self.socket.as_fd(), message, &[]);
    }

    fn control(&mut self, message: ClientMessage, mut fds: Vec<OwnedFd>) {
        match message {
            ClientMessage::Hello(_) => {}
            ClientMessage::AddRegion { seq, region, bytes } => {
                let mapped = fds
                    .pop()
                    .and_then(|fd| open_peer_kv_region(fd.as_fd(), "kv", bytes).ok());
                let Some(mapping) = mapped else { return };
                self.memory.regions.insert(region, mapping);
                self.world.regions.fetch_add(1, Ordering::Relaxed);
                self.reply(&DaemonMessage::Done { seq });
            }
            ClientMessage::AddDeviceRegion { .. }
            | ClientMessage::AddDeviceChunks { .. }
            | ClientMessage::AddEvents { .. } => {
                let answer = self.world.gpu.lock().unwrap().answer(&message, fds.len());
                answer.iter().for_each(|answer| self.reply(answer));
            }
            ClientMessage::RemoveRegion { seq, region } => {
                if self.memory.regions.remove(&region).is_some() {
                    self.world.regions.fetch_sub(1, Ordering::Relaxed);
                } else {
                    let mut gpu = self.world.gpu.lock().unwrap();
                    gpu.seen.push(Seen::Remove(region));
                }
                self.reply(&DaemonMessage::Done { seq });
            }
            ClientMessage::Register {
                seq, registration, ..
            } => self.register(seq, *registration),
            ClientMessage::Unregister { seq, registration } => {
                self.registrations.remove(&registration);
                self.world.unregistered.fetch_add(1, Ordering::Relaxed);
                self.reply(&DaemonMessage::Done { seq });
            }
        }
    }

    fn register(&mut self, seq: u64, spec: RegisterSpec) {
        if let Some(status) = *self.world.refuse_register.lock().unwrap() {
            let message = "refused for the test".into();
            return self.reply(&DaemonMessage::Failed {
                seq,
                status,
                message,
            });
        }
        let segments = spec.groups.iter().flat_map(|group| &group.segments);
        let unknown = segments.clone().find(|segment| match segment.memory {
            MemoryRef::Region(region) => {
                let gpu = self.world.gpu.lock().unwrap();
                !self.memory.regions.contains_key(&region) && !gpu.regions.contains(&region)
            }
            MemoryRef::Process => false,
        });
        if let Some(segment) = unknown {
            return self.reply(&DaemonMessage::Failed {
                seq,
                status: Status::BadLayout,
                message: format!("there is no {:?} in this session", segment.memory),
            });
        }
        let used: Vec<u32> = device_regions(&spec, &self.world).collect();
        if !used.is_empty() {
            self.world
                .gpu
                .lock()
                .unwrap()
                .seen
                .push(Seen::Register(used));
        }
        let number = self.world.registrations.fetch_add(1, Ordering::Relaxed);
        let registration = 100 + number;
        self.registrations.insert(registration, spec);
        self.reply(&DaemonMessage::Registered {
            seq,
            registration,
            signals: false,
        });
        if !self.world.never_ready.load(Ordering::Relaxed) {
            self.reply(&DaemonMessage::Ready {
                registration,
                namespace: NAMESPACE,
            });
        }
    }

    fn submission(&mut self, submission: Submission) {
        let op = submission
            .check(self.shape.arena_bytes() as u32)
            .expect("a correct client");
        let rudeness = self.world.rudeness();
        let mut payload = vec![0; submission.payload_bytes as usize];
        let at = self.shape.arena_offset() + submission.payload_offset as usize;
        self.c2d.copy_out(at, &mut payload).unwrap();
        let mut open = self.open.remove(&submission.request_id).unwrap_or_default();
        let runs = submission.flags & flags::BLOCK_RUNS != 0;
        let count = submission.count;
        match op {
            Op::Query => open.hashes.extend(query_hashes(&payload, count).unwrap()),
            Op::Save => {
                let (hashes, blocks) = split_save(&payload, count).unwrap();
                open.hashes.extend(hashes);
                decode_blocks(blocks, runs, count, &mut open.blocks).unwrap();
            }
            Op::Load => decode_blocks(&payload, runs, count, &mut open.blocks).unwrap(),
            _ => {}
        }
        if submission.flags & flags::MORE != 0 {
            self.open.insert(submission.request_id, open);
            return;
        }
        assert_eq!(
            submission.total as usize,
            open.hashes.len().max(open.blocks.len())
        );
        let mut completion = Completion::new(op, submission.request_id, Status::Ok);
        let spec = self.registrations.get(&submission.registration);
        let is_on_device = spec.is_some_and(|spec| device_regions(spec, &self.world).count() > 0);
        if is_on_device && matches!(op, Op::Save | Op::Load) {
            completion.count = submission.total;
            let mut gpu = self.world.gpu.lock().unwrap();
            gpu.seen.push(Seen::After(submission.after()));
            drop(gpu);
            return self.post(completion, rudeness);
        }
        match op {
            Op::Query if submission.group == 0 => self.query(&submission, &open, &mut completion),
            Op::Query => self.membership(&submission, &open, &mut completion),
            Op::Save => self.save(&submission, &open, &mut completion),
            Op::Load => self.load(&submission, &open, &mut completion),
            Op::Release => {
                let mut store = self.world.store.lock().unwrap();
                if store.leases.remove(&submission.arg0).is_none() {
                    completion.status = Status::UnknownLease as u8;
                }
            }
            _ => {}
        }
        self.post(completion, rudeness);
    }

    fn query(&self, submission: &Submission, open: &Open, completion: &mut Completion) {
        let mut store = self.world.store.lock().unwrap();
        let hits = open
            .hashes
            .iter()
            .take_while(|hash| store.holds(0, hash))
            .count();
        completion.count = hits as u32;
        if hits < open.hashes.len() {
            completion.reason = MissReason::Absent as u16;
        }
        if hits > 0 {
            completion.lease = store.next_lease;
            store.next_lease += 1;
            store
                .leases
                .insert(completion.lease, open.hashes[..hits].to_vec());
        }
        completion.arg0 = if submission.arg2 == 0 {
            1000
        } else {
            submission.arg2
        };
    }

    fn membership(&self, submission: &Submission, open: &Open, completion: &mut Completion) {
        let store = self.world.store.lock().unwrap();
        // Ones beyond the end, which the client must not hand on.
        let mut words = vec![u64::MAX; open.hashes.len().div_ceil(64)];
        for (at, hash) in open.hashes.iter().enumerate() {
            let hit = store.holds(submission.group, hash);
            completion.count += u32::from(hit);
            if !hit {
                words[at / 64] &= !(1 << (at % 64));
            }
        }
        let at = self.d2c_shape.arena_offset() + submission.arg1 as usize;
        self.d2c.copy_in(at, bytemuck::cast_slice(&words)).unwrap();
    }

    fn save(&self, submission: &Submission, open: &Open, completion: &mut Completion) {
        let Some(spec) = self.registrations.get(&submission.registration) else {
            completion.status = Status::UnknownRegistration as u8;
            return;
        };
        let mut store = self.world.store.lock().unwrap();
        for (hash, block) in open.hashes.iter().zip(&open.blocks) {
            if store.holds(submission.group, hash) {
                completion.skipped += 1;
                continue;
            }
            let Some(page) = self.memory.gather(spec, submission.group, *block) else {
                completion.status = Status::CopyFailed as u8;
                completion.dropped += 1;
                continue;
            };
            completion.bytes += page.len() as u64;
            completion.count += 1;
            store.put(submission.group, *hash, page);
        }
    }

    fn load(&self, submission: &Submission, open: &Open, completion: &mut Completion) {
        let store = self.world.store.lock().unwrap();
        let spec = self.registrations.get(&submission.registration);
        let lease = store.leases.get(&submission.arg0);
        let (Some(spec), Some(lease)) = (spec, lease) else {
            completion.status = Status::UnknownLease as u8;
            return;
        };
        let hashes = &lease[(submission.arg1 as usize).min(lease.len())..];
        if open.blocks.len() > hashes.len() {
            completion.status = Status::TooMany as u8;
            return;
        }
        for (hash, block) in hashes.iter().zip(&open.blocks) {
            let page = &store.blocks[&(submission.group, *hash)];
            if self
                .memory
                .scatter(spec, submission.group, *block, page)
                .is_none()
            {
                completion.status = Status::CopyFailed as u8;
                return;
            }
            completion.bytes += page.len() as u64;
            completion.count += 1;
        }
    }

    fn post(&mut self, mut completion: Completion, rudeness: Rudeness) {
        match rudeness {
            Rudeness::Mute => return,
            Rudeness::UnknownRequest => completion.request_id ^= 1 << 40,
            Rudeness::WrongOperation => completion.op = Op::Renew as u8,
            Rudeness::TooManyBlocks => completion.count = u32::MAX,
            Rudeness::UnknownReason => completion.reason = 999,
            Rudeness::BrokenRing => {
                let position = self.completions.position() as usize;
                let slot = position % self.d2c_shape.slots as usize;
                let word = self
                    .d2c
                    .atomic_u64(SLOTS_OFFSET + slot * SLOT_BYTES)
                    .unwrap();
                word.store(12345, Ordering::Release);
                let _ = self.pipe.ring();
                return;
            }
            // Not before the client has to look, and never corrected.
            Rudeness::ConsumedAhead
                if self.submissions.position() >= u64::from(self.shape.slots) - 2 =>
            {
                let word = self.d2c.atomic_u64(CONSUMED_OFFSET).unwrap();
                word.store(1 << 40, Ordering::Release);
                self.frozen = true;
            }
            _ => {}
        }
        self.completions
            .try_push(&completion.to_body())
            .expect("the client keeps its credit");
        if self.waker.should_ring() {
            let _ = self.pipe.ring();
        }
    }
}

/// Regions of device memory that a registration names, each once.
fn device_regions(spec: &RegisterSpec, world: &World) -> impl Iterator<Item = u32> + use<> {
    let known = world.gpu.lock().unwrap().regions.clone();
    let segments = spec.groups.iter().flat_map(|group| &group.segments);
    let named = segments.filter_map(|segment| match segment.memory {
        MemoryRef::Region(region) => Some(region),
        MemoryRef::Process => None,
    });
    let used: std::collections::BTreeSet<u32> = named.collect();
    used.into_iter()
        .filter(move |region| known.contains(region))
}
