//! The descriptors a client sleeps on.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pegaflow_shm::bell::BellListener;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::{Errno, read, write};

use crate::Error;

/// An eventfd of this process only.
#[derive(Debug)]
pub(crate) struct Event {
    fd: OwnedFd,
}

impl Event {
    pub(crate) fn new() -> Result<Event, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| Error::system("eventfd", errno))?;
        Ok(Event { fd })
    }

    /// Makes it readable.
    pub(crate) fn signal(&self) {
        // It can only fail when it is readable as can be.
        let _ = write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable; true if it was readable.
    pub(crate) fn clear(&self) -> bool {
        let mut count = [0; 8];
        loop {
            match read(&self.fd, &mut count) {
                Err(Errno::INTR) => {}
                other => return other.is_ok(),
            }
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All of a client's descriptors that outlive a session.
#[derive(Debug)]
pub(crate) struct Events {
    /// What the engine's event loop watches: the session's bell and `local`.
    pub(crate) epoll: OwnedFd,
    /// Completions are ready that no bell announces.
    pub(crate) local: Event,
    /// The thread that waits on the bell for all others has to look up.
    pub(crate) leader: Event,
    /// The keeper has to look up.
    pub(crate) keeper: Event,
    /// The client closes; never cleared.
    pub(crate) stop: Event,
}

impl Events {
    pub(crate) fn new() -> Result<Events, Error> {
        let failed = |errno| Error::system("epoll_create1", errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let events = Events {
            epoll,
            local: Event::new()?,
            leader: Event::new()?,
            keeper: Event::new()?,
            stop: Event::new()?,
        };
        events.add(events.local.as_fd())?;
        Ok(events)
    }

    /// Watches a session's bell.
    pub(crate) fn watch(&self, bell: &BellListener) -> Result<(), Error> {
        self.add(bell.as_fd())
    }

    /// Stops watching it: the bell of a lost session is readable for ever.
    pub(crate) fn unwatch(&self, bell: &BellListener) {
        // It may have been taken out already.
        let _ = epoll::delete(&self.epoll, bell.as_fd());
    }

    fn add(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)
            .map_err(|errno| Error::system("epoll_ctl", errno))
    }
}
