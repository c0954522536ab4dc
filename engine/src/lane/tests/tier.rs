//! Blocks leave for the tier below the pool and come back: right, in time, or not at all.

mod begin;
mod cancel;
mod checksums;
mod hot;
mod late;
mod shared;
mod waits;
mod withdrawn;

use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use pegaflow_shm::desc::{Completion, MissReason, Op, Submission, flags};
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::status::Status;

use super::rig::*;
use crate::lane::LaneOptions;
use crate::lane::api::CloseReason;
use crate::tier::memory::Handle;
use crate::tier::{AdmitWhen, Refused, StoreOutcome, TierOptions};

/// Blocks that the pool holds.
const POOL_BLOCKS: u64 = 16 * EXTENT / PAGE;

struct Below {
    dir: tempfile::TempDir,
    store: Handle,
    rig: Rig,
}

fn options(options: &mut LaneOptions) {
    options.tier = Some(TierOptions::default());
}

fn tier(adjust: impl FnOnce(&mut TierOptions)) -> impl FnOnce(&mut LaneOptions) {
    let mut tier = TierOptions::default();
    adjust(&mut tier);
    move |options| options.tier = Some(tier)
}

fn over(
    dir: &std::path::Path,
    boot: u8,
    store: &Handle,
    adjust: impl FnOnce(&mut LaneOptions),
) -> Rig {
    let store = store.clone();
    Rig::over(
        dir,
        boot,
        adjust,
        Some(Box::new(move |pool, wake| Ok(store.open(pool, wake)))),
    )
    .unwrap()
}

impl Below {
    fn start() -> Below {
        Below::with(options)
    }

    fn with(adjust: impl FnOnce(&mut LaneOptions)) -> Below {
        let (dir, store) = (folder(), Handle::default());
        let rig = over(dir.path(), 1, &store, adjust);
        Below { dir, store, rig }
    }
}

/// Saves blocks with these numbers, each filled with its number.
fn save(client: &mut Client, worker: u32, memory: &Memory, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let block = (number % u64::from(BLOCKS)) as u32;
        memory.fill(block, number as u8);
        let saved = client.save(worker, 0, &hashes([number]), &[block]);
        assert_eq!(
            (saved.status(), saved.count),
            (Status::Ok, 1),
            "block {number}"
        );
    }
}

/// Repeats a query until it is not loading.
fn settled(
    client: &mut Client,
    worker: u32,
    key: u64,
    numbers: std::ops::Range<u64>,
) -> Completion {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = client.query_key(worker, 0, key, &hashes(numbers.clone()));
        if answer.status() != Status::Loading {
            return answer;
        }
        assert_eq!(answer.lease, 0, "a loading query has no lease");
        assert!(Instant::now() < until, "still loading: {answer:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn reach(worker: u32, key: u64, flags: u8, count: usize, deadline_ms: u64) -> Submission {
    Submission {
        arg0: key,
        arg2: deadline_ms << 32,
        flags,
        ..list(Op::Query, worker, 0, count)
    }
}

fn load_and_check(
    client: &mut Client,
    worker: u32,
    memory: &Memory,
    answer: &Completion,
    numbers: std::ops::Range<u64>,
) {
    let blocks: Vec<u32> = (0..answer.count).map(|at| at + 128).collect();
    for block in &blocks {
        memory.fill(*block, 0xee);
    }
    let loaded = client.load(worker, 0, answer.lease, &blocks);
    assert_eq!((loaded.status(), loaded.count), (Status::Ok, answer.count));
    for (block, number) in blocks.iter().zip(numbers) {
        assert!(memory.holds(*block, number as u8), "block of {number}");
    }
}

#[test]
fn an_evicted_block_comes_back_with_its_bytes() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let first = client.query(worker, 0, &hashes(0..8));
    assert_eq!((first.status(), first.lease), (Status::Loading, 0));
    assert_eq!((first.count, first.arg0), (0, 8));
    let answer = settled(&mut client, worker, 7, 0..8);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 8));
    assert_eq!(answer.reason, MissReason::None as u16);
    load_and_check(&mut client, worker, &memory, &answer, 0..8);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_sum(&[Counter::QueryHitSsd], 8);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
}

