//! One session's task: its messages one after the other, its end whatever the cause.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, DeviceUuid, PROTOCOL_DEVICES, PROTOCOL_DRAINING, RegisterSpec,
};
use pegaflow_shm::mapping::Mapping;
use pegaflow_shm::segment::{STATE_OFFSET, SessionState};
use pegaflow_shm::seqpacket::PacketError;
use pegaflow_shm::status::Status;
use pegaflow_shm::sync::Ordering;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Shared;
use super::gpu::Import;
use super::hub::Notice;
use super::links::SegmentLinks;
use super::pace::Pace;
use super::packet::{Overflow, PacketSocket};
use super::peer::{self, Peer};
use super::regions::Memory;
use super::register;
use super::watch::watch;
use crate::lane::api::{CloseReason, LaneEvent, Refusal, SessionId};

/// Why a session's task ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Left,
    Died,
    Faulted(String),
    Stopping,
}

impl From<Overflow> for End {
    fn from(overflow: Overflow) -> End {
        End::Faulted(overflow.to_string())
    }
}

/// The next message, once the session's pace allows it.
async fn paced(
    pace: &Pace,
    socket: &PacketSocket,
) -> Result<(ClientMessage, Vec<OwnedFd>), PacketError> {
    if pace.next() > Instant::now() {
        tokio::time::sleep_until(pace.next()).await;
    }
    socket.receive::<ClientMessage>().await
}

/// True for the words that [`PROTOCOL_DEVICES`] brought.
fn is_about_devices(message: &ClientMessage) -> bool {
    match message {
        ClientMessage::AddDeviceRegion { .. }
        | ClientMessage::AddDeviceChunks { .. }
        | ClientMessage::AddEvents { .. } => true,
        ClientMessage::Register { registration, .. } => {
            registration.groups.iter().any(|group| group.replicated)
        }
        _ => false,
    }
}

fn takes_descriptors(message: &ClientMessage) -> bool {
    matches!(
        message,
        ClientMessage::AddRegion { .. }
            | ClientMessage::AddDeviceRegion { .. }
            | ClientMessage::AddDeviceChunks { .. }
    )
}

/// A session that the lane serves.
pub(super) struct Session {
    shared: Arc<Shared>,
    id: SessionId,
    peer: Peer,
    socket: PacketSocket,
    notices: mpsc::Receiver<Notice>,
    /// Version that both sides speak.
    protocol: u32,
    d2c: Arc<Mapping>,
    links: SegmentLinks,
    memory: Memory,
    /// Regions that each registration uses.
    registrations: HashMap<u32, Vec<u32>>,
}

impl Session {
    pub(super) fn new(
        shared: Arc<Shared>,
        id: SessionId,
        peer: Peer,
        socket: PacketSocket,
        notices: mpsc::Receiver<Notice>,
        protocol: u32,
        (d2c, links): (Arc<Mapping>, SegmentLinks),
    ) -> Session {
        let (memory, registrations) = (Memory::default(), HashMap::new());
        Session {
            shared,
            id,
            peer,
            socket,
            notices,
            protocol,
            d2c,
            links,
            memory,
            registrations,
        }
    }

    /// Serves until the client leaves, dies, breaks the protocol, or the daemon stops.
    pub(super) async fn run(mut self) {
        let end = match self.watch_process() {
            Ok(process) => self.serve(process).await,
            Err(error) => End::Faulted(format!("the client's process cannot be watched: {error}")),
        };
        self.finish(end).await;
    }

    fn watch_process(&self) -> std::io::Result<AsyncFd<OwnedFd>> {
        watch(self.peer.pidfd.try_clone()?, Interest::READABLE)
    }

    async fn serve(&mut self, process: AsyncFd<OwnedFd>) -> End {
        let mut pace = Pace::new(Instant::now());
        loop {
            let step = tokio::select! {
                received = paced(&pace, &self.socket) => match received {
                    Ok((message, fds)) => {
                        pace.took(Instant::now());
                        self.handle(message, fds).await
                    }
                    Err(PacketError::Closed) => Err(self.left_or_died()),
                    Err(error) => Err(End::Faulted(error.to_string())),
                },
                notice = self.notices.recv() => self.take_notice(notice).await,
                _ = process.readable() => Err(End::Died),
                () = self.socket.writable(), if self.socket.is_waiting() => {
                    self.socket.flush();
                    Ok(())
                }
            };
            if let Err(end) = step {
                return end;
            }
            // A client that sends without pause gets no more than its turn.
            tokio::task::yield_now().await;
        }
    }

