//! The handshake: Hello, Welcome, and the checks of what came with it.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use pegaflow_shm::BootId;
use pegaflow_shm::bell::{BellFd, BellListener, SharedWaker, Sleeper};
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, Hello, PROTOCOL_MAX, PROTOCOL_MIN, Welcome,
};
use pegaflow_shm::index::IndexReader;
use pegaflow_shm::mapping::{
    Access, Mapping, NamedFile, SharedU32, create_segment, open_peer_segment,
};
use pegaflow_shm::ring::{Consumer, RawRing, SharedProducer};
use pegaflow_shm::segment::{
    C2D_MAGIC, CONSUMED_OFFSET, D2C_MAGIC, SLEEP_EPOCH_OFFSET, SLOTS_OFFSET, STATE_OFFSET,
    SegmentHeader, SegmentShape,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{Bound, Channel, DaemonProcess, Live, Session};
use crate::Error;
use crate::memory::IndexMapping;
use crate::options::Resolved;
use crate::requests::{ChunkPool, ResultPool};

/// Descriptors that come with a Welcome.
struct Gifts {
    d2c: OwnedFd,
    bell: OwnedFd,
    pipe: OwnedFd,
    index: OwnedFd,
}

impl Session {
    /// Opens a session over a connected socket.
    pub(crate) fn open(
        resolved: &Resolved,
        number: u64,
        channel: Channel,
        bound: Bound<'_>,
    ) -> Result<Live, Error> {
        let (peer_pid, peer_uid) = channel.peer()?;
        check_owner(resolved, peer_uid)?;
        let shape = resolved.shape;
        let (memfd, c2d) = create_segment("pegaflow-c2d", shape.total_bytes() as u64)?;
        c2d.copy_in(0, bytemuck::bytes_of(&shape.header(C2D_MAGIC, [0; 16], 0)))?;
        let hello = Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            client_version: env!("CARGO_PKG_VERSION").to_owned(),
            client_name: resolved.client_name.clone(),
            c2d_bytes: shape.total_bytes() as u64,
            completion_slots: resolved.options.completion_slots,
        };
        let sent = channel.send(&ClientMessage::Hello(hello), &[memfd.as_fd()], bound);
        // A daemon that refuses this user closes at once; its reason can be read all the same.
        let (welcome, gifts) = await_welcome(&channel, bound)?;
        sent?;
        let daemon_pid = if peer_pid == 0 {
            welcome.daemon_pid
        } else {
            peer_pid
        };
        assemble(
            resolved,
            Parts {
                number,
                channel,
                daemon_pid,
                process: DaemonProcess::new(peer_pid),
                c2d,
                welcome,
                gifts,
            },
        )
    }
}

fn await_welcome(channel: &Channel, bound: Bound<'_>) -> Result<(Welcome, Gifts), Error> {
    match channel.receive(bound)? {
        (DaemonMessage::Welcome(welcome), fds) => {
            if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&welcome.protocol) {
                let spoken = welcome.protocol;
                return Err(Error::Protocol(format!(
                    "it answered in protocol version {spoken}, this library speaks {PROTOCOL_MIN} \
                     to {PROTOCOL_MAX}"
                )));
            }
            let count = fds.len();
            let [d2c, bell, pipe, index] = <[OwnedFd; 4]>::try_from(fds).map_err(|_| {
                Error::Protocol(format!("{count} descriptors came with its Welcome, not 4"))
            })?;
            Ok((
                welcome,
                Gifts {
                    d2c,
                    bell,
                    pipe,
                    index,
                },
            ))
        }
        (DaemonMessage::Refused { status, message }, _)
        | (DaemonMessage::Closing { status, message }, _) => {
            Err(Error::Refused { status, message })
        }
        (other, _) => Err(Error::Protocol(format!(
            "{} came before its Welcome",
            kind(&other)
        ))),
    }
}

struct Parts {
    number: u64,
    channel: Channel,
    daemon_pid: u32,
    process: DaemonProcess,
    c2d: Mapping,
    welcome: Welcome,
    gifts: Gifts,
}

