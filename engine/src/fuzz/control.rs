//! Packets of the session socket, from either side, without the socket.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, DeviceHandle, GroupLayout, MAX_MESSAGE_BYTES, MAX_MESSAGE_CHUNKS,
    MAX_WORLD_SIZE, MemoryRef, RegisterSpec,
};
use pegaflow_shm::mapping::create_segment;
use pegaflow_shm::segment::{C2D_MAGIC, D2C_MAGIC, SegmentHeader, SegmentShape};
use pegaflow_shm::status::Status;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, geteuid, getpid, pidfd_open};

use tokio::sync::Semaphore;

use super::input::Input;
use crate::control::MAX_AWAITED_CHUNKS;
use crate::control::gpu::Import;
use crate::control::handshake::check_hello;
use crate::control::packet::bounded;
use crate::control::peer::Peer;
use crate::control::regions::{MAX_REGION_BYTES, MAX_REGIONS, Memory};
use crate::control::register;
use crate::copy::ProcessMemory;
use crate::isolation::IsolationDomain;
use crate::lane::api::Refusal;
use crate::registry::{InstanceId, Member, MemberGroup, Registry, packed_groups};

/// Ends a packet of the input: JSON has no such byte outside of strings, and escapes it in them.
const END: u8 = 0;
/// Packets of one input at most.
const MAX_PACKETS: usize = 32;
/// Size of the file behind every region of the input; none of it is ever touched.
const REGION_FILE_BYTES: u64 = 1 << 30;
pub(super) const SHAPE: SegmentShape = SegmentShape {
    slots: 16,
    arena_chunks: 1,
};

/// The first byte picks the side that reads; packets follow, each ended by a zero byte.
pub fn control(data: &[u8]) {
    let mut input = Input::new(data);
    if input.below(4) == 0 {
        client_side(&mut input);
    } else {
        daemon_side(&mut input);
    }
}

/// What a client makes of a daemon's packets and of the header of its segment.
fn client_side(input: &mut Input<'_>) {
    let header: SegmentHeader = patched(D2C_MAGIC, input);
    if let Ok(shape) = header.check(D2C_MAGIC, SHAPE.total_bytes()) {
        assert_eq!(shape.total_bytes(), SHAPE.total_bytes());
    }
    for packet in input.rest().split(|byte| *byte == END).take(MAX_PACKETS) {
        let Ok(message) = serde_json::from_slice::<DaemonMessage>(packet) else {
            continue;
        };
        let text = serde_json::to_vec(&message).expect("a message is text");
        assert_eq!(
            serde_json::from_slice::<DaemonMessage>(&text).ok(),
            Some(message)
        );
    }
}

/// A genuine header with some bytes replaced.
fn patched(magic: u64, input: &mut Input<'_>) -> SegmentHeader {
    let mut bytes: [u8; 88] = bytemuck::cast(SHAPE.header(magic, [7; 16], 1));
    for _ in 0..input.below(8) {
        bytes[usize::from(input.below(88))] = input.u8();
    }
    bytemuck::cast(bytes)
}

/// The daemon's side of one session, up to where the lane would take over.
struct Session {
    peer: Peer,
    memory: Memory,
    registry: Registry,
    /// Instance and regions of each registration.
    registrations: HashMap<u32, (InstanceId, Vec<u32>)>,
    last_registration: u32,
    region_file: OwnedFd,
    places: Arc<Semaphore>,
}