#[test]
fn blocks_come_up_in_the_order_of_the_keys_and_no_further_than_allowed() {
    let mut below = Below::with(tier(|tier| tier.max_prefetch = 2));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.store.hold();
    below.store.state().reads.clear();
    let answer = client.query(worker, 0, &hashes(0..6));
    assert_eq!(answer.status(), Status::Loading);
    client.flush();
    below.rig.expect_gauge(Gauge::SsdReading, 2);
    // Leases that were given, not those that are set aside.
    below.rig.expect_gauge(Gauge::Leases, 0);
    below.store.release();
    settled(&mut client, worker, 7, 0..6);
    let read: Vec<_> = below
        .store
        .state()
        .reads
        .iter()
        .map(|key| key.hash)
        .collect();
    assert_eq!(read, hashes(0..6));
}

#[test]
fn two_queries_have_a_block_fetched_once() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.store.hold();
    below.store.state().reads.clear();
    for key in [1, 2] {
        let answer = client.query_key(worker, 0, key, &hashes(0..4));
        assert_eq!(answer.status(), Status::Loading);
    }
    below.store.release();
    for key in [1, 2] {
        let answer = settled(&mut client, worker, key, 0..4);
        assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    }
    assert_eq!(below.store.state().reads.len(), 4);
}

#[test]
fn a_query_that_waits_is_answered_when_its_blocks_are_in() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.store.hold();
    let names = hashes(0..4);
    client.submit_list(0, &names.concat(), reach(worker, 9, flags::WAIT, 4, 0));
    client.flush();
    assert!(client.try_completion().is_none());
    below.rig.expect_gauge(Gauge::Requests, 1);
    below.store.release();
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 0..4);
    below.rig.expect_gauge(Gauge::Requests, 0);
    below.rig.expect_gauge(Gauge::Leases, 0);
}

#[test]
fn a_deadline_gives_what_is_there() {
    let mut below = Below::with(tier(|tier| tier.patience = Duration::from_secs(600)));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.store.hold();
    // Two that are in the pool, then two that are below.
    let names = hashes([last - 2, last - 1, 0, 1]);
    client.submit_list(0, &names.concat(), reach(worker, 9, flags::WAIT, 4, 50));
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 2));
    assert_eq!(answer.reason, MissReason::InFlight as u16);
    assert_ne!(answer.lease, 0);
    assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    below.store.release();
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    below.rig.expect_gauge(Gauge::BlocksUnfinished, 0);
}

#[test]
fn who_wants_it_now_gets_what_is_in_the_pool_and_fetches_nothing() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.store.hold();
    below.store.state().reads.clear();
    let names = hashes([last - 1, 0]);
    client.submit_list(0, &names.concat(), reach(worker, 9, flags::NOW, 2, 0));
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    assert_eq!(answer.reason, MissReason::Absent as u16);
    assert!(below.store.state().reads.is_empty());
    // It also ends what an earlier query of the same request began.
    let key = reach(worker, 10, 0, 2, 0);
    client.submit_list(0, &names.concat(), key);
    assert_eq!(client.completion().status(), Status::Loading);
    client.submit_list(0, &names.concat(), reach(worker, 10, flags::NOW, 2, 0));
    assert_eq!(client.completion().count, 1);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_sum(&[Counter::PrefetchBegun], 1);
    below.rig.expect_sum(&[Counter::PrefetchAbandoned], 1);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
}

#[test]
fn a_prefetch_that_nobody_asks_for_again_leaves_no_pin() {
    let mut below = Below::with(|options| {
        options.tier = Some(TierOptions::default());
        options.lease_ttl = Duration::from_millis(200);
    });
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let answer = client.query(worker, 0, &hashes(0..4));
    assert_eq!(answer.status(), Status::Loading);
    below.rig.expect_sum(&[Counter::PrefetchAbandoned], 1);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 0);

    // Neither does one whose session ends while its blocks are on their way.
    below.store.hold();
    let mut other = below.rig.connect();
    let scheduler = below
        .rig
        .register(&other, spec("a", "", 1, None), &[], &memory);
    let names = hashes(10..14);
    let query = reach(scheduler.unwrap(), 3, flags::WAIT, 4, 0);
    other.submit_list(0, &names.concat(), query);
    other.flush();
    below.rig.expect_gauge(Gauge::SsdReading, 4);
    below.rig.close(&other);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Requests, 0);
}

