//! Who is at the other end of a connection, by the kernel's word.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno as NixErrno;
use nix::sys::socket::{getsockopt, sockopt};
use pegaflow_shm::status::Status;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::isolation::peer_groups::peer_groups;
use crate::isolation::{Credentials, DomainRules, IsolationDomain};
use crate::lane::api::Refusal;

/// A connected process.
#[derive(Debug)]
pub struct Peer {
    /// Its id in the daemon's process namespace.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its isolation domain, which does not change while it is connected.
    pub domain: Arc<IsolationDomain>,
    /// Becomes readable when it ends.
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Asks the kernel, and refuses users whom no rule admits.
    ///
    /// # Errors
    /// What to tell the client.
    pub fn identify(socket: BorrowedFd<'_>, rules: &DomainRules) -> Result<Peer, Refusal> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)
            .map_err(|errno| system("getsockopt(SO_PEERCRED)", errno))?;
        let (pid, uid) = (credentials.pid(), credentials.uid());
        let mut gids = vec![credentials.gid()];
        gids.extend(peer_groups(socket).map_err(|error| {
            let errno = error
                .raw_os_error()
                .map_or(NixErrno::EIO, NixErrno::from_raw);
            system("getsockopt(SO_PEERGROUPS)", errno)
        })?);
        let domain = rules
            .domain_of(&Credentials { uid, gids })
            .map_err(|error| Refusal::new(Status::PermissionDenied, error.to_string()))?;
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
        Ok(Peer {
            pid,
            uid,
            domain,
            pidfd,
        })
    }

    /// Namespaces that matter to shared GPU memory and in which the process is apart from the
    /// daemon, as far as they can be seen.
    pub(super) fn foreign_namespaces(&self) -> Vec<&'static str> {
        let link =
            |process: &str, kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
        let is_foreign = |kind: &&str| {
            let theirs = link(&self.pid.to_string(), kind);
            theirs.is_some_and(|theirs| link("self", kind).is_some_and(|own| own != theirs))
        };
        ["ipc", "pid", "user"]
            .into_iter()
            .filter(is_foreign)
            .collect()
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

    use rustix::process::geteuid;

    use super::*;
    use crate::config::Config;

    #[test]
    fn a_peer_is_known_by_user_and_process() {
        let (left, _right) = UnixStream::pair().unwrap();
        let own = geteuid().as_raw();
        let rules = DomainRules::of(&Config::default());
        let peer = Peer::identify(left.as_fd(), &rules).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id() as i32, own));
        assert_eq!(peer.domain.name(), format!("uid-{own}"));
        assert!(peer.foreign_namespaces().is_empty());
    }

    #[test]
    fn a_user_off_the_list_is_told_the_flag() {
        let (left, _right) = UnixStream::pair().unwrap();
        let refusal = Peer::identify(left.as_fd(), &DomainRules::only([4242])).unwrap_err();
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
