//! The memory that the two processes of a rings bench share.
//!
//! | memory | written by | for |
//! | --- | --- | --- |
//! | C2D segment | the asking process | the product's submission ring |
//! | D2C segment | the answering process | the product's completion ring |
//! | scratch region | both | the raw ping-pong's lines and the textbook ring |

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use pegaflow_shm::bell::{BellFd, BellListener, Sleeper, Waker};
use pegaflow_shm::mapping::{
    Mapping, SharedU32, SharedU64, create_kv_region, create_segment, open_peer_kv_region,
    open_peer_segment,
};
use pegaflow_shm::ring::{Consumer, Producer, RawRing};
use pegaflow_shm::segment::{
    C2D_MAGIC, CONSUMED_OFFSET, D2C_MAGIC, SLEEP_EPOCH_OFFSET, SLOTS_OFFSET, SegmentShape,
};

use crate::error::ToolError;

/// Both segments, of the default size of a session.
pub const SHAPE: SegmentShape = SegmentShape {
    slots: SegmentShape::DEFAULT_C2D.slots,
    arena_chunks: 16,
};

const LINE_OFFSETS: [usize; 2] = [0, 4096];
const HEAD_OFFSET: usize = 8192;
const TAIL_OFFSET: usize = 8192 + 256;
const TEXTBOOK_SLOTS_OFFSET: usize = 16384;
const SCRATCH_BYTES: u64 = (TEXTBOOK_SLOTS_OFFSET + SHAPE.slots as usize * 64) as u64;

/// Creates this side's own segment with its header.
pub fn own_segment(is_client: bool) -> Result<(OwnedFd, Arc<Mapping>), ToolError> {
    let magic = if is_client { C2D_MAGIC } else { D2C_MAGIC };
    let (fd, mapping) = create_segment("pegactl-bench", SHAPE.total_bytes() as u64)?;
    mapping.copy_in(0, bytemuck::bytes_of(&SHAPE.header(magic, [0; 16], 0)))?;
    Ok((fd, Arc::new(mapping)))
}

/// Maps the other side's segment read-only, after the checks that the product makes.
pub fn peer_segment(fd: BorrowedFd<'_>) -> Result<Arc<Mapping>, ToolError> {
    Ok(Arc::new(open_peer_segment(
        fd,
        "pegactl-bench",
        SHAPE.total_bytes() as u64,
    )?))
}

/// Creates the scratch region.
pub fn create_scratch() -> Result<(OwnedFd, Arc<Mapping>), ToolError> {
    let (fd, mapping) = create_kv_region("pegactl-bench", SCRATCH_BYTES)?;
    Ok((fd, Arc::new(mapping)))
}

/// Maps the scratch region that the other side created.
pub fn open_scratch(fd: BorrowedFd<'_>) -> Result<Arc<Mapping>, ToolError> {
    Ok(Arc::new(open_peer_kv_region(
        fd,
        "pegactl-bench",
        SCRATCH_BYTES,
    )?))
}

/// The words of the raw ping-pong and of the textbook ring.
pub struct Scratch {
    /// Two cache lines, far apart.
    pub lines: [SharedU64; 2],
    /// Textbook ring: messages produced.
    pub head: SharedU64,
    /// Textbook ring: messages consumed.
    pub tail: SharedU64,
    /// Textbook ring: its slots, reached as those of any ring.
    pub slots: RawRing,
}

impl Scratch {
    /// Finds the words in a mapping of the region.
    pub fn new(mapping: &Arc<Mapping>) -> Result<Scratch, ToolError> {
        let word = |offset| SharedU64::new(mapping, offset);
        Ok(Scratch {
            lines: [word(LINE_OFFSETS[0])?, word(LINE_OFFSETS[1])?],
            head: word(HEAD_OFFSET)?,
            tail: word(TAIL_OFFSET)?,
            slots: RawRing::for_producer(
                mapping,
                TEXTBOOK_SLOTS_OFFSET,
                SHAPE.slots,
                mapping,
                TAIL_OFFSET,
            )?,
        })
    }
}

/// One side's handles of the product's rings and doorbells.
pub struct Rings {
    /// Messages to the other side.
    pub producer: Producer<RawRing>,
    /// Messages from the other side.
    pub consumer: Consumer<RawRing>,
    /// Tells whether the other side sleeps.
    pub waker: Waker<SharedU32>,
    /// Tells the other side that this one sleeps.
    pub sleeper: Sleeper<SharedU32>,
    /// Wakes the other side.
    pub bell: BellFd,
}

impl Rings {
    /// This side's handles over its own segment and the other side's.
    pub fn new(own: &Arc<Mapping>, peer: &Arc<Mapping>, bell: BellFd) -> Result<Rings, ToolError> {
        let slots = SHAPE.slots;
        let out = RawRing::for_producer(own, SLOTS_OFFSET, slots, peer, CONSUMED_OFFSET)?;
        let incoming = RawRing::for_consumer(peer, SLOTS_OFFSET, slots, own, CONSUMED_OFFSET)?;
        Ok(Rings {
            producer: Producer::new(out),
            consumer: Consumer::new(incoming),
            waker: Waker::new(SharedU32::new(peer, SLEEP_EPOCH_OFFSET)?),
            sleeper: Sleeper::new(SharedU32::new(own, SLEEP_EPOCH_OFFSET)?),
            bell,
        })
    }
}

/// What wakes a side: the daemon's way for the answering side, the client's way for the asking one.
pub enum Alarm {
    /// An eventfd watched edge-triggered and never read, as the daemon's lane does.
    Epoll {
        /// The epoll descriptor.
        epoll: OwnedFd,
        /// The eventfd, kept open.
        _eventfd: OwnedFd,
    },
    /// The read end of a pipe, as the client library does.
    Pipe(BellListener),
}

impl Alarm {
    /// Watches an eventfd as the daemon does.
    pub fn epoll(eventfd: OwnedFd) -> Result<Alarm, ToolError> {
        use rustix::event::epoll;
        let failed = ToolError::errno("epoll");
        let make = || {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, eventfd.as_fd(), epoll::EventData::new_u64(0), flags)?;
            Ok(epoll)
        };
        let epoll = make().map_err(failed)?;
        Ok(Alarm::Epoll {
            epoll,
            _eventfd: eventfd,
        })
    }

    /// Sleeps until it is rung; the asking side a second at most, as the library's waits have a
    /// bound.
    pub fn sleep(&self) -> Result<(), ToolError> {
        use rustix::event::epoll;
        match self {
            Alarm::Pipe(listener) => {
                let woken = listener.wait(std::time::Duration::from_secs(1));
                woken.map(|_| ()).map_err(|error| ToolError::Io {
                    what: "doorbell".into(),
                    source: std::io::Error::other(error),
                })
            }
            Alarm::Epoll { epoll, .. } => {
                // Without a limit, as the daemon's lane sleeps when it holds no lease: a timer
                // costs more than the wake-up. The kernel ends this process with the one that asks.
                let mut events = Vec::with_capacity(4);
                let events = rustix::buffer::spare_capacity(&mut events);
                match epoll::wait(epoll, events, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
                    Err(errno) => Err(ToolError::errno("epoll_wait")(errno)),
                }
            }
        }
    }
}
