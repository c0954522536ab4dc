//! One packet of the session socket: a JSON text and the descriptors beside it.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt::set_socket_linger,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS};

/// Most descriptors that the kernel passes with one packet (`SCM_MAX_FD`). All of them are taken
/// in, so that none is left to the kernel to close; see [`take_descriptors`].
const MOST_FDS: usize = 253;

/// A packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket's system call failed; `EAGAIN` on a non-blocking socket means "not now".
    #[error("session socket: {0}")]
    Io(#[from] Errno),
    /// The peer closed the socket.
    #[error("the peer closed the session socket")]
    Closed,
    /// A message does not fit a packet.
    #[error("message of {bytes} bytes, at most {MAX_MESSAGE_BYTES} fit: register fewer segments")]
    TooLong {
        /// Length of the message.
        bytes: usize,
    },
    /// The packet or its descriptors were cut off by the receiver's limits.
    #[error(
        "the peer sent a packet beyond {MAX_MESSAGE_BYTES} bytes or {MAX_MESSAGE_FDS} descriptors"
    )]
    Truncated,
    /// The packet is not a message of this protocol.
    #[error("the peer sent a packet that is no message: {0}")]
    Malformed(#[from] serde_json::Error),
}

impl PacketError {
    /// True when a non-blocking socket had nothing to give or no room to take.
    pub fn would_block(&self) -> bool {
        matches!(self, PacketError::Io(Errno::AGAIN))
    }
}

/// Whether a message fits a packet, without sending it.
///
/// # Errors
/// [`PacketError::TooLong`].
pub fn check_length<M: Serialize>(message: &M) -> Result<(), PacketError> {
    packet(message).map(drop)
}

fn packet<M: Serialize>(message: &M) -> Result<Vec<u8>, PacketError> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_MESSAGE_BYTES {
        return Err(PacketError::TooLong { bytes: text.len() });
    }
    Ok(text)
}