impl Session {
    fn new() -> Session {
        let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).expect("a descriptor is left");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let region_file = memfd_create("region", flags).expect("a descriptor is left");
        ftruncate(&region_file, REGION_FILE_BYTES).expect("a sparse file");
        fcntl_add_seals(&region_file, SealFlags::SHRINK).expect("a fresh memfd");
        Session {
            peer: Peer {
                pid: getpid().as_raw_nonzero().get(),
                uid: geteuid().as_raw(),
                domain: Arc::new(IsolationDomain::of_user(1000)),
                pidfd,
            },
            memory: Memory::default(),
            registry: Registry::new(4),
            registrations: HashMap::new(),
            last_registration: 0,
            region_file,
            places: Arc::new(Semaphore::new(MAX_AWAITED_CHUNKS)),
        }
    }

    fn handle(&mut self, message: ClientMessage, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        match message {
            ClientMessage::Hello(hello) => {
                let opening = check_hello(hello, fds)?;
                assert_eq!(opening.c2d_shape.total_bytes(), opening.c2d.len());
                Ok(())
            }
            ClientMessage::AddRegion { region, bytes, .. } => {
                self.memory.add(region, bytes, &fds)?;
                assert!(bytes > 0 && bytes <= REGION_FILE_BYTES.min(MAX_REGION_BYTES));
                assert_eq!(self.memory.region_bytes(region), Some(bytes));
                Ok(())
            }
            ClientMessage::AddDeviceRegion {
                region,
                bytes,
                device,
                handle,
                ..
            } => {
                let what = (region, bytes, device);
                let begun = self
                    .memory
                    .begin_device_region(what, handle, fds, &self.places);
                no_device(begun)
            }
            ClientMessage::AddDeviceChunks { region, .. } => {
                no_device(self.memory.add_device_chunks(region, fds))
            }
            ClientMessage::AddEvents { .. } => {
                let text = "no device here";
                Err(Refusal::new(Status::DeviceUnavailable, text))
            }
            ClientMessage::RemoveRegion { region, .. } => self.memory.remove(region),
            ClientMessage::Register {
                registration,
                signals,
                ..
            } => self.register(*registration, signals),
            ClientMessage::Unregister { registration, .. } => {
                let Some((instance, regions)) = self.registrations.remove(&registration) else {
                    return Err(Refusal::new(Status::UnknownRegistration, "no such one"));
                };
                self.registry.leave(instance, 1, registration);
                self.memory.count_user(&regions, false);
                Ok(())
            }
        }
    }

    fn register(&mut self, spec: RegisterSpec, signals: Option<u32>) -> Result<(), Refusal> {
        if register::names_process(&spec) {
            let pidfd = self.peer.pidfd.try_clone().expect("a descriptor is left");
            let process = ProcessMemory::open(self.peer.pid, pidfd, self.peer.uid);
            let process = process.expect("our own memory");
            self.memory.hold_process(process);
        }
        let checked = register::check(spec, signals, &self.memory, &self.peer.domain)?;
        let spec = checked.registration.spec;
        assert!((1..=MAX_WORLD_SIZE).contains(&spec.world_size));
        assert_eq!(spec.rank.is_some(), !spec.groups.is_empty());
        assert!(spec.rank.is_none_or(|rank| rank < spec.world_size));
        for (layout, bound) in spec.groups.iter().zip(&checked.registration.groups) {
            assert_eq!(layout.group, bound.group);
            let page_bytes = bound.target.layout().page_bytes();
            check_layout(layout, page_bytes, |id| self.memory.region_bytes(id));
        }
        let id = self.last_registration + 1;
        let groups = checked.registration.groups.iter();
        let groups = groups.map(|group| MemberGroup::of(group.target.layout()));
        let member = Member {
            session: 1,
            registration: id,
            groups: groups.collect(),
        };
        let instance = self.registry.join(0, &spec, member)?;
        let found = self.registry.get(instance).expect("it was joined just now");
        if found.is_complete() {
            spec.namespace
                .digest(found.world_size, &packed_groups(found));
        }
        self.last_registration = id;
        self.memory.count_user(&checked.regions, true);
        self.registrations.insert(id, (instance, checked.regions));
        Ok(())
    }
}

/// What a daemon without GPUs answers where all has come that a region needs.
fn no_device(begun: Result<Option<Import>, Refusal>) -> Result<(), Refusal> {
    match begun? {
        Some(_) => Err(Refusal::new(Status::DeviceUnavailable, "no device here")),
        None => Ok(()),
    }
}