    fn left_or_died(&self) -> End {
        let mut fds = [PollFd::new(&self.peer.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ended = matches!(poll(&mut fds, Some(&now)), Ok(1..));
        if ended || peer::is_exiting(self.peer.pid) {
            End::Died
        } else {
            End::Left
        }
    }

    async fn handle(&mut self, message: ClientMessage, fds: Vec<OwnedFd>) -> Result<(), End> {
        if self.protocol < PROTOCOL_DEVICES && is_about_devices(&message) {
            let text = format!(
                "a message about GPU memory in a session of protocol {}, it needs \
                 {PROTOCOL_DEVICES}",
                self.protocol
            );
            return Err(End::Faulted(text));
        }
        if !fds.is_empty() && !takes_descriptors(&message) {
            let text = format!(
                "{} descriptors came with a message that takes none",
                fds.len()
            );
            return Err(End::Faulted(text));
        }
        let (seq, result) = match message {
            ClientMessage::Hello(_) => {
                return Err(End::Faulted("Hello came a second time".into()));
            }
            ClientMessage::AddRegion { seq, region, bytes } => (
                seq,
                self.memory
                    .add(region, bytes, &fds)
                    .map(|()| DaemonMessage::Done { seq }),
            ),
            ClientMessage::AddDeviceRegion {
                seq,
                region,
                bytes,
                device,
                handle,
            } => {
                let places = &self.shared.awaited_chunks;
                let what = (region, bytes, device);
                let begun = self.memory.begin_device_region(what, handle, fds, places);
                (
                    seq,
                    self.import(begun)
                        .await
                        .map(|()| DaemonMessage::Done { seq }),
                )
            }
            ClientMessage::AddDeviceChunks { seq, region } => {
                let begun = self.memory.add_device_chunks(region, fds);
                (
                    seq,
                    self.import(begun)
                        .await
                        .map(|()| DaemonMessage::Done { seq }),
                )
            }
            ClientMessage::AddEvents {
                seq,
                device,
                handles,
            } => {
                let devices = &self.shared.options.devices;
                let added = self.memory.add_events(device, handles, devices, &self.peer);
                (seq, added.await.map(|()| DaemonMessage::Done { seq }))
            }
            ClientMessage::RemoveRegion { seq, region } => (
                seq,
                self.memory
                    .remove(region)
                    .map(|()| DaemonMessage::Done { seq }),
            ),
            ClientMessage::Register {
                seq,
                registration,
                signals,
            } => {
                let registered = self.register(*registration, signals).await;
                let signals = signals.is_some();
                let answer = |registration| DaemonMessage::Registered {
                    seq,
                    registration,
                    signals,
                };
                (seq, registered.map(answer))
            }
            ClientMessage::Unregister { seq, registration } => {
                let unregistered = self.unregister(registration).await;
                (seq, unregistered.map(|()| DaemonMessage::Done { seq }))
            }
        };
        let answer = result.unwrap_or_else(|Refusal { status, message }| {
            tracing::debug!(session = self.id, seq, %status, %message, "request refused");
            DaemonMessage::Failed {
                seq,
                status,
                message,
            }
        });
        Ok(self.socket.send(answer)?)
    }

    /// Maps device memory, once all that belongs to it has come.
    async fn import(&mut self, begun: Result<Option<Import>, Refusal>) -> Result<(), Refusal> {
        let Some(import) = begun? else { return Ok(()) };
        let devices = &self.shared.options.devices;
        self.memory.import(import, devices, &self.peer).await
    }

    async fn register(&mut self, spec: RegisterSpec, signals: Option<u32>) -> Result<u32, Refusal> {
        if register::names_process(&spec) {
            self.memory.open_process(&self.peer).await?;
        }
        let checked = register::check(spec, signals, &self.memory, &self.peer.domain)?;
        let (instance, rank) = (
            checked.registration.spec.instance.clone(),
            checked.registration.spec.rank,
        );
        let id = self
            .shared
            .lane
            .register(self.id, checked.registration)
            .await?;
        self.memory.count_user(&checked.regions, true);
        self.registrations.insert(id, checked.regions);
        tracing::info!(session = self.id, registration = id, %instance, ?rank, "registered");
        Ok(id)
    }

    async fn unregister(&mut self, registration: u32) -> Result<(), Refusal> {
        if !self.registrations.contains_key(&registration) {
            let text = format!("there is no registration {registration} in this session");
            return Err(Refusal::new(Status::UnknownRegistration, text));
        }
        self.shared.lane.unregister(self.id, registration).await?;
        if let Some(regions) = self.registrations.remove(&registration) {
            self.memory.count_user(&regions, false);
        }
        tracing::info!(session = self.id, registration, "unregistered");
        Ok(())
    }

    /// A device has failed: what the session has there ends. The lane says when no copy touches it
    /// any more.
    async fn lose_device(&mut self, device: DeviceUuid, message: String) -> Result<(), End> {
        let lost = self.memory.regions_on(device);
        let registrations = self.registrations.iter();
        let lies_there = |used: &[u32]| used.iter().any(|region| lost.contains(region));
        let ended: Vec<u32> = registrations
            .filter(|(_, used)| lies_there(used))
            .map(|(id, _)| *id)
            .collect();
        for id in ended {
            if let Err(refusal) = self.unregister(id).await {
                let session = self.id;
                tracing::error!(session, registration = id, %refusal, "it stays after its GPU");
            }
        }
        if self.memory.lose_device(device) && self.protocol >= PROTOCOL_DEVICES {
            self.socket
                .send(DaemonMessage::DeviceDown { device, message })?;
        }
        Ok(())
    }

    async fn take_notice(&mut self, notice: Option<Notice>) -> Result<(), End> {
        match notice {
            Some(Notice::Lane(LaneEvent::Ready {
                registration,
                namespace,
                ..
            })) => Ok(self.socket.send(DaemonMessage::Ready {
                registration,
                namespace,
            })?),
            Some(Notice::Lane(LaneEvent::NotReady { registration, .. })) => {
                Ok(self.socket.send(DaemonMessage::NotReady { registration })?)
            }
            Some(Notice::Lane(LaneEvent::Fault { message, .. })) => Err(End::Faulted(message)),
            Some(Notice::Draining { limit_ms }) => {
                self.show(SessionState::Draining);
                if self.protocol >= PROTOCOL_DRAINING {
                    self.socket.send(DaemonMessage::Draining { limit_ms })?;
                }
                Ok(())
            }
            Some(Notice::DeviceDown { device, message }) => self.lose_device(device, message).await,
            Some(Notice::DeviceUp { device }) => {
                if self.memory.regain_device(device) {
                    self.socket.send(DaemonMessage::DeviceUp { device })?;
                }
                Ok(())
            }
            Some(Notice::Stop) => Err(End::Stopping),
            None => Err(End::from(Overflow)),
        }
    }

    /// Shows the session's state in the segment that the client reads.
    fn show(&self, state: SessionState) {
        match self.d2c.atomic_u32(STATE_OFFSET) {
            Ok(word) => word.store(state as u32, Ordering::Release),
            Err(error) => tracing::error!(session = self.id, %error, "the state cannot be shown"),
        }
    }

    /// Tells the client, then the lane; the socket ends, and memory is let go of, only after the
    /// lane's answer.
    async fn finish(mut self, end: End) {
        let (reason, closing) = match &end {
            End::Left => (CloseReason::Left, None),
            End::Died => (CloseReason::Died, None),
            End::Faulted(text) => (
                CloseReason::Faulted,
                Some((Status::ProtocolError, text.clone())),
            ),
            End::Stopping => {
                let text = "the daemon is shutting down".to_owned();
                (CloseReason::Stopping, Some((Status::Draining, text)))
            }
        };
        match &end {
            End::Faulted(text) => tracing::warn!(
                session = self.id,
                pid = self.peer.pid,
                reason = %text,
                "session closed for breaking the protocol"
            ),
            other => {
                tracing::info!(session = self.id, pid = self.peer.pid, reason = ?other, "session ends")
            }
        }
        if let Some((status, message)) = closing {
            // A client that does not read finds the reason in the daemon's log.
            let _ = self.socket.send(DaemonMessage::Closing { status, message });
        }
        self.shared.hub.leave(self.id);
        self.show(SessionState::Closed);
        let Session {
            shared,
            id,
            socket,
            memory,
            links,
            d2c,
            ..
        } = self;
        if let Err(refusal) = shared.lane.close_session(id, reason).await {
            tracing::error!(session = id, %refusal, "the lane did not close a session");
        }
        // No copy touches the client's memory any more, which is what the end of the socket tells
        // it: a client that lives on uses the blocks of its unfinished loads again.
        socket.close();
        drop((memory, links, d2c));
        tracing::debug!(session = id, "session gone");
    }
}
