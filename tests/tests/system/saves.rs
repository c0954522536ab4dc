//! Saving: no copy is made twice, nothing half-copied is seen.

use pegaflow::{Client, Error, GroupMemory, Registration, RegistrationId, Status};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::Daemon;
use pegaflow_tests::SOON;
use pegaflow_tests::content::hashes;
use pegaflow_tests::layout::Arrangement;
use pegaflow_tests::memory::unmapped_segment;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

#[test]
fn a_block_that_is_held_is_not_copied_again() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 10);
    assert_eq!(worker.save(&names).count, 10);
    let again = worker.save(&names);
    assert_eq!(
        (again.status, again.count, again.skipped, again.bytes),
        (Status::Ok, 0, 10, 0)
    );
    let other = Worker::ready(daemon.options(), WorkerSpec::default().instance("other"));
    let mixed = other.save(&hashes(6, 10));
    assert_eq!((mixed.count, mixed.skipped), (5, 5));
    assert!(daemon.counter_reaches(Counter::SaveHeld, 15));
    let page = worker.spec.page_bytes() as u64;
    assert!(daemon.counter_becomes(Counter::SavedBytes, 15 * page));
}

#[test]
fn a_hash_that_occurs_twice_in_a_save_is_stored_once() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 2);
    let saved = worker.save_in(0, &[0, 1, 2], &[names[0], names[1], names[0]]);
    assert_eq!(
        (saved.status, saved.count, saved.skipped),
        (Status::Ok, 2, 1)
    );
    assert_eq!(worker.fetch(1, &names), 2);
}

#[test]
fn savers_that_race_for_the_same_blocks_copy_each_once() {
    let daemon = Daemon::start();
    let count = 200;
    let spec = WorkerSpec {
        blocks: count,
        half_bytes: 4096,
        ..WorkerSpec::default()
    };
    let names = hashes(1, count as usize);
    let (stored, skipped) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let spec = spec.instance(&format!("engine-{number}"));
                let (daemon, names) = (&daemon, &names);
                scope.spawn(move || {
                    let worker = Worker::ready(daemon.options(), spec);
                    let done = worker.save(names);
                    assert_eq!(done.status, Status::Ok);
                    (done.count, done.skipped)
                })
            })
            .collect();
        threads.into_iter().fold((0, 0), |sum, thread| {
            let (stored, skipped) = thread.join().expect("no panic");
            (sum.0 + stored, sum.1 + skipped)
        })
    });
    assert_eq!((stored, skipped), (count, 3 * count));
    let worker = Worker::ready(daemon.options(), spec);
    assert_eq!(worker.fetch(1, &names), count as usize);
    assert!(daemon.counter_becomes(Counter::SavedBytes, u64::from(count) * 16 * 1024));
}

#[test]
fn a_save_only_instance_saves_and_is_refused_the_rest() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        save_only: true,
        ..WorkerSpec::default().instance("prefill")
    };
    let prefill = Worker::ready(daemon.options(), spec);
    let names = hashes(1, 4);
    assert_eq!(prefill.save(&names).count, 4);
    let answer = prefill.query(1, &names);
    assert_eq!((answer.status, answer.lease), (Status::SaveOnly, 0));
    let decode = Worker::ready(daemon.options(), WorkerSpec::default().instance("decode"));
    let lease = decode.query(1, &names).lease;
    assert_eq!(prefill.load_in(0, lease, 0, &[0]).status, Status::SaveOnly);
    decode.load_and_verify(lease, &names);
}

#[test]
fn a_scheduler_has_no_memory_to_save_from_or_load_into() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let scheduler = Worker::ready(daemon.options(), WorkerSpec::default().scheduler());
    let names = hashes(1, 2);
    worker.save(&names);
    let (client, registration) = (&scheduler.client, scheduler.registration);
    let saved = scheduler.finish(client.save(registration, 0, &names, &[0, 1]));
    assert_eq!(saved.status, Status::NoMemory);
    let lease = scheduler.query(1, &names).lease;
    assert_eq!(
        scheduler.load_in(0, lease, 0, &[0]).status,
        Status::NoMemory
    );
    worker.load_and_verify(lease, &names);
}

#[test]
fn a_block_id_out_of_range_fails_the_save_and_stores_nothing() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 3);
    let (client, registration) = (&worker.client, worker.registration);
    let done = worker.finish(client.save(registration, 0, &names, &[0, 1, 64]));
    assert_eq!(
        (done.status, done.arg0, done.count),
        (Status::BlockOutOfRange, 64, 0)
    );
    assert_eq!(worker.query(1, &names).count, 0);
    assert!(
        daemon.gauge_becomes(Gauge::PoolUsedBytes, 0),
        "no page is left over"
    );
}

