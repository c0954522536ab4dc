//! The connected socket of a session on the runtime: receive one message, send without ever
//! waiting.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pegaflow_shm::control::DaemonMessage;
use pegaflow_shm::seqpacket::{self, PacketError};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::watch::watch;

/// Messages that wait for a client to read; one more, and its session ends.
pub const MAX_WAITING_MESSAGES: usize = 64;
/// Longest reason in a message to a client.
pub(crate) const MAX_REASON_BYTES: usize = 8 * 1024;
/// Empty packets looked through when a session ends; a client's socket buffer holds fewer.
const MAX_EMPTY_PACKETS: usize = 1024;

/// The client does not read its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WAITING_MESSAGES} messages wait for the client to read its socket")]
pub struct Overflow;

/// A connected session socket.
pub(super) struct PacketSocket {
    fd: AsyncFd<OwnedFd>,
    waiting: VecDeque<DaemonMessage>,
}

impl PacketSocket {
    pub(super) fn new(fd: OwnedFd) -> io::Result<PacketSocket> {
        let fd = watch(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(PacketSocket {
            fd,
            waiting: VecDeque::new(),
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// The next message. Nothing is lost when the future is dropped.
    pub(super) async fn receive<M: DeserializeOwned>(
        &self,
    ) -> Result<(M, Vec<OwnedFd>), PacketError> {
        loop {
            let mut ready = self.fd.readable().await.map_err(runtime_gone)?;
            match seqpacket::receive(self.as_fd()) {
                Err(error) if error.would_block() => ready.clear_ready(),
                other => return other,
            }
        }
    }

    /// Sends a message with descriptors now; for the first message, when the socket is empty.
    pub(super) fn send_now(
        &self,
        message: DaemonMessage,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PacketError> {
        seqpacket::send(self.as_fd(), &bounded(message), fds)
    }

    /// Sends a message, or keeps it until the client has read others.
    pub(super) fn send(&mut self, message: DaemonMessage) -> Result<(), Overflow> {
        if self.waiting.len() >= MAX_WAITING_MESSAGES {
            return Err(Overflow);
        }
        self.waiting.push_back(bounded(message));
        self.flush();
        Ok(())
    }

    /// True while messages wait.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Waits until the client may have read something; then [`Self::flush`]. Only while messages
    /// wait.
    pub(super) async fn writable(&self) {
        // An error here is one of the runtime; the next send or receive says what.
        let _ = self.fd.writable().await;
    }

    /// Sends what the socket takes. A socket that is closed takes everything: the reading side says
    /// so.
    pub(super) fn flush(&mut self) {
        while let Some(message) = self.waiting.front() {
            match seqpacket::send(self.as_fd(), message, &[]) {
                Err(error) if error.would_block() => {
                    // Tells the runtime, so that `writable` waits for the client to read.
                    let full: io::Result<()> = self.fd.try_io(Interest::WRITABLE, |_| {
                        Err(io::ErrorKind::WouldBlock.into())
                    });
                    debug_assert!(full.is_err());
                    return;
                }
                Ok(()) | Err(PacketError::Closed) => {}
                Err(error) => tracing::debug!(%error, "a message to a client is lost"),
            }
            self.waiting.pop_front();
        }
    }

    /// Closes so that the client can still read what was sent: a socket closed with unread packets
    /// would give it a connection reset first.
    pub(super) fn close(self) {
        let fd = self.fd.into_inner();
        if shutdown(&fd, Shutdown::Read).is_err() {
            return;
        }
        // Nobody can send any more. An empty packet looks like the end, and descriptors behind it
        // must not be left to the kernel, whose closing may wait: so look further.
        let mut nothings = 0;
        while nothings < MAX_EMPTY_PACKETS {
            match seqpacket::discard(fd.as_fd()) {
                Ok(true) => {}
                Ok(false) => nothings += 1,
                Err(_) => return,
            }
        }
    }
}

/// Cuts the reason that a message gives to [`MAX_REASON_BYTES`]: it may quote what the client sent,
/// and an answer that does not fit a packet would not arrive at all.
pub(crate) fn bounded(mut message: DaemonMessage) -> DaemonMessage {
    if let DaemonMessage::Refused { message: text, .. }
    | DaemonMessage::Failed { message: text, .. }
    | DaemonMessage::Closing { message: text, .. } = &mut message
        && text.len() > MAX_REASON_BYTES
    {
        text.truncate(text.floor_char_boundary(MAX_REASON_BYTES));
        text.push('…');
    }
    message
}

fn runtime_gone(error: io::Error) -> PacketError {
    PacketError::Io(
        error
            .raw_os_error()
            .map_or(Errno::IO, Errno::from_raw_os_error),
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use pegaflow_shm::control::{ClientMessage, MAX_MESSAGE_BYTES};
    use pegaflow_shm::status::Status;
    use rustix::net::{
        AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair, sockopt,
    };

    use super::*;

    /// The last holder of the second socket waits half a minute when it closes it.
    fn lingering() -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        sockopt::set_socket_linger(&near, Some(Duration::from_secs(30))).unwrap();
        near.set_nonblocking(true).unwrap();
        while near.write(&[0; 65536]).is_ok() {}
        (listener, near, far)
    }

    #[test]
    fn a_reason_that_quotes_a_whole_packet_still_fits_one() {
        let most = seqpacket_text(&bounded(DaemonMessage::Refused {
            status: Status::VersionMismatch,
            message: "\u{1}".repeat(MAX_MESSAGE_BYTES),
        }));
        assert!(most.len() <= MAX_MESSAGE_BYTES);
        let short = DaemonMessage::Closing {
            status: Status::ProtocolError,
            message: "ä".repeat(MAX_REASON_BYTES / 2),
        };
        assert_eq!(bounded(short.clone()), short);
        let message = "ä".repeat(MAX_REASON_BYTES);
        let cut = bounded(DaemonMessage::Failed {
            seq: 1,
            status: Status::BadLayout,
            message,
        });
        assert!(seqpacket_text(&cut).ends_with("ä…\"}"));
    }

    fn seqpacket_text(message: &DaemonMessage) -> String {
        serde_json::to_string(message).unwrap()
    }

    #[tokio::test]
    async fn descriptors_that_nobody_took_do_not_hold_up_the_end_of_a_connection() {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let (_listener, near, _far) = lingering();
        send(&theirs, &[], SendFlags::NOSIGNAL).unwrap();
        let message = ClientMessage::Unregister {
            seq: 1,
            registration: 2,
        };
        seqpacket::send(theirs.as_fd(), &message, &[near.as_fd()]).unwrap();
        drop(near);
        let socket = PacketSocket::new(ours).unwrap();
        let begun = Instant::now();
        socket.close();
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
