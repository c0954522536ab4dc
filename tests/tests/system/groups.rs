//! Cache groups of hybrid models: prefix semantics for group 0, membership for the others.

use pegaflow::{MissReason, Status};
use pegaflow_tests::Daemon;
use pegaflow_tests::content::hashes;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

fn hybrid() -> WorkerSpec {
    WorkerSpec {
        groups: vec![0, 3],
        ..WorkerSpec::default()
    }
}

#[test]
fn group_0_answers_with_the_longest_prefix() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), hybrid());
    let names = hashes(1, 12);
    let held: Vec<_> = [0, 1, 2, 3, 6, 7].map(|at: usize| names[at]).to_vec();
    worker.save(&held);
    let answer = worker.query(1, &names);
    assert_eq!((answer.count, answer.reason), (4, MissReason::Absent));
    assert!(answer.bitmap.is_none());
    assert_eq!(
        worker.client.probe(worker.registration, 0, &names).unwrap(),
        4
    );
}

#[test]
fn another_group_answers_each_position_on_its_own() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), hybrid());
    let names = hashes(1, 200);
    let at: Vec<usize> = (0..200).filter(|position| position % 7 == 3).collect();
    let held: Vec<_> = at.iter().map(|position| names[*position]).collect();
    worker.save_in(3, &first_blocks(held.len()), &held);
    let answer = worker.query_in(3, 1, &names);
    assert_eq!(
        (answer.status, answer.count as usize),
        (Status::Ok, held.len())
    );
    let found = ones(answer.bitmap.as_deref().expect("a bitmap"));
    assert_eq!(found, at);
    let mut bitmap = [u64::MAX; 4];
    let count = worker
        .client
        .probe_membership(worker.registration, 3, &names, &mut bitmap)
        .expect("a registration");
    assert_eq!((count as usize, ones(&bitmap)), (held.len(), at));
    let blocks = first_blocks(held.len());
    worker.wipe(3, &blocks);
    let loaded = worker.load_in(3, answer.lease, 0, &blocks);
    assert_eq!(
        (loaded.status, loaded.count as usize),
        (Status::Ok, held.len())
    );
    for (block, hash) in blocks.iter().zip(&held) {
        assert_eq!(
            worker.verify(3, *block, hash),
            Ok(()),
            "hits are loaded in their order"
        );
    }
}

fn ones(bitmap: &[u64]) -> Vec<usize> {
    let bit = |at: &usize| bitmap[at / 64] >> (at % 64) & 1 == 1;
    (0..bitmap.len() * 64).filter(bit).collect()
}

#[test]
fn the_same_hash_in_two_groups_is_two_blocks() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), hybrid());
    let names = hashes(1, 4);
    worker.save(&names);
    let other = worker.query_in(3, 1, &names);
    assert_eq!((other.status, other.count, other.lease), (Status::Ok, 0, 0));
    worker.save_in(3, &[10, 11, 12, 13], &names);
    assert_eq!(
        worker.fetch(2, &names),
        4,
        "group 0 still has its own bytes"
    );
    let hit = worker.query_in(3, 3, &names);
    worker.wipe(3, &[20, 21, 22, 23]);
    worker.load_in(3, hit.lease, 0, &[20, 21, 22, 23]);
    for (block, hash) in (20..24).zip(&names) {
        assert_eq!(worker.verify(3, block, hash), Ok(()));
    }
}

#[test]
fn a_group_that_only_some_ranks_hold_needs_only_their_shards() {
    let daemon = Daemon::start();
    let both = hybrid().rank(0, 2);
    let one = WorkerSpec::default().rank(1, 2);
    let first = Worker::open(daemon.options(), both).expect("open");
    let second = Worker::ready(daemon.options(), one);
    first.wait_ready();
    let names = hashes(1, 4);
    first.save_in(3, &first_blocks(4), &names);
    assert_eq!(first.query_in(3, 1, &names).count, 4);
    first.save(&names);
    assert_eq!(
        first.query(2, &names).count,
        0,
        "group 0 still lacks the second rank's shards"
    );
    second.save(&names);
    assert_eq!(first.query(3, &names).count, 4);
}

#[test]
fn an_unknown_group_is_refused() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), hybrid());
    let names = hashes(1, 2);
    let (client, registration) = (&worker.client, worker.registration);
    for request in [
        client.query(registration, 9, 1, &names, 0),
        client.save(registration, 9, &names, &[0, 1]),
    ] {
        let status = match request {
            Ok(request) => worker.finish(Ok(request)).status,
            Err(error) => error.status(),
        };
        assert_eq!(status, Status::UnknownGroup);
    }
}