#[test]
fn a_query_that_waits_can_be_cancelled() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.store.hold();
    let query = Submission {
        request_id: 1000,
        ..reach(worker, 9, flags::WAIT, 4, 0)
    };
    client.submit_list(0, &hashes(0..4).concat(), query);
    client.submit(Submission {
        op: Op::Cancel as u8,
        registration: worker,
        arg0: 1000,
        ..Submission::zeroed()
    });
    let (query, cancel) = (client.completion(), client.completion());
    assert_eq!(
        (query.request_id, query.status()),
        (1000, Status::Cancelled)
    );
    assert_eq!(cancel.status(), Status::Ok);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.store.release();
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Requests, 0);
}

#[test]
fn a_bad_page_or_a_failing_drive_ends_as_a_miss() {
    for (outcome, counter) in [
        (StoreOutcome::Bad, Counter::SsdFetchBad),
        (StoreOutcome::Failed, Counter::SsdFetchFailed),
    ] {
        let mut below = Below::start();
        let memory = Memory::new();
        let (mut client, worker) = below.rig.worker("a", "", &memory);
        save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
        below.store.state().reads_end = Some(outcome);
        let answer = settled(&mut client, worker, 7, 0..4);
        assert_eq!(
            (answer.status(), answer.count, answer.lease),
            (Status::Ok, 0, 0)
        );
        assert_eq!(answer.reason, MissReason::Absent as u16);
        below.rig.expect_gauge(Gauge::BlocksUnfinished, 0);
        below.rig.expect_gauge(Gauge::BlocksPinned, 0);
        below.rig.expect_gauge(Gauge::SsdReading, 0);
        assert!(below.rig.node.counter(counter) > 0);
        let sum = [
            Counter::QueryHit,
            Counter::QueryHitSsd,
            Counter::QueryMissAbsent,
            Counter::QueryMissAfterMiss,
        ];
        below.rig.expect_sum(&sum, 4);
    }
}

#[test]
fn a_drive_that_stalls_costs_the_patience_and_no_more() {
    let mut below = Below::with(tier(|tier| tier.patience = Duration::from_millis(50)));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.store.hold();
    let names = hashes([last - 1, 0, 1]);
    client.submit_list(0, &names.concat(), reach(worker, 9, flags::WAIT, 3, 0));
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    assert_eq!(answer.reason, MissReason::InFlight as u16);
    // Nobody else waits for what has stalled, either.
    let answer = client.query_key(worker, 0, 10, &names[1..]);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 0));
    // The pool serves on meanwhile, and the pages that the drive has are not given to others.
    save(&mut client, worker, &memory, 1000..1000 + POOL_BLOCKS);
    let answer = client.query_key(worker, 0, 11, &hashes(1100..1104));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 1100..1104);
    below.rig.expect_gauge(Gauge::SsdReading, 2);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
}

#[test]
fn saves_do_not_wait_for_a_drive_that_does_not_write() {
    for held in [true, false] {
        let mut below = Below::start();
        let memory = Memory::new();
        let (mut client, worker) = below.rig.worker("a", "", &memory);
        if held {
            below.store.hold();
        } else {
            below.store.state().refuse_writes = Some(Refused::Degraded);
        }
        save(&mut client, worker, &memory, 0..4 * POOL_BLOCKS);
        let lost = || below.rig.node.counter(Counter::SsdUnwritten);
        assert!(lost() > 2 * POOL_BLOCKS, "{}", lost());
        // What a stalled drive still reads is not overwritten by anything.
        let held_pages = below.rig.node.gauge(Gauge::SsdWriting);
        assert!(held_pages <= POOL_BLOCKS / 4, "{held_pages}");
        below.store.release();
        below.rig.expect_gauge(Gauge::SsdWriting, 0);
        below.rig.expect_gauge(Gauge::BlocksPinned, 0);
        for pages in below.store.state().blocks.values() {
            assert!(pages[0].iter().all(|byte| *byte == pages[0][0]));
        }
    }
}

