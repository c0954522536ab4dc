//! A daemon that says that it stops: what it would refuse is not sent any more, what it has taken
//! is waited for, and its successor is found.

mod fake;
mod setup;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fake::Fake;
use pegaflow::{State, Status};
use pegaflow_shm::control::PROTOCOL_DRAINING;
use setup::{LONG, PAGE, Place, hashes, until, worker};

#[test]
fn a_draining_daemon_gets_no_new_work_and_finishes_what_it_has() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let client = place.client();
    let memory = client.alloc_host(8 * PAGE).unwrap();
    let registration = worker(&client, &memory);
    let names = hashes(0..3);
    fake.hold();
    let taken = client.save(registration, 0, &names, &[0, 1, 2]).unwrap();
    fake.world.drain.store(true, Ordering::Relaxed);
    let refused = || {
        let save = client.save(registration, 0, &names, &[0, 1, 2]).unwrap();
        match client.wait(save, Duration::ZERO) {
            Ok(done) => {
                assert_eq!((done.status, done.count), (Status::Draining, 0));
                true
            }
            Err(_) => false,
        }
    };
    until("the notice arrives", refused);
    assert_eq!(client.state(), State::Connected, "it is still there");
    let query = client.query(registration, 0, 1, &names, 0).unwrap();
    let answer = client.wait(query, Duration::ZERO).unwrap();
    assert_eq!((answer.status, answer.count), (Status::Draining, 0));
    assert_eq!(answer.lease, 0);
    let many = vec![0; client.limits().load_blocks + 1];
    let load = client.load(registration, 0, 1, 0, &many).unwrap_err();
    assert_eq!(load.status(), Status::TooMany, "as at any other time");
    fake.world.hold.store(false, Ordering::Relaxed);
    let done = client.wait(taken, LONG).unwrap();
    assert_eq!((done.status, done.count), (Status::Ok, 3));
}

#[test]
fn the_successor_of_a_draining_daemon_is_found_without_growing_pauses() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let mut options = place.options();
    // Growing pauses would soon be hours.
    options.backoff_min = Duration::from_millis(2);
    options.backoff_max = Duration::from_secs(36_000);
    let client = pegaflow::Client::connect(options).unwrap();
    let memory = client.alloc_host(8 * PAGE).unwrap();
    let registration = worker(&client, &memory);
    fake.world.drain.store(true, Ordering::Relaxed);
    let told = || {
        let save = client.save(registration, 0, &hashes(0..1), &[0]).unwrap();
        client.wait(save, LONG).unwrap().status == Status::Draining
    };
    until("the notice arrives", told);
    fake.vanish();
    until("the end is seen", || client.state() == State::Disconnected);
    // Time enough for pauses to grow beyond the test's patience.
    std::thread::sleep(Duration::from_millis(300));
    let _successor = Fake::start(&place.socket());
    until("the successor", || client.state() == State::Connected);
    client.wait_ready(registration, LONG).unwrap();
    let save = client.save(registration, 0, &hashes(0..1), &[0]).unwrap();
    assert_eq!(client.wait(save, LONG).unwrap().status, Status::Ok);
}

#[test]
fn a_word_of_a_newer_version_ends_a_session_of_an_older_one() {
    let place = Place::new();
    let fake = Fake::start(&place.socket());
    let older = PROTOCOL_DRAINING - 1;
    fake.world.protocol.store(older, Ordering::Relaxed);
    let client = place.client();
    assert_eq!(client.session_info().unwrap().protocol, older);
    fake.world.drain.store(true, Ordering::Relaxed);
    until("the session is given up", || client.stats().disconnects > 0);
    fake.world.drain.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    until("another session", || client.state() == State::Connected);
    assert!(begun.elapsed() < LONG);
}
