//! What a client can do to the lane.

use std::time::Duration;

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Op, Submission, flags};
use pegaflow_shm::node::Gauge;
use pegaflow_shm::status::Status;

use super::rig::*;
use crate::lane::api::LaneEvent;

#[test]
fn a_client_that_never_pauses_does_not_hold_up_a_drain() {
    let dir = folder();
    let long = Duration::from_millis(200);
    let mut rig = Rig::with(dir.path(), 1, |options| options.spin = long);
    let mut client = rig.connect();
    let handle = rig.lane.handle.clone();
    let drained = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let limit = Duration::from_secs(3);
        runtime.block_on(async { tokio::time::timeout(limit, handle.drain()).await.is_ok() })
    });
    let nop = Submission {
        op: Op::Nop as u8,
        ..Submission::zeroed()
    };
    let mut unfinished = 0;
    while !drained.is_finished() {
        if unfinished < 512 {
            client.submit(nop);
            unfinished += 1;
        }
        while client.try_completion().is_some() {
            unfinished -= 1;
        }
    }
    assert!(drained.join().unwrap(), "the drain was not answered");
}

#[test]
fn block_lists_in_the_making_have_a_maximum() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut client, worker) = rig.worker("a", "", &memory);
    // Lists of 1,024 blocks, the most that there can be, in eight bytes each, and none of them
    // finished.
    let run = [0u32, 1023];
    for request in 0..4 {
        let head = Submission {
            flags: flags::MORE | flags::BLOCK_RUNS,
            request_id: 1000 + request,
            count: 1023,
            total: 1024,
            arg0: 5,
            ..list(Op::Load, worker, 0, 0)
        };
        client.submit_list(0, bytemuck::cast_slice(&run), head);
    }
    client.flush();
    let last = [1023u32, 1];
    let mut answers = Vec::new();
    for request in 0..4 {
        let tail = Submission {
            flags: flags::BLOCK_RUNS,
            request_id: 1000 + request,
            count: 1,
            total: 1024,
            arg0: 5,
            ..list(Op::Load, worker, 0, 0)
        };
        client.submit_list(0, bytemuck::cast_slice(&last), tail);
        answers.push(client.completion().status());
    }
    assert_eq!(answers[0], Status::UnknownLease);
    assert_eq!(answers[1..], [Status::TooMany; 3]);
    // The room is there again.
    let after = client.load(worker, 0, 5, &[0, 1]);
    assert_eq!(after.status(), Status::UnknownLease);
}

#[test]
fn a_broken_descriptor_ends_its_session_and_no_other() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut good, worker) = rig.worker("a", "", &memory);
    good.save(worker, 0, &hashes(0..2), &[0, 1]);
    let lease = good.query(worker, 0, &hashes(0..2)).lease;
    let nop = Submission {
        op: Op::Nop as u8,
        ..Submission::zeroed()
    };
    let save = list(Op::Save, worker, 0, 1);
    let broken = [
        Submission { op: 99, ..nop },
        Submission { flags: 128, ..nop },
        Submission {
            payload_offset: u32::MAX - 7,
            payload_bytes: 36,
            ..save
        },
        Submission {
            payload_bytes: 35,
            ..save
        },
        Submission {
            payload_bytes: 40,
            count: u32::MAX,
            total: u32::MAX,
            ..save
        },
        Submission {
            count: 2,
            total: 1,
            ..save
        },
    ];
    for submission in broken {
        let mut bad = rig.connect();
        bad.submit(submission);
        let event = rig.runtime.block_on(async {
            loop {
                match rig.lane.events.recv().await {
                    Some(LaneEvent::Fault { session, .. }) => return session,
                    Some(_) => {}
                    None => panic!("the lane ended"),
                }
            }
        });
        assert_eq!(event, bad.id, "{submission:?}");
        rig.close(&bad);
    }
    memory.fill(4, 0);
    let loaded = good.load(worker, 0, lease, &[4, 5]);
    assert_eq!(loaded.status(), Status::Ok);
    rig.expect_gauge(Gauge::Sessions, 1);
}

#[test]
fn namespaces_that_hold_nothing_make_room_for_new_ones() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memory = Memory::new();
    let (mut first, worker) = rig.worker("first", "kept", &memory);
    memory.fill(0, 11);
    first.save(worker, 0, &hashes(0..1), &[0]);
    rig.close(&first);
    let client = rig.connect();
    for salt in 0..crate::catalog::MAX_NAMESPACES + 8 {
        let spec = spec("many", &salt.to_string(), 1, Some(0));
        let id = rig.register(&client, spec, &[0], &memory).unwrap();
        let gone = rig.lane.handle.unregister(client.id, id);
        rig.runtime.block_on(gone).unwrap();
    }
    while let Ok(event) = rig.lane.events.try_recv() {
        assert!(!matches!(event, LaneEvent::Fault { .. }), "{event:?}");
    }
    // What holds blocks keeps its place.
    let (mut again, worker) = rig.worker("first", "kept", &memory);
    let answer = again.query(worker, 0, &hashes(0..1));
    assert_eq!(answer.count, 1);
    assert_eq!(again.load(worker, 0, answer.lease, &[9]).count, 1);
    assert!(memory.holds(9, 11));
}

#[test]
fn a_list_begun_under_a_namespace_whose_number_came_to_mean_another_one_saves_nothing() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let (small, large) = (Memory::new(), Memory::with_page(EXTENT));
    let (mut client, other, third) = (rig.connect(), rig.connect(), rig.connect());
    let rank = |rank| spec("a", "", 2, Some(rank));
    let worker = rig.register(&client, rank(1), &[0], &small).unwrap();
    let before = rig.register(&other, rank(0), &[1], &small).unwrap();
    // A domain that has its share of the rows gives up those that hold nothing, lowest first.
    for salt in 0..crate::catalog::MAX_NAMESPACES {
        let spec = spec("many", &salt.to_string(), 1, Some(0));
        let id = rig.register(&third, spec, &[0], &small).unwrap();
        let gone = rig.lane.handle.unregister(third.id, id);
        rig.runtime.block_on(gone).unwrap();
    }
    // One shard to a block of group 0, and the first of them.
    client.submit(part(list(Op::Save, worker, 0, 0), 1000, 1, true));
    client.flush();
    let gone = rig.lane.handle.unregister(other.id, before);
    rig.runtime.block_on(gone).unwrap();
    // Now two, and the first is the other rank's, in a larger page.
    rig.register(&other, rank(0), &[0, 1], &large).unwrap();
    client.flush();
    let mut numbers = Vec::new();
    while let Ok(event) = rig.lane.events.try_recv() {
        match event {
            LaneEvent::Ready {
                session, namespace, ..
            } if session == client.id => numbers.push(namespace),
            LaneEvent::Fault { .. } => panic!("{event:?}"),
            _ => {}
        }
    }
    assert_eq!(numbers, [numbers[0]; 2], "else this test tests nothing");
    let rest = part(list(Op::Save, worker, 0, 1), 1000, 1, false);
    client.submit_list(0, &save_payload(&hashes(0..1), &[0]), rest);
    assert_eq!(client.completion().status(), Status::NotReady);
    assert_eq!(client.query(worker, 0, &hashes(0..1)).count, 0);
    let whole = client.save(worker, 0, &hashes(0..1), &[0]);
    assert_eq!((whole.status(), whole.count), (Status::Ok, 1));
}
