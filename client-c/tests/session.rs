//! Sessions against a small in-process daemon: the handshake, faults on either side, the daemon going
//! away and coming back, waiting and event loops.

mod fake;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fake::{Fake, Rudeness, wait_readable};
use pegaflow::{
    BlockHash, Client, Completion, Error, GroupMemory, HostMemory, MissReason, Mode, NamespaceSpec,
    Op, Options, Registration, RegistrationId, SegmentMemory, State, Status,
};

const LONG: Duration = Duration::from_secs(10);

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("test.sock")
    }

    fn options(&self) -> Options {
        Options {
            socket: Some(self.socket()),
            client_name: "test".into(),
            autostart: Some(false),
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(50),
            ..Options::default()
        }
    }

    fn client(&self) -> Client {
        Client::connect(self.options()).unwrap()
    }
}

fn hash(number: u32) -> BlockHash {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&number.to_le_bytes());
    hash
}

fn hashes(range: std::ops::Range<u32>) -> Vec<BlockHash> {
    range.map(hash).collect()
}

fn registration(groups: Vec<GroupMemory>) -> Registration {
    Registration {
        instance: "engine-0".into(),
        namespace: NamespaceSpec {
            model: "m".into(),
            dtype: "bfloat16".into(),
            hash_algorithm: "sha256".into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size: 1,
        rank: (!groups.is_empty()).then_some(0),
        mode: Mode::ReadWrite,
        groups,
    }
}

const PAGE: usize = 4096;

fn worker(client: &Client, memory: &HostMemory) -> RegistrationId {
    let blocks = (memory.len() / PAGE) as u32;
    let segment = SegmentMemory::in_host(memory, 0, PAGE as u64, PAGE as u64);
    let group = |group| GroupMemory {
        group,
        num_blocks: blocks,
        segments: vec![segment.clone()],
    };
    let id = client
        .register(&registration(vec![group(0), group(1)]))
        .unwrap();
    client.wait_ready(id, LONG).unwrap();
    id
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn each_operation_is_answered() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = place.client();
    assert_eq!(client.state(), State::Connected);
    assert_eq!(client.session_info().unwrap().node, "fake");
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let id = worker(&client, &memory);
    for block in 0..8 {
        memory
            .write(block * PAGE, &[block as u8 + 1; PAGE])
            .unwrap();
    }
    let names = hashes(0..8);
    let saved = client
        .save(id, 0, &names, &[0, 1, 2, 3, 4, 5, 6, 7])
        .unwrap();
    let saved = client.wait(saved, LONG).unwrap();
    assert!(saved.is_ok());
    assert_eq!(
        (saved.op, saved.count, saved.bytes),
        (Op::Save, 8, 8 * PAGE as u64)
    );
    assert_eq!(client.probe(id, 0, &hashes(0..20)).unwrap(), 8);
    assert_eq!(client.probe(id, 1, &hashes(0..20)).unwrap(), 0);
    let query = client.query(id, 0, 77, &hashes(0..20), 500).unwrap();
    let hit = client.wait(query, LONG).unwrap();
    assert_eq!(
        (hit.count, hit.reason, hit.arg0),
        (8, MissReason::Absent, 500)
    );
    assert!(hit.lease != 0 && hit.bitmap.is_none());
    let loaded = client.load(id, 0, hit.lease, 2, &[40, 42, 41]).unwrap();
    assert_eq!(client.wait(loaded, LONG).unwrap().count, 3);
    let mut bytes = [0; PAGE];
    for (block, value) in [(40, 3), (42, 4), (41, 5)] {
        memory.read(block * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes, [value; PAGE]);
    }
    let released = client.release(id, hit.lease).unwrap();
    assert!(client.wait(released, LONG).unwrap().is_ok());
    let again = client.release(id, hit.lease).unwrap();
    assert_eq!(
        client.wait(again, LONG).unwrap().status,
        Status::UnknownLease
    );
    let renewed = client.renew(id, 1, 100).unwrap();
    assert_eq!(client.wait(renewed, LONG).unwrap().op, Op::Renew);
    client.unregister(id).unwrap();
    assert!(matches!(
        client.probe(id, 0, &names),
        Err(Error::UnknownRegistration(_))
    ));
    let stats = client.stats();
    assert_eq!((stats.outstanding, stats.probe_hits), (0, 8));
    assert_eq!(
        (stats.saved_bytes, stats.loaded_bytes),
        (8 * PAGE as u64, 3 * PAGE as u64)
    );
}

#[test]
fn memory_of_the_process_itself_can_be_registered() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = place.client();
    let mut memory = vec![0u8; 16 * PAGE];
    let base = memory.as_mut_ptr();
    // SAFETY: the memory lives until the registration has ended and is reached through `base` only.
    let segment = unsafe { SegmentMemory::at(base, PAGE as u64, PAGE as u64) };
    let group = GroupMemory {
        group: 0,
        num_blocks: 16,
        segments: vec![segment],
    };
    let id = client.register(&registration(vec![group])).unwrap();
    // SAFETY: in bounds; the daemon does not touch it now.
    unsafe { base.write_bytes(7, PAGE) };
    let saved = client.save(id, 0, &[hash(1)], &[0]).unwrap();
    assert!(client.wait(saved, LONG).unwrap().is_ok());
    client.wait_ready(id, LONG).unwrap();
    let query = client.query(id, 0, 1, &[hash(1)], 0).unwrap();
    let lease = client.wait(query, LONG).unwrap().lease;
    let loaded = client.load(id, 0, lease, 0, &[9]).unwrap();
    assert!(client.wait(loaded, LONG).unwrap().is_ok());
    // SAFETY: in bounds; the load is done.
    let page = unsafe { std::slice::from_raw_parts(base.add(9 * PAGE), PAGE) };
    assert!(page.iter().all(|byte| *byte == 7));
    client.unregister(id).unwrap();
}

