//! From a connection to a session: Hello is checked, segments and bells are made, Welcome is sent.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use pegaflow_shm::bell::BellFd;
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, Hello, PROTOCOL_MAX, PROTOCOL_MIN, Welcome, negotiate,
};
use pegaflow_shm::mapping::{Mapping, create_segment, open_peer_segment};
use pegaflow_shm::segment::{
    C2D_MAGIC, D2C_MAGIC, STATE_OFFSET, SegmentHeader, SegmentShape, SessionState,
};
use pegaflow_shm::seqpacket::PacketError;
use pegaflow_shm::status::Status;
use pegaflow_shm::sync::Ordering;

use super::Shared;
use super::links::SegmentLinks;
use super::packet::PacketSocket;
use super::peer::Peer;
use super::register::check_name;
use super::session::Session;
use crate::lane::api::{CloseReason, NewSession, Refusal, SessionId};

/// What a client says of itself, checked.
pub(crate) struct Opening {
    name: String,
    version: String,
    protocol: u32,
    pub(crate) c2d: Arc<Mapping>,
    pub(crate) c2d_shape: SegmentShape,
    c2d_fd: OwnedFd,
    completion_slots: u32,
}

/// Makes a session of a connection, or says why not.
pub(super) async fn open_session(
    shared: &Arc<Shared>,
    socket: PacketSocket,
    peer: Peer,
) -> Result<Session, (PacketSocket, Refusal)> {
    let opening = match receive_hello(shared, &socket).await {
        Ok(opening) => opening,
        Err(refusal) => return Err((socket, refusal)),
    };
    let (id, protocol) = (shared.next_session(), opening.protocol);
    let notices = shared.hub.join(id);
    match welcome(shared, &socket, &peer, id, opening).await {
        Ok(half) => Ok(Session::new(
            shared.clone(),
            id,
            peer,
            socket,
            notices,
            protocol,
            half,
        )),
        Err(refusal) => {
            shared.hub.leave(id);
            Err((socket, refusal))
        }
    }
}

async fn receive_hello(shared: &Shared, socket: &PacketSocket) -> Result<Opening, Refusal> {
    let limit = shared.options.hello_timeout;
    let protocol = |text: String| Refusal::new(Status::ProtocolError, text);
    let received = tokio::time::timeout(limit, socket.receive::<ClientMessage>()).await;
    let (message, fds) = match received {
        Ok(Ok(received)) => received,
        Ok(Err(PacketError::Closed)) => {
            return Err(protocol("the client left before it said Hello".into()));
        }
        Ok(Err(error)) => return Err(protocol(error.to_string())),
        Err(_) => return Err(protocol(format!("no Hello came within {limit:?}"))),
    };
    match message {
        ClientMessage::Hello(hello) => check_hello(hello, fds),
        _ => Err(protocol("the first message must be Hello".into())),
    }
}

pub(crate) fn check_hello(hello: Hello, fds: Vec<OwnedFd>) -> Result<Opening, Refusal> {
    let Hello {
        protocol_min,
        protocol_max,
        ..
    } = hello;
    let Some(protocol) = negotiate(protocol_min, protocol_max) else {
        let text = format!(
            "the client (version {:?}) speaks protocol {protocol_min} to {protocol_max}, this daemon \
             {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one",
            hello.client_version
        );
        return Err(Refusal::new(Status::VersionMismatch, text));
    };
    check_name("client_name", &hello.client_name)?;
    check_name("client_version", &hello.client_version)?;
    let invalid = |text: String| Refusal::new(Status::InvalidArgument, text);
    let count = fds.len();
    let Ok([c2d_fd]) = <[OwnedFd; 1]>::try_from(fds) else {
        return Err(invalid(format!(
            "{count} descriptors came with Hello: send the C2D memfd alone"
        )));
    };
    let c2d = open_peer_segment(c2d_fd.as_fd(), "C2D segment", hello.c2d_bytes)
        .map_err(|error| invalid(error.to_string()))?;
    let mut header = [0u8; size_of::<SegmentHeader>()];
    c2d.copy_out(0, &mut header)
        .map_err(|error| invalid(error.to_string()))?;
    let header: SegmentHeader = bytemuck::pod_read_unaligned(&header);
    let c2d_shape = header
        .check(C2D_MAGIC, c2d.len())
        .map_err(|fault| invalid(format!("C2D segment: {fault}")))?;
    Ok(Opening {
        name: hello.client_name,
        version: hello.client_version,
        protocol,
        c2d: Arc::new(c2d),
        c2d_shape,
        c2d_fd,
        completion_slots: hello.completion_slots,
    })
}

