//! The control side: sockets, sessions, liveness. It moves no block and owns no cache state.
//!
//! One task per connection runs on a single-threaded runtime, next to the HTTP pages and the
//! timers. A client can break its own session and nothing else: its messages are checked before the
//! lane hears of them, what it does not read is bounded, and its end is noticed by its socket and
//! its pidfd.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`lock`] | lock files with the holder's process id |
//! | [`node_dir`] | the node's folder: made, checked, locked, swept |
//! | [`listener`] | the session socket and the right to it |
//! | [`peer`] | user, domain, process and pidfd of a connection |
//! | `packet` | one message in, bounded messages out |
//! | `handshake` | Hello, segments, bells, Welcome |
//! | `session` | one session's messages and its end |
//! | `regions` | the session's KV memory |
//! | `gpu` | the part of it that lies on GPUs, and the events there |
//! | `register` | checks of a registration |
//! | `links` | `sessions/<id>.c2d` and `.d2c` |
//! | `users` | how many connections each user has |
//! | `pace` | how many messages a session is served |
//! | `log_limit` | how many lines refused connections get |
//! | `hub` | events and notices to the sessions' tasks |

#![forbid(unsafe_code)]

pub(crate) mod gpu;
pub(crate) mod handshake;
mod hub;
mod links;
pub mod listener;
pub mod lock;
mod log_limit;
pub mod node_dir;
mod pace;
pub(crate) mod packet;
pub mod peer;
pub(crate) mod regions;
pub(crate) mod register;
mod session;
mod users;
mod watch;

#[cfg(test)]
pub(crate) mod fake_lane;
#[cfg(test)]
mod tests;

pub use gpu::{MAX_AWAITED_CHUNKS, MAX_DEVICE_BYTES, MAX_DEVICE_REGIONS, MAX_SESSION_CHUNKS};
pub use handshake::hex;
pub use hub::MAX_WAITING_NOTICES;
pub use packet::{MAX_WAITING_MESSAGES, Overflow};
pub use regions::{MAX_REGION_BYTES, MAX_REGIONS};

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::BootId;
use pegaflow_shm::control::DaemonMessage;
use pegaflow_shm::node::{Counter, NodeWriter};
use pegaflow_shm::seqpacket;
use pegaflow_shm::status::Status;
use serde::de::IgnoredAny;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::device::{DeviceNews, Devices};
use crate::isolation::DomainRules;
use crate::isolation::share::may_take;
use crate::lane::api::{LaneEvent, LaneHandle, Refusal, SessionId};
use listener::Listener;
use log_limit::LogLimit;
use packet::PacketSocket;
use peer::Peer;

/// How long a connection may take to say Hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Refused connections that are kept until their client has said Hello.
const MAX_LINGERING_REFUSALS: usize = 32;
/// How long they are kept at most.
const REFUSAL_LINGER: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the control side needs to know.
#[derive(Clone, Debug)]
pub struct ControlOptions {
    /// Name of the node.
    pub node: String,
    /// Boot id.
    pub boot_id: BootId,
    /// Who may connect, and to which isolation domain each belongs.
    pub rules: DomainRules,
    /// Most connections, sessions and those on the way to one.
    pub max_sessions: u32,
    /// How long a connection may take to say Hello.
    pub hello_timeout: Duration,
    /// Life of a lease when the query names none.
    pub lease_ttl: Duration,
    /// GPUs whose memory sessions may share.
    pub devices: Devices,
    /// Folder of the links to the sessions' segments.
    pub sessions_dir: PathBuf,
}

/// What all connections share.
struct Shared {
    options: ControlOptions,
    lane: LaneHandle,
    node: NodeWriter,
    hub: hub::Hub,
    session_ids: AtomicU64,
    places: Arc<Semaphore>,
    /// Descriptors of physical allocations that may be held.
    awaited_chunks: Arc<Semaphore>,
    /// Connections of each user.
    users: users::Users,
    refusals: Arc<Semaphore>,
    refusal_lines: Mutex<LogLimit>,
}

