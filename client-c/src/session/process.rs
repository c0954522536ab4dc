//! The daemon's process, for what may go on after its socket has ended.
//!
//! The kernel closes a killed process's descriptors one by one: this side can read the end of the
//! socket while the GPU still carries out copies that the daemon had queued. Until the process is
//! gone, memory that such a copy may write must not be called the engine's again. (A daemon that
//! ends a session on purpose lets copies drain first, and says that it ends it.)

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

use crate::shared::timespec;

/// How long a process may take to end after its socket. Longer, and the engine hears of the end all
/// the same: a hang is no answer either.
const BOUND: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 5 });
/// How long it is given where it cannot be watched: in another PID namespace, say.
const UNSEEN: Duration = Duration::from_millis(500);
/// How long a client that disconnects waits for it still: it promises half a second.
const LEAVING: Duration = Duration::from_millis(400);
/// Between looks whether the client disconnects.
const LOOK: Duration = Duration::from_millis(50);

/// The process at the other end of a session.
pub(crate) struct DaemonProcess {
    /// `None` where the kernel shows no process, or it is this very process.
    pidfd: Option<OwnedFd>,
    is_own: bool,
    /// It was told of GPU memory, which it reaches without this process.
    reaches_gpu: AtomicBool,
    #[cfg(test)]
    pretended: std::sync::OnceLock<OwnedFd>,
}

impl DaemonProcess {
    /// The process with this number, 0 for one that is not shown.
    pub(crate) fn new(pid: u32) -> DaemonProcess {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let is_own = pid == Some(getpid());
        let other = pid.filter(|_| !is_own);
        DaemonProcess {
            pidfd: other.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()),
            is_own,
            reaches_gpu: AtomicBool::new(false),
            #[cfg(test)]
            pretended: std::sync::OnceLock::new(),
        }
    }

    /// It is being told of GPU memory.
    pub(crate) fn reaches_gpu(&self) {
        self.reaches_gpu.store(true, Ordering::Relaxed);
    }

    /// Whether copies of GPU memory may still run if it was killed just now, as far as can be seen.
    pub(crate) fn may_copy(&self) -> bool {
        self.reaches_gpu.load(Ordering::Relaxed)
            && self
                .pidfd()
                .is_some_and(|pidfd| !ends_within(pidfd, Duration::ZERO))
    }

    /// Waits until no copy of GPU memory of a killed daemon can run any more, within a bound, and
    /// not for long once the client disconnects. False if that is not known then.
    pub(crate) fn await_end(&self, is_closing: impl Fn() -> bool) -> bool {
        let pidfd = self.pidfd();
        if !self.reaches_gpu.load(Ordering::Relaxed) || (self.is_own && pidfd.is_none()) {
            return true;
        }
        let bound = if pidfd.is_some() { BOUND } else { UNSEEN };
        let (mut until, mut leaves) = (Instant::now() + bound, false);
        while Instant::now() < until {
            match pidfd {
                Some(pidfd) if ends_within(pidfd, LOOK) => return true,
                Some(_) => {}
                None => std::thread::sleep(LOOK),
            }
            if !leaves && is_closing() {
                leaves = true;
                until = until.min(Instant::now() + LEAVING);
            }
        }
        false
    }

    fn pidfd(&self) -> Option<&OwnedFd> {
        #[cfg(test)]
        if let Some(pretended) = self.pretended.get() {
            return Some(pretended);
        }
        self.pidfd.as_ref()
    }

    /// Takes another process for the daemon's.
    #[cfg(test)]
    pub(crate) fn pretend(&self, pid: u32) {
        let other = DaemonProcess::new(pid).pidfd.expect("another process");
        self.pretended.set(other).expect("once");
    }
}

fn ends_within(pidfd: &OwnedFd, time: Duration) -> bool {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(ready) if ready > 0 => return true,
            // Interrupted before: the rest of the time is left.
            _ if left.is_zero() => return false,
            _ => {}
        }
    }
}
