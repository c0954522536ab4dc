//! Memory of the pool that changes by itself: with checksums it costs a miss, never a wrong byte.

use std::os::unix::fs::FileExt;

use pegaflow::{BlockHash, Status};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};

fn daemon(mode: &str) -> Daemon {
    Daemon::start_with(Config::with(&["--checksum", mode]))
}

fn spec() -> WorkerSpec {
    WorkerSpec::default()
}

/// Flips a bit in the middle of the page that holds these bytes. There must be one such page.
fn flip(daemon: &Daemon, page: &[u8]) {
    let path = daemon.shm().join("pool");
    let pool = std::fs::read(&path).expect("the pool");
    let found: Vec<usize> = pool
        .chunks_exact(page.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == page)
        .map(|(at, _)| at * page.len())
        .collect();
    let [at] = found[..] else {
        panic!("{} pages hold these bytes", found.len());
    };
    let at = at + page.len() / 2;
    let file = std::fs::File::options().write(true).open(path);
    let changed = [pool[at] ^ 4];
    file.expect("the pool")
        .write_all_at(&changed, at as u64)
        .expect("written");
}

/// The bytes of a hash as they lie in the pool: computed into a block that is not used otherwise.
fn page_of(worker: &Worker, hash: &BlockHash) -> Vec<u8> {
    let last = worker.spec.blocks - 1;
    worker.compute(0, last, hash);
    worker.page(0, last)
}

/// Loads a lease of which one block has changed: nothing but sound blocks arrives.
fn load_without(worker: &Worker, lease: u64, names: &[BlockHash], changed: usize) {
    let blocks = first_blocks(names.len());
    worker.wipe(0, &blocks);
    let wiped = worker.page(0, blocks[changed]);
    let loaded = worker.load_in(0, lease, 0, &blocks);
    assert_eq!(loaded.status, Status::CopyFailed);
    assert!((loaded.count as usize) < names.len());
    assert_eq!(loaded.count + loaded.dropped, names.len() as u32);
    assert_eq!(
        worker.page(0, blocks[changed]),
        wiped,
        "a changed page arrived"
    );
    let arrived = blocks.iter().zip(names);
    let arrived = arrived.filter(|(block, name)| worker.verify(0, **block, name).is_ok());
    assert_eq!(arrived.count() as u32, loaded.count);
}

#[test]
fn a_page_that_changes_is_a_miss_and_never_a_wrong_byte() {
    for memory in MemoryKind::ALL {
        let daemon = daemon("always");
        let worker = Worker::ready(daemon.options(), WorkerSpec { memory, ..spec() });
        let names = hashes(1, 16);
        worker.save(&names);
        assert_eq!(worker.fetch(1, &names), 16, "sound pages are served");
        flip(&daemon, &page_of(&worker, &names[5]));

        let lease = worker.query(2, &names).lease;
        load_without(&worker, lease, &names, 5);
        assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 1));
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains("is withdrawn"));
        let line = line.unwrap_or_else(|| panic!("not told:\n{log}"));
        for word in ["namespace=", "hash=", "offset="] {
            assert!(line.contains(word), "{line}");
        }

        let shorter = worker.query(3, &names);
        assert_eq!(shorter.count, 5, "a miss from there on");
        worker.release(shorter.lease);
        assert!(daemon.gauge_becomes(Gauge::BlocksHeld, 15));
        assert_eq!(worker.save(&names).count, 1, "and can be saved again");
        assert_eq!(worker.fetch(4, &names), 16);
        assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 1));
        assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    }
}

#[test]
fn without_checksums_nobody_looks_and_sampled_looks_at_one_of_sixteen() {
    let daemon_off = daemon("off");
    let worker = Worker::ready(daemon_off.options(), spec());
    let names = hashes(1, 32);
    worker.save(&names);
    flip(&daemon_off, &page_of(&worker, &names[0]));
    let lease = worker.query(1, &names).lease;
    let loaded = worker.load_in(0, lease, 0, &first_blocks(32));
    assert_eq!(loaded.status, Status::Ok, "this is what checksums are for");
    assert!(worker.verify(0, 0, &names[0]).is_err());
    assert_eq!(daemon_off.counter(Counter::ChecksumMismatches), 0);

    let daemon = daemon("sampled");
    let worker = Worker::ready(daemon.options(), spec());
    worker.save(&names);
    for name in &names {
        flip(&daemon, &page_of(&worker, name));
    }
    for (key, name) in names.iter().enumerate() {
        let lease = worker.query(key as u64, std::slice::from_ref(name)).lease;
        worker.load_in(0, lease, 0, &[0]);
    }
    assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 2));
}

