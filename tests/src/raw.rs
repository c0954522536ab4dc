//! A client without the library, free to break every rule.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_shm::bell::BellFd;
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, Hello, PROTOCOL_MAX, PROTOCOL_MIN, Welcome,
};
use pegaflow_shm::desc::{Completion, Submission};
use pegaflow_shm::mapping::{Mapping, create_segment, open_peer_segment};
use pegaflow_shm::segment::{C2D_MAGIC, CONSUMED_OFFSET, SLOT_BYTES, SLOTS_OFFSET, SegmentShape};
use pegaflow_shm::seqpacket::{self, PacketError};
use pegaflow_shm::sync::Ordering;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::SOON;

/// The connected socket, before anything is said.
pub struct RawSocket {
    fd: OwnedFd,
}

impl RawSocket {
    /// Connects.
    ///
    /// # Panics
    /// Nobody listens.
    pub fn connect(path: &Path) -> RawSocket {
        let fd = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket");
        let address = SocketAddrUnix::new(path).expect("a path that fits");
        connect(&fd, &address).expect("the daemon listens");
        RawSocket { fd }
    }

    /// The descriptor.
    pub fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends any bytes as a packet; whether the daemon still reads is not this call's business.
    pub fn send_bytes(&self, bytes: &[u8]) {
        rustix::net::send(&self.fd, bytes, rustix::net::SendFlags::NOSIGNAL).ok();
    }

    /// Sends a message with descriptors; a closed socket is not this call's business.
    pub fn send(&self, message: &ClientMessage, fds: &[std::os::fd::BorrowedFd<'_>]) {
        seqpacket::send(self.as_fd(), message, fds).ok();
    }

    /// The next message, within [`SOON`]; `None` at the end of the socket.
    ///
    /// # Panics
    /// Nothing comes, or something that is no message.
    pub fn receive(&self) -> Option<(DaemonMessage, Vec<OwnedFd>)> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let bound = Timespec {
            tv_sec: SOON.as_secs() as i64,
            tv_nsec: 0,
        };
        let ready = poll(&mut fds, Some(&bound)).expect("poll");
        assert!(ready > 0, "the daemon said nothing within {SOON:?}");
        match seqpacket::receive(self.as_fd()) {
            Ok(message) => Some(message),
            Err(PacketError::Closed) => None,
            Err(error) => panic!("the daemon sent what is no message: {error}"),
        }
    }

    /// True once the daemon has closed its end; reads nothing.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(closed)
    }

    /// Reads until the end of the socket and returns the last message before it.
    pub fn last_words(&self) -> Option<DaemonMessage> {
        let mut last = None;
        while let Some((message, _)) = self.receive() {
            last = Some(message);
        }
        last
    }
}

/// A session whose segments and ring this side may fill with anything.
pub struct RawClient {
    /// The socket.
    pub socket: RawSocket,
    /// What the daemon answered.
    pub welcome: Welcome,
    /// Own segment, writable.
    pub c2d: Mapping,
    /// The daemon's segment.
    pub d2c: Mapping,
    /// Shape of the own segment.
    pub shape: SegmentShape,
    /// Rings the daemon.
    pub bell: OwnedFd,
    /// The index of the session's isolation domain.
    pub index: OwnedFd,
    next: u64,
    seen: u64,
    completion_slots: u64,
}

/// A correct greeting for a segment of this many bytes.
pub fn hello(c2d_bytes: u64) -> Hello {
    Hello {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        client_version: "0".into(),
        client_name: "raw".into(),
        c2d_bytes,
        completion_slots: 64,
    }
}

/// A correct segment of the client.
///
/// # Panics
/// There is no memory.
pub fn segment(shape: SegmentShape) -> (OwnedFd, Mapping) {
    let (fd, mapping) = create_segment("raw client", shape.total_bytes() as u64).expect("a memfd");
    let header = shape.header(C2D_MAGIC, [0; 16], 0);
    mapping
        .copy_in(0, bytemuck::bytes_of(&header))
        .expect("the header fits");
    (fd, mapping)
}

impl RawClient {
    /// A session that has been opened correctly.
    ///
    /// # Panics
    /// The daemon refuses it.
    pub fn open(path: &Path) -> RawClient {
        RawClient::try_open(path).expect("a session")
    }

    /// [`Self::open`]; `None` where the daemon has no room for it.
    pub fn try_open(path: &Path) -> Option<RawClient> {
        let shape = SegmentShape {
            slots: 64,
            arena_chunks: 4,
        };
        let socket = RawSocket::connect(path);
        let (fd, c2d) = segment(shape);
        socket.send(
            &ClientMessage::Hello(hello(shape.total_bytes() as u64)),
            &[fd.as_fd()],
        );
        let Some((DaemonMessage::Welcome(welcome), fds)) = socket.receive() else {
            return None;
        };
        let [d2c, bell, _own_bell, index]: [OwnedFd; 4] = fds.try_into().expect("four descriptors");
        let d2c = open_peer_segment(d2c.as_fd(), "daemon's segment", welcome.d2c_bytes)
            .expect("the daemon's segment is sealed");
        let completion_slots = 64;
        Some(RawClient {
            socket,
            welcome,
            c2d,
            d2c,
            shape,
            bell,
            index,
            next: 0,
            seen: 0,
            completion_slots,
        })
    }

    /// Closes the socket, and goes on with the segments.
    pub fn drop_socket(mut self, go_on: impl FnOnce(&RawClient)) {
        self.socket.fd = rustix::pipe::pipe().expect("a pipe").0;
        go_on(&self);
    }

    /// Puts a submission into the next slot.
    pub fn push(&mut self, submission: Submission) {
        let at = SLOTS_OFFSET + (self.next as usize % self.shape.slots as usize) * SLOT_BYTES;
        for (position, word) in submission.to_body().iter().enumerate() {
            self.c2d
                .copy_in(at + 8 + position * 8, &word.to_ne_bytes())
                .expect("in the segment");
        }
        self.next += 1;
        self.write_word(at, self.next);
    }

    /// Submissions so far.
    pub fn pushed(&self) -> u64 {
        self.next
    }

    /// Writes a word of the own segment, as a release.
    pub fn write_word(&self, offset: usize, value: u64) {
        let word = self.c2d.atomic_u64(offset).expect("in the segment");
        word.store(value, Ordering::Release);
    }

    /// Wakes the daemon, whether it sleeps or not.
    pub fn ring(&self) {
        let bell = BellFd::from_eventfd(self.bell.try_clone().expect("a descriptor"));
        bell.ring().ok();
    }

    /// The next completion, if one comes within the time.
    pub fn pop(&mut self, bound: Duration) -> Option<Completion> {
        let slot = (self.seen % self.completion_slots) as usize;
        let at = SLOTS_OFFSET + slot * SLOT_BYTES;
        let deadline = Instant::now() + bound;
        let seq = self.d2c.atomic_u64(at).expect("in the segment");
        while seq.load(Ordering::Acquire) != self.seen + 1 {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut bytes = [0; 56];
        self.d2c
            .copy_out(at + 8, &mut bytes)
            .expect("in the segment");
        self.seen += 1;
        self.write_word(CONSUMED_OFFSET, self.seen);
        Some(bytemuck::cast(bytes))
    }
}
