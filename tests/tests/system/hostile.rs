//! Clients that break every rule: their own session ends with a named reason, and nobody else
//! notices.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use pegaflow::Status;
use pegaflow_shm::control::{ClientMessage, DaemonMessage, Hello, PROTOCOL_MAX};
use pegaflow_shm::desc::{Op, Submission, flags};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::segment::{
    CONSUMED_OFFSET, SLEEP_EPOCH_OFFSET, SLOT_BYTES, SLOTS_OFFSET, SegmentShape,
};
use pegaflow_tests::content::{Stream, hashes};
use pegaflow_tests::raw::{RawClient, RawSocket, hello, segment};
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{Daemon, SOON, trials};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const SHAPE: SegmentShape = SegmentShape {
    slots: 64,
    arena_chunks: 4,
};

/// A daemon, and a worker that must not notice anything.
struct Scene {
    worker: Worker,
    key: u64,
    daemon: Daemon,
}

impl Scene {
    fn new() -> Scene {
        let daemon = Daemon::start();
        let worker = Worker::ready(daemon.options(), WorkerSpec::default());
        worker.save(&hashes(1, 8));
        Scene {
            worker,
            key: 0,
            daemon,
        }
    }

    /// The worker is served as before.
    fn check(&mut self, after: &str) {
        assert!(
            self.daemon.is_alive(),
            "the daemon died after {after}\n{}",
            self.daemon.log()
        );
        self.key += 1;
        assert_eq!(
            self.worker.fetch(self.key, &hashes(1, 8)),
            8,
            "after {after}"
        );
        assert_eq!(self.worker.client.stats().disconnects, 0, "after {after}");
    }

    /// All sessions but the worker's end.
    fn all_gone(&self, after: &str) {
        assert!(
            self.daemon.gauge_becomes(Gauge::Sessions, 1),
            "after {after}"
        );
    }
}

#[test]
fn garbage_on_the_socket_ends_that_socket_only() {
    let mut scene = Scene::new();
    let packets: [&[u8]; 7] = [
        b"",
        b"\0",
        b"hello",
        b"{}",
        br#"{"type":"hello"}"#,
        br#"{"type":"register","seq":1}"#,
        &[0xFF; 4096],
    ];
    for packet in packets {
        let socket = RawSocket::connect(&scene.daemon.socket());
        socket.send_bytes(packet);
        let said = format!("{:?}", socket.last_words());
        assert!(said.contains("Refused") || said == "None", "{said}");
        scene.check("garbage");
    }
    let mut random = Stream::new(&[3]);
    for _ in 0..trials("PEGAFLOW_HOSTILE_TRIALS", 100) {
        let socket = RawSocket::connect(&scene.daemon.socket());
        let length = random.below(3000) as usize;
        let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        socket.send_bytes(&bytes);
    }
    scene.check("random garbage");
    scene.all_gone("garbage");
}

#[test]
fn a_client_that_says_nothing_holds_nobody_up() {
    let mut scene = Scene::new();
    let silent: Vec<RawSocket> = (0..50)
        .map(|_| RawSocket::connect(&scene.daemon.socket()))
        .collect();
    scene.check("silent connections");
    drop(silent);
    scene.check("their end");
}

#[track_caller]
fn refusal(scene: &Scene, hello: Hello, fds: &[OwnedFd]) -> (Status, String) {
    let socket = RawSocket::connect(&scene.daemon.socket());
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    socket.send(&ClientMessage::Hello(hello), &fds);
    match socket.receive() {
        Some((DaemonMessage::Refused { status, message }, _)) => (status, message),
        other => panic!("not refused: {other:?}\n{}", scene.daemon.log()),
    }
}

#[test]
fn a_version_without_common_ground_is_refused_by_number() {
    let mut scene = Scene::new();
    let bytes = SHAPE.total_bytes() as u64;
    let newer = PROTOCOL_MAX + 1;
    for (protocol_min, protocol_max) in [(newer, newer + 5), (0, 0), (5, 1)] {
        let hello = Hello {
            protocol_min,
            protocol_max,
            ..hello(bytes)
        };
        let (status, message) = refusal(&scene, hello, &[segment(SHAPE).0]);
        assert_eq!(status, Status::VersionMismatch, "{message}");
        assert!(message.contains(&PROTOCOL_MAX.to_string()), "{message}");
    }
    scene.check("wrong versions");
    scene.all_gone("wrong versions");
}

