//! Who is at the other end of a connection, by the kernel's word.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno as NixErrno;
use nix::sys::socket::{getsockopt, sockopt};
use pegaflow_shm::status::Status;
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use crate::config::Config;
use crate::lane::api::Refusal;

/// Users that may connect.
#[derive(Clone, Debug)]
pub struct AllowList(Vec<u32>);

impl AllowList {
    /// The daemon's own user, root, and those of `--allow-uid`.
    pub fn of(config: &Config) -> AllowList {
        let mut uids = config.allow_uid.clone();
        uids.extend([0, geteuid().as_raw()]);
        AllowList(uids)
    }

    /// Exactly these users.
    pub fn only(uids: impl Into<Vec<u32>>) -> AllowList {
        AllowList(uids.into())
    }

    /// Whether this user may connect.
    pub fn contains(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }
}

/// A connected process.
#[derive(Debug)]
pub struct Peer {
    /// Its id in the daemon's process namespace.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Becomes readable when it ends.
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Asks the kernel, and refuses users that are not on the list.
    ///
    /// # Errors
    /// What to tell the client.
    pub fn identify(socket: BorrowedFd<'_>, allowed: &AllowList) -> Result<Peer, Refusal> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)
            .map_err(|errno| system("getsockopt(SO_PEERCRED)", errno))?;
        let (pid, uid) = (credentials.pid(), credentials.uid());
        if !allowed.contains(uid) {
            return Err(Refusal::new(
                Status::PermissionDenied,
                format!("user {uid} may not connect: start pegaflowd with --allow-uid {uid}"),
            ));
        }
        let Some(known) = Pid::from_raw(pid).filter(|_| pid > 0) else {
            return Err(Refusal::new(
                Status::SystemError,
                "the daemon cannot see your process: let its container share the host's process \
                 namespace (hostPID)",
            ));
        };
        // The socket's own pidfd cannot be another process that got the id meanwhile; kernels
        // before 6.5 do not have it.
        let pidfd = match getsockopt(&socket, sockopt::PeerPidfd) {
            Ok(pidfd) => pidfd,
            Err(NixErrno::ENOPROTOOPT) => pidfd_open(known, PidfdFlags::empty())
                .map_err(|errno| system("pidfd_open", NixErrno::from_raw(errno.raw_os_error())))?,
            Err(errno) => return Err(system("getsockopt(SO_PEERPIDFD)", errno)),
        };
        Ok(Peer { pid, uid, pidfd })
    }
}

fn system(call: &str, errno: NixErrno) -> Refusal {
    Refusal::new(
        Status::SystemError,
        format!("{call} for your connection failed: {errno}"),
    )
}

/// True if the process has ended or is about to: a process that dies closes its sockets before its
/// pidfd becomes readable, but after the kernel has marked it as exiting.
pub(super) fn is_exiting(pid: i32) -> bool {
    const PF_EXITING: u64 = 0x4;
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    // The name, in parentheses, may hold anything; flags are the seventh field behind it.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut fields = fields.split_whitespace();
    let dead = matches!(fields.next(), Some("Z" | "X" | "x"));
    let flags = fields
        .nth(5)
        .and_then(|field| field.parse::<u64>().ok())
        .unwrap_or(0);
    dead || flags & PF_EXITING != 0
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_is_known_by_user_and_process() {
        let (left, _right) = UnixStream::pair().unwrap();
        let own = geteuid().as_raw();
        let peer = Peer::identify(left.as_fd(), &AllowList::of(&Config::default())).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id() as i32, own));
    }

    #[test]
    fn a_user_off_the_list_is_told_the_flag() {
        let (left, _right) = UnixStream::pair().unwrap();
        let refusal = Peer::identify(left.as_fd(), &AllowList::only([4242])).unwrap_err();
        assert_eq!(refusal.status, Status::PermissionDenied);
        let uid = geteuid().as_raw();
        assert!(
            refusal.message.contains(&format!("--allow-uid {uid}")),
            "{refusal}"
        );
    }

    #[test]
    fn this_process_is_not_exiting_and_a_reaped_one_is() {
        assert!(!is_exiting(std::process::id() as i32));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        assert!(is_exiting(pid));
    }
}