#[test]
fn long_lists_arrive_whole_and_in_order() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(PAGE).unwrap();
    let segment = SegmentMemory::in_host(&memory, 0, 1, 1);
    let group = |group| GroupMemory {
        group,
        num_blocks: 4096,
        segments: vec![segment.clone()],
    };
    let id = client
        .register(&registration(vec![group(0), group(1)]))
        .unwrap();
    client.wait_ready(id, LONG).unwrap();
    let limits = client.limits();
    assert_eq!((limits.query_hashes, limits.requests), (131_072, 1024));
    let names = hashes(0..limits.save_blocks as u32);
    let blocks: Vec<u32> = (0..names.len() as u32).map(|at| at * 7 % 4096).collect();
    let saved = client.save(id, 1, &names, &blocks).unwrap();
    assert_eq!(
        client.wait(saved, LONG).unwrap().count as usize,
        names.len()
    );
    assert!(fake.world.submissions.load(Ordering::Relaxed) >= 36);
    assert_eq!(client.probe(id, 1, &names).unwrap() as usize, names.len());
    let too_long = hashes(0..limits.save_blocks as u32 + 1);
    let ids = vec![0; too_long.len()];
    let refused = client.save(id, 1, &too_long, &ids).unwrap_err();
    assert_eq!(refused.status(), Status::TooMany);
    assert!(refused.to_string().contains("the arena"), "{refused}");
}

