//! The session socket, non-blocking, with a deadline on everything.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use pegaflow_shm::control::{ClientMessage, DaemonMessage};
use pegaflow_shm::seqpacket::{self, PacketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with, sockopt,
};

use crate::Error;
use crate::client::Event;
use crate::shared::timespec;

/// First and longest pause between attempts while the daemon's queue of connections is full.
const BACKLOG_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// How long a call may wait, and what ends it before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound<'a> {
    since: Instant,
    deadline: Instant,
    stop: Option<&'a Event>,
}

impl Bound<'_> {
    /// Until a deadline.
    pub(crate) fn until(deadline: Instant) -> Bound<'static> {
        Bound {
            since: Instant::now(),
            deadline,
            stop: None,
        }
    }

    /// Not at all.
    pub(crate) fn now() -> Bound<'static> {
        Bound::until(Instant::now())
    }

    /// For a time, or until the event is signalled.
    pub(crate) fn unless(stop: &Event, time: Duration) -> Bound<'_> {
        let since = Instant::now();
        Bound {
            since,
            deadline: since + time,
            stop: Some(stop),
        }
    }

    fn ran_out(&self, what: &'static str) -> Error {
        Error::Timeout {
            what,
            bound: self.deadline.saturating_duration_since(self.since),
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits for the descriptor, if there is one, at most for `most`.
    fn wait(&self, watched: Option<(BorrowedFd<'_>, PollFlags)>, most: Duration) -> Wait {
        let limit = timespec(self.left().min(most));
        let stop = self.stop.map(|stop| (stop.as_fd(), PollFlags::IN));
        let mut fds: Vec<PollFd<'_>> = [stop, watched]
            .iter()
            .flatten()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Wait::Failed(errno),
        }
        if self.stop.is_some() && !fds[0].revents().is_empty() {
            return Wait::Stopped;
        }
        Wait::LookAgain
    }
}

enum Wait {
    LookAgain,
    Stopped,
    Failed(Errno),
}

impl Wait {
    fn check(self) -> Result<(), Error> {
        match self {
            Wait::LookAgain => Ok(()),
            Wait::Stopped => Err(Error::Disconnected {
                reason: "this client disconnects".into(),
            }),
            Wait::Failed(errno) => Err(Error::system("poll", errno)),
        }
    }
}

/// A connected session socket.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

/// Why no connection came about.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// Nobody listens there: the file is missing, or its owner is gone.
    NobodyListens(Errno),
    /// Anything else.
    Failed(Error),
}

impl Channel {
    /// Connects to the daemon's socket.
    pub(crate) fn connect(path: &Path, bound: Bound<'_>) -> Result<Channel, ConnectError> {
        let failed = |errno: Errno| ConnectError::Failed(Error::system("connect", errno));
        let address = address(path).map_err(ConnectError::Failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).map_err(failed)?;
        let (mut pause, longest) = BACKLOG_PAUSES;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Ok(Channel { socket }),
                Err(Errno::INTR) => {}
                Err(errno @ (Errno::NOENT | Errno::CONNREFUSED | Errno::NOTDIR)) => {
                    return Err(ConnectError::NobodyListens(errno));
                }
                Err(Errno::AGAIN) if !bound.left().is_zero() => {
                    bound
                        .wait(None, pause)
                        .check()
                        .map_err(ConnectError::Failed)?;
                    pause = (pause * 2).min(longest);
                }
                Err(Errno::AGAIN) => {
                    let what = "the daemon's queue of connections";
                    return Err(ConnectError::Failed(bound.ran_out(what)));
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Process and user at the other end; the process is 0 where this namespace does not show it.
    pub(crate) fn peer(&self) -> Result<(u32, u32), Error> {
        let credentials = sockopt::socket_peercred(&self.socket)
            .map_err(|errno| Error::system("getsockopt(SO_PEERCRED)", errno))?;
        let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).unwrap_or(0);
        Ok((pid, credentials.uid.as_raw()))
    }

    /// Sends one message before the deadline.
    pub(crate) fn send(
        &self,
        message: &ClientMessage,
        fds: &[BorrowedFd<'_>],
        bound: Bound<'_>,
    ) -> Result<(), Error> {
        loop {
            match seqpacket::send(self.socket.as_fd(), message, fds) {
                Err(error) if error.would_block() => {
                    self.await_socket(PollFlags::OUT, "sending to the daemon", bound)?;
                }
                other => return other.map_err(from_packet),
            }
        }
    }

    /// Receives one message before the deadline.
    pub(crate) fn receive(&self, bound: Bound<'_>) -> Result<(DaemonMessage, Vec<OwnedFd>), Error> {
        loop {
            match self.try_receive()? {
                Some(received) => return Ok(received),
                None => self.await_socket(PollFlags::IN, "the daemon's answer", bound)?,
            }
        }
    }

    /// Receives one message if there is one now.
    pub(crate) fn try_receive(&self) -> Result<Option<(DaemonMessage, Vec<OwnedFd>)>, Error> {
        match seqpacket::receive(self.socket.as_fd()) {
            Ok(received) => Ok(Some(received)),
            Err(error) if error.would_block() => Ok(None),
            Err(error) => Err(from_packet(error)),
        }
    }

    /// Ends the connection for both sides, whoever still holds the socket.
    pub(crate) fn shut_down(&self) {
        // It may be over already; then there is nothing to do.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Ends the connection in good order: says that nothing more comes, and takes what does come
    /// until the daemon has closed its end too. Gives up at the deadline.
    ///
    /// The daemon tells a client that left from one that died by whether the process still lives
    /// when it sees the end of the socket; a process that ends right after this has left.
    pub(crate) fn take_leave(&self, deadline: Instant) {
        let bound = Bound::until(deadline);
        if shutdown(&self.socket, Shutdown::Write).is_err() {
            return;
        }
        while Instant::now() < deadline && self.receive(bound).is_ok() {}
    }

    fn await_socket(
        &self,
        flags: PollFlags,
        what: &'static str,
        bound: Bound<'_>,
    ) -> Result<(), Error> {
        if bound.left().is_zero() {
            return Err(bound.ran_out(what));
        }
        let socket = Some((self.socket.as_fd(), flags));
        bound.wait(socket, Duration::MAX).check()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The address of a socket's path.
pub(crate) fn address(path: &Path) -> Result<SocketAddrUnix, Error> {
    SocketAddrUnix::new(path).map_err(|_| {
        let value = path.display().to_string();
        Error::argument("socket", value, "use a path of < 108 bytes")
    })
}

/// Whether a message fits a packet at all.
pub(crate) fn check_length(message: &ClientMessage) -> Result<(), Error> {
    seqpacket::check_length(message).map_err(from_packet)
}

fn from_packet(error: PacketError) -> Error {
    match error {
        PacketError::Io(errno) => Error::system("session socket", errno),
        PacketError::Closed => Error::Disconnected {
            reason: "the daemon closed the socket".into(),
        },
        PacketError::TooLong { bytes } => {
            let way_out = "register fewer or shorter segments and texts";
            Error::argument("message", format!("{bytes} bytes"), way_out)
        }
        PacketError::Truncated | PacketError::Malformed(_) => Error::Protocol(error.to_string()),
    }
}
