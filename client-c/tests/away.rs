//! The daemon is not there yet, goes, comes back, refuses: what the engine sees.

mod fake;
mod setup;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fake::{Fake, Rudeness, wait_readable};
use pegaflow::{Client, Error, Log, LogLevel, MissReason, Options, State, Status};
use setup::{LONG, PAGE, Place, hash, hashes, registration, until, worker};

/// Lines that a client has said.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn log(&self) -> Option<Log> {
        let lines = self.clone();
        Some(Log::new(move |_, line| {
            lines.0.lock().unwrap().push(line.to_owned());
        }))
    }

    fn count(&self, words: &str) -> usize {
        let lines = self.0.lock().unwrap();
        lines.iter().filter(|line| line.contains(words)).count()
    }
}

fn early(place: &Place, lines: &Lines) -> Options {
    Options {
        start_without_daemon: Some(true),
        log: lines.log(),
        log_level: Some(LogLevel::Info),
        ..place.options()
    }
}

#[test]
fn an_engine_that_starts_before_its_daemon_works_and_gets_everything_from_the_first_one() {
    let (place, lines) = (Place::new(), Lines::default());
    let client = Client::connect(early(&place, &lines)).unwrap();
    assert_eq!(client.state(), State::Disconnected);
    assert!(client.session_info().is_none());
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let segment = pegaflow::SegmentMemory::in_host(&memory, 0, PAGE as u64, PAGE as u64);
    let group = pegaflow::GroupMemory {
        group: 0,
        num_blocks: 64,
        segments: vec![segment],
        replicated: false,
    };
    let id = client.register(&registration(vec![group])).unwrap();
    let limits = client.limits();
    let waited = client
        .wait_ready(id, Duration::from_millis(30))
        .unwrap_err();
    assert_eq!(waited.status(), Status::Timeout);
    assert!(waited.to_string().contains("no daemon answers"), "{waited}");
    assert_eq!(client.probe(id, 0, &hashes(0..5)).unwrap(), 0);
    let mut bitmap = [u64::MAX];
    let found = client.probe_membership(id, 2, &hashes(0..5), &mut bitmap);
    assert_eq!((found.unwrap(), bitmap), (0, [0]));
    let fd = client.completion_fd();
    let mut done = [pegaflow::Completion::default()];
    while client.poll(&mut done) > 0 {}
    for group in [0, 3] {
        client.query(id, group, 1, &hashes(0..5), 0).unwrap();
        assert!(wait_readable(&fd, LONG), "the descriptor tells of it");
        assert_eq!(client.poll(&mut done), 1);
        assert_eq!((done[0].status, done[0].count), (Status::Disconnected, 0));
        assert_eq!(done[0].reason, MissReason::Disconnected);
        while client.poll(&mut done) > 0 {}
    }
    for refused in [
        client.save(id, 0, &[hash(1)], &[0]),
        client.load(id, 0, 7, 0, &[0]),
        client.release(id, 7),
        client.renew(id, 7, 1),
        client.nop(),
    ] {
        assert_eq!(refused.unwrap_err().status(), Status::Disconnected);
    }
    let other = client.register(&registration(Vec::new())).unwrap();
    client.unregister(other).unwrap();
    let stats = client.stats();
    assert_eq!(
        (stats.disconnects, stats.reconnects, stats.outstanding),
        (0, 0, 0)
    );

    let fake = Fake::start(&place.socket());
    until("the first daemon is found", || {
        client.state() == State::Connected
    });
    client.wait_ready(id, LONG).unwrap();
    assert_eq!(fake.world.regions.load(Ordering::Relaxed), 1);
    assert_eq!(fake.world.registrations.load(Ordering::Relaxed), 1);
    let saved = client.save(id, 0, &[hash(5)], &[0]).unwrap();
    assert!(client.wait(saved, LONG).unwrap().is_ok());
    let now = client.limits();
    assert_eq!(now.query_hashes, limits.query_hashes);
    assert_eq!(now.requests, limits.requests);
    assert!(limits.membership_hashes > 0 && limits.load_blocks > 0);
    let stats = client.stats();
    assert_eq!((stats.disconnects, stats.reconnects), (0, 0));
    assert!(stats.away_ms > 0 && stats.failed_attempts > 0);
    drop(client);
    assert_eq!(lines.count("no daemon yet"), 1);
    assert_eq!(lines.count("connected to node fake"), 1);
    assert_eq!(lines.count("disconnected: this client"), 1);
}

#[test]
fn a_client_without_the_option_is_told_of_it() {
    let place = Place::new();
    let options = || Options {
        start_without_daemon: Some(false),
        ..place.options()
    };
    let error = Client::connect(options()).unwrap_err();
    assert_eq!(error.status(), Status::NoDaemon);
    assert!(
        error.to_string().contains("start_without_daemon"),
        "{error}"
    );
    let fake = Fake::start(&place.socket());
    let client = Client::connect(options()).unwrap();
    fake.vanish();
    until("the end is seen", || client.state() != State::Connected);
    let refused = client.register(&registration(Vec::new())).unwrap_err();
    assert_eq!(refused.status(), Status::Disconnected);
}

