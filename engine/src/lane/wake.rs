//! Waking the lane: an eventfd that only this process knows.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pegaflow_shm::sync::{AtomicBool, Ordering, fence};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Shared by the lane and everything in the daemon that hands it work.
pub struct LaneWake {
    fd: OwnedFd,
    parked: AtomicBool,
}

impl LaneWake {
    /// An awake lane's wake-up.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new() -> Result<LaneWake, Errno> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(LaneWake {
            fd,
            parked: AtomicBool::new(false),
        })
    }

    /// Wakes the lane whether it sleeps or not; what was handed over before is then seen.
    pub fn wake(&self) {
        // A full counter means that it has been rung and not yet looked: nothing is lost.
        if let Err(error) = rustix::io::write(&self.fd, &1u64.to_ne_bytes())
            && error != Errno::AGAIN
        {
            tracing::error!(%error, "the lane cannot be woken");
        }
    }

    /// Wakes the lane if it sleeps. The caller has put a full fence behind what it handed over.
    pub fn wake_if_parked(&self) {
        if self.parked.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    /// The lane announces that it is about to sleep; it must look for work once more after this.
    pub(super) fn park(&self) {
        self.parked.store(true, Ordering::Relaxed);
        // SYNC: copy-done. Pairs with the copy threads' fence before `wake_if_parked`.
        fence(Ordering::SeqCst);
    }

    /// The lane is awake.
    pub(super) fn unpark(&self) {
        self.parked.store(false, Ordering::Relaxed);
        let mut count = [0u8; 8];
        match rustix::io::read(&self.fd, &mut count) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "the lane's wake-up cannot be read"),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