#[test]
fn a_segment_that_could_hurt_is_refused() {
    let mut scene = Scene::new();
    let bytes = SHAPE.total_bytes() as u64;
    let unsealed = memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&unsealed, bytes).expect("sized");
    let disk = tempfile::tempfile().expect("a file");
    disk.set_len(bytes).expect("sized");
    let (pipe, _writer) = rustix::pipe::pipe().expect("a pipe");
    let cases: [(&str, u64, Vec<OwnedFd>); 9] = [
        ("no descriptor", bytes, vec![]),
        (
            "two descriptors",
            bytes,
            vec![segment(SHAPE).0, segment(SHAPE).0],
        ),
        ("an unsealed memfd", bytes, vec![unsealed]),
        ("a file on disk", bytes, vec![disk.into()]),
        ("a pipe", bytes, vec![pipe]),
        (
            "a segment shorter than announced",
            bytes + 4096,
            vec![segment(SHAPE).0],
        ),
        (
            "a segment longer than announced",
            bytes - 4096,
            vec![segment(SHAPE).0],
        ),
        ("no bytes", 0, vec![segment(SHAPE).0]),
        ("a huge announcement", u64::MAX, vec![segment(SHAPE).0]),
    ];
    for (what, announced, fds) in cases {
        let (status, message) = refusal(&scene, hello(announced), &fds);
        assert_ne!(status, Status::Ok);
        assert!(!message.is_empty(), "{what}");
        scene.check(what);
    }
    scene.all_gone("bad segments");
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    let mut scene = Scene::new();
    let bytes = SHAPE.total_bytes() as u64;
    let mut random = Stream::new(&[9]);
    for _ in 0..trials("PEGAFLOW_HOSTILE_TRIALS", 60) {
        let (fd, mapping) = segment(SHAPE);
        // Any field but the boot and session id, which are zero here and mean nothing.
        let places = [0, 1, 2, 3, 7, 8, 9, 10];
        let at = places[random.below(places.len() as u64) as usize] * 8;
        let word = mapping.atomic_u64(at).expect("in the header");
        let before = word.load(pegaflow_shm::sync::Ordering::Relaxed);
        let after = before ^ (1 << random.below(64)) ^ (1 << random.below(64)) ^ (1 << 40);
        word.store(after, pegaflow_shm::sync::Ordering::Relaxed);
        let socket = RawSocket::connect(&scene.daemon.socket());
        socket.send(&ClientMessage::Hello(hello(bytes)), &[fd.as_fd()]);
        if let Some((answer, _)) = socket.receive() {
            let tolerated = at == 8 || at == 24;
            let refused = matches!(answer, DaemonMessage::Refused { .. });
            assert!(
                refused || tolerated,
                "word {at}: {before:#x} as {after:#x}: {answer:?}"
            );
        }
    }
    scene.check("bad headers");
    scene.all_gone("bad headers");
}

/// Waits for the daemon's last words to a raw client and its socket's end.
#[track_caller]
fn closing(client: &RawClient) -> (Status, String) {
    match client.socket.last_words() {
        Some(DaemonMessage::Closing { status, message }) => (status, message),
        other => panic!("no reason given: {other:?}"),
    }
}

#[test]
fn a_correct_client_without_the_library_is_served() {
    let mut scene = Scene::new();
    let mut client = RawClient::open(&scene.daemon.socket());
    for request_id in 1..=300 {
        client.push(Submission {
            request_id,
            ..nop()
        });
        client.ring();
        let done = client.pop(SOON).expect("an answer");
        assert_eq!((done.request_id, done.status()), (request_id, Status::Ok));
    }
    scene.check("a raw client");
}

fn nop() -> Submission {
    Submission::from_body([Op::Nop as u64, 0, 0, 0, 0, 0, 0])
}

#[test]
fn every_malformed_descriptor_ends_the_session_with_its_name() {
    let mut scene = Scene::new();
    let good = Submission {
        request_id: 7,
        ..nop()
    };
    let save = Submission {
        op: Op::Save as u8,
        registration: 1,
        count: 1,
        total: 1,
        ..good
    };
    let arena = SHAPE.arena_bytes() as u32;
    let cases = [
        (Submission { op: 99, ..good }, "unknown operation 99"),
        (Submission { op: 0, ..good }, "unknown operation 0"),
        (
            Submission {
                flags: 0x80,
                ..save
            },
            "unknown flag bits",
        ),
        (
            Submission {
                request_id: 0,
                ..good
            },
            "request id 0",
        ),
        (
            Submission {
                count: 2,
                total: 1,
                ..save
            },
            "chunk of 2 items in a request of 1",
        ),
        (
            Submission {
                payload_offset: arena,
                payload_bytes: 36,
                ..save
            },
            "does not lie in the arena",
        ),
        (
            Submission {
                payload_offset: u32::MAX - 7,
                payload_bytes: 64,
                ..save
            },
            "does not lie in the arena",
        ),
        (
            Submission {
                payload_offset: 4,
                payload_bytes: 36,
                ..save
            },
            "does not lie in the arena",
        ),
        (
            Submission {
                payload_bytes: 8,
                ..good
            },
            "takes no payload",
        ),
        (
            Submission {
                payload_bytes: 35,
                ..save
            },
            "does not hold 1 items",
        ),
    ];
    for (submission, words) in cases {
        let mut client = RawClient::open(&scene.daemon.socket());
        client.push(submission);
        client.ring();
        // A registration that is not there may be answered before its payload is looked at.
        let answered = client.pop(Duration::from_millis(300));
        if submission.registration == 1
            && answered.is_some_and(|done| done.status() == Status::UnknownRegistration)
        {
            continue;
        }
        let (status, message) = closing(&client);
        assert_eq!(status, Status::ProtocolError, "{message}");
        assert!(
            message.contains(words),
            "`{message}` does not say `{words}`"
        );
        scene.check(words);
    }
    scene.all_gone("malformed descriptors");
    assert!(scene.daemon.counter_reaches(Counter::SessionsFaulted, 6));
}