impl Shared {
    fn next_session(&self) -> SessionId {
        self.session_ids.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// The daemon's sessions.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// No sessions yet.
    pub fn new(options: ControlOptions, lane: LaneHandle, node: NodeWriter) -> Control {
        let places = Arc::new(Semaphore::new(options.max_sessions as usize));
        let refusals = Arc::new(Semaphore::new(MAX_LINGERING_REFUSALS));
        let (hub, session_ids) = (hub::Hub::default(), AtomicU64::new(0));
        Control {
            shared: Arc::new(Shared {
                options,
                lane,
                node,
                hub,
                session_ids,
                places,
                awaited_chunks: Arc::new(Semaphore::new(MAX_AWAITED_CHUNKS)),
                users: users::Users::default(),
                refusals,
                refusal_lines: Mutex::default(),
            }),
        }
    }

    /// Accepts connections until the future is dropped.
    pub async fn accept(&self, listener: &Listener) {
        loop {
            match listener.accept().await {
                Ok(connection) => {
                    self.admit(connection);
                    // A client that connects without pause gets no more than its turn: otherwise
                    // its connections would take all places before the first of them has ended.
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Passes the lane's events, and what befalls the devices, on until the lane has ended.
    pub async fn deliver(&self, events: &mut mpsc::UnboundedReceiver<LaneEvent>) {
        let mut news = self.shared.options.devices.take_news();
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.shared.hub.deliver(event),
                    None => return,
                },
                told = next_news(&mut news) => self.shared.hub.tell_all(&told),
            }
        }
    }

    /// Tells every client that no new work is taken, and how long what was taken has.
    pub fn announce_draining(&self, limit: Duration) {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.shared
            .hub
            .tell_all(&hub::Notice::Draining { limit_ms });
    }

    /// Closes every session and waits until all are gone; true if they went within the limit.
    pub async fn close_all(&self, limit: Duration) -> bool {
        // Connections that have not said Hello hold places, too, but end by their own time limit.
        self.shared.hub.tell_all(&hub::Notice::Stop);
        let all = self.shared.options.max_sessions;
        let gone = self.shared.places.acquire_many(all);
        tokio::time::timeout(limit, gone).await.is_ok()
    }

    fn admit(&self, connection: OwnedFd) {
        let shared = &self.shared;
        let admitted = Peer::identify(connection.as_fd(), &shared.options.rules)
            .and_then(|peer| self.place(peer.uid).map(|place| (peer, place)));
        match admitted {
            Ok((peer, place)) => {
                tokio::spawn(connect(shared.clone(), connection, peer, place));
            }
            Err(refusal) => refuse(shared, connection, refusal),
        }
    }

    /// A place among all connections, which no user alone may take up when others are served.
    fn place(&self, uid: u32) -> Result<Place, Refusal> {
        let shared = &self.shared;
        let most = shared.options.max_sessions;
        let free = shared.places.available_permits() as u64;
        let own = shared.users.count(uid);
        if free > 0 && shared.options.rules.serves_others() && !may_take(own, free) {
            let text = format!(
                "user {uid} has {own} of {most} sessions and leaves the other {free} to others: end \
                 some, or raise --max-sessions"
            );
            return Err(Refusal::new(Status::Limit, text));
        }
        let permit = shared.places.clone().try_acquire_owned().map_err(|_| {
            let text = format!("{most} sessions are connected: end some, or raise --max-sessions");
            Refusal::new(Status::Limit, text)
        })?;
        Ok(Place {
            _permit: permit,
            _user: shared.users.enter(uid),
        })
    }
}

/// One of the places for connections, until it is dropped.
struct Place {
    _permit: OwnedSemaphorePermit,
    _user: users::Entry,
}

/// What befalls a device next; never, where there are none.
async fn next_news(news: &mut Option<mpsc::UnboundedReceiver<DeviceNews>>) -> hub::Notice {
    let told = match news {
        Some(news) => news.recv().await,
        None => None,
    };
    match told {
        Some(DeviceNews::Down { device, message }) => {
            tracing::warn!(%device, reason = %message, "GPU down");
            hub::Notice::DeviceDown { device, message }
        }
        Some(DeviceNews::Up { device }) => {
            tracing::info!(%device, "GPU up again");
            hub::Notice::DeviceUp { device }
        }
        None => std::future::pending().await,
    }
}

async fn connect(shared: Arc<Shared>, connection: OwnedFd, peer: Peer, place: Place) {
    let socket = match PacketSocket::new(connection) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%error, "a connection cannot be watched");
            return;
        }
    };
    match handshake::open_session(&shared, socket, peer).await {
        Ok(session) => session.run().await,
        Err((socket, refusal)) => {
            note_refusal(&shared, &refusal);
            let Refusal { status, message } = refusal;
            // The client may be gone already; the log has the reason.
            let _ = socket.send_now(DaemonMessage::Refused { status, message }, &[]);
            socket.close();
        }
    }
    drop(place);
}

/// Tells a connection that it does not become a session. The client is about to say Hello, and
/// would find a closed socket before it reads the reason: so its first message is waited for.
fn refuse(shared: &Shared, connection: OwnedFd, refusal: Refusal) {
    note_refusal(shared, &refusal);
    let Refusal { status, message } = refusal;
    // The client may be gone already; the log has the reason.
    let _ = seqpacket::send(
        connection.as_fd(),
        &DaemonMessage::Refused { status, message },
        &[],
    );
    let Ok(socket) = PacketSocket::new(connection) else {
        return;
    };
    let Ok(place) = shared.refusals.clone().try_acquire_owned() else {
        socket.close();
        return;
    };
    let limit = shared.options.hello_timeout.min(REFUSAL_LINGER);
    tokio::spawn(async move {
        // Whatever comes, or nothing: it changes nothing.
        let _ = tokio::time::timeout(limit, socket.receive::<IgnoredAny>()).await;
        socket.close();
        drop(place);
    });
}

fn note_refusal(shared: &Shared, refusal: &Refusal) {
    shared.node.add(Counter::SessionsRefused, 1);
    let lines = &shared.refusal_lines;
    let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(left_out) = lines.admit(Instant::now()) else {
        return;
    };
    if left_out > 0 {
        tracing::warn!(
            left_out,
            "connections were refused without a line of their own"
        );
    }
    tracing::warn!(status = %refusal.status, reason = %refusal.message, "connection refused");
}
