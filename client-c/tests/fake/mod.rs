//! A daemon in the test's own process: small, obliging, and on request rude.
//!
//! It speaks the whole protocol (segments, rings, bells, index, lists in chunks, region and process
//! memory) for one namespace, so that the client and the C examples can be run against it; and it
//! breaks the protocol in the ways that [`Rudeness`] names.

#![allow(dead_code)]

pub mod gpu;
mod serve;
mod store;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pegaflow_shm::BootId;
use pegaflow_shm::control::PROTOCOL_MAX;
use pegaflow_shm::status::Status;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};
use store::Store;

/// How the fake breaks the protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rudeness {
    #[default]
    None,
    /// Refuses each session with this status.
    Refuse(Status),
    /// Answers Hello in a protocol version that nobody speaks.
    FutureProtocol,
    /// Names another boot id in the Welcome than in the segment.
    OtherBootId,
    /// Sends only two descriptors.
    FewDescriptors,
    /// Accepts and says nothing.
    Silent,
    /// Posts completions for a request that does not exist.
    UnknownRequest,
    /// Posts completions of another operation.
    WrongOperation,
    /// Posts completions that name more blocks than were asked about.
    TooManyBlocks,
    /// Posts an unknown miss reason.
    UnknownReason,
    /// Scribbles an impossible sequence number into the completion ring.
    BrokenRing,
    /// Claims to have consumed what was never produced.
    ConsumedAhead,
    /// Takes requests and never answers.
    Mute,
    /// Does not look at its socket.
    Deaf,
}

/// What all sessions of a fake share.
pub struct World {
    pub boot_id: BootId,
    pub rudeness: Mutex<Rudeness>,
    pub store: Mutex<Store>,
    pub registrations: AtomicU32,
    pub regions: AtomicU32,
    pub unregistered: AtomicU32,
    pub refuse_register: Mutex<Option<Status>>,
    pub never_ready: AtomicBool,
    /// Newest protocol version that it speaks.
    pub protocol: AtomicU32,
    /// Says Draining in every session, whatever its version.
    pub drain: AtomicBool,
    /// Leaves requests in the ring for now; see [`Fake::hold`].
    pub hold: AtomicBool,
    /// A session has seen that.
    held: AtomicBool,
    /// Devices.
    pub gpu: Mutex<gpu::Gpu>,
    pub sessions: AtomicU64,
    pub submissions: AtomicU64,
    /// Sessions whose end the fake has taken notice of.
    pub left: AtomicU64,
    stop: AtomicBool,
    sockets: Mutex<Vec<OwnedFd>>,
}

impl World {
    pub fn rudeness(&self) -> Rudeness {
        *self.rudeness.lock().unwrap()
    }

    pub fn set_rudeness(&self, rudeness: Rudeness) {
        *self.rudeness.lock().unwrap() = rudeness;
    }

    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A running fake; stops when dropped.
pub struct Fake {
    pub world: Arc<World>,
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// Starts listening on `socket`.
    pub fn start(socket: &Path) -> Fake {
        Self::start_with(socket, Rudeness::None)
    }

    pub fn start_with(socket: &Path, rudeness: Rudeness) -> Fake {
        static STARTS: AtomicU64 = AtomicU64::new(1);
        let start = STARTS.fetch_add(1, Ordering::Relaxed);
        let mut boot_id = [0; 16];
        boot_id[..8].copy_from_slice(&start.to_le_bytes());
        boot_id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let world = Arc::new(World {
            boot_id,
            rudeness: Mutex::new(rudeness),
            store: Mutex::new(Store::new(boot_id)),
            registrations: AtomicU32::new(0),
            regions: AtomicU32::new(0),
            unregistered: AtomicU32::new(0),
            refuse_register: Mutex::new(None),
            never_ready: AtomicBool::new(false),
            protocol: AtomicU32::new(PROTOCOL_MAX),
            drain: AtomicBool::new(false),
            hold: AtomicBool::new(false),
            held: AtomicBool::new(false),
            gpu: Mutex::default(),
            sessions: AtomicU64::new(0),
            submissions: AtomicU64::new(0),
            left: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            sockets: Mutex::new(Vec::new()),
        });
        let _ = std::fs::remove_file(socket);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(socket).unwrap()).unwrap();
        listen(&listener, 16).unwrap();
        let thread = std::thread::spawn({
            let world = world.clone();
            move || accept_all(&world, &listener)
        });
        Fake {
            world,
            socket: socket.to_owned(),
            thread: Some(thread),
        }
    }

    /// Ends every session without a word, as a kill would.
    pub fn vanish(mut self) {
        self.stop();
    }

    /// Leaves in the ring what comes from here on.
    pub fn hold(&self) {
        self.world.hold.store(true, Ordering::Relaxed);
        // A turn that began before may still take something.
        while !self.world.held.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }

    /// Ends the sessions there are and goes on listening.
    pub fn drop_sessions(&self) {
        for socket in self.world.sockets.lock().unwrap().drain(..) {
            let _ = shutdown(&socket, Shutdown::Both);
        }
    }

    fn stop(&mut self) {
        self.world.stop.store(true, Ordering::Relaxed);
        let _ = std::fs::remove_file(&self.socket);
        self.drop_sessions();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(
                std::thread::panicking() || joined.is_ok(),
                "the fake panicked"
            );
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_all(world: &Arc<World>, listener: &OwnedFd) {
    let mut threads = Vec::new();
    while !world.stopping() {
        wait_readable(listener, Duration::from_millis(10));
        let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else {
            continue;
        };
        world
            .sockets
            .lock()
            .unwrap()
            .push(socket.as_fd().try_clone_to_owned().unwrap());
        let world = world.clone();
        threads.push(std::thread::spawn(move || {
            let end = socket.as_fd().try_clone_to_owned().unwrap();
            serve::session(&world, socket);
            let _ = shutdown(&end, Shutdown::Both);
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Waits for one descriptor.
pub fn wait_readable(fd: &impl AsFd, limit: Duration) -> bool {
    let limit = Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&limit)), Ok(ready) if ready > 0)
}