/// Makes the daemon's half, hands the session to the lane, sends Welcome.
async fn welcome(
    shared: &Arc<Shared>,
    socket: &PacketSocket,
    peer: &Peer,
    id: SessionId,
    opening: Opening,
) -> Result<(Arc<Mapping>, SegmentLinks), Refusal> {
    let system = |text: String| Refusal::new(Status::SystemError, text);
    let shape = SegmentShape {
        slots: opening.completion_slots,
        ..SegmentShape::DEFAULT_D2C
    };
    shape.check().map_err(|fault| {
        Refusal::new(
            Status::InvalidArgument,
            format!("completion_slots: {fault}"),
        )
    })?;
    let (d2c_fd, d2c) = create_d2c(shared, id, shape).map_err(|error| system(error.to_string()))?;
    let lane_bell = BellFd::eventfd().map_err(|error| system(error.to_string()))?;
    let their_bell = lane_bell
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| system(format!("no descriptor left: {error}")))?;
    let (client_bell, client_end) = BellFd::pipe().map_err(|error| system(error.to_string()))?;
    let new = NewSession {
        id,
        uid: peer.uid,
        domain: peer.domain.clone(),
        pid: peer.pid as u32,
        client_name: opening.name.clone(),
        c2d: opening.c2d,
        c2d_shape: opening.c2d_shape,
        d2c: d2c.clone(),
        d2c_shape: shape,
        lane_bell: lane_bell.into_fd(),
        client_bell,
    };
    let opened = shared.lane.open_session(new).await?;
    let message = DaemonMessage::Welcome(Welcome {
        protocol: opening.protocol,
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: hex(&shared.options.boot_id),
        node: shared.options.node.clone(),
        session: id,
        daemon_pid: std::process::id(),
        d2c_bytes: shape.total_bytes() as u64,
        index_bytes: opened.index_bytes,
        lease_ttl_ms: shared.options.lease_ttl.as_millis() as u64,
    });
    let fds = [
        d2c_fd.as_fd(),
        their_bell.as_fd(),
        client_end.as_fd(),
        opened.index.as_fd(),
    ];
    if let Err(error) = socket.send_now(message, &fds) {
        // The lane counts the session's end; whether it answers no longer matters to anybody.
        let _ = shared.lane.close_session(id, CloseReason::Left).await;
        return Err(system(format!("Welcome could not be sent: {error}")));
    }
    tracing::info!(
        session = id,
        pid = peer.pid,
        uid = peer.uid,
        domain = %peer.domain,
        client = %opening.name,
        version = %opening.version,
        protocol = opening.protocol,
        "session opened"
    );
    let links = SegmentLinks::make(&shared.options.sessions_dir, id, opening.c2d_fd, d2c_fd);
    Ok((d2c, links))
}

fn create_d2c(
    shared: &Shared,
    id: SessionId,
    shape: SegmentShape,
) -> Result<(OwnedFd, Arc<Mapping>), pegaflow_shm::mapping::MappingError> {
    let (fd, mapping) = create_segment("D2C segment", shape.total_bytes() as u64)?;
    let header = shape.header(D2C_MAGIC, shared.options.boot_id, id);
    mapping.copy_in(0, bytemuck::bytes_of(&header))?;
    mapping
        .atomic_u32(STATE_OFFSET)?
        .store(SessionState::Active as u32, Ordering::Release);
    Ok((fd, Arc::new(mapping)))
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
