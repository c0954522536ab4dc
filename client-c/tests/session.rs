//! Connecting, and every operation, against a small in-process daemon.

mod fake;
mod setup;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use fake::{Fake, Rudeness};
use pegaflow::{
    Client, Completion, Error, GroupMemory, MissReason, Op, Options, RegistrationId, SegmentMemory,
    State, Status,
};
use setup::{LONG, PAGE, Place, hash, hashes, registration, until, worker};

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
        replicated: false,
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
        replicated: false,
    };
    let id = client
        .register(&registration(vec![group(0), group(1)]))
        .unwrap();
    client.wait_ready(id, LONG).unwrap();
    let limits = client.limits();
    assert_eq!((limits.query_hashes, limits.requests), (98_304, 256));
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
    assert!(refused.to_string().contains("ring_slots"), "{refused}");
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
    let expected = |at: usize| at.is_multiple_of(3);
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
fn an_autostarted_daemon_inherits_no_descriptor() {
    let place = Place::new();
    let folder = place.folder.path();
    let marker = std::fs::File::create(folder.join("marker")).unwrap();
    // A duplicate is not closed by `exec` unless somebody sees to it.
    let _engines = rustix::io::dup(&marker).unwrap();
    let (program, pid) = (folder.join("daemon"), folder.join("pid"));
    let script = format!("#!/bin/sh\necho $$ > {}\nexec sleep 3\n", pid.display());
    std::fs::write(&program, script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&program, mode).unwrap();
    let options = Options {
        autostart: Some(true),
        daemon: Some(program),
        connect_timeout: Duration::from_millis(500),
        ..place.options()
    };
    let error = Client::connect(options).unwrap_err();
    assert!(error.to_string().contains("does not listen"), "{error}");
    let pid = std::fs::read_to_string(pid).unwrap();
    let process = PathBuf::from("/proc").join(pid.trim());
    let name = || std::fs::read_to_string(process.join("comm")).unwrap();
    until("the shell is the daemon", || name() == "sleep\n");
    let open: Vec<(String, PathBuf)> = std::fs::read_dir(process.join("fd"))
        .unwrap()
        .flatten()
        .map(|fd| {
            let target = std::fs::read_link(fd.path()).unwrap();
            (fd.file_name().into_string().unwrap(), target)
        })
        .collect();
    let standard = |fd: &str| ["0", "1", "2"].contains(&fd);
    assert!(open.iter().all(|(fd, _)| standard(fd)), "{open:?}");
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
fn a_client_that_ends_waits_until_the_daemon_has_taken_notice() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    for round in 1..=5 {
        let client = place.client();
        let _ = client.register(&registration(Vec::new())).unwrap();
        // Nobody has read these completions when the client goes.
        let _ = client.nop().unwrap();
        let _ = client.nop().unwrap();
        drop(client);
        assert_eq!(fake.world.left.load(Ordering::Relaxed), round);
    }
    let client = place.client();
    fake.world.set_rudeness(Rudeness::Deaf);
    let start = Instant::now();
    drop(client);
    assert!(start.elapsed() < Duration::from_secs(2), "but not for ever");
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
