//! A lane over a small pool, and clients that drive its rings by hand.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::BlockHash;
use pegaflow_shm::bell::BellFd;
use pegaflow_shm::control::{Mode, RegisterSpec};
use pegaflow_shm::desc::{Completion, Op, Submission, flags};
use pegaflow_shm::mapping::{Access, Mapping, NamedFile, create_kv_region, create_segment};
use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::node::{Counter, Gauge, NodeHeader, NodeReader, NodeWriter};
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::ring::{Consumer, Producer, RawRing};
use pegaflow_shm::segment::{CONSUMED_OFFSET, SLOTS_OFFSET, SegmentShape};
use pegaflow_shm::status::Status;
use tokio::runtime::Runtime;

use crate::copy::{BoundLayout, ChecksumMode, ClientMemory, RegionMapping};
use crate::isolation::{DomainRules, IsolationDomain};
use crate::lane::api::{CloseReason, NewRegistration, NewSession, Refusal, RegisteredGroup};
use crate::lane::{LaneOptions, LaneStartError, OpenStore, StartedLane, start};
use crate::layout::{GroupLayout, MemoryRef, SegmentLayout, ValidLayout};
use crate::policy::{AdmissionKind, PolicyKind};

/// Bytes of an extent.
pub const EXTENT: u64 = 64 << 10;
/// Bytes of a page.
pub const PAGE: u64 = 4 << 10;
/// Blocks of a worker's memory.
pub const BLOCKS: u32 = 256;
/// The client's half of a session.
const C2D: SegmentShape = SegmentShape {
    slots: 1024,
    arena_chunks: 4,
};
/// The daemon's half.
const D2C: SegmentShape = SegmentShape {
    slots: 1024,
    arena_chunks: 4,
};
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Rig {
    pub lane: StartedLane,
    pub node: NodeReader,
    pub runtime: Runtime,
    sessions: u64,
}

pub struct Client {
    pub id: u64,
    submissions: Producer<RawRing>,
    completions: Consumer<RawRing>,
    c2d: Arc<Mapping>,
    d2c: Arc<Mapping>,
    bell: BellFd,
    requests: u64,
    _bell_end: OwnedFd,
}

/// A worker's KV memory: block `b` lies at `b * PAGE`.
pub struct Memory {
    mapping: Mapping,
    region: Arc<RegionMapping>,
    pub page: u64,
    /// Every rank that registers it says that all hold the same bytes.
    pub replicated: bool,
}

pub fn hash(number: u64) -> BlockHash {
    *blake3::hash(&number.to_le_bytes()).as_bytes()
}

pub fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    numbers.into_iter().map(hash).collect()
}

fn options(dir: &std::path::Path, node: NodeWriter, boot: u8) -> LaneOptions {
    LaneOptions {
        dir: dir.to_owned(),
        rules: DomainRules::any_user(),
        boot_id: [boot; 16],
        node_name: "n1".to_owned(),
        node,
        pool_bytes: 16 * EXTENT,
        extent_bytes: EXTENT,
        nodes: crate::pool::MemoryNodes::default(),
        hugepages: false,
        max_blocks: 1024,
        policy: PolicyKind::Lru,
        admission: AdmissionKind::Off,
        copy_threads: 1,
        checksum: ChecksumMode::Off,
        lease_ttl: Duration::from_secs(30),
        lease_ttl_max: Duration::from_secs(60),
        incomplete_ttl: Duration::from_secs(60),
        max_leases: 64,
        max_sessions: 8,
        max_instances: 8,
        spin: Duration::ZERO,
        pool: crate::config::PoolStart::Adopt,
        tier: None,
    }
}

/// The domain of a user whom no rule mentions.
pub fn domain_of(uid: u32) -> Arc<IsolationDomain> {
    Arc::new(IsolationDomain::of_user(uid))
}

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

impl Rig {
    pub fn start(dir: &std::path::Path, boot: u8) -> Rig {
        Rig::with(dir, boot, |_| {})
    }

    pub fn with(dir: &std::path::Path, boot: u8, adjust: impl FnOnce(&mut LaneOptions)) -> Rig {
        Rig::try_with(dir, boot, adjust).unwrap()
    }

    pub fn try_with(
        dir: &std::path::Path,
        boot: u8,
        adjust: impl FnOnce(&mut LaneOptions),
    ) -> Result<Rig, LaneStartError> {
        Rig::over(dir, boot, adjust, None)
    }

    /// A lane with a tier below its pool.
    pub fn over(
        dir: &std::path::Path,
        boot: u8,
        adjust: impl FnOnce(&mut LaneOptions),
        store: Option<OpenStore>,
    ) -> Result<Rig, LaneStartError> {
        let path = dir.join(format!("node-{boot}"));
        let file = NamedFile::create(&path, "node file", NodeWriter::FILE_BYTES as u64).unwrap();
        let mapping = Arc::new(file.map(Access::ReadWrite).unwrap());
        let node = NodeWriter::create(mapping, &NodeHeader::zeroed()).unwrap();
        let reader = node.reader();
        let mut options = options(dir, node, boot);
        adjust(&mut options);
        Ok(Rig {
            lane: start(options, &crate::device::Devices::none(), store, &|_| {})?,
            node: reader,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            sessions: 0,
        })
    }

