//! A thread that answers the lane's commands as a lane would, without a cache.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, mpsc};

use pegaflow_shm::mapping::create_segment;
use pegaflow_shm::status::Status;
use tokio::sync::mpsc as tokio_mpsc;

use crate::lane::LaneWake;
use crate::lane::api::{
    CloseReason, LaneCommand, LaneEvent, LaneHandle, Refusal, SessionId, SessionOpened,
};

/// What the fake has seen, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Opened(SessionId),
    /// Session, instance, groups.
    Registered(SessionId, String, usize),
    Unregistered(SessionId, u32),
    Closed(SessionId, CloseReason),
    Drained,
}

pub(crate) struct FakeLane {
    pub(crate) handle: LaneHandle,
    pub(crate) events: tokio_mpsc::UnboundedSender<LaneEvent>,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    /// While a test holds it, copies of sessions that end go on.
    pub(crate) copies: Arc<Mutex<()>>,
}

impl FakeLane {
    pub(crate) fn start() -> (FakeLane, tokio_mpsc::UnboundedReceiver<LaneEvent>) {
        let (commands, inbox) = mpsc::channel();
        let handle = LaneHandle::new(commands, Arc::new(LaneWake::new().unwrap()));
        let (events, receiver) = tokio_mpsc::unbounded_channel();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let copies = Arc::new(Mutex::new(()));
        let (log, running) = (seen.clone(), copies.clone());
        std::thread::spawn(move || serve(&inbox, &log, &running));
        (
            FakeLane {
                handle,
                events,
                seen,
                copies,
            },
            receiver,
        )
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn index() -> OwnedFd {
    create_segment("index", 4096).unwrap().0
}

fn serve(inbox: &mpsc::Receiver<LaneCommand>, log: &Mutex<Vec<Seen>>, copies: &Mutex<()>) {
    let note = |seen| log.lock().unwrap().push(seen);
    let mut sessions = Vec::new();
    let mut registrations = 0;
    while let Ok(command) = inbox.recv() {
        // An answer that nobody waits for any more is no concern of the lane's.
        match command {
            LaneCommand::OpenSession(new, reply) => {
                note(Seen::Opened(new.id));
                sessions.push(new);
                let _ = reply.send(Ok(SessionOpened {
                    index: index(),
                    index_bytes: 4096,
                }));
            }
            LaneCommand::Register(session, new, reply) => {
                registrations += 1;
                note(Seen::Registered(
                    session,
                    new.spec.instance.clone(),
                    new.groups.len(),
                ));
                let _ = reply.send(Ok(registrations));
            }
            LaneCommand::Unregister(session, registration, reply) => {
                if sessions.iter().any(|known| known.id == session) {
                    note(Seen::Unregistered(session, registration));
                    let _ = reply.send(Ok(()));
                } else {
                    let refusal = Refusal::new(Status::UnknownRegistration, "no such session");
                    let _ = reply.send(Err(refusal));
                }
            }
            LaneCommand::CloseSession(session, reason, reply) => {
                note(Seen::Closed(session, reason));
                sessions.retain(|known| known.id != session);
                drop(copies.lock().unwrap());
                let _ = reply.send(());
            }
            LaneCommand::Drain(reply) => {
                note(Seen::Drained);
                let _ = reply.send(());
            }
            LaneCommand::Ping(reply) => {
                let _ = reply.send(());
            }
            LaneCommand::Stop => return,
        }
    }
}