#[test]
fn admission_decides_what_is_written() {
    // As soon as they are sealed, without any eviction.
    let mut below = Below::with(tier(|tier| tier.admit = AdmitWhen::Seal));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..8);
    below.rig.expect_sum(&[Counter::SsdWritten], 8);

    // What was found twice, and nothing else, however much is evicted.
    let mut below = Below::with(tier(|tier| tier.admit = AdmitWhen::Hits(2)));
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..8);
    for key in 0..2 {
        let answer = client.query_key(worker, 0, key, &hashes(0..3));
        assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    }
    below.rig.expect_sum(&[Counter::SsdWritten], 3);
    save(&mut client, worker, &memory, 8..3 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    assert_eq!(below.store.state().blocks.len(), 3);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
}

#[test]
fn a_full_queue_puts_writes_off_and_loses_none() {
    let mut below = Below::with(tier(|tier| tier.admit = AdmitWhen::Seal));
    below.store.state().depth = 2;
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    below.store.hold();
    save(&mut client, worker, &memory, 0..20);
    assert_eq!(below.store.pending(), 2);
    below.store.release();
    below.rig.expect_sum(&[Counter::SsdWritten], 20);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn another_domain_or_namespace_never_gets_the_block() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let (mut salted, other) = below.rig.worker("b", "salt", &memory);
    let answer = salted.query(other, 0, &hashes(0..4));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 0));
    let mut stranger = below.rig.connect_as(2000);
    let registered = below
        .rig
        .register(&stranger, spec("a", "", 1, Some(0)), &[0, 1], &memory);
    let answer = stranger.query(registered.unwrap(), 0, &hashes(0..4));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 0));
    assert_eq!(settled(&mut client, worker, 7, 0..4).count, 4);
}

#[test]
fn members_of_a_group_come_up_one_by_one() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    memory.fill(0, 0xaa);
    client.save(worker, 1, &hashes([1, 2, 3]), &[0, 0, 0]);
    save(&mut client, worker, &memory, 100..100 + 2 * POOL_BLOCKS);
    memory.fill(0, 0xaa);
    client.save(worker, 1, &hashes([2]), &[0]);
    let names = hashes([1, 2, 9, 3]);
    assert_eq!(client.query(worker, 1, &names).status(), Status::Loading);
    let until = Instant::now() + Duration::from_secs(10);
    let answer = loop {
        let answer = client.query(worker, 1, &names);
        if answer.status() != Status::Loading {
            break answer;
        }
        assert!(Instant::now() < until);
    };
    assert_eq!((answer.status(), answer.count), (Status::Ok, 3));
    assert_eq!(client.result_word() & 0xf, 0b1011);
    let loaded = client.load(worker, 1, answer.lease, &[5, 6, 7]);
    assert_eq!(loaded.status(), Status::Ok);
    assert!((5..8).all(|block| memory.holds(block, 0xaa)));
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn a_block_of_several_ranks_comes_back_whole() {
    let mut below = Below::start();
    let memories = [Memory::new(), Memory::with_page(2 * PAGE)];
    let mut ranks = Vec::new();
    for (rank, memory) in (0..).zip(&memories) {
        let client = below.rig.connect();
        let spec = spec("a", "", 2, Some(rank));
        let registered = below.rig.register(&client, spec, &[0], memory).unwrap();
        ranks.push((client, registered));
    }
    for number in 0..POOL_BLOCKS {
        let block = (number % 128) as u32;
        for ((client, worker), memory) in ranks.iter_mut().zip(&memories) {
            memory.fill(block, number as u8);
            client.save(*worker, 0, &hashes([number]), &[block]);
        }
    }
    let (client, worker) = &mut ranks[0];
    let answer = settled(client, *worker, 7, 0..3);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 3));
    for ((client, worker), memory) in ranks.iter_mut().zip(&memories) {
        load_and_check(client, *worker, memory, &answer, 0..3);
    }
    below.rig.expect_gauge(Gauge::Leases, 0);
}