#[test]
fn a_membership_query_tells_each_position() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    for number in (0..1000).step_by(3) {
        fake.world
            .store
            .lock()
            .unwrap()
            .put(1, hash(number), vec![1]);
    }
    let client = place.client();
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let id = worker(&client, &memory);
    let names = hashes(0..1000);
    let expected = |at: usize| at % 3 == 0;
    for round in 0..100 {
        let query = client.query(id, 1, round, &names, 0).unwrap();
        let done = client.wait(query, LONG).unwrap();
        let bitmap = done.bitmap.unwrap();
        assert_eq!((done.count, bitmap.len()), (334, 16));
        for at in 0..1024 {
            assert_eq!(
                bitmap[at / 64] >> (at % 64) & 1 == 1,
                at < 1000 && expected(at),
                "{at}"
            );
        }
    }
    let mut bitmap = [u64::MAX; 17];
    assert_eq!(
        client.probe_membership(id, 1, &names, &mut bitmap).unwrap(),
        334
    );
    assert!(
        (0..1088).all(|at| (bitmap[at / 64] >> (at % 64) & 1 == 1) == (at < 1000 && expected(at)))
    );
    assert!(
        client
            .probe_membership(id, 1, &names, &mut bitmap[..2])
            .is_err()
    );
    // 128 KiB of bitmaps at once is half of the result arena of 32 KiB: some have to wait.
    let mut taken = vec![Completion::default(); 64];
    let long = hashes(0..60_000);
    let first = client.query(id, 1, 1, &long, 0).unwrap();
    let mut queued = 1;
    let refused = loop {
        match client.query(id, 1, 1, &long, 0) {
            Ok(_) => queued += 1,
            Err(error) => break error,
        }
        assert!(queued < 10);
    };
    assert_eq!(refused.status(), Status::Again);
    let mut seen = usize::from(client.wait(first, LONG).is_ok());
    until("all of them finish", || {
        seen += client.poll(&mut taken);
        seen == queued
    });
    assert!(client.query(id, 1, 1, &long, 0).is_ok());
}

#[test]
fn an_empty_list_completes_at_once() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(PAGE).unwrap();
    let id = worker(&client, &memory);
    for request in [
        client.query(id, 0, 1, &[], 0).unwrap(),
        client.save(id, 0, &[], &[]).unwrap(),
        client.load(id, 0, 1, 0, &[]).unwrap(),
    ] {
        let done = client.wait(request, Duration::ZERO).unwrap();
        assert!(done.is_ok() && done.count == 0 && done.lease == 0);
    }
    assert_eq!(fake.world.submissions.load(Ordering::Relaxed), 0);
    assert!(client.save(id, 0, &[hash(1)], &[]).is_err());
}

#[test]
fn refusals_and_malformed_welcomes_are_named() {
    let cases = [
        (
            Rudeness::Refuse(Status::PermissionDenied),
            Status::PermissionDenied,
            "refused for",
        ),
        (
            Rudeness::Refuse(Status::VersionMismatch),
            Status::VersionMismatch,
            "refused for",
        ),
        (
            Rudeness::FutureProtocol,
            Status::ProtocolError,
            "protocol version 99",
        ),
        (
            Rudeness::OtherBootId,
            Status::ProtocolError,
            "boot ids differ",
        ),
        (
            Rudeness::FewDescriptors,
            Status::ProtocolError,
            "2 descriptors",
        ),
        (Rudeness::Silent, Status::Timeout, "took longer"),
    ];
    for (rudeness, status, text) in cases {
        let place = Place::new();
        let _fake = Fake::start_with(&place.socket(), rudeness);
        let options = Options {
            connect_timeout: Duration::from_millis(200),
            ..place.options()
        };
        let error = Client::connect(options).unwrap_err();
        assert_eq!(error.status(), status, "{rudeness:?}: {error}");
        assert!(error.to_string().contains(text), "{rudeness:?}: {error}");
    }
}