#[test]
fn an_id_used_twice_and_chunks_that_contradict_end_the_session() {
    let mut scene = Scene::new();
    let chunk = Submission {
        op: Op::Query as u8,
        flags: flags::MORE,
        request_id: 5,
        payload_bytes: 32,
        count: 1,
        total: 3,
        ..nop()
    };
    let pairs = [
        (chunk, Submission { total: 4, ..chunk }),
        (
            chunk,
            Submission {
                count: 3,
                payload_bytes: 96,
                ..chunk
            },
        ),
        (
            chunk,
            Submission {
                op: Op::Load as u8,
                payload_bytes: 4,
                ..chunk
            },
        ),
        (chunk, Submission { group: 7, ..chunk }),
        (chunk, Submission { flags: 0, ..chunk }),
    ];
    for (first, second) in pairs {
        let mut client = RawClient::open(&scene.daemon.socket());
        client.push(first);
        client.push(second);
        client.ring();
        // Either the session ends, or the request is answered as one that names no registration.
        if client.pop(Duration::from_millis(300)).is_none() {
            let (status, _) = closing(&client);
            assert_eq!(status, Status::ProtocolError);
        }
        scene.check("contradicting chunks");
    }
    scene.all_gone("contradicting chunks");
}

#[test]
fn more_requests_than_the_completion_ring_holds_end_the_session() {
    let mut scene = Scene::new();
    let mut client = RawClient::open(&scene.daemon.socket());
    // Requests that stay unfinished: each announces a second chunk that never comes.
    for request_id in 1..=64 {
        let unfinished = Submission {
            op: Op::Query as u8,
            flags: flags::MORE,
            request_id,
            payload_bytes: 32,
            count: 1,
            total: 2,
            ..nop()
        };
        client.push(unfinished);
    }
    client.ring();
    assert!(
        client
            .pop(Duration::from_millis(300))
            .is_none_or(|done| !done.status().is_ok())
    );
    for request_id in 1..200 {
        client.push(Submission {
            request_id: request_id + 1000,
            ..nop()
        });
        client.ring();
        std::thread::sleep(Duration::from_micros(200));
    }
    let (status, message) = closing(&client);
    assert_eq!(status, Status::ProtocolError, "{message}");
    scene.check("exceeded credit");
    scene.all_gone("exceeded credit");
}