/// Sends one message with descriptors.
///
/// # Errors
/// See [`PacketError`]; a closed peer reads as [`PacketError::Closed`].
pub fn send<M: Serialize>(
    socket: BorrowedFd<'_>,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> Result<(), PacketError> {
    let text = packet(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(PacketError::Truncated);
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(&text)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(PacketError::Closed),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Room for the longest message, kept by its thread from one message to the next: a peer that sends
/// many short ones must not make this side clear so much memory for each.
struct Room(Vec<u8>);

thread_local! {
    static SPARE_ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Room {
    fn take() -> Room {
        // A thread that is ending has none.
        let mut bytes = SPARE_ROOM.try_with(Cell::take).unwrap_or_default();
        bytes.resize(MAX_MESSAGE_BYTES, 0);
        Room(bytes)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        let _ = SPARE_ROOM.try_with(|spare| spare.set(bytes));
    }
}

/// Receives one message and its descriptors (close-on-exec).
///
/// # Errors
/// See [`PacketError`]. Descriptors of a packet that is refused are closed.
pub fn receive<M: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(M, Vec<OwnedFd>), PacketError> {
    let mut text = Room::take();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut reset = false;
    let received = loop {
        let mut slices = [IoSliceMut::new(&mut text.0)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            // A peer that closed without reading everything raises this once, before its last
            // words.
            Err(Errno::CONNRESET) if !reset => reset = true,
            Err(Errno::CONNRESET) => return Err(PacketError::Closed),
            Err(error) => return Err(error.into()),
        }
    };
    let fds = take_descriptors(&mut ancillary);
    let is_cut = received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if is_cut || fds.len() > MAX_MESSAGE_FDS {
        return Err(PacketError::Truncated);
    }
    if received.bytes == 0 {
        return Err(PacketError::Closed);
    }
    Ok((serde_json::from_slice(&text.0[..received.bytes])?, fds))
}

/// Throws away a packet that waits, with its descriptors, without waiting for one. False if there
/// was none, or an empty one.
///
/// # Errors
/// `EAGAIN` when there is none now, or another failure of `recvmsg`.
pub fn discard(socket: BorrowedFd<'_>) -> Result<bool, PacketError> {
    let mut scrap = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut slices = [IoSliceMut::new(&mut scrap)];
    let received = recvmsg(socket, &mut slices, &mut ancillary, flags)?;
    let fds = take_descriptors(&mut ancillary);
    Ok(received.bytes > 0 || !fds.is_empty())
}

/// Takes descriptors in so that closing them does not wait: a peer can pass a connected socket with
/// `SO_LINGER` set and unread data, and close its own; the last one to close it, which is then this
/// process, would sleep until the lingering ends.
fn take_descriptors(ancillary: &mut RecvAncillaryBuffer<'_>) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    for fd in &fds {
        // Fails for whatever is no socket, as it should be.
        let _ = set_socket_linger(fd, None);
    }
    fds
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::control::ClientMessage;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (left, right) = pair();
        let message = ClientMessage::Unregister {
            seq: 1,
            registration: 2,
        };
        send(left.as_fd(), &message, &[left.as_fd(), right.as_fd()]).unwrap();
        let (back, fds): (ClientMessage, _) = receive(right.as_fd()).unwrap();
        assert_eq!(back, message);
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn garbage_is_refused_and_a_closed_peer_is_seen() {
        let (left, right) = pair();
        rustix::io::write(&left, b"{]").unwrap();
        let garbage = receive::<ClientMessage>(right.as_fd());
        assert!(matches!(garbage, Err(PacketError::Malformed(_))));
        drop(left);
        assert!(matches!(
            receive::<ClientMessage>(right.as_fd()),
            Err(PacketError::Closed)
        ));
    }

    #[test]
    fn the_last_words_of_a_peer_that_did_not_listen_are_heard() {
        let (left, right) = pair();
        let message = ClientMessage::Unregister {
            seq: 1,
            registration: 2,
        };
        send(right.as_fd(), &message, &[]).unwrap();
        send(left.as_fd(), &message, &[]).unwrap();
        drop(left);
        let (back, _): (ClientMessage, _) = receive(right.as_fd()).unwrap();
        assert_eq!(back, message);
        assert!(matches!(
            receive::<ClientMessage>(right.as_fd()),
            Err(PacketError::Closed)
        ));
    }

    /// A TCP socket whose closing waits half a minute for a peer that does not read.
    fn lingering() -> (
        std::net::TcpListener,
        std::net::TcpStream,
        std::net::TcpStream,
    ) {
        use std::io::Write;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let linger = Some(std::time::Duration::from_secs(30));
        rustix::net::sockopt::set_socket_linger(&near, linger).unwrap();
        near.set_nonblocking(true).unwrap();
        while near.write(&[0; 65536]).is_ok() {}
        (listener, near, far)
    }

    #[test]
    fn sockets_that_linger_do_not_hold_up_whoever_receives_them() {
        let message = ClientMessage::Unregister {
            seq: 1,
            registration: 2,
        };
        for (count, is_wanted) in [(1, true), (MAX_MESSAGE_FDS + 1, true), (1, false)] {
            let (left, right) = pair();
            let (_listener, near, _far) = lingering();
            let text = serde_json::to_vec(&message).unwrap();
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS + 1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = vec![near.as_fd(); count];
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(
                &left,
                &[IoSlice::new(&text)],
                &mut ancillary,
                SendFlags::empty(),
            )
            .unwrap();
            drop(near);
            let begun = std::time::Instant::now();
            if is_wanted {
                let received = receive::<ClientMessage>(right.as_fd());
                assert_eq!(received.is_ok(), count <= MAX_MESSAGE_FDS);
            } else {
                assert!(discard(right.as_fd()).unwrap());
                assert!(discard(right.as_fd()).unwrap_err().would_block());
            }
            let took = begun.elapsed();
            assert!(took.as_secs() < 5, "{count} descriptors: {took:?}");
        }
    }

    #[test]
    fn a_message_beyond_the_limit_is_refused_before_it_is_sent() {
        let (left, _right) = pair();
        let long = "x".repeat(MAX_MESSAGE_BYTES);
        assert!(matches!(
            send(left.as_fd(), &long, &[]),
            Err(PacketError::TooLong { .. })
        ));
    }
}