#[test]
fn where_nobody_listens_the_error_says_what_to_do() {
    let place = Place::new();
    let error = Client::connect(place.options()).unwrap_err();
    assert_eq!(error.status(), Status::NoDaemon);
    assert!(error.to_string().contains("PEGAFLOW_AUTOSTART"), "{error}");
    let daemon = place.folder.path().join("no-such-daemon");
    let options = Options {
        autostart: Some(true),
        daemon: Some(daemon),
        ..place.options()
    };
    let error = Client::connect(options).unwrap_err();
    assert_eq!(error.status(), Status::NoDaemon);
    assert!(error.to_string().contains("no-such-daemon"), "{error}");
    let daemon = Some(PathBuf::from("/bin/false"));
    let options = Options {
        autostart: Some(true),
        daemon,
        ..place.options()
    };
    let error = Client::connect(options).unwrap_err();
    assert!(error.to_string().contains("ended with"), "{error}");
    let listens = place.folder.path().join("sleeper");
    std::fs::write(&listens, "#!/bin/sh\nsleep 2\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&listens, mode).unwrap();
    let connect_timeout = Duration::from_millis(100);
    let daemon = Some(listens);
    let options = Options {
        autostart: Some(true),
        daemon,
        connect_timeout,
        ..place.options()
    };
    let start = Instant::now();
    let error = Client::connect(options).unwrap_err();
    assert!(error.to_string().contains("does not listen"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn impossible_completions_end_the_session_and_every_request_is_answered() {
    let rude = [
        (Rudeness::UnknownRequest, "unknown request"),
        (Rudeness::WrongOperation, "operation"),
        (Rudeness::TooManyBlocks, "speaks of"),
        (Rudeness::UnknownReason, "miss reason"),
        (Rudeness::BrokenRing, "completion ring"),
    ];
    for (rudeness, text) in rude {
        let place = Place::new();
        let fake = Fake::start(&place.socket());
        let client = Client::connect(Options {
            reconnect: false,
            ..place.options()
        })
        .unwrap();
        let memory = client.alloc_host(PAGE).unwrap();
        let id = worker(&client, &memory);
        fake.world.set_rudeness(rudeness);
        let requests = [
            client.query(id, 0, 1, &hashes(0..10), 0).unwrap(),
            client.query(id, 1, 1, &hashes(0..10), 0).unwrap(),
        ];
        let start = Instant::now();
        for request in requests {
            let done = client.wait(request, LONG).unwrap();
            assert_eq!(done.status, Status::Disconnected, "{rudeness:?}");
            assert_eq!(done.reason, MissReason::Disconnected);
            assert!(
                done.bitmap
                    .is_none_or(|bitmap| bitmap.iter().all(|word| *word == 0))
            );
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{rudeness:?}");
        assert_eq!(client.state(), State::Closed);
        let error = client.nop().unwrap_err();
        assert_eq!(error.status(), Status::Disconnected);
        assert!(error.to_string().contains(text), "{rudeness:?}: {error}");
    }
}

#[test]
fn a_daemon_that_lies_about_its_progress_is_left() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let options = Options {
        reconnect: false,
        ring_slots: 16,
        ..place.options()
    };
    let client = Client::connect(options).unwrap();
    fake.world.set_rudeness(Rudeness::ConsumedAhead);
    let mut ended = false;
    for _ in 0..64 {
        match client.nop() {
            Ok(request) => ended |= !client.wait(request, LONG).unwrap().is_ok(),
            Err(error) => {
                assert_eq!(error.status(), Status::Disconnected);
                ended = true;
            }
        }
    }
    assert!(ended && client.state() == State::Closed);
}

#[test]
fn a_daemon_that_vanishes_answers_everything_and_comes_back() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let id = worker(&client, &memory);
    let saved = client.save(id, 0, &[hash(1)], &[0]).unwrap();
    assert!(client.wait(saved, LONG).unwrap().is_ok());
    assert_eq!(client.probe(id, 0, &[hash(1)]).unwrap(), 1);
    fake.world.set_rudeness(Rudeness::Mute);
    let pending: Vec<_> = (0..10).map(|_| client.nop().unwrap()).collect();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = pending
            .iter()
            .map(|request| scope.spawn(|| client.wait(*request, LONG)))
            .collect();
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        fake.vanish();
        for waiter in waiters {
            let done = waiter.join().unwrap().unwrap();
            assert_eq!(done.status, Status::Disconnected);
        }
        assert!(start.elapsed() < Duration::from_secs(1));
    });
    assert_eq!(client.state(), State::Disconnected);
    assert_eq!(
        client.probe(id, 0, &[hash(1)]).unwrap(),
        0,
        "a daemon that is gone is a miss"
    );
    let query = client.query(id, 0, 1, &[hash(1)], 0).unwrap();
    let missed = client.wait(query, Duration::ZERO).unwrap();
    assert_eq!((missed.status, missed.count), (Status::Disconnected, 0));
    assert_eq!(missed.reason, MissReason::Disconnected);
    let start = Instant::now();
    assert_eq!(
        client.save(id, 0, &[hash(1)], &[0]).unwrap_err().status(),
        Status::Disconnected
    );
    assert_eq!(
        client.load(id, 0, 1, 0, &[0]).unwrap_err().status(),
        Status::Disconnected
    );
    assert!(start.elapsed() < Duration::from_millis(100));
    // Memory made meanwhile is shared with the next daemon as well.
    let more = client.alloc_host(PAGE).unwrap();

    let fake = Fake::start(&place.socket());
    until("the client reconnects", || {
        client.state() == State::Connected
    });
    client.wait_ready(id, LONG).unwrap();
    assert_eq!(fake.world.regions.load(Ordering::Relaxed), 2);
    assert_eq!(fake.world.registrations.load(Ordering::Relaxed), 1);
    let saved = client.save(id, 0, &[hash(5)], &[0]).unwrap();
    assert!(client.wait(saved, LONG).unwrap().is_ok());
    assert_eq!(client.probe(id, 0, &[hash(5)]).unwrap(), 1);
    let stats = client.stats();
    assert_eq!((stats.disconnects, stats.reconnects), (1, 1));
    drop(more);
    until("the region is taken back", || {
        fake.world.regions.load(Ordering::Relaxed) == 1
    });
}

#[test]
fn a_session_that_ends_under_a_living_daemon_is_replaced() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(PAGE).unwrap();
    let id = worker(&client, &memory);
    for round in 1..=5 {
        fake.drop_sessions();
        until("the client notices", || client.stats().disconnects == round);
        until("the client reconnects", || {
            client.stats().reconnects == round
        });
        client.wait_ready(id, LONG).unwrap();
        let saved = client.save(id, 0, &[hash(round as u32)], &[0]).unwrap();
        assert!(client.wait(saved, LONG).unwrap().is_ok());
    }
}