#[test]
fn a_registration_made_while_the_daemon_is_away_or_goes_reaches_the_next_one() {
    let (place, lines) = (Place::new(), Lines::default());
    let fake = Fake::start(&place.socket());
    let client = Client::connect(early(&place, &lines)).unwrap();
    // The daemon takes the message and dies before it answers.
    fake.world.set_rudeness(Rudeness::Deaf);
    let id = std::thread::scope(|scope| {
        let asked = scope.spawn(|| client.register(&registration(Vec::new())).unwrap());
        std::thread::sleep(Duration::from_millis(30));
        fake.vanish();
        asked.join().unwrap()
    });
    let _fake = Fake::start(&place.socket());
    client.wait_ready(id, LONG).unwrap();
}

#[test]
fn a_refused_registration_is_told_by_wait_ready_by_a_counter_and_by_a_line() {
    let (place, lines) = (Place::new(), Lines::default());
    let client = Client::connect(early(&place, &lines)).unwrap();
    let id = client.register(&registration(Vec::new())).unwrap();
    let fake = Fake::start(&place.socket());
    *fake.world.refuse_register.lock().unwrap() = Some(Status::PermissionDenied);
    fake.drop_sessions();
    until("the refusal is known", || {
        client.stats().refused_registrations == 1
    });
    let start = Instant::now();
    let told = client.wait_ready(id, LONG).unwrap_err();
    assert_eq!(told.status(), Status::PermissionDenied);
    assert!(start.elapsed() < LONG / 2, "waiting does not mend it");
    until("one refusal does not keep the client away", || {
        client.state() == State::Connected
    });
    *fake.world.refuse_register.lock().unwrap() = Some(Status::AlreadyRegistered);
    until("another reason", || {
        let told = client.wait_ready(id, Duration::from_millis(5)).unwrap_err();
        told.status() == Status::AlreadyRegistered
    });
    *fake.world.refuse_register.lock().unwrap() = None;
    client.wait_ready(id, LONG).unwrap();
    assert_eq!(client.stats().refused_registrations, 0);
    until("all is said", || lines.count("is accepted now") == 1);
    assert_eq!(lines.count("is refused, trying on: "), 1);
    assert!(lines.count("registration 1 (scheduler of instance `engine-0`)") == 2);
}

#[test]
fn a_daemon_that_refuses_after_its_return_is_tried_until_it_serves() {
    let (place, lines) = (Place::new(), Lines::default());
    let fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        log: lines.log(),
        ..place.options()
    })
    .unwrap();
    let memory = client.alloc_host(PAGE).unwrap();
    let id = worker(&client, &memory);
    fake.vanish();
    let rude = Rudeness::Refuse(Status::VersionMismatch);
    let refusing = Fake::start_with(&place.socket(), rude);
    until("it was refused several times", || {
        client.stats().failed_attempts > 5
    });
    let error = client.nop().unwrap_err();
    assert_eq!(error.status(), Status::Disconnected);
    assert!(
        error.to_string().contains("refused for the test"),
        "{error}"
    );
    until("it is said", || {
        lines.count("cannot connect, trying on: refused") > 0
    });
    refusing.vanish();
    let _fake = Fake::start(&place.socket());
    until("it is back", || client.state() == State::Connected);
    client.wait_ready(id, LONG).unwrap();
    assert_eq!(client.stats().reconnects, 1);
    assert!(client.stats().away_ms > 0);
    until("its return is said", || {
        lines.count("without a daemon") == 1
    });
    assert_eq!(lines.count("cannot connect, trying on: refused"), 1, "once");
    assert_eq!(lines.count("the daemon is away"), 1);
}

#[test]
fn the_blocks_of_loads_that_a_daemon_took_with_it_are_named() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(64 * PAGE).unwrap();
    let id = worker(&client, &memory);
    let save = client.save(id, 0, &hashes(0..8), &[0, 1, 2, 3, 4, 5, 6, 7]);
    client.wait(save.unwrap(), LONG).unwrap();
    let query = client.query(id, 0, 1, &hashes(0..8), 0).unwrap();
    let lease = client.wait(query, LONG).unwrap().lease;
    let good = client.load(id, 0, lease, 0, &[9, 10]).unwrap();
    assert!(client.wait(good, LONG).unwrap().is_ok());
    let bad = client.load(id, 0, lease + 1, 0, &[11, 12]).unwrap();
    assert_eq!(client.wait(bad, LONG).unwrap().status, Status::UnknownLease);
    assert_eq!(client.unloaded_blocks(bad).unwrap(), [11, 12]);
    fake.hold();
    let all: Vec<Vec<u32>> = (0..20).map(|n| vec![63 - n, n, 40]).collect();
    let loads: Vec<_> = all
        .iter()
        .map(|blocks| client.load(id, 0, lease, 0, blocks).unwrap())
        .collect();
    assert!(client.unloaded_blocks(loads[0]).is_err(), "not finished");
    fake.vanish();
    for (load, blocks) in loads.iter().zip(&all) {
        let done = client.wait(*load, LONG).unwrap();
        assert_eq!((done.status, done.count), (Status::Disconnected, 0));
        assert_eq!(client.unloaded_blocks(*load).unwrap(), *blocks);
        assert_eq!(client.unloaded_blocks(*load).unwrap(), *blocks, "and again");
    }
    assert_eq!(client.unloaded_blocks(bad).unwrap(), [11, 12], "still");
    for request in [good, query] {
        let error = client.unloaded_blocks(request).unwrap_err();
        assert!(matches!(error, Error::NoBlockList(_)), "{error}");
    }
}

