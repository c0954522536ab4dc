//! Faults of the daemon, its end, and its return.

mod fake;
mod setup;

use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use fake::{Fake, Rudeness};
use pegaflow::{Client, MissReason, Options, State, Status};
use setup::{LONG, PAGE, Place, hash, hashes, registration, until, worker};

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
    for _ in 0..14 {
        let request = client.nop().unwrap();
        assert!(client.wait(request, LONG).unwrap().is_ok());
    }
    let requests: Vec<_> = (0..4).map_while(|_| client.nop().ok()).collect();
    assert!(requests.len() >= 2);
    for request in requests {
        assert_eq!(
            client.wait(request, LONG).unwrap().status,
            Status::Disconnected
        );
    }
    assert_eq!(client.state(), State::Closed);
    assert!(client.nop().unwrap_err().to_string().contains("consumed"));
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