#[test]
fn a_registration_that_is_refused_after_a_reconnect_is_tried_again() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(PAGE).unwrap();
    let id = worker(&client, &memory);
    *fake.world.refuse_register.lock().unwrap() = Some(Status::AlreadyRegistered);
    let refused = client.register(&registration(Vec::new())).unwrap_err();
    assert_eq!(refused.status(), Status::AlreadyRegistered);
    fake.drop_sessions();
    until("the client notices", || client.stats().disconnects == 1);
    until("the new session is used", || {
        client.save(id, 0, &[hash(1)], &[0]).unwrap_err().status() == Status::AlreadyRegistered
    });
    let query = client.query(id, 0, 1, &[hash(1)], 0).unwrap();
    assert_eq!(
        client.wait(query, LONG).unwrap().count,
        0,
        "until then it misses"
    );
    *fake.world.refuse_register.lock().unwrap() = None;
    until("the registration is back", || {
        client.save(id, 0, &[hash(1)], &[0]).is_ok()
    });
    until("the state says so", || client.state() == State::Connected);
}

#[test]
fn waiting_for_ready_has_a_bound() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    fake.world.never_ready.store(true, Ordering::Relaxed);
    let client = place.client();
    let id = client.register(&registration(Vec::new())).unwrap();
    let error = client
        .wait_ready(id, Duration::from_millis(20))
        .unwrap_err();
    assert_eq!(error.status(), Status::Timeout);
    assert_eq!(client.probe(id, 0, &[hash(1)]).unwrap(), 0);
    let unknown = client.wait_ready(RegistrationId(99), LONG).unwrap_err();
    assert_eq!(unknown.status(), Status::UnknownRegistration);
}

