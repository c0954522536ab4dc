//! A client that writes whatever it likes wherever it may.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pegaflow_shm::bell::BellFd;
use pegaflow_shm::control::{GroupLayout, MemoryRef, Mode, RegisterSpec, SegmentLayout};
use pegaflow_shm::desc::{Completion, Submission};
use pegaflow_shm::mapping::{Mapping, create_kv_region, create_segment};
use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::ring::{Consumer, RawRing};
use pegaflow_shm::segment::{CONSUMED_OFFSET, SLOT_BYTES, SLOTS_OFFSET, SegmentShape};

use crate::copy::{BoundLayout, ClientMemory, RegionMapping};
use crate::isolation::IsolationDomain;
use crate::lane::api::{NewRegistration, NewSession, RegisteredGroup};
use crate::layout::ValidLayout;

pub(super) const SHAPE: SegmentShape = SegmentShape {
    slots: 16,
    arena_chunks: 2,
};
/// Blocks of a client's memory.
pub(super) const BLOCKS: u32 = 16;
/// Bytes of a block in group 0; group 1 has twice as much.
pub(super) const PAGE: u64 = 1024;

pub(super) struct Client {
    pub id: u64,
    pub uid: u32,
    pub c2d: Arc<Mapping>,
    pub position: u64,
    pub submitted: u64,
    pub completed: u64,
    pub ids: HashSet<u64>,
    pub registrations: u32,
    pub memory: Mapping,
    region: Arc<RegionMapping>,
    completions: Consumer<RawRing>,
    d2c: Arc<Mapping>,
    _bell_end: OwnedFd,
}

impl Client {
    pub(super) fn new(id: u64, uid: u32) -> (Client, NewSession) {
        let segment = |purpose| {
            let made = create_segment(purpose, SHAPE.total_bytes() as u64);
            Arc::new(made.expect("there is memory").1)
        };
        let (c2d, d2c) = (segment("C2D segment"), segment("D2C segment"));
        let lane_bell = BellFd::eventfd().expect("a descriptor is left");
        let (client_bell, bell_end) = BellFd::pipe().expect("a descriptor is left");
        let new = NewSession {
            id,
            uid,
            domain: Arc::new(IsolationDomain::of_user(uid)),
            pid: std::process::id(),
            client_name: "fuzz".into(),
            c2d: c2d.clone(),
            c2d_shape: SHAPE,
            d2c: d2c.clone(),
            d2c_shape: SHAPE,
            lane_bell: lane_bell.into_fd(),
            client_bell,
        };
        let ring = RawRing::for_consumer(&d2c, SLOTS_OFFSET, SHAPE.slots, &c2d, CONSUMED_OFFSET);
        let bytes = u64::from(BLOCKS) * 2 * PAGE;
        let (fd, memory) = create_kv_region("KV memory", bytes).expect("there is memory");
        let client = Client {
            id,
            uid,
            c2d,
            position: 0,
            submitted: 0,
            completed: 0,
            ids: HashSet::new(),
            registrations: 0,
            memory,
            region: RegionMapping::map(fd.as_fd(), bytes).expect("a sealed memfd"),
            completions: Consumer::new(ring.expect("the shape fits")),
            d2c,
            _bell_end: bell_end,
        };
        (client, new)
    }

    /// The only rank of an instance, or rank `rank` of two; groups 0 and 1 over the same memory.
    pub(super) fn registration(&self, instance: &str, rank: Option<u32>) -> NewRegistration {
        let spec = RegisterSpec {
            instance: instance.into(),
            namespace: NamespaceSpec {
                model: "m".into(),
                dtype: "bf16".into(),
                hash_algorithm: "blake3".into(),
                block_tokens: 16,
                ..NamespaceSpec::default()
            },
            world_size: 1 + u32::from(rank.is_some()),
            rank: Some(rank.unwrap_or(0)),
            mode: Mode::ReadWrite,
            groups: Vec::new(),
        };
        let groups = [0, 1].map(|group: u16| RegisteredGroup {
            group,
            target: self.layout(group),
        });
        NewRegistration {
            events: None,
            signals: None,
            spec,
            groups: groups.into(),
        }
    }

    fn layout(&self, group: u16) -> Arc<BoundLayout> {
        let bytes = PAGE << group;
        let layout = GroupLayout {
            group,
            num_blocks: BLOCKS,
            segments: vec![SegmentLayout {
                memory: MemoryRef::Region(0),
                base: 0,
                block_stride: bytes,
                bytes,
            }],
            replicated: false,
        };
        let valid = ValidLayout::new(&layout, |_| Some(self.region.bytes())).expect("it fits");
        let resolve = |_| Some(ClientMemory::Region(self.region.clone()));
        BoundLayout::bind(Arc::new(valid), resolve).expect("the region is there")
    }

    /// Writes a slot and publishes it as the next position, or under any number.
    pub(super) fn publish(&mut self, submission: &Submission, seq: Option<u64>) {
        let slot = self.position as usize % SHAPE.slots as usize;
        let at = SLOTS_OFFSET + slot * SLOT_BYTES;
        self.write(at + 8, bytemuck::bytes_of(submission));
        self.write(at, &seq.unwrap_or(self.position + 1).to_le_bytes());
        self.position += 1;
        self.submitted += 1;
        self.ids.insert(submission.request_id);
    }

    /// Writes anywhere into its segment; what does not fit is left out.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        let room = SHAPE.total_bytes().saturating_sub(at).min(bytes.len());
        if room > 0 {
            self.c2d.copy_in(at, &bytes[..room]).expect("inside");
        }
    }

    pub(super) fn write_arena(&self, at: usize, bytes: &[u8]) {
        self.write(SHAPE.arena_offset() + at, bytes);
    }

    /// The next completion. Each answers something that was asked, once.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        let body = self
            .completions
            .try_pop()
            .expect("the daemon writes no nonsense")?;
        let completion = Completion::from_body(body);
        self.completed += 1;
        assert!(
            self.completed <= self.submitted,
            "more answers than questions"
        );
        assert!(self.ids.contains(&completion.request_id), "{completion:?}");
        Some(completion)
    }

    pub(super) fn fill(&self, block: u32, byte: u8) {
        let at = u64::from(block) * PAGE;
        let bytes = [byte; PAGE as usize];
        self.memory.copy_in(at as usize, &bytes).expect("inside");
    }

    pub(super) fn holds(&self, block: u32, byte: u8) -> bool {
        let mut bytes = [0; PAGE as usize];
        let at = u64::from(block) * PAGE;
        self.memory
            .copy_out(at as usize, &mut bytes)
            .expect("inside");
        bytes == [byte; PAGE as usize]
    }

    /// The state that the daemon shows, to look at what a client looks at.
    pub(super) fn d2c(&self) -> &Mapping {
        &self.d2c
    }
}
