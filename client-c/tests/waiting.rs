//! Room and credit, waiting threads, event loops.

mod fake;
mod setup;

use std::collections::HashSet;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use fake::{Fake, Rudeness, wait_readable};
use pegaflow::{Client, Completion, Error, Options, Status};
use setup::{LONG, PAGE, Place, hashes, registration, until, worker};

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

/// A request that finishes before its thread waits for it belongs to whoever polls: between the
/// two, each completion is handed out exactly once and none is lost.
#[test]
fn an_event_loop_and_a_waiting_thread_lose_nothing_between_them() {
    let place = Place::new();
    let _fake = Fake::start(&place.socket());
    let client = place.client();
    let client = &client;
    let strays = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            for _ in 0..1000 {
                let request = client.nop().unwrap();
                match client.wait(request, LONG) {
                    Ok(done) => assert!(done.is_ok()),
                    Err(error) => {
                        assert_eq!(error.status(), Status::UnknownRequest);
                        until("the poller gets it", || {
                            strays.lock().unwrap().remove(&request)
                        });
                    }
                }
            }
        });
        let fd = client.completion_fd();
        let mut out = vec![Completion::default(); 8];
        let (mut left, mut own) = (1000, None);
        while left > 0 || !waiter.is_finished() {
            if own.is_none() && left > 0 {
                own = Some(client.nop().unwrap());
            }
            let count = client.poll(&mut out);
            for done in &out[..count] {
                if own == Some(done.request) {
                    (own, left) = (None, left - 1);
                } else {
                    assert!(
                        strays.lock().unwrap().insert(done.request),
                        "handed out twice"
                    );
                }
            }
            if count == 0 {
                let bound = if own.is_some() {
                    LONG
                } else {
                    Duration::from_millis(1)
                };
                assert!(
                    wait_readable(&fd, bound) || own.is_none(),
                    "{own:?} did not wake it"
                );
            }
        }
        waiter.join().unwrap();
    });
    assert_eq!(client.stats().outstanding, 0);
}