fn assemble(resolved: &Resolved, parts: Parts) -> Result<Live, Error> {
    let Parts {
        number,
        channel,
        daemon_pid,
        process,
        c2d,
        welcome,
        gifts,
    } = parts;
    let shape = resolved.shape;
    let d2c = open_peer_segment(gifts.d2c.as_fd(), "pegaflow-d2c", welcome.d2c_bytes)?;
    let header = read_header(&d2c)?;
    let d2c_shape = header
        .check(D2C_MAGIC, d2c.len())
        .map_err(|fault| Error::Protocol(format!("daemon-to-client segment: {fault}")))?;
    let index = open_index(gifts.index, welcome.index_bytes)?;
    check_boot_ids(&welcome, &header.boot_id, index.boot_id())?;
    for fd in [&gifts.bell, &gifts.pipe] {
        set_nonblocking(fd)?;
    }
    let (c2d, d2c) = (Arc::new(c2d), Arc::new(d2c));
    let submissions =
        RawRing::for_producer(&c2d, SLOTS_OFFSET, shape.slots, &d2c, CONSUMED_OFFSET)?;
    let completions =
        RawRing::for_consumer(&d2c, SLOTS_OFFSET, d2c_shape.slots, &c2d, CONSUMED_OFFSET)?;
    let chunks = ChunkPool::new(shape.arena_chunks);
    let results = ResultPool::new(d2c_shape.arena_bytes());
    let sleeper = Sleeper::new(SharedU32::new(&c2d, SLEEP_EPOCH_OFFSET)?);
    let session = Session {
        number,
        welcome,
        daemon_pid,
        process,
        channel,
        index,
        pipe: BellListener::new(gifts.pipe),
        links: chunks.links(),
        arena_chunks: shape.arena_chunks,
        lost: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        ending: OnceLock::new(),
        arena_offset: shape.arena_offset(),
        result_offset: d2c_shape.arena_offset(),
        producer: SharedProducer::new(submissions),
        waker: SharedWaker::new(SharedU32::new(&d2c, SLEEP_EPOCH_OFFSET)?),
        bell: BellFd::from_eventfd(gifts.bell),
        state: SharedU32::new(&d2c, STATE_OFFSET)?,
        completions: completions.clone(),
        position: AtomicU64::new(0),
        c2d,
        d2c,
    };
    Ok(Live {
        session: Arc::new(session),
        consumer: Consumer::new(completions),
        sleeper,
        chunks,
        results,
        in_flight: 0,
        credit: credit(resolved, d2c_shape),
        slots_used: 0,
        slots_limit: shape.slots - shape.slots / 4,
    })
}

fn credit(resolved: &Resolved, d2c: SegmentShape) -> u32 {
    d2c.slots.min(resolved.options.completion_slots)
}

fn read_header(d2c: &Mapping) -> Result<SegmentHeader, Error> {
    let mut bytes = [0; size_of::<SegmentHeader>()];
    d2c.copy_out(0, &mut bytes)?;
    Ok(bytemuck::cast(bytes))
}

fn open_index(fd: OwnedFd, bytes: u64) -> Result<IndexReader<IndexMapping>, Error> {
    let file = NamedFile::from_fd(fd, "block index")?;
    let mapping = file.map_exact(Access::ReadOnly, bytes)?;
    IndexReader::open(IndexMapping::new(Arc::new(mapping))?)
        .map_err(|fault| Error::Protocol(format!("block index: {fault}")))
}

/// The same daemon start must have made all three.
fn check_boot_ids(welcome: &Welcome, segment: &BootId, index: &BootId) -> Result<(), Error> {
    let named = hex(segment);
    if welcome.boot_id != named || index != segment {
        let (said, index) = (&welcome.boot_id, hex(index));
        return Err(Error::Protocol(format!(
            "boot ids differ: {said} in its Welcome, {named} in its segment, {index} in its index"
        )));
    }
    Ok(())
}

/// Where nobody named the socket, its owner must be one who could harm this process anyway.
fn check_owner(resolved: &Resolved, peer_uid: u32) -> Result<(), Error> {
    let ours = rustix::process::geteuid().as_raw();
    if resolved.socket_is_explicit || peer_uid == 0 || peer_uid == ours {
        return Ok(());
    }
    let value = format!("{} of uid {peer_uid}", resolved.socket.display());
    let way_out = "another user listens there: name the socket in PEGAFLOW_SOCKET to trust it";
    Err(Error::argument("socket", value, way_out))
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), Error> {
    let failed = |errno| Error::system("fcntl(F_SETFL)", errno);
    let flags = fcntl_getfl(fd).map_err(failed)?;
    fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(failed)
}

fn hex(boot_id: &BootId) -> String {
    boot_id.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Name of a message, for faults.
pub(crate) fn kind(message: &DaemonMessage) -> &'static str {
    match message {
        DaemonMessage::Welcome(_) => "a Welcome",
        DaemonMessage::Refused { .. } => "a Refused",
        DaemonMessage::Done { .. } => "a Done",
        DaemonMessage::Failed { .. } => "a Failed",
        DaemonMessage::Registered { .. } => "a Registered",
        DaemonMessage::Ready { .. } => "a Ready",
        DaemonMessage::NotReady { .. } => "a NotReady",
        DaemonMessage::Draining { .. } => "a Draining",
        DaemonMessage::DeviceDown { .. } => "a DeviceDown",
        DaemonMessage::DeviceUp { .. } => "a DeviceUp",
        DaemonMessage::Closing { .. } => "a Closing",
    }
}
