//! The few system calls about processes that have no safe wrapper.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Descriptors that are closed for an autostarted daemon where the kernel cannot close them all.
const MOST_DESCRIPTORS: libc::c_int = 65_536;

/// Raised in each forked child, so that a client can tell cheaply that it is not its own process.
static FORKS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Remembers the process it was made in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HomeProcess {
    forks: u32,
    pid: u32,
}

impl HomeProcess {
    /// This process.
    pub(crate) fn here() -> HomeProcess {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            // SAFETY: the hook only adds to an atomic, which is allowed in the child of a process
            // with threads. Should it not be installed for want of memory, forks go undetected.
            unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
        });
        HomeProcess {
            forks: FORKS.load(Ordering::Relaxed),
            pid: std::process::id(),
        }
    }

    /// True in the process that made this, false in its forks. One load.
    #[inline]
    pub(crate) fn is_here(self) -> bool {
        FORKS.load(Ordering::Relaxed) == self.forks
    }

    /// Process id.
    pub(crate) fn pid(self) -> u32 {
        self.pid
    }
}

/// Runs `start` with all signals blocked, so that a thread it makes never runs the engine's signal
/// handlers.
pub(crate) fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are plain data that the calls fill before they are read.
    let saved = unsafe {
        let mut all = std::mem::zeroed();
        let mut saved = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut saved);
        saved
    };
    let result = start();
    // SAFETY: `saved` was filled above by the same thread.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &saved, std::ptr::null_mut()) };
    result
}

/// Lets `pid` read and write this process's memory where Yama (`ptrace_scope` 1) would refuse it. A
/// kernel without Yama refuses the call and needs none.
pub(crate) fn allow_tracer(pid: u32) {
    // SAFETY: takes a number and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::c_ulong::from(pid), 0, 0, 0) };
}

/// Makes the command the leader of a session of its own, so that it outlives this one's terminal
/// and gets none of its signals. Of this process's descriptors it gets its standard ones only: a
/// daemon that outlives the engine must not keep the engine's sockets and files open.
///
/// The child of this process is one that waits for the command and ends as it does. Once the child
/// is killed, the command is nobody's here: engines that end kill all that descends from them.
pub(crate) fn detach(command: &mut Command) {
    let start = || {
        own_session()?;
        // SAFETY: takes nothing; the child of a process with threads makes async-signal-safe calls
        // only, here and until it executes the command.
        match unsafe { libc::fork() } {
            0 => own_session()?,
            command if command > 0 => wait_in_its_place(command),
            _ => return Err(io::Error::last_os_error()),
        }
        // SAFETY: the set is plain data that `sigemptyset` fills; both calls are
        // async-signal-safe. A blocked signal would otherwise stay blocked in the daemon.
        unsafe {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        }
        close_on_exec();
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and allocates nothing.
    unsafe { command.pre_exec(start) };
}

/// Leaves the session that this process is in. Async-signal-safe.
fn own_session() -> io::Result<()> {
    // SAFETY: takes nothing, and is async-signal-safe.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ends this process when its child does, in the same way. Async-signal-safe.
fn wait_in_its_place(child: libc::pid_t) -> ! {
    // The pipe that tells whoever spawns of the `exec` among them: it would never end.
    for_descriptors(0, |fd| {
        // SAFETY: this process uses none of its descriptors any more.
        unsafe { libc::close(fd) };
    });
    let mut status = 0;
    // SAFETY: `status` is a valid place for the call to fill.
    while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            break;
        }
    }
    let code = if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    };
    // SAFETY: ends this process at once, without the engine's handlers.
    unsafe { libc::_exit(code) }
}

/// Marks every descriptor but the standard three to be closed by `exec`. Async-signal-safe.
fn close_on_exec() {
    for_descriptors(libc::CLOSE_RANGE_CLOEXEC, |fd| {
        // SAFETY: takes numbers only; a descriptor that is not open gives an error and no more.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    });
}

/// Does to every descriptor but the standard three what `flag` tells the kernel to, or where it
/// cannot do all of them, what `one` does to one. Async-signal-safe if that is.
fn for_descriptors(flag: libc::c_uint, one: impl Fn(libc::c_int)) {
    let (first, last) = (3 as libc::c_uint, libc::c_uint::MAX);
    // SAFETY: takes numbers and touches no memory of ours. Descriptors are closed (flag 0) only by
    // `wait_in_its_place`, which uses none any more.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, flag) } == 0 {
        return;
    }
    // A filter on system calls may not know this one yet: one by one then, as far as is sensible.
    for fd in 3..MOST_DESCRIPTORS {
        one(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_is_not_home() {
        let home = HomeProcess::here();
        assert!(home.is_here());
        // SAFETY: the child looks at an atomic and exits without running anything else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let code = i32::from(home.is_here());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: `status` is a valid place, `child` is a child of this process.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(libc::WEXITSTATUS(status), 0);
        assert!(home.is_here());
    }

    #[test]
    fn signals_are_blocked_inside_and_as_before_outside() {
        let blocked = || {
            // SAFETY: the set is plain data that the call fills.
            unsafe {
                let mut now = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut now);
                libc::sigismember(&now, libc::SIGUSR1) == 1
            }
        };
        assert!(!blocked());
        assert!(without_signals(blocked));
        assert!(!blocked());
    }
}