    pub fn connect(&mut self) -> Client {
        self.connect_as(1000)
    }

    pub fn connect_as(&mut self, uid: u32) -> Client {
        self.sessions += 1;
        let id = self.sessions;
        let (shape, back) = (C2D, D2C);
        let (_, c2d) = create_segment("C2D segment", shape.total_bytes() as u64).unwrap();
        let (_, d2c) = create_segment("D2C segment", back.total_bytes() as u64).unwrap();
        let (c2d, d2c) = (Arc::new(c2d), Arc::new(d2c));
        let bell = BellFd::eventfd().unwrap();
        let lane_bell = bell.as_fd().try_clone_to_owned().unwrap();
        let (client_bell, bell_end) = BellFd::pipe().unwrap();
        let new = NewSession {
            id,
            uid,
            domain: domain_of(uid),
            pid: std::process::id(),
            client_name: "test".into(),
            c2d: c2d.clone(),
            c2d_shape: shape,
            d2c: d2c.clone(),
            d2c_shape: back,
            lane_bell,
            client_bell,
        };
        let opened = self.runtime.block_on(self.lane.handle.open_session(new));
        opened.unwrap();
        let submissions =
            RawRing::for_producer(&c2d, SLOTS_OFFSET, shape.slots, &d2c, CONSUMED_OFFSET);
        let completions =
            RawRing::for_consumer(&d2c, SLOTS_OFFSET, back.slots, &c2d, CONSUMED_OFFSET);
        Client {
            id,
            submissions: Producer::new(submissions.unwrap()),
            completions: Consumer::new(completions.unwrap()),
            c2d,
            d2c,
            bell,
            requests: 0,
            _bell_end: bell_end,
        }
    }

    /// Registers a rank whose groups all lie in `memory`, or a scheduler without any.
    pub fn register(
        &self,
        client: &Client,
        spec: RegisterSpec,
        groups: &[u16],
        memory: &Memory,
    ) -> Result<u32, Refusal> {
        let groups = groups.iter().map(|group| RegisteredGroup {
            group: *group,
            target: memory.layout(*group),
        });
        let registration = NewRegistration {
            events: None,
            signals: None,
            spec,
            groups: groups.collect(),
        };
        let registered = self.lane.handle.register(client.id, registration);
        self.runtime.block_on(registered)
    }

    /// A client that is the only rank of an instance.
    pub fn worker(&mut self, instance: &str, salt: &str, memory: &Memory) -> (Client, u32) {
        let client = self.connect();
        let spec = spec(instance, salt, 1, Some(0));
        let registration = self.register(&client, spec, &[0, 1], memory).unwrap();
        (client, registration)
    }

    pub fn close(&self, client: &Client) {
        let closed = self.lane.handle.close_session(client.id, CloseReason::Left);
        self.runtime.block_on(closed).unwrap();
    }

    /// Waits for the lane to sleep, so that the published figures are those of now.
    fn settle<T: PartialEq + Copy + std::fmt::Debug>(&self, read: impl Fn() -> T, wanted: T) {
        let until = Instant::now() + PATIENCE;
        while read() != wanted && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(read(), wanted);
    }

    pub fn expect_gauge(&self, gauge: Gauge, wanted: u64) {
        self.settle(|| self.node.gauge(gauge), wanted);
    }

    pub fn expect_sum(&self, counters: &[Counter], wanted: u64) {
        let sum = || counters.iter().map(|c| self.node.counter(*c)).sum::<u64>();
        self.settle(sum, wanted);
    }

    /// Ends the lane as a clean stop would.
    pub fn stop(self) {
        self.lane.handle.stop().unwrap();
        self.lane.thread.join().unwrap();
    }
}