#[test]
fn a_scribbled_ring_ends_that_session_only() {
    let mut scene = Scene::new();
    let mut random = Stream::new(&[11]);
    for _ in 0..trials("PEGAFLOW_HOSTILE_TRIALS", 100) {
        let mut client = RawClient::open(&scene.daemon.socket());
        for request_id in 1..random.below(20) + 1 {
            client.push(Submission {
                request_id,
                ..nop()
            });
        }
        let words = SHAPE.total_bytes() as u64 / 8;
        for _ in 0..random.below(200) + 1 {
            let at = match random.below(4) {
                0 => SLOTS_OFFSET as u64 / 8 + random.below(64) * SLOT_BYTES as u64 / 8,
                1 => SLEEP_EPOCH_OFFSET as u64 / 8 + random.below(32),
                _ => random.below(words),
            };
            let value = match random.below(3) {
                0 => random.below(130),
                1 => u64::MAX - random.below(3),
                _ => random.next(),
            };
            client.write_word(at as usize * 8, value);
        }
        client.ring();
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
    scene.check("scribbled rings");
    scene.all_gone("scribbled rings");
    assert!(scene.daemon.gauge_becomes(Gauge::Requests, 0));
}

#[test]
fn random_descriptors_with_correct_numbers_harm_nobody() {
    let mut scene = Scene::new();
    let mut random = Stream::new(&[13]);
    for _ in 0..trials("PEGAFLOW_HOSTILE_TRIALS", 100) {
        let mut client = RawClient::open(&scene.daemon.socket());
        for request_id in 1..=random.below(60) + 1 {
            let mut submission = Submission::from_body(std::array::from_fn(|_| random.next()));
            submission.op = random.below(9) as u8;
            if random.below(4) > 0 {
                submission.flags &= flags::KNOWN;
                submission.request_id = request_id;
                submission.registration = random.below(2) as u32;
                submission.group = random.below(2) as u16;
                submission.payload_offset = random.below(5) as u32 * (16 << 10);
                submission.payload_bytes = random.below(17 << 10) as u32;
                submission.count = random.below(500) as u32;
                submission.total = submission.count + random.below(2) as u32;
            }
            client.push(submission);
        }
        client.ring();
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
    scene.check("random descriptors");
    scene.all_gone("random descriptors");
    assert!(scene.daemon.gauge_becomes(Gauge::Requests, 0));
}

#[test]
fn a_slot_that_is_skipped_ends_the_session_within_a_bound() {
    let mut scene = Scene::new();
    let mut client = RawClient::open(&scene.daemon.socket());
    client.push(Submission {
        request_id: 1,
        ..nop()
    });
    client.push(Submission {
        request_id: 2,
        ..nop()
    });
    // Takes the first back, as a thread that claimed it and vanished would have left it.
    client.write_word(SLOTS_OFFSET, 0);
    client.ring();
    // The daemon may have been quick enough to read it before.
    if client.pop(Duration::from_millis(100)).is_none() {
        let (status, message) = closing(&client);
        assert_eq!(status, Status::ProtocolError, "{message}");
    }
    scene.check("a skipped slot");
}

#[test]
fn a_consumer_that_lies_about_its_progress_ends_its_session_only() {
    let mut scene = Scene::new();
    for progress in [u64::MAX, 1 << 40, 65] {
        let mut client = RawClient::open(&scene.daemon.socket());
        client.write_word(CONSUMED_OFFSET, progress);
        for request_id in 1..=200 {
            client.push(Submission {
                request_id,
                ..nop()
            });
            client.ring();
            std::thread::sleep(Duration::from_micros(100));
        }
        drop(client);
        scene.check("a wrong progress word");
    }
    scene.all_gone("wrong progress words");
}

#[test]
fn a_doorbell_made_blocking_and_full_stops_nobody() {
    let mut scene = Scene::new();
    let mut client = RawClient::open(&scene.daemon.socket());
    let flags = rustix::fs::fcntl_getfl(&client.bell).expect("flags");
    rustix::fs::fcntl_setfl(&client.bell, flags - rustix::fs::OFlags::NONBLOCK).expect("set");
    rustix::io::write(&client.bell, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
    // Says that it sleeps, so that the daemon rings it at every completion, and never reads.
    for round in 1..=500u32 {
        let word = client
            .c2d
            .atomic_u32(SLEEP_EPOCH_OFFSET)
            .expect("in the segment");
        word.store(round, pegaflow_shm::sync::Ordering::Release);
        client.push(Submission {
            request_id: u64::from(round),
            ..nop()
        });
        let mut count = [0; 8];
        rustix::io::read(&client.bell, &mut count).expect("drained");
        rustix::io::write(&client.bell, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
        if client.pop(Duration::from_secs(2)).is_none() {
            break;
        }
    }
    scene.check("a doorbell that blocks");
    drop(client);
    scene.all_gone("a doorbell that blocks");
}

#[test]
fn bells_without_messages_cost_the_daemon_little() {
    let mut scene = Scene::new();
    let client = RawClient::open(&scene.daemon.socket());
    for _ in 0..10_000 {
        client.ring();
    }
    scene.check("bells without messages");
}

#[test]
fn the_segments_a_client_holds_cannot_be_written_or_cut() {
    let scene = Scene::new();
    let socket = RawSocket::connect(&scene.daemon.socket());
    let (fd, _mapping) = segment(SHAPE);
    let bytes = SHAPE.total_bytes() as u64;
    socket.send(&ClientMessage::Hello(hello(bytes)), &[fd.as_fd()]);
    let Some((DaemonMessage::Welcome(_), fds)) = socket.receive() else {
        panic!("no welcome")
    };
    let (d2c, index) = (&fds[0], &fds[3]);
    assert!(ftruncate(d2c, 0).is_err(), "the daemon's segment is sealed");
    assert!(rustix::io::write(d2c, b"x").is_err());
    assert!(
        ftruncate(index, 0).is_err(),
        "the index is open for reading only"
    );
    assert!(rustix::io::write(index, b"x").is_err());
    assert!(
        ftruncate(&fd, 0).is_err(),
        "nor can a client cut its own under the daemon"
    );
}
