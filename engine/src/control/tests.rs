//! A client that talks to the control side over a real socket, with a lane that only pretends.

mod devices;
mod domains;
mod versions;

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, GroupLayout, Hello, MAX_MESSAGE_BYTES, MemoryRef, Mode,
    PROTOCOL_MAX, RegisterSpec, SegmentLayout, Welcome,
};
use pegaflow_shm::mapping::{Mapping, create_kv_region, create_segment, open_peer_segment};
use pegaflow_shm::namespace::NamespaceSpec;
use pegaflow_shm::node::{NodeHeader, NodeReader};
use pegaflow_shm::segment::{C2D_MAGIC, STATE_OFFSET, SegmentShape, SessionState};
use pegaflow_shm::seqpacket::PacketError;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

use super::fake_lane::{FakeLane, Seen};
use super::listener::SocketClaim;
use super::*;
use crate::device::Devices;
use crate::lane::api::CloseReason;

const SOON: Duration = Duration::from_secs(10);
const SHAPE: SegmentShape = SegmentShape {
    slots: 16,
    arena_chunks: 1,
};

struct Rig {
    dir: tempfile::TempDir,
    lane: FakeLane,
    control: Control,
    node: NodeReader,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

impl Rig {
    fn start() -> Rig {
        Rig::with(|_| {})
    }

    fn with(adjust: impl FnOnce(&mut ControlOptions)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (lane, mut events) = FakeLane::start();
        let mapping = Arc::new(Mapping::anonymous(NodeWriter::FILE_BYTES).unwrap());
        let node = NodeWriter::create(mapping, &NodeHeader::zeroed()).unwrap();
        let mut options = ControlOptions {
            devices: Devices::none(),
            node: "n1".into(),
            boot_id: [7; 16],
            rules: DomainRules::only([rustix::process::geteuid().as_raw()]),
            max_sessions: 8,
            hello_timeout: SOON,
            lease_ttl: Duration::from_secs(30),
            sessions_dir: dir.path().to_owned(),
        };
        adjust(&mut options);
        let reader = node.reader();
        let control = Control::new(options, lane.handle.clone(), node);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (path, serving) = (dir.path().join("s.sock"), control.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let claim = SocketClaim::take(&path, false).unwrap();
                let listener = claim.listen(0o600).unwrap();
                ready.send(()).unwrap();
                let delivering = serving.clone();
                tokio::spawn(async move { delivering.deliver(&mut events).await });
                tokio::select! {
                    () = serving.accept(&listener) => {}
                    _ = stopped => {}
                }
                serving.close_all(SOON).await
            })
        });
        is_ready.recv().unwrap();
        Rig {
            dir,
            lane,
            control,
            node: reader,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> Client {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(SOON)).unwrap();
        let address = SocketAddrUnix::new(self.dir.path().join("s.sock")).unwrap();
        connect(&socket, &address).unwrap();
        Client { socket }
    }

    /// A session, and its id.
    fn session(&self) -> (Client, Welcome, Vec<OwnedFd>) {
        let client = self.connect();
        let c2d = c2d();
        client.send_fds(&hello(), &[c2d.as_fd()]);
        match client.receive_fds() {
            (DaemonMessage::Welcome(welcome), fds) => (client, welcome, fds),
            (other, _) => panic!("{other:?}"),
        }
    }

    fn link(&self, session: u64, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("{session}.{suffix}"))
    }

    fn wait_seen(&self, wanted: &Seen) {
        wait_until(|| self.lane.seen().contains(wanted), &format!("{wanted:?}"));
    }

    /// Stops the control side; true if every session went.
    fn stop(&mut self) -> bool {
        let _ = self.stop.take().map(|stop| stop.send(()));
        self.thread
            .take()
            .is_none_or(|thread| thread.join().unwrap())
    }
}