#[test]
fn a_client_ends_at_once_while_a_silent_daemon_keeps_it_waiting() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        connect_timeout: 6 * LONG,
        control_timeout: 6 * LONG,
        ..place.options()
    })
    .unwrap();
    fake.vanish();
    let _silent = Fake::start_with(&place.socket(), Rudeness::Silent);
    until("it notices", || client.state() == State::Disconnected);
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    drop(client);
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
}

#[test]
fn freeing_memory_does_not_wait_for_a_daemon_that_reads_nothing() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        control_timeout: 6 * LONG,
        ..place.options()
    })
    .unwrap();
    let regions: Vec<_> = (0..800).map(|_| client.alloc_host(1).unwrap()).collect();
    fake.world.set_rudeness(Rudeness::Deaf);
    // What it was reading just now.
    std::thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    drop(regions);
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    assert!(fake.world.regions.load(Ordering::Relaxed) > 0);
    fake.world.set_rudeness(Rudeness::None);
    until("it hears of all of them in the end", || {
        fake.world.regions.load(Ordering::Relaxed) == 0
    });
}

#[test]
fn many_clients_come_back_within_a_second_and_not_in_step() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let options = || Options {
        log_level: Some(LogLevel::Off),
        ..Options {
            backoff_min: Options::default().backoff_min,
            backoff_max: Options::default().backoff_max,
            ..place.options()
        }
    };
    let clients: Vec<_> = (0..20)
        .map(|_| Client::connect(options()).unwrap())
        .collect();
    let descriptors: Vec<_> = clients
        .iter()
        .map(|client| client.completion_fd().as_fd().try_clone_to_owned().unwrap())
        .collect();
    fake.vanish();
    // Long enough for the pauses to have grown to their maximum.
    std::thread::sleep(Duration::from_millis(1500));
    let _fake = Fake::start(&place.socket());
    until("all are back", || {
        clients
            .iter()
            .all(|client| client.state() == State::Connected)
    });
    let away: Vec<u64> = clients.iter().map(|c| c.stats().away_ms).collect();
    let (first, last) = (away.iter().min().unwrap(), away.iter().max().unwrap());
    assert!(last - first > 20, "in step: {away:?}");
    let stats = clients[0].stats();
    assert!(stats.failed_attempts < 30, "a busy loop: {stats:?}");
    drop(descriptors);
}

#[test]
fn a_registration_does_not_overtake_the_memory_that_it_names() {
    let (place, lines) = (Place::new(), Lines::default());
    let client = Client::connect(early(&place, &lines)).unwrap();
    // More messages than a socket takes in: the keeper is still telling of them.
    let regions: Vec<_> = (0..800).map(|_| client.alloc_host(PAGE).unwrap()).collect();
    let fake = Fake::start_with(&place.socket(), Rudeness::Deaf);
    until("a session", || client.session_info().is_some());
    std::thread::sleep(Duration::from_millis(30));
    std::thread::scope(|scope| {
        let last = scope.spawn(|| worker(&client, &regions[799]));
        std::thread::sleep(Duration::from_millis(30));
        fake.world.set_rudeness(Rudeness::None);
        last.join().unwrap();
    });
}

#[test]
fn a_registration_too_long_for_a_message_is_refused_without_a_daemon_too() {
    let (place, lines) = (Place::new(), Lines::default());
    let client = Client::connect(early(&place, &lines)).unwrap();
    let memory = client.alloc_host(PAGE).unwrap();
    let segment = pegaflow::SegmentMemory::in_host(&memory, 0, PAGE as u64, PAGE as u64);
    let group = |group| pegaflow::GroupMemory {
        group,
        num_blocks: 1,
        segments: vec![segment.clone(); 1024],
        replicated: false,
    };
    let long = registration((0..4).map(group).collect());
    let error = client.register(&long).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument, "{error}");
    let id = client.register(&registration(Vec::new())).unwrap();
    let _fake = Fake::start(&place.socket());
    client.wait_ready(id, LONG).unwrap();
    assert_eq!(client.state(), State::Connected);
}

#[test]
fn times_beyond_all_measure_are_no_times_at_all() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = Client::connect(Options {
        connect_timeout: Duration::MAX,
        control_timeout: Duration::MAX,
        backoff_max: Duration::MAX,
        ..place.options()
    })
    .unwrap();
    let id = client.register(&registration(Vec::new())).unwrap();
    client.wait_ready(id, Duration::MAX).unwrap();
    fake.drop_sessions();
    until("it is back", || client.stats().reconnects == 1);
    client.wait_ready(id, LONG).unwrap();
    client.unregister(id).unwrap();
}