#[test]
fn checksums_survive_the_daemon_and_the_mode_may_change_between_boots() {
    let mut daemon = daemon("always");
    let names = hashes(1, 16);
    let late = hashes(100, 4);
    let pages: Vec<Vec<u8>>;
    {
        let worker = Worker::ready(daemon.options(), spec());
        worker.save(&names);
        pages = names.iter().map(|name| page_of(&worker, name)).collect();
    }
    daemon.kill();
    flip(&daemon, &pages[3]);
    daemon.set_argument("--checksum", "off");
    daemon.launch();
    {
        let worker = Worker::ready(daemon.options(), spec());
        assert_eq!(worker.query(1, &names[..3]).count, 3);
        worker.save(&late);
        let lease = worker.query(2, &names).lease;
        let loaded = worker.load_in(0, lease, 0, &first_blocks(16));
        assert_eq!(loaded.status, Status::Ok, "off: nobody looks");
    }
    daemon.kill();
    daemon.set_argument("--checksum", "sampled");
    daemon.launch();
    assert_eq!(daemon.counter(Counter::AdoptedBlocks), 20);
    let worker = Worker::ready(daemon.options(), spec());
    assert_eq!(
        worker.fetch(1, &late),
        4,
        "saved without one: served as it is"
    );
    let lease = worker.query(2, &names).lease;
    load_without(&worker, lease, &names, 3);
    assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 1));
    drop(worker);
    daemon.kill();
    daemon.launch();
    assert_eq!(
        daemon.counter(Counter::AdoptedBlocks),
        19,
        "withdrawn for good"
    );
    let worker = Worker::ready(daemon.options(), spec());
    assert_eq!(worker.query(1, &names).count, 3);
}

#[test]
fn a_block_of_several_ranks_goes_when_one_shard_changes() {
    let daemon = daemon("always");
    let ranks: Vec<Worker> = (0..2)
        .map(|rank| Worker::open(daemon.options(), spec().rank(rank, 2)).expect("registered"))
        .collect();
    ranks.iter().for_each(Worker::wait_ready);
    let names = hashes(1, 8);
    // Not in one piece: the checksums of the first rank wait for the second.
    ranks[0].save(&names);
    ranks[1].save(&names);
    let lease = ranks[0].query(1, &names).lease;
    for rank in &ranks {
        rank.load_and_verify(lease, &names);
    }
    flip(&daemon, &page_of(&ranks[1], &names[2]));
    let lease = ranks[0].query(2, &names).lease;
    load_without(&ranks[1], lease, &names, 2);
    // The other shards of that block go with it.
    load_without(&ranks[0], lease, &names, 2);
    assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 1));
    assert_eq!(ranks[0].query(3, &names).count, 2);
    assert!(daemon.gauge_becomes(Gauge::BlocksHeld, 7));
    assert_eq!(ranks[0].save(&names).count, 1);
    assert_eq!(ranks[1].save(&names).count, 1);
    let lease = ranks[1].query(4, &names).lease;
    for rank in &ranks {
        rank.load_and_verify(lease, &names);
    }
}

#[test]
fn a_block_that_two_instances_hold_is_withdrawn_once_and_freed_after_both() {
    let daemon = daemon("always");
    let one = Worker::ready(daemon.options(), spec().instance("one"));
    let two = Worker::ready(daemon.options(), spec().instance("two"));
    let names = hashes(1, 12);
    one.save(&names);
    let used = daemon.gauge(Gauge::PoolUsedBytes);
    let leases = [one.query(1, &names).lease, two.query(1, &names).lease];
    flip(&daemon, &page_of(&one, &names[7]));
    load_without(&one, leases[0], &names, 7);
    // A new one under the same name while the old one is still held.
    assert_eq!(one.save(&names).count, 1);
    assert_eq!(one.fetch(2, &names), 12);
    load_without(&two, leases[1], &names, 7);
    assert!(daemon.counter_becomes(Counter::ChecksumMismatches, 1));
    assert!(daemon.gauge_becomes(Gauge::Leases, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksHeld, 12));
    assert!(used == 0 || daemon.gauge_becomes(Gauge::PoolUsedBytes, used));
    assert_eq!(two.fetch(3, &names), 12);
}