#[test]
fn lists_of_different_length_are_refused() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let refused = worker
        .client
        .save(worker.registration, 0, &hashes(1, 3), &[0, 1]);
    let Err(error @ Error::Argument { .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(error.to_string().contains("3 hashes, 2 blocks"), "{error}");
}

/// An instance like the worker's, over addresses where nothing is mapped.
fn broken_instance(client: &Client, spec: &WorkerSpec) -> RegistrationId {
    let bytes = spec.page_bytes() as u64;
    let segments = vec![unmapped_segment(bytes, bytes)];
    let groups = vec![GroupMemory {
        group: 0,
        num_blocks: 64,
        segments,
        replicated: false,
    }];
    let registration = Registration {
        instance: "broken".into(),
        groups,
        ..spec.registration(&[])
    };
    let registration = client
        .register(&registration)
        .expect("addresses matter when copied");
    client.wait_ready(registration, SOON).expect("complete");
    registration
}

fn one_segment() -> WorkerSpec {
    WorkerSpec {
        arrangement: Arrangement::BlocksFirst,
        layers: 1,
        ..WorkerSpec::default()
    }
}

#[test]
fn a_copy_that_fails_withdraws_its_blocks() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), one_segment());
    let client = daemon.connect();
    let registration = broken_instance(&client, &one_segment());
    let names = hashes(1, 5);
    let request = client
        .save(registration, 0, &names, &first_blocks(5))
        .expect("submitted");
    let done = client.wait(request, SOON).expect("answered");
    assert_eq!(
        (done.status, done.count, done.dropped),
        (Status::CopyFailed, 0, 5)
    );
    assert_eq!(client.probe(registration, 0, &names).expect("probe"), 0);
    let request = client
        .query(registration, 0, 1, &names, 0)
        .expect("submitted");
    let answer = client.wait(request, SOON).expect("answered");
    assert_eq!((answer.count, answer.lease), (0, 0));
    assert!(
        daemon.gauge_becomes(Gauge::PoolUsedBytes, 0),
        "its pages are free again"
    );
    assert!(daemon.counter_reaches(Counter::SaveFailed, 5));
    assert_eq!(worker.save(&names).count, 5, "nobody else notices");
    assert_eq!(worker.fetch(1, &names), 5);
}

#[test]
fn a_load_that_fails_says_so_and_harms_nobody_else() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), one_segment());
    let names = hashes(1, 5);
    worker.save(&names);
    let client = daemon.connect();
    let registration = broken_instance(&client, &one_segment());
    let request = client
        .query(registration, 0, 1, &names, 0)
        .expect("submitted");
    let lease = client.wait(request, SOON).expect("answered").lease;
    let request = client
        .load(registration, 0, lease, 0, &first_blocks(5))
        .expect("submitted");
    let done = client.wait(request, SOON).expect("answered");
    assert_eq!((done.status, done.count), (Status::CopyFailed, 0));
    assert!(daemon.counter_reaches(Counter::LoadFailed, 5));
    assert_eq!(worker.fetch(1, &names), 5);
    assert!(daemon.gauge_becomes(Gauge::CopyTasks, 0));
}

#[test]
fn a_cancelled_save_stores_whole_blocks_or_none() {
    let daemon = Daemon::start();
    let count = 64;
    let spec = WorkerSpec {
        half_bytes: 16 << 10,
        blocks: count,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    for round in 0..10 {
        let names = hashes(1 + round * 100, count as usize);
        let blocks = first_blocks(names.len());
        for (block, name) in blocks.iter().zip(&names) {
            worker.compute(0, *block, name);
        }
        let (client, registration) = (&worker.client, worker.registration);
        let save = client
            .save(registration, 0, &names, &blocks)
            .expect("submitted");
        let cancel = client.cancel(save);
        let saved = worker.finish(Ok(save));
        assert!(
            matches!(saved.status, Status::Ok | Status::Cancelled),
            "{}",
            saved.status
        );
        if let Ok(cancel) = cancel {
            let status = worker.finish(Ok(cancel)).status;
            assert!(
                matches!(status, Status::Ok | Status::UnknownRequest),
                "{status}"
            );
        }
        // Nothing of the cancelled request reads the blocks any more: they may be used again.
        worker.wipe(0, &blocks);
        for (number, name) in names.iter().enumerate() {
            let key = round << 32 | number as u64;
            worker.fetch(key, std::slice::from_ref(name));
        }
    }
    assert!(daemon.gauge_becomes(Gauge::Requests, 0));
    assert!(daemon.gauge_becomes(Gauge::CopyTasks, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksUnfinished, 0));
}
