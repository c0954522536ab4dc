//! The descriptors behind a doorbell.
//!
//! Client to daemon: an eventfd, which the daemon watches edge-triggered and never reads. Daemon to
//! client: a pipe, whose write end only the daemon holds; the non-blocking flag of an eventfd would
//! be shared with the client, who could clear it and make the daemon's write block.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, read, write};
use rustix::pipe::{PipeFlags, pipe_with};
use thiserror::Error;

/// What ringing came to; either way the peer's descriptor is readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// The descriptor was rung.
    Now,
    /// It could take no more rings: the peer has plenty to wake up to.
    Already,
}

/// Why a doorbell could not be made, rung or waited for.
#[derive(Debug, Error)]
pub enum BellError {
    /// Nobody can hear it any more: the peer has closed its end.
    #[error("doorbell: the peer has closed its end; close the session")]
    PeerGone,
    /// A system call failed.
    #[error("doorbell: {operation} failed: {source}")]
    Io {
        /// System call.
        operation: &'static str,
        /// Its error.
        source: io::Error,
    },
}

impl BellError {
    fn errno(operation: &'static str, errno: Errno) -> Self {
        Self::Io {
            operation,
            source: errno.into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Eventfd,
    Pipe,
}

/// The end that is rung. Ringing never blocks as long as nobody else clears the descriptor's
/// non-blocking flag: give a pipe's write end to no one.
///
/// A process that rings a pipe must ignore SIGPIPE (Rust programs do from the start).
#[derive(Debug)]
pub struct BellFd {
    fd: OwnedFd,
    kind: Kind,
}

impl BellFd {
    /// A new eventfd, non-blocking. Pass a duplicate to the peer; either side can ring or wait.
    ///
    /// # Errors
    /// No descriptor or no memory.
    pub fn eventfd() -> Result<Self, BellError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| BellError::errno("eventfd", errno))?;
        Ok(Self {
            fd,
            kind: Kind::Eventfd,
        })
    }

    /// A new pipe: the end to ring, and the end to pass to the peer.
    ///
    /// # Errors
    /// No descriptor or no memory.
    pub fn pipe() -> Result<(Self, OwnedFd), BellError> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|errno| BellError::errno("pipe2", errno))?;
        Ok((
            Self {
                fd: writer,
                kind: Kind::Pipe,
            },
            reader,
        ))
    }

    /// The end to ring of an eventfd that came over a socket.
    #[must_use]
    pub fn from_eventfd(fd: OwnedFd) -> Self {
        Self {
            fd,
            kind: Kind::Eventfd,
        }
    }

    /// Makes the peer's descriptor readable. Costs a system call: ask the waker first.
    ///
    /// # Errors
    /// [`BellError::PeerGone`] if a pipe's read end is closed, or another failure of `write`.
    pub fn ring(&self) -> Result<Rung, BellError> {
        let bytes: &[u8] = match self.kind {
            Kind::Eventfd => &1_u64.to_ne_bytes(),
            Kind::Pipe => &[1],
        };
        loop {
            return match write(&self.fd, bytes) {
                Ok(_) => Ok(Rung::Now),
                Err(Errno::AGAIN) => Ok(Rung::Already),
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE) => Err(BellError::PeerGone),
                Err(errno) => Err(BellError::errno("write", errno)),
            };
        }
    }

    /// The descriptor, to keep or pass on.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for BellFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The end that is waited on: a pipe's read end or an eventfd, non-blocking.
#[derive(Debug)]
pub struct BellListener {
    fd: OwnedFd,
}

impl BellListener {
    /// Listens on `fd`.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Sleeps until the bell is rung (true) or `timeout` has passed (false), then takes the rings.
    /// A signal ends the sleep early, as if the time had passed.
    ///
    /// # Errors
    /// [`BellError::PeerGone`] once the ringing end of a pipe is closed, or a failed system call.
    pub fn wait(&self, timeout: Duration) -> Result<bool, BellError> {
        // A duration too long for the kernel's type is cut to what nobody outlives.
        let limit = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => self.drain(),
            Err(errno) => Err(BellError::errno("poll", errno)),
        }
    }

    /// Takes the rings so far, so that the next wait sleeps; true if there were any.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn drain(&self) -> Result<bool, BellError> {
        let mut bytes = [0; 512];
        let mut any = false;
        // A pipe holds 64 KiB by default; what is left after as many reads is left for the next
        // time.
        for _ in 0..128 {
            match read(&self.fd, &mut bytes) {
                // The rings that were taken count; the next call tells about the end.
                Ok(0) if any => return Ok(true),
                Ok(0) => return Err(BellError::PeerGone),
                Ok(count) => {
                    any = true;
                    if count < bytes.len() {
                        return Ok(true);
                    }
                }
                Err(Errno::AGAIN) => return Ok(any),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(BellError::errno("read", errno)),
            }
        }
        Ok(any)
    }
}

impl AsFd for BellListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
#[cfg_attr(miri, allow(unused))]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn a_ring_ends_the_wait_and_is_taken_by_it() {
        let (bell, reader) = BellFd::pipe().unwrap();
        let listener = BellListener::new(reader);
        assert!(!listener.wait(SHORT).unwrap());
        assert_eq!(bell.ring().unwrap(), Rung::Now);
        assert_eq!(bell.ring().unwrap(), Rung::Now);
        assert!(listener.wait(LONG).unwrap());
        assert!(!listener.wait(SHORT).unwrap());
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn an_eventfd_nobody_reads_never_blocks_the_ringer() {
        let bell = BellFd::eventfd().unwrap();
        let full = (u64::MAX - 1).to_ne_bytes();
        write(&bell, &full).unwrap();
        assert_eq!(bell.ring().unwrap(), Rung::Already);
        let listener = BellListener::new(bell.as_fd().try_clone_to_owned().unwrap());
        assert!(listener.wait(LONG).unwrap());
        assert_eq!(bell.ring().unwrap(), Rung::Now);
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn a_full_pipe_never_blocks_the_ringer_and_drains() {
        let (bell, reader) = BellFd::pipe().unwrap();
        let mut rings = 0_u32;
        while bell.ring().unwrap() == Rung::Now {
            rings += 1;
            assert!(rings < 1 << 22, "a pipe is bounded");
        }
        let listener = BellListener::new(reader);
        while listener.drain().unwrap() {}
        assert_eq!(bell.ring().unwrap(), Rung::Now);
        assert!(listener.wait(LONG).unwrap());
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn each_side_learns_that_the_other_is_gone() {
        let (bell, reader) = BellFd::pipe().unwrap();
        drop(reader);
        assert!(matches!(bell.ring(), Err(BellError::PeerGone)));

        let (bell, reader) = BellFd::pipe().unwrap();
        let listener = BellListener::new(reader);
        bell.ring().unwrap();
        drop(bell);
        assert!(listener.wait(LONG).unwrap(), "the last ring is heard");
        assert!(matches!(listener.wait(LONG), Err(BellError::PeerGone)));
    }
}