fn daemon_side(input: &mut Input<'_>) {
    let header = patched(C2D_MAGIC, input);
    let mut session = Session::new();
    let packets = input.rest().split(|byte| *byte == END);
    for (seq, packet) in (0..).zip(packets.take(MAX_PACKETS)) {
        let packet = &packet[..packet.len().min(MAX_MESSAGE_BYTES)];
        let result = match serde_json::from_slice::<ClientMessage>(packet) {
            Ok(message) => {
                round_trip(&message);
                let fds = descriptors(&message, &header, &session);
                session.handle(message, fds)
            }
            Err(error) => Err(Refusal::new(Status::ProtocolError, error.to_string())),
        };
        assert!(session.registrations.len() <= MAX_PACKETS && MAX_PACKETS < MAX_REGIONS);
        if let Err(Refusal { status, message }) = result {
            let answer = bounded(DaemonMessage::Failed {
                seq,
                status,
                message,
            });
            let text = serde_json::to_vec(&answer).expect("a message is text");
            assert!(
                text.len() <= MAX_MESSAGE_BYTES,
                "an answer of {} bytes",
                text.len()
            );
        }
    }
}

/// What a client of this version would send is read as what it meant.
fn round_trip(message: &ClientMessage) {
    let text = serde_json::to_vec(message).expect("a message is text");
    let back = serde_json::from_slice::<ClientMessage>(&text).ok();
    assert_eq!(back.as_ref(), Some(message));
}

/// What travels beside a message of a client that sends the right kind of descriptor.
fn descriptors(message: &ClientMessage, header: &SegmentHeader, session: &Session) -> Vec<OwnedFd> {
    match message {
        ClientMessage::Hello(_) => {
            let made = create_segment("C2D segment", SHAPE.total_bytes() as u64);
            let (fd, mapping) = made.expect("there is room for a small segment");
            let bytes = bytemuck::bytes_of(header);
            mapping.copy_in(0, bytes).expect("the header fits");
            vec![fd]
        }
        ClientMessage::AddRegion { .. } => {
            let fd = session.region_file.as_fd().try_clone_to_owned();
            vec![fd.expect("a descriptor is left")]
        }
        // As many as are due of a small region, and too few of a large one.
        ClientMessage::AddDeviceRegion {
            handle: DeviceHandle::Vmm { chunks },
            ..
        } => some_descriptors(chunks.len()),
        ClientMessage::AddDeviceChunks { region, .. } => some_descriptors(*region as usize),
        _ => Vec::new(),
    }
}

/// At most as many descriptors as a message takes.
fn some_descriptors(count: usize) -> Vec<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC;
    let one = |_| memfd_create("chunk", flags).expect("a descriptor is left");
    (0..count.min(MAX_MESSAGE_CHUNKS)).map(one).collect()
}

/// A layout that was accepted, in wide numbers.
fn check_layout(layout: &GroupLayout, page_bytes: u64, region: impl Fn(u32) -> Option<u64>) {
    let blocks = u128::from(layout.num_blocks);
    let mut pieces = Vec::new();
    let mut sum = 0;
    for (index, segment) in layout.segments.iter().enumerate() {
        let (base, stride) = (u128::from(segment.base), u128::from(segment.block_stride));
        let bytes = u128::from(segment.bytes);
        sum += bytes;
        let end = base + (blocks - 1) * stride + bytes;
        let limit = match segment.memory {
            MemoryRef::Region(id) => u128::from(region(id).expect("a region that exists")),
            MemoryRef::Process => 1 << 47,
        };
        assert!(
            bytes > 0 && stride >= bytes && end <= limit,
            "segment {index}"
        );
        let memory = match segment.memory {
            MemoryRef::Region(id) => u64::from(id),
            MemoryRef::Process => u64::MAX,
        };
        // Blocks beyond these repeat the pattern of the first ones.
        for block in 0..blocks.min(64) {
            let start = base + block * stride;
            pieces.push((memory, start, start + bytes));
        }
    }
    assert_eq!(sum, u128::from(page_bytes));
    pieces.sort_unstable();
    for pair in pieces.windows(2) {
        let [(memory, _, end), (other, start, _)] = [pair[0], pair[1]];
        assert!(memory != other || end <= start, "{:?} share bytes", pair);
    }
}

#[cfg(test)]
pub(super) fn seeds() -> Vec<Vec<u8>> {
    super::tests::control_seeds()
}