#[test]
fn both_tiers_survive_a_restart() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    let last = 2 * POOL_BLOCKS;
    save(&mut client, worker, &memory, 0..last);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    let Below { dir, store, rig } = below;
    rig.close(&client);
    rig.stop();
    let mut rig = over(dir.path(), 2, &store, options);
    let (mut client, worker) = rig.worker("a", "", &memory);
    let answer = client.query_key(worker, 0, 1, &hashes(last - 4..last));
    assert_eq!(
        (answer.status(), answer.count),
        (Status::Ok, 4),
        "from the pool"
    );
    load_and_check(&mut client, worker, &memory, &answer, last - 4..last);
    let answer = settled(&mut client, worker, 2, 0..4);
    assert_eq!(
        (answer.status(), answer.count),
        (Status::Ok, 4),
        "from below"
    );
    load_and_check(&mut client, worker, &memory, &answer, 0..4);
    // A new pool leaves what is below alone.
    rig.close(&client);
    rig.stop();
    let mut rig = over(dir.path(), 3, &store, |wanted| {
        options(wanted);
        wanted.pool = crate::config::PoolStart::Fresh;
    });
    let (mut client, worker) = rig.worker("a", "", &memory);
    let answer = settled(&mut client, worker, 2, 0..4);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 0..4);
}

#[test]
fn a_rank_that_leaves_ends_the_wait_of_its_instance() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let mut other = below.rig.connect();
    let scheduler = below
        .rig
        .register(&other, spec("a", "", 1, None), &[], &memory);
    below.store.hold();
    let query = reach(scheduler.unwrap(), 3, flags::WAIT, 4, 0);
    other.submit_list(0, &hashes(0..4).concat(), query);
    other.flush();
    let closed = below
        .rig
        .lane
        .handle
        .close_session(client.id, CloseReason::Left);
    below.rig.runtime.block_on(closed).unwrap();
    assert_eq!(other.completion().status(), Status::NotReady);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn a_query_that_takes_the_key_of_one_that_waits_keeps_its_own_blocks() {
    for flag in [flags::WAIT, flags::NOW] {
        let mut below = Below::start();
        let memory = Memory::new();
        let (mut client, worker) = below.rig.worker("a", "", &memory);
        let last = 2 * POOL_BLOCKS;
        save(&mut client, worker, &memory, 0..last);
        below.store.hold();
        let names = hashes(0..4);
        let first = Submission {
            request_id: 1000,
            ..reach(worker, 9, flags::WAIT, 4, 0)
        };
        client.submit_list(0, &names.concat(), first);
        client.flush();
        below.rig.expect_gauge(Gauge::Requests, 1);
        // The same key with other hashes: in the pool for who wants them now, else below it.
        let numbers = match flag {
            flags::NOW => last - 4..last,
            _ => 4..8,
        };
        let second = Submission {
            request_id: 1001,
            ..reach(worker, 9, flag, 4, 0)
        };
        client.submit_list(0, &hashes(numbers.clone()).concat(), second);
        // What is ended or in the pool needs no drive.
        let first = client.completion();
        if flag == flags::WAIT {
            below.store.release();
        }
        let mut answers = [first, client.completion()];
        below.store.release();
        answers.sort_by_key(|answer| answer.request_id);
        let [first, second] = answers;
        assert_eq!((first.status(), first.count), (Status::Ok, 0));
        assert_eq!(
            (first.lease, first.reason),
            (0, MissReason::InFlight as u16)
        );
        assert_eq!((second.status(), second.count), (Status::Ok, 4));
        load_and_check(&mut client, worker, &memory, &second, numbers);
        below.rig.expect_gauge(Gauge::BlocksPinned, 0);
        below.rig.expect_gauge(Gauge::Prefetches, 0);
    }
}

