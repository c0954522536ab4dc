//! Bytes loaded are the bytes saved.

use pegaflow::Status;
use pegaflow_tests::WorkerProcess;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::layout::Arrangement;
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

use crate::WORKER;

#[test]
fn what_one_process_saves_another_loads_byte_for_byte() {
    let daemon = Daemon::start();
    for (number, kind) in MemoryKind::ALL.into_iter().enumerate() {
        let saver = WorkerSpec {
            memory: kind,
            ..WorkerSpec::default()
        };
        let other = MemoryKind::ALL[1 - number];
        let loader = WorkerSpec {
            memory: other,
            ..saver.instance("loader")
        };
        let first = number as u64 * 1000;
        let mut left = WorkerProcess::start(WORKER, &daemon, &saver);
        let saved = left.run(&Task::Save { first, count: 40 });
        assert!(
            saved.is_ok() && saved.count == 40,
            "{saved:?}\n{}",
            daemon.log()
        );
        left.finish();
        let mut right = WorkerProcess::start(WORKER, &daemon, &loader);
        assert!(right.run(&Task::WaitReady).is_ok());
        assert_eq!(right.run(&Task::Probe { first, count: 50 }).count, 40);
        let hit = right.run(&Task::Query {
            key: 1,
            first,
            count: 50,
        });
        assert_eq!((hit.status.as_str(), hit.count), ("ok", 40));
        let loaded = right.run(&Task::Load {
            lease: hit.lease,
            first,
            count: 40,
        });
        assert!(loaded.is_ok() && loaded.count == 40, "{loaded:?}");
        right.finish();
    }
}

/// Saves with one spec and loads with the other, and checks every byte and every neighbour.
fn save_and_load(daemon: &Daemon, saver: &WorkerSpec, loader: &WorkerSpec) {
    let blocks = saver.blocks as usize / 2;
    let names = hashes(1, blocks);
    let left = Worker::ready(daemon.options(), saver.clone());
    let done = left.save(&names);
    let expected = (
        Status::Ok,
        blocks as u32,
        (blocks * saver.page_bytes()) as u64,
    );
    assert_eq!((done.status, done.count, done.bytes), expected, "{saver:?}");
    drop(left);
    let right = Worker::ready(daemon.options(), loader.clone());
    right.wipe(0, &first_blocks(loader.blocks as usize));
    assert_eq!(right.fetch(1, &names), blocks, "{loader:?}");
    let untouched = vec![0xA5; loader.page_bytes()];
    for block in blocks as u32..loader.blocks {
        assert_eq!(
            right.page(0, block),
            untouched,
            "block {block} was not asked for"
        );
    }
}

#[test]
fn every_arrangement_of_kv_memory_gives_the_bytes_back() {
    let daemon = Daemon::start();
    for kind in MemoryKind::ALL {
        for arrangement in Arrangement::ALL {
            let salt = format!("{kind:?} {arrangement:?}");
            let spec = WorkerSpec {
                memory: kind,
                arrangement,
                ..WorkerSpec::default().salt(&salt)
            };
            let spec = WorkerSpec {
                layers: 3,
                half_bytes: 520,
                ..spec
            };
            save_and_load(&daemon, &spec, &spec.instance("other"));
        }
    }
}

#[test]
fn arrangements_with_equal_segments_share_blocks() {
    let daemon = Daemon::start();
    let with = |arrangement| WorkerSpec {
        arrangement,
        ..WorkerSpec::default()
    };
    let apart = with(Arrangement::KvApart).salt("apart");
    let layers = with(Arrangement::LayersFirst).salt("apart");
    save_and_load(&daemon, &apart, &layers.instance("other"));
    let together = with(Arrangement::KvTogether).salt("together");
    let padded = with(Arrangement::Padded).salt("together");
    save_and_load(&daemon, &together, &padded.instance("other"));
}

