//! Checks of the daemons on this machine.

#![forbid(unsafe_code)]

use std::path::Path;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Check;
use crate::node::{Liveness, NodePlace, NodeView};
use crate::output::size;

/// Connects to a session socket and hangs up.
pub fn try_connect(path: &Path) -> Result<(), Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    connect(&socket, &address)
}

/// Whether the node's daemon answers.
pub fn daemon(place: &NodePlace, socket: &Path) -> Check {
    let name = "daemon";
    let state = NodeView::open(place).map(|view| (view.liveness(), view.header.pid));
    match (try_connect(socket), state) {
        (Ok(()), Ok((_, pid))) => Check::ok(
            name,
            format!(
                "node `{}`, pid {pid}, accepts at {}",
                place.node,
                socket.display()
            ),
        ),
        (Ok(()), Err(error)) => Check::warn(
            name,
            format!("{} accepts, but {error}", socket.display()),
            "the socket belongs to another node: name both --node and --socket",
        ),
        (Err(Errno::ACCESS), _) => Check::fail(
            name,
            format!("{}: permission denied", socket.display()),
            "run as the daemon's user, or start it with --allow-uid and a socket folder you can enter",
        ),
        (Err(errno), Ok((Liveness::Alive, pid))) => Check::fail(
            name,
            format!("pid {pid} lives, but {}: {errno}", socket.display()),
            "give the daemon's socket with --socket; see pegactl status for the one it uses",
        ),
        (Err(errno), _) => Check::warn(
            name,
            format!(
                "none for node `{}` ({}: {errno})",
                place.node,
                socket.display()
            ),
            "start pegaflowd, or let the library do so with PEGAFLOW_AUTOSTART=1",
        ),
    }
}

fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .filter(std::fs::Metadata::is_file)
        .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
        .sum()
}

/// Folders whose daemon is dead: their memory stays taken until a daemon of that name starts.
pub fn stale(place: &NodePlace) -> Check {
    let name = "stale nodes";
    let mut stale = Vec::new();
    for node in place.all_nodes() {
        let one = NodePlace {
            node: node.clone(),
            shm_dir: place.shm_dir.clone(),
        };
        let dead = NodeView::open(&one).is_ok_and(|view| view.liveness() == Liveness::Dead);
        if dead {
            stale.push(format!("{node} ({})", size(bytes_below(&one.dir()))));
        }
    }
    if stale.is_empty() {
        return Check::ok(name, "none");
    }
    Check::warn(
        name,
        format!("no daemon runs, memory still taken: {}", stale.join(", ")),
        format!(
            "start pegaflowd --node NAME to adopt the cache, or remove {}/NAME",
            place.shm_dir.display()
        ),
    )
}