#[test]
fn a_full_ring_is_again_and_recovers() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    fake.world.set_rudeness(Rudeness::Mute);
    let options = Options {
        ring_slots: 16,
        completion_slots: 64,
        ..place.options()
    };
    let client = Client::connect(options).unwrap();
    let mut requests = Vec::new();
    let refused = loop {
        match client.nop() {
            Ok(request) => requests.push(request),
            Err(error) => break error,
        }
    };
    assert_eq!((refused.status(), requests.len()), (Status::Again, 12));
    assert!(refused.to_string().contains("submission ring"));
    assert!(client.stats().again > 0);
    fake.drop_sessions();
    for request in requests {
        assert_eq!(
            client.wait(request, LONG).unwrap().status,
            Status::Disconnected
        );
    }
    fake.world.set_rudeness(Rudeness::None);
    until("the client reconnects", || client.stats().reconnects >= 1);
    for _ in 0..1000 {
        let request = client.nop().unwrap();
        assert!(client.wait(request, LONG).unwrap().is_ok());
    }
}

#[test]
fn completions_that_nobody_consumes_hold_their_credit() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let options = Options {
        completion_slots: 16,
        ..place.options()
    };
    let client = Client::connect(options).unwrap();
    let requests: Vec<_> = (0..16).map(|_| client.nop().unwrap()).collect();
    let refused = client.nop().unwrap_err();
    assert_eq!(refused.status(), Status::Again);
    assert!(refused.to_string().contains("completion ring"));
    assert!(client.wait(requests[7], LONG).unwrap().is_ok());
    assert!(client.nop().is_ok());
    let mut out = vec![Completion::default(); 5];
    let mut seen = 0;
    until("the rest comes", || {
        seen += client.poll(&mut out);
        seen == 16
    });
    assert_eq!(client.stats().outstanding, 0);
}

#[test]
fn an_arena_without_room_is_again_and_one_too_small_is_too_many() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        arena_bytes: 2 * 16384,
        ..place.options()
    })
    .unwrap();
    let memory = client.alloc_host(PAGE).unwrap();
    let id = worker(&client, &memory);
    let refused = client.query(id, 0, 1, &hashes(0..1025), 0).unwrap_err();
    assert_eq!(refused.status(), Status::TooMany);
    assert!(refused.to_string().contains("1024"), "{refused}");
    fake.world.set_rudeness(Rudeness::Mute);
    client.query(id, 0, 1, &hashes(0..1024), 0).unwrap();
    let refused = client.query(id, 0, 1, &hashes(0..1), 0).unwrap_err();
    assert_eq!(refused.status(), Status::Again);
    assert!(refused.to_string().contains("arena"));
    assert!(client.nop().is_ok(), "what needs no arena goes on");
}

#[test]
fn threads_share_one_client() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        completion_slots: 16,
        ..place.options()
    })
    .unwrap();
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let id = worker(&client, &memory);
    let names = hashes(0..700);
    let client = &client;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let names = &names;
            scope.spawn(move || {
                for round in 0..500 {
                    let request = loop {
                        let submitted = if (round + thread) % 3 == 0 {
                            client.query(id, (thread % 2) as u16, round, names, 0)
                        } else {
                            client.nop()
                        };
                        match submitted {
                            Ok(request) => break request,
                            Err(Error::Again(_)) => std::thread::yield_now(),
                            Err(error) => panic!("{error}"),
                        }
                    };
                    let done = client.wait(request, LONG).unwrap();
                    assert!(done.is_ok() && done.request == request);
                }
            });
        }
    });
    let stats = client.stats();
    assert_eq!((stats.completed, stats.outstanding), (2000, 0));
    assert_eq!(client.poll(&mut [Completion::default()]), 0);
}

#[test]
fn a_wait_that_runs_out_leaves_the_request_to_others() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    fake.world.set_rudeness(Rudeness::Mute);
    let request = client.nop().unwrap();
    for bound in [
        Duration::ZERO,
        Duration::from_micros(10),
        Duration::from_millis(5),
    ] {
        let start = Instant::now();
        let error = client.wait(request, bound).unwrap_err();
        assert_eq!(error.status(), Status::Timeout);
        assert!(start.elapsed() < bound + Duration::from_millis(100));
    }
    fake.drop_sessions();
    let mut out = [Completion::default()];
    until("a poller gets it", || client.poll(&mut out) == 1);
    assert_eq!(
        (out[0].request, out[0].status),
        (request, Status::Disconnected)
    );
    assert_eq!(
        client.wait(request, LONG).unwrap_err().status(),
        Status::UnknownRequest
    );
}