pub fn spec(instance: &str, salt: &str, world_size: u32, rank: Option<u32>) -> RegisterSpec {
    RegisterSpec {
        instance: instance.into(),
        namespace: NamespaceSpec {
            model: "m".into(),
            dtype: "bf16".into(),
            hash_algorithm: "blake3".into(),
            salt: salt.into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size,
        rank,
        mode: Mode::ReadWrite,
        groups: Vec::new(),
    }
}

impl Memory {
    pub fn new() -> Memory {
        Memory::with_page(PAGE)
    }

    pub fn with_page(page: u64) -> Memory {
        let bytes = u64::from(BLOCKS) * page;
        let (fd, mapping) = create_kv_region("KV memory", bytes).unwrap();
        let region = RegionMapping::map(fd.as_fd(), bytes).unwrap();
        Memory {
            mapping,
            region,
            page,
            replicated: false,
        }
    }

    fn layout(&self, group: u16) -> Arc<BoundLayout> {
        let layout = GroupLayout {
            group,
            num_blocks: BLOCKS,
            segments: vec![SegmentLayout {
                memory: MemoryRef::Region(0),
                base: 0,
                block_stride: self.page,
                bytes: self.page,
            }],
            replicated: self.replicated,
        };
        let valid = ValidLayout::new(&layout, |_| Some(self.region.bytes())).unwrap();
        let resolve = |_| Some(ClientMemory::Region(self.region.clone()));
        BoundLayout::bind(Arc::new(valid), resolve).unwrap()
    }

    pub fn fill(&self, block: u32, byte: u8) {
        let bytes = vec![byte; self.page as usize];
        let at = u64::from(block) * self.page;
        self.mapping.copy_in(at as usize, &bytes).unwrap();
    }

    pub fn holds(&self, block: u32, byte: u8) -> bool {
        let mut bytes = vec![0; self.page as usize];
        let at = u64::from(block) * self.page;
        self.mapping.copy_out(at as usize, &mut bytes).unwrap();
        bytes.iter().all(|found| *found == byte)
    }
}

impl Client {
    /// Publishes a submission and rings; fills in an id if there is none.
    pub fn submit(&mut self, mut submission: Submission) -> u64 {
        if submission.request_id == 0 {
            self.requests += 1;
            submission.request_id = self.requests;
        }
        self.submissions.try_push(&submission.to_body()).unwrap();
        self.bell.ring().unwrap();
        submission.request_id
    }

    /// Writes a payload to a chunk of the arena and submits it.
    pub fn submit_list(&mut self, chunk: u32, payload: &[u8], mut submission: Submission) -> u64 {
        let offset = chunk as usize * CHUNK_BYTES;
        let arena = C2D.arena_offset();
        self.c2d.copy_in(arena + offset, payload).unwrap();
        submission.payload_offset = offset as u32;
        submission.payload_bytes = payload.len() as u32;
        self.submit(submission)
    }

    pub fn try_completion(&mut self) -> Option<Completion> {
        let body = self.completions.try_pop().unwrap();
        body.map(Completion::from_body)
    }

    pub fn completion(&mut self) -> Completion {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.try_completion() {
                return completion;
            }
            assert!(Instant::now() < until, "no completion came");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Sends no-operations until one is answered: everything sent before has been read.
    pub fn flush(&mut self) {
        let id = self.submit(Submission {
            op: Op::Nop as u8,
            ..Submission::zeroed()
        });
        while self.completion().request_id != id {}
    }

    pub fn query(&mut self, registration: u32, group: u16, hashes: &[BlockHash]) -> Completion {
        self.query_key(registration, group, 7, hashes)
    }

    pub fn query_key(
        &mut self,
        registration: u32,
        group: u16,
        key: u64,
        hashes: &[BlockHash],
    ) -> Completion {
        let query = Submission {
            arg0: key,
            ..list(Op::Query, registration, group, hashes.len())
        };
        self.submit_list(0, hashes.concat().as_slice(), query);
        self.completion()
    }

    /// The bitmap of the last membership query.
    pub fn result_word(&self) -> u64 {
        let mut word = [0; 8];
        let at = D2C.arena_offset();
        self.d2c.copy_out(at, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    pub fn save(
        &mut self,
        registration: u32,
        group: u16,
        hashes: &[BlockHash],
        blocks: &[u32],
    ) -> Completion {
        let payload = save_payload(hashes, blocks);
        self.submit_list(
            0,
            &payload,
            list(Op::Save, registration, group, hashes.len()),
        );
        self.completion()
    }

    pub fn load(
        &mut self,
        registration: u32,
        group: u16,
        lease: u64,
        blocks: &[u32],
    ) -> Completion {
        let load = Submission {
            arg0: lease,
            ..list(Op::Load, registration, group, blocks.len())
        };
        self.submit_list(0, bytemuck::cast_slice(blocks), load);
        self.completion()
    }

    /// Release, renew or cancel.
    pub fn simple(&mut self, op: Op, registration: u32, about: u64) -> Status {
        self.submit(Submission {
            op: op as u8,
            registration,
            arg0: about,
            ..Submission::zeroed()
        });
        self.completion().status()
    }
}

pub fn list(op: Op, registration: u32, group: u16, count: usize) -> Submission {
    Submission {
        op: op as u8,
        registration,
        group,
        count: count as u32,
        total: count as u32,
        ..Submission::zeroed()
    }
}

/// One chunk of a longer list.
pub fn part(whole: Submission, request_id: u64, total: usize, more: bool) -> Submission {
    Submission {
        request_id,
        total: total as u32,
        flags: if more { flags::MORE } else { 0 },
        ..whole
    }
}

pub fn save_payload(hashes: &[BlockHash], blocks: &[u32]) -> Vec<u8> {
    let mut payload = hashes.concat();
    payload.extend_from_slice(bytemuck::cast_slice(blocks));
    payload
}