fn wait_until(holds: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Client {
    socket: OwnedFd,
}

impl Client {
    fn send(&self, message: &ClientMessage) {
        self.send_fds(message, &[]);
    }

    fn send_fds(&self, message: &ClientMessage, fds: &[BorrowedFd<'_>]) {
        seqpacket::send(self.socket.as_fd(), message, fds).unwrap();
    }

    fn send_raw(&self, bytes: &[u8]) {
        assert_eq!(rustix::io::write(&self.socket, bytes), Ok(bytes.len()));
    }

    fn receive_fds(&self) -> (DaemonMessage, Vec<OwnedFd>) {
        seqpacket::receive(self.socket.as_fd()).unwrap()
    }

    fn receive(&self) -> DaemonMessage {
        self.receive_fds().0
    }

    fn ask(&self, message: &ClientMessage) -> DaemonMessage {
        self.send(message);
        self.receive()
    }

    fn is_closed(&self) {
        let end = seqpacket::receive::<DaemonMessage>(self.socket.as_fd());
        assert!(matches!(end, Err(PacketError::Closed)), "{end:?}");
    }

    /// Expects `Refused` and the end of the socket.
    fn is_refused(&self, status: Status, words: &[&str]) {
        match self.receive() {
            DaemonMessage::Refused {
                status: found,
                message,
            } => {
                assert_eq!(found, status, "{message}");
                for word in words {
                    assert!(message.contains(word), "{message:?} lacks {word:?}");
                }
            }
            other => panic!("{other:?}"),
        }
        self.is_closed();
    }

    /// Expects `Closing` for a protocol error and the end of the socket.
    fn is_faulted(&self, word: &str) {
        loop {
            match self.receive() {
                DaemonMessage::Closing { status, message } => {
                    assert_eq!(status, Status::ProtocolError);
                    assert!(message.contains(word), "{message:?} lacks {word:?}");
                    break;
                }
                DaemonMessage::Failed { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        self.is_closed();
    }

    fn is_failed(&self, message: &ClientMessage, status: Status, word: &str) {
        match self.ask(message) {
            DaemonMessage::Failed {
                status: found,
                message,
                ..
            } => {
                assert_eq!(found, status, "{message}");
                assert!(message.contains(word), "{message:?} lacks {word:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A sealed segment with a good header.
fn c2d() -> OwnedFd {
    let (fd, mapping) = create_segment("test C2D", SHAPE.total_bytes() as u64).unwrap();
    let header = SHAPE.header(C2D_MAGIC, [0; 16], 0);
    mapping.copy_in(0, bytemuck::bytes_of(&header)).unwrap();
    fd
}

fn hello_spec() -> Hello {
    Hello {
        protocol_min: 1,
        protocol_max: PROTOCOL_MAX,
        client_version: "0.0.1".into(),
        client_name: "tester".into(),
        c2d_bytes: SHAPE.total_bytes() as u64,
        completion_slots: 64,
    }
}

fn hello() -> ClientMessage {
    ClientMessage::Hello(hello_spec())
}

fn group(memory: MemoryRef) -> GroupLayout {
    let segment = SegmentLayout {
        memory,
        base: 8192,
        block_stride: 64,
        bytes: 64,
    };
    GroupLayout {
        group: 0,
        num_blocks: 16,
        segments: vec![segment],
        replicated: false,
    }
}

fn worker(groups: Vec<GroupLayout>) -> RegisterSpec {
    RegisterSpec {
        instance: "i1".into(),
        namespace: NamespaceSpec {
            model: "m".into(),
            dtype: "bf16".into(),
            hash_algorithm: "sha256".into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size: 2,
        rank: Some(1),
        mode: Mode::ReadWrite,
        groups,
    }
}

fn register(registration: RegisterSpec) -> ClientMessage {
    ClientMessage::Register {
        seq: 9,
        signals: None,
        registration: Box::new(registration),
    }
}

#[test]
fn a_client_is_welcomed_found_by_name_and_forgotten_when_it_leaves() {
    let rig = Rig::start();
    let (client, welcome, fds) = rig.session();
    assert_eq!((welcome.session, welcome.protocol), (1, PROTOCOL_MAX));
    assert_eq!(welcome.boot_id, "07".repeat(16));
    assert_eq!(welcome.daemon_pid, std::process::id());
    assert_eq!((welcome.lease_ttl_ms, welcome.index_bytes), (30_000, 4096));
    let [d2c, _eventfd, _pipe, _index] = <[OwnedFd; 4]>::try_from(fds).unwrap();
    let d2c = open_peer_segment(d2c.as_fd(), "D2C", welcome.d2c_bytes).unwrap();
    let state = d2c.atomic_u32(STATE_OFFSET).unwrap();
    assert_eq!(state.load(Ordering::Acquire), SessionState::Active as u32);
    wait_until(|| rig.link(1, "d2c").exists(), "the links");
    assert!(
        fs::read_link(rig.link(1, "c2d"))
            .unwrap()
            .starts_with("/proc")
    );
    drop(client);
    rig.wait_seen(&Seen::Closed(1, CloseReason::Left));
    wait_until(
        || rig.link(1, "c2d").symlink_metadata().is_err(),
        "the links' end",
    );
    assert_eq!(state.load(Ordering::Acquire), SessionState::Closed as u32);
    assert_eq!(rig.session().1.session, 2, "ids are never used twice");
}

#[test]
fn a_user_off_the_list_is_refused_by_name_and_counted() {
    let rig = Rig::with(|options| {
        options.rules = DomainRules::only([4242]);
        options.hello_timeout = Duration::from_millis(50);
    });
    let uid = rustix::process::geteuid().as_raw();
    let words = [format!("user {uid}"), format!("--allow-uid {uid}")];
    rig.connect()
        .is_refused(Status::PermissionDenied, &[&words[0], &words[1]]);
    assert_eq!(rig.node.counter(Counter::SessionsRefused), 1);
    assert!(rig.lane.seen().is_empty());
}

#[test]
fn a_refused_client_that_says_hello_first_still_reads_why() {
    let rig = Rig::with(|options| options.rules = DomainRules::only([4242]));
    let client = rig.connect();
    // Long enough for the refusal to be sent.
    std::thread::sleep(Duration::from_millis(50));
    let segment = c2d();
    client.send_fds(&hello(), &[segment.as_fd()]);
    client.is_refused(Status::PermissionDenied, &["--allow-uid"]);
}

#[test]
fn a_refused_client_that_says_nothing_is_closed() {
    let rig = Rig::with(|options| {
        options.rules = DomainRules::only([4242]);
        options.hello_timeout = Duration::from_millis(50);
    });
    rig.connect()
        .is_refused(Status::PermissionDenied, &["--allow-uid"]);
}

#[test]
fn a_connection_that_says_nothing_is_ended() {
    let rig = Rig::with(|options| options.hello_timeout = Duration::from_millis(50));
    rig.connect()
        .is_refused(Status::ProtocolError, &["no Hello came within 50ms"]);
}

#[test]
fn a_bad_opening_is_refused_with_the_reason() {
    let rig = Rig::start();
    let say = |message: &ClientMessage, fds: &[BorrowedFd<'_>]| {
        let client = rig.connect();
        client.send_fds(message, fds);
        client
    };
    let good = c2d();
    let newer = Hello {
        protocol_min: 7,
        protocol_max: 9,
        ..hello_spec()
    };
    say(&ClientMessage::Hello(newer), &[good.as_fd()])
        .is_refused(Status::VersionMismatch, &["protocol 7 to 9", "upgrade"]);
    let first = ClientMessage::Unregister {
        seq: 1,
        registration: 1,
    };
    say(&first, &[]).is_refused(Status::ProtocolError, &["must be Hello"]);
    say(&hello(), &[]).is_refused(Status::InvalidArgument, &["0 descriptors"]);
    let two = [good.as_fd(), good.as_fd()];
    say(&hello(), &two).is_refused(Status::InvalidArgument, &["2 descriptors"]);
    let named = Hello {
        client_name: "x\n".into(),
        ..hello_spec()
    };
    say(&ClientMessage::Hello(named), &[good.as_fd()]).is_refused(
        Status::InvalidArgument,
        &["client_name", "control characters"],
    );
    let short = Hello {
        c2d_bytes: 4096,
        ..hello_spec()
    };
    say(&ClientMessage::Hello(short), &[good.as_fd()])
        .is_refused(Status::InvalidArgument, &["C2D segment", "expected 4096"]);
    let odd = Hello {
        completion_slots: 65,
        ..hello_spec()
    };
    say(&ClientMessage::Hello(odd), &[good.as_fd()])
        .is_refused(Status::InvalidArgument, &["completion_slots: 65"]);
    let (blank, _) = create_segment("blank", SHAPE.total_bytes() as u64).unwrap();
    say(&hello(), &[blank.as_fd()]).is_refused(Status::InvalidArgument, &["magic"]);
    let (loose, _) = create_kv_region("loose", SHAPE.total_bytes() as u64).unwrap();
    say(&hello(), &[loose.as_fd()]).is_refused(Status::InvalidArgument, &["seals"]);
    let garbage = rig.connect();
    garbage.send_raw(b"{\"type\":");
    garbage.is_refused(Status::ProtocolError, &["no message"]);
    assert!(rig.lane.seen().is_empty(), "the lane heard of none of them");
}

#[test]
fn garbage_ends_the_session_that_sent_it_and_no_other() {
    let rig = Rig::start();
    let (bystander, ..) = rig.session();
    type Breach = (&'static str, fn(&Client));
    let breaches: [Breach; 5] = [
        ("no message", |client| client.send_raw(b"\xff\x00 garbage")),
        ("no message", |client| {
            client.send_raw(br#"{"type":"dance"}"#)
        }),
        ("beyond", |client| {
            client.send_raw(&vec![b' '; MAX_MESSAGE_BYTES + 1])
        }),
        ("a second time", |client| client.send(&hello())),
        ("descriptors", |client| {
            let fd = c2d();
            let message = ClientMessage::Unregister {
                seq: 1,
                registration: 1,
            };
            client.send_fds(&message, &[fd.as_fd()]);
        }),
    ];
    for (word, breach) in breaches {
        let (client, welcome, _fds) = rig.session();
        breach(&client);
        client.is_faulted(word);
        rig.wait_seen(&Seen::Closed(welcome.session, CloseReason::Faulted));
    }
    bystander.is_failed(
        &ClientMessage::Unregister {
            seq: 1,
            registration: 1,
        },
        Status::UnknownRegistration,
        "registration 1",
    );
}

#[test]
fn the_reason_arrives_although_the_client_has_sent_more() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    for _ in 0..50 {
        // Sending ends with the session, which may be any moment.
        let _ = rustix::net::send(&client.socket, b"garbage", rustix::net::SendFlags::NOSIGNAL);
    }
    client.is_faulted("no message");
}

#[test]
fn the_socket_does_not_end_before_the_last_copy() {
    let rig = Rig::start();
    let (client, welcome, _fds) = rig.session();
    let copies = rig.lane.copies.lock().unwrap();
    client.send_raw(b"garbage");
    match client.receive() {
        DaemonMessage::Closing { .. } => {}
        other => panic!("{other:?}"),
    }
    rig.wait_seen(&Seen::Closed(welcome.session, CloseReason::Faulted));
    // The client may use the blocks of unfinished loads again once it sees the end.
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    let mut fds = [rustix::event::PollFd::new(
        &client.socket,
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(rustix::event::poll(&mut fds, Some(&now)), Ok(0));
    drop(copies);
    client.is_closed();
}

#[test]
fn a_client_that_does_not_read_is_ended_and_nobody_waits_for_it() {
    let rig = Rig::start();
    let (deaf, welcome, _fds) = rig.session();
    let (bystander, ..) = rig.session();
    let limit = Some(Duration::from_millis(500));
    sockopt::set_socket_timeout(&deaf.socket, sockopt::Timeout::Send, limit).unwrap();
    let message = ClientMessage::RemoveRegion { seq: 1, region: 1 };
    for _ in 0..100_000 {
        if seqpacket::send(deaf.socket.as_fd(), &message, &[]).is_err() {
            break;
        }
    }
    rig.wait_seen(&Seen::Closed(welcome.session, CloseReason::Faulted));
    bystander.is_failed(&message, Status::InvalidArgument, "region 1");
}

#[test]
fn regions_are_checked_counted_and_kept_while_used() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let bytes = 64 << 10;
    let (region, _map) = create_kv_region("kv", bytes).unwrap();
    let add = |seq, region| ClientMessage::AddRegion { seq, region, bytes };
    let remove = |region| ClientMessage::RemoveRegion { seq: 5, region };
    let failed = |message: &ClientMessage, status, word: &str| {
        client.send_fds(message, &[region.as_fd()]);
        match client.receive() {
            DaemonMessage::Failed {
                status: found,
                message,
                ..
            } => {
                assert_eq!(found, status, "{message}");
                assert!(message.contains(word), "{message}");
            }
            other => panic!("{other:?}"),
        }
    };
    client.send_fds(&add(3, 1), &[region.as_fd()]);
    assert_eq!(client.receive(), DaemonMessage::Done { seq: 3 });
    failed(&add(4, 1), Status::InvalidArgument, "exists already");
    let huge = ClientMessage::AddRegion {
        seq: 1,
        region: 2,
        bytes: MAX_REGION_BYTES,
    };
    failed(&huge, Status::Limit, "one session");
    let long = ClientMessage::AddRegion {
        seq: 1,
        region: 2,
        bytes: bytes + 1,
    };
    failed(&long, Status::InvalidArgument, "ftruncate");
    client.is_failed(&add(4, 2), Status::InvalidArgument, "0 descriptors");
    client.is_failed(&remove(9), Status::InvalidArgument, "no region 9");

    let registered = client.ask(&register(worker(vec![group(MemoryRef::Region(1))])));
    assert_eq!(
        registered,
        DaemonMessage::Registered {
            seq: 9,
            registration: 1,
            signals: false,
        }
    );
    client.is_failed(
        &remove(1),
        Status::InvalidArgument,
        "used by 1 registrations",
    );
    let unregister = ClientMessage::Unregister {
        seq: 6,
        registration: 1,
    };
    assert_eq!(client.ask(&unregister), DaemonMessage::Done { seq: 6 });
    assert_eq!(client.ask(&remove(1)), DaemonMessage::Done { seq: 5 });
    client.is_failed(&unregister, Status::UnknownRegistration, "registration 1");
}

#[test]
fn each_bad_registration_is_refused_before_the_lane_hears_of_it() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let good = || worker(vec![group(MemoryRef::Process)]);
    let mut flat = group(MemoryRef::Process);
    flat.segments[0].block_stride = 1;
    let cases = [
        (
            RegisterSpec {
                instance: String::new(),
                ..good()
            },
            Status::InvalidArgument,
            "instance",
        ),
        (
            RegisterSpec {
                instance: "x".repeat(200),
                ..good()
            },
            Status::InvalidArgument,
            "200",
        ),
        (
            RegisterSpec {
                namespace: NamespaceSpec::default(),
                ..good()
            },
            Status::InvalidArgument,
            "model",
        ),
        (
            RegisterSpec {
                world_size: 0,
                ..good()
            },
            Status::InvalidArgument,
            "world_size 0",
        ),
        (
            RegisterSpec {
                world_size: 129,
                ..good()
            },
            Status::InvalidArgument,
            "1 to 128",
        ),
        (
            RegisterSpec {
                rank: Some(2),
                ..good()
            },
            Status::InvalidArgument,
            "rank 2",
        ),
        (
            RegisterSpec {
                rank: None,
                ..good()
            },
            Status::InvalidArgument,
            "scheduler",
        ),
        (
            worker(Vec::new()),
            Status::InvalidArgument,
            "no cache groups",
        ),
        (
            worker(vec![group(MemoryRef::Process), group(MemoryRef::Process)]),
            Status::InvalidArgument,
            "given twice",
        ),
        (
            worker(vec![group(MemoryRef::Region(3))]),
            Status::BadLayout,
            "region 3",
        ),
        (worker(vec![flat]), Status::BadLayout, "stride"),
    ];
    for (spec, status, word) in cases {
        client.is_failed(&register(spec), status, word);
    }
    assert_eq!(rig.lane.seen(), vec![Seen::Opened(1)]);
    let registered = client.ask(&register(good()));
    assert_eq!(
        registered,
        DaemonMessage::Registered {
            seq: 9,
            registration: 1,
            signals: false,
        }
    );
    let scheduler = RegisterSpec {
        rank: None,
        groups: Vec::new(),
        ..good()
    };
    let registered = client.ask(&register(scheduler));
    assert_eq!(
        registered,
        DaemonMessage::Registered {
            seq: 9,
            registration: 2,
            signals: false,
        }
    );
    assert_eq!(
        rig.lane.seen()[1..],
        [
            Seen::Registered(1, "i1".into(), 1),
            Seen::Registered(1, "i1".into(), 0)
        ]
    );
}

#[test]
fn events_of_the_lane_reach_their_session() {
    let rig = Rig::start();
    let (one, ..) = rig.session();
    let (two, ..) = rig.session();
    let ready = LaneEvent::Ready {
        session: 2,
        registration: 3,
        namespace: 4,
    };
    rig.lane.events.send(ready).unwrap();
    rig.lane
        .events
        .send(LaneEvent::NotReady {
            session: 2,
            registration: 3,
        })
        .unwrap();
    rig.lane
        .events
        .send(LaneEvent::Fault {
            session: 1,
            message: "slot 5".into(),
        })
        .unwrap();
    assert_eq!(
        two.receive(),
        DaemonMessage::Ready {
            registration: 3,
            namespace: 4
        }
    );
    assert_eq!(two.receive(), DaemonMessage::NotReady { registration: 3 });
    one.is_faulted("slot 5");
    rig.wait_seen(&Seen::Closed(1, CloseReason::Faulted));
}

#[test]
fn one_session_too_many_is_refused_until_another_leaves() {
    let rig = Rig::with(|options| options.max_sessions = 1);
    let (first, ..) = rig.session();
    rig.connect()
        .is_refused(Status::Limit, &["1 sessions", "--max-sessions"]);
    drop(first);
    rig.wait_seen(&Seen::Closed(1, CloseReason::Left));
    wait_until(
        || rig.control.shared.places.available_permits() == 1,
        "the place",
    );
    rig.session();
}

#[test]
fn a_stop_shows_draining_then_closes_every_session() {
    let mut rig = Rig::start();
    let (client, welcome, fds) = rig.session();
    let d2c = open_peer_segment(fds[0].as_fd(), "D2C", welcome.d2c_bytes).unwrap();
    let state = || {
        d2c.atomic_u32(STATE_OFFSET)
            .unwrap()
            .load(Ordering::Acquire)
    };
    rig.control.announce_draining(Duration::from_secs(30));
    wait_until(
        || state() == SessionState::Draining as u32,
        "draining is shown",
    );
    assert!(rig.stop(), "every session went");
    let notice = DaemonMessage::Draining { limit_ms: 30_000 };
    assert_eq!(client.receive(), notice);
    match client.receive() {
        DaemonMessage::Closing {
            status: Status::Draining,
            ..
        } => {}
        other => panic!("{other:?}"),
    }
    client.is_closed();
    rig.wait_seen(&Seen::Closed(1, CloseReason::Stopping));
    assert_eq!(state(), SessionState::Closed as u32);
}
