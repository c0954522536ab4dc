//! One connection to the daemon: its two segments, its socket, its bells, the index it may read.
//!
//! A [`Session`] is immutable once it is open and lives as long as somebody holds it, so that a
//! thread that is still writing into the arena of a lost session does no harm. What changes (free
//! chunks, ring positions) is in [`Live`], under the client's lock, and ends with the session.

#![forbid(unsafe_code)]

mod channel;
pub(crate) mod control;
mod open;
mod process;

pub(crate) use channel::{Bound, Channel, ConnectError, address, check_length};
pub(crate) use open::kind;
pub(crate) use process::DaemonProcess;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use pegaflow_shm::bell::{BellFd, BellListener, SharedWaker, Sleeper};
use pegaflow_shm::control::Welcome;
use pegaflow_shm::desc::Body;
use pegaflow_shm::index::IndexReader;
use pegaflow_shm::mapping::{Mapping, SharedU32};
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::ring::{Consumer, PushError, RawRing, RingMemory, SharedProducer};
use pegaflow_shm::segment::SessionState;
use pegaflow_shm::status::Status;

use crate::Error;
use crate::memory::IndexMapping;
use crate::requests::{ChunkPool, Links, ResultPool};

/// The part of a session that any thread may use at any time.
pub(crate) struct Session {
    /// Counts the sessions of one client from 1.
    pub(crate) number: u64,
    pub(crate) welcome: Welcome,
    /// The daemon's process, as the kernel shows it here; 0 if it shows none.
    pub(crate) daemon_pid: u32,
    pub(crate) process: DaemonProcess,
    pub(crate) channel: Channel,
    pub(crate) index: IndexReader<IndexMapping>,
    pub(crate) pipe: BellListener,
    pub(crate) links: Links,
    /// Chunks of the submission arena.
    pub(crate) arena_chunks: u32,
    lost: AtomicBool,
    draining: AtomicBool,
    /// What the daemon said when it began to end the session.
    ending: OnceLock<(Status, String)>,
    c2d: Arc<Mapping>,
    d2c: Arc<Mapping>,
    arena_offset: usize,
    result_offset: usize,
    producer: SharedProducer<RawRing>,
    waker: SharedWaker<SharedU32>,
    bell: BellFd,
    state: SharedU32,
    completions: RawRing,
    /// Position of the next completion, for [`Self::has_completion`] only.
    position: AtomicU64,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Session({} of node {})",
            self.welcome.session, self.welcome.node
        )
    }
}

impl std::fmt::Display for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let welcome = &self.welcome;
        let (node, version, pid) = (&welcome.node, &welcome.daemon_version, self.daemon_pid);
        write!(f, "node {node} (pegaflowd {version}, pid {pid})")
    }
}

/// The part of a session that changes, under the client's lock.
pub(crate) struct Live {
    pub(crate) session: Arc<Session>,
    pub(crate) consumer: Consumer<RawRing>,
    pub(crate) sleeper: Sleeper<SharedU32>,
    pub(crate) chunks: ChunkPool,
    pub(crate) results: ResultPool,
    /// Unfinished requests.
    pub(crate) in_flight: u32,
    /// Most unfinished requests: the completion ring has room for their answers.
    pub(crate) credit: u32,
    /// Ring slots of unfinished requests.
    pub(crate) slots_used: u32,
    /// Most of them: the daemon tells its progress a quarter of a lap late, so that with the rest
    /// of the ring in use a push always finds room.
    pub(crate) slots_limit: u32,
}

impl Session {
    /// True while the daemon takes requests of this session.
    #[inline]
    pub(crate) fn serves(&self) -> bool {
        !self.lost.load(Ordering::Relaxed)
            && SessionState::from_code(self.state.load(Ordering::Relaxed)) == SessionState::Active
    }

    /// True once the client has given the session up.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Marks the session as over, for readers that take no lock.
    pub(crate) fn mark_lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// True once the daemon has said that it takes nothing new.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Notes that the daemon takes nothing new.
    pub(crate) fn mark_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The daemon takes no more requests: the end of the socket follows once no copy touches this
    /// process's memory any more.
    pub(crate) fn begin_end(&self, status: Status, reason: String) {
        // A second reason adds nothing.
        let _ = self.ending.set((status, reason));
    }

    /// Why the session ends, if the daemon has said so.
    #[inline]
    pub(crate) fn ending(&self) -> Option<&str> {
        self.ending.get().map(|(_, reason)| &**reason)
    }

    /// Kind of reason for which the session ended, and the reason.
    pub(crate) fn end_reason(&self, error: &Error) -> (Status, String) {
        let said = self.ending.get().cloned();
        said.unwrap_or_else(|| match error {
            Error::Disconnected { reason } => (Status::Disconnected, reason.clone()),
            other => (other.status(), other.to_string()),
        })
    }

    /// Writes into an arena chunk that the caller holds.
    #[inline]
    pub(crate) fn write_chunk(&self, chunk: u32, at: usize, bytes: &[u8]) -> Result<(), Error> {
        assert!(
            at + bytes.len() <= CHUNK_BYTES,
            "payload does not fit its chunk"
        );
        let offset = self.arena_offset + chunk as usize * CHUNK_BYTES + at;
        Ok(self.c2d.copy_in(offset, bytes)?)
    }

    /// Offset of a chunk in the arena, as submissions name it.
    #[inline]
    pub(crate) fn chunk_offset(&self, chunk: u32) -> u32 {
        // An arena has at most 1 GiB.
        chunk * CHUNK_BYTES as u32
    }

    /// Copies a finished bitmap out of the result arena.
    pub(crate) fn read_result(&self, offset: usize, out: &mut [u64]) -> Result<(), Error> {
        Ok(self
            .d2c
            .copy_out(self.result_offset + offset, bytemuck::cast_slice_mut(out))?)
    }

    /// Publishes one submission.
    #[inline]
    pub(crate) fn push(&self, body: &Body) -> Result<(), PushError> {
        self.producer.try_push(body)
    }

    /// Wakes the daemon if it sleeps. Call after publishing.
    #[inline]
    pub(crate) fn wake_daemon(&self) {
        if self.waker.should_ring() {
            // A failure means that the daemon is gone, which the socket tells better.
            let _ = self.bell.ring();
        }
    }

    /// True if a completion is there; a hint for spinning, without the lock.
    #[inline]
    pub(crate) fn has_completion(&self) -> bool {
        let position = self.position.load(Ordering::Relaxed);
        let index = position & u64::from(self.completions.capacity() - 1);
        self.completions
            .slot(index as u32)
            .seq
            .load(Ordering::Relaxed)
            == position + 1
    }

    /// Keeps the hint of [`Self::has_completion`] up to date.
    #[inline]
    pub(crate) fn set_position(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
    }

    /// The socket, to watch for its end.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