#[test]
fn padding_between_blocks_is_never_written() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        arrangement: Arrangement::Padded,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec.clone());
    let names = hashes(1, 8);
    worker.save(&names);
    assert_eq!(worker.fetch(1, &names), 8);
    for block in 0..8 {
        let end = (block + 1) * (spec.page_bytes() + 192) - 192;
        assert_eq!(
            worker.raw(0, end, 192),
            vec![0; 192],
            "behind block {block}"
        );
    }
}

#[test]
fn page_sizes_from_tiny_to_two_mebibytes_work() {
    let daemon = Daemon::start();
    for (half_bytes, layers) in [
        (8, 1),
        (40, 1),
        (264, 3),
        (4096, 8),
        (1 << 20, 1),
        (1 << 14, 64),
    ] {
        for kind in MemoryKind::ALL {
            let salt = format!("{half_bytes} {layers} {kind:?}");
            let spec = WorkerSpec {
                half_bytes,
                layers,
                memory: kind,
                blocks: 4,
                ..WorkerSpec::default()
            };
            let spec = spec.salt(&salt);
            save_and_load(&daemon, &spec, &spec.instance("other"));
        }
    }
}

#[test]
fn hundreds_of_layers_are_packed_in_order() {
    let daemon = Daemon::start();
    for kind in MemoryKind::ALL {
        let spec = WorkerSpec {
            layers: 512,
            half_bytes: 64,
            memory: kind,
            ..WorkerSpec::default()
        };
        let spec = WorkerSpec {
            blocks: 8,
            ..spec.salt(&format!("{kind:?}"))
        };
        save_and_load(&daemon, &spec, &spec.instance("other"));
    }
}

#[test]
fn lists_of_many_chunks_keep_their_order() {
    let daemon = Daemon::start_with(Config {
        pool: "128MiB".into(),
        ..Config::default()
    });
    let blocks = 9000;
    let spec = WorkerSpec {
        half_bytes: 64,
        layers: 1,
        blocks,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    let names = hashes(1, blocks as usize);
    // Every other block first: no runs to shorten the list.
    let (even, odd): (Vec<u32>, Vec<u32>) = (0..blocks).partition(|block| block % 2 == 0);
    let order: Vec<u32> = odd.into_iter().chain(even).collect();
    let saved = worker.save_in(0, &order, &names);
    assert_eq!((saved.status, saved.count), (Status::Ok, blocks));
    assert_eq!(worker.fetch(1, &names), blocks as usize);
}

#[test]
fn a_lease_can_be_loaded_from_its_middle_into_any_blocks() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 20);
    worker.save(&names);
    let lease = worker.query(1, &names).lease;
    let blocks = [63, 7, 30, 8];
    worker.wipe(0, &blocks);
    let loaded = worker.load_in(0, lease, 11, &blocks);
    assert_eq!((loaded.status, loaded.count), (Status::Ok, 4));
    for (block, hash) in blocks.iter().zip(&names[11..]) {
        assert_eq!(worker.verify(0, *block, hash), Ok(()));
    }
}

#[test]
fn several_threads_share_one_client() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        blocks: 64,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec);
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let worker = &worker;
            scope.spawn(move || {
                let blocks: Vec<u32> = (thread * 16..thread * 16 + 16).collect();
                for round in 0..20u64 {
                    let names = hashes(u64::from(thread) * 10_000 + round * 100, 16);
                    assert_eq!(worker.save_in(0, &blocks, &names).count, 16);
                    let hit = worker.query(u64::from(thread) << 32 | round, &names);
                    assert_eq!(hit.count, 16);
                    worker.wipe(0, &blocks);
                    assert_eq!(worker.load_in(0, hit.lease, 0, &blocks).status, Status::Ok);
                    for (block, hash) in blocks.iter().zip(&names) {
                        assert_eq!(worker.verify(0, *block, hash), Ok(()));
                    }
                }
            });
        }
    });
}