#[test]
fn a_membership_query_that_lost_its_prefetch_names_no_hit() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    client.save(worker, 1, &hashes([1]), &[0]);
    save(&mut client, worker, &memory, 100..100 + 2 * POOL_BLOCKS);
    client.save(worker, 1, &hashes([2]), &[0]);
    below.store.hold();
    let query = |request_id, flag| Submission {
        arg0: 9,
        request_id,
        flags: flag,
        ..list(Op::Query, worker, 1, 2)
    };
    client.submit_list(0, &hashes([1, 2]).concat(), query(1000, flags::WAIT));
    client.flush();
    below.rig.expect_gauge(Gauge::Requests, 1);
    client.submit_list(0, &hashes([2, 1]).concat(), query(1001, 0));
    let mut answers = [client.completion(), client.completion()];
    answers.sort_by_key(|answer| answer.request_id);
    assert_eq!(answers[1].status(), Status::Loading);
    assert_eq!((answers[0].status(), answers[0].count), (Status::Ok, 0));
    assert_eq!(answers[0].lease, 0);
    assert_eq!(client.result_word() & 0b11, 0, "hits without a lease");
    below.store.release();
    below.rig.close(&client);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn what_a_stalled_drive_holds_does_not_keep_the_other_drives_blocks_down() {
    let mut below = Below::with(tier(|tier| {
        tier.patience = Duration::from_millis(50);
        tier.max_prefetch = 2;
    }));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    below.store.state().held_keys.extend(hashes(0..2));
    let stalled = reach(worker, 1, flags::WAIT, 2, 0);
    client.submit_list(0, &hashes(0..2).concat(), stalled);
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 0));
    let healthy = reach(worker, 2, flags::WAIT, 4, 0);
    client.submit_list(0, &hashes(4..8).concat(), healthy);
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 4..8);
    below.rig.expect_gauge(Gauge::SsdReading, 2);
    below.store.release();
    below.rig.expect_gauge(Gauge::SsdReading, 0);
    // What is late counts no more once it has ended.
    let answer = settled(&mut client, worker, 3, 8..16);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 8));
}

#[test]
fn a_drive_whose_queue_is_full_holds_up_nobody_who_wants_blocks_of_another() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    below.store.state().held_keys.extend(hashes(0..1));
    below.store.state().busy_keys.extend(hashes(1..2));
    for key in 0..2 {
        let answer = client.query_key(worker, 0, key, &hashes(key..key + 1));
        assert_eq!(answer.status(), Status::Loading);
    }
    let other = reach(worker, 2, flags::WAIT, 4, 0);
    client.submit_list(0, &hashes(4..8).concat(), other);
    let answer = client.completion();
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    load_and_check(&mut client, worker, &memory, &answer, 4..8);
    // The full queue is tried again, although nothing has ended.
    below.store.state().busy_keys.clear();
    let answer = settled(&mut client, worker, 1, 1..2);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    below.store.release();
    let answer = settled(&mut client, worker, 0, 0..1);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
}

#[test]
fn asking_again_for_what_is_loading_is_no_further_hit() {
    let mut below = Below::with(tier(|tier| tier.admit = AdmitWhen::Hits(2)));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..1);
    for key in 0..2 {
        let answer = client.query_key(worker, 0, key, &hashes(0..1));
        assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    }
    below.rig.expect_sum(&[Counter::SsdWritten], 1);
    save(&mut client, worker, &memory, 1..2 * POOL_BLOCKS);
    // One that is in the pool, and one that is below.
    let names = hashes([2 * POOL_BLOCKS - 1, 0]);
    below.store.hold();
    for _ in 0..5 {
        let answer = client.query_key(worker, 0, 7, &names);
        assert_eq!((answer.status(), answer.count), (Status::Loading, 1));
    }
    below.store.release();
    let until = Instant::now() + Duration::from_secs(10);
    let answer = loop {
        let answer = client.query_key(worker, 0, 7, &names);
        if answer.status() != Status::Loading {
            break answer;
        }
        assert!(Instant::now() < until);
    };
    assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    save(&mut client, worker, &memory, 1000..1000 + 2 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    assert_eq!(below.store.state().blocks.len(), 1);
}