#[test]
fn the_completion_descriptor_wakes_an_event_loop_every_time() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let fd = client.completion_fd();
    let mut out = vec![Completion::default(); 8];
    while client.poll(&mut out) > 0 {}
    assert!(!wait_readable(&fd, Duration::ZERO));
    for round in 0..500 {
        let request = client.nop().unwrap();
        assert!(wait_readable(&fd, LONG), "round {round}");
        let mut seen = 0;
        until("the completion comes", || {
            seen += client.poll(&mut out);
            seen == 1
        });
        assert_eq!(out[0].request, request);
        assert_eq!(client.poll(&mut out), 0);
    }
    assert!(
        !wait_readable(&fd, Duration::from_millis(1)),
        "asleep when nothing comes"
    );
    // Completions made here, without a daemon, wake it as well.
    let scheduler = client.register(&registration(Vec::new())).unwrap();
    client.query(scheduler, 0, 1, &[], 0).unwrap();
    assert!(wait_readable(&fd, LONG));
    assert_eq!(client.poll(&mut out), 1);
    assert_eq!(client.poll(&mut out), 0);
    assert!(!wait_readable(&fd, Duration::ZERO));
    fake.world.set_rudeness(Rudeness::Mute);
    let lost = client.nop().unwrap();
    fake.drop_sessions();
    assert!(wait_readable(&fd, LONG));
    until("the lost request comes", || client.poll(&mut out) == 1);
    assert_eq!(
        (out[0].request, out[0].status),
        (lost, Status::Disconnected)
    );
    fake.world.set_rudeness(Rudeness::None);
    until("the client reconnects", || client.stats().reconnects == 1);
    while client.poll(&mut out) > 0 {}
    let request = client.nop().unwrap();
    assert!(
        wait_readable(&fd, LONG),
        "the descriptor outlives the session"
    );
    until("it comes", || client.poll(&mut out) == 1);
    assert_eq!(out[0].request, request);
}

#[test]
fn an_event_loop_and_a_waiting_thread_take_nothing_from_each_other() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = place.client();
    let client = &client;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            for _ in 0..1000 {
                let request = client.nop().unwrap();
                assert!(client.wait(request, LONG).unwrap().is_ok());
            }
        });
        let fd = client.completion_fd();
        let mut out = vec![Completion::default(); 8];
        for _ in 0..1000 {
            let request = client.nop().unwrap();
            'one: loop {
                loop {
                    let count = client.poll(&mut out);
                    if out[..count].iter().any(|done| done.request == request) {
                        break 'one;
                    }
                    if count == 0 {
                        break;
                    }
                    panic!("a completion of the other thread");
                }
                assert!(
                    wait_readable(&fd, LONG),
                    "{request:?} did not wake the loop"
                );
            }
        }
        waiter.join().unwrap();
    });
}

#[test]
fn cancelling_needs_an_unfinished_request() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = place.client();
    let request = client.nop().unwrap();
    let _ = client.wait(request, LONG).unwrap();
    assert_eq!(
        client.cancel(request).unwrap_err().status(),
        Status::UnknownRequest
    );
}

#[test]
fn a_client_that_ends_leaves_no_thread_and_no_descriptor() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let keepers = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        tasks
            .flatten()
            .filter_map(|task| name(task).ok())
            .filter(|n| n.trim() == "pega-keeper")
            .count()
    };
    let _ = keepers();
    for _ in 0..20 {
        let client = place.client();
        let memory = client.alloc_host(PAGE).unwrap();
        let _ = worker(&client, &memory);
        drop(client);
        drop(memory);
    }
    drop(fake);
    // Other tests of this process come and go meanwhile; a leak of twenty would stand out.
    until("descriptors are closed", || count() < 400);
}
