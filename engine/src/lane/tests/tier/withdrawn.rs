//! Blocks whose bytes turn out to be wrong while the tier has to do with them.

use super::*;
use crate::copy::ChecksumMode;

fn checked(admit: AdmitWhen) -> impl FnOnce(&mut LaneOptions) {
    move |wanted| {
        tier(|tier| tier.admit = admit)(wanted);
        wanted.checksum = ChecksumMode::Always;
    }
}

/// A load finds that a block's page has changed.
fn found_wrong(client: &mut Client, worker: u32, key: u64, number: u64) {
    let answer = client.query_key(worker, 0, key, &hashes([number]));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    let loaded = client.load(worker, 0, answer.lease, &[200]);
    assert_eq!(loaded.status(), Status::CopyFailed);
}

#[test]
fn a_block_that_is_withdrawn_while_it_is_written_is_not_on_the_tier_afterwards() {
    let mut below = Below::with(checked(AdmitWhen::Seal));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    below.store.hold();
    save(&mut client, worker, &memory, 0..4);
    below.rig.expect_gauge(Gauge::SsdWriting, 4);
    below.store.change(&hashes([2])[0]);
    found_wrong(&mut client, worker, 5, 2);
    below.rig.expect_sum(&[Counter::ChecksumMismatches], 1);
    // The drive's copy of it is as it was saved, which nobody can know.
    below.store.change(&hashes([2])[0]);
    below.store.release();
    below.rig.expect_sum(&[Counter::SsdWritten], 4);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    let names: Vec<_> = below
        .store
        .state()
        .blocks
        .keys()
        .map(|key| key.hash)
        .collect();
    assert_eq!(names.len(), 3);
    assert!(!names.contains(&hashes([2])[0]));
    below.rig.expect_gauge(Gauge::BlocksHeld, 3);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn a_block_that_is_withdrawn_while_a_prefetch_holds_it_is_in_no_answer() {
    let mut below = Below::with(checked(AdmitWhen::Evict));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    // One of three is in the pool when the wait begins.
    let answer = settled(&mut client, worker, 7, 1..2);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    below.store.hold();
    let waits = reach(worker, 9, flags::WAIT, 3, 0);
    let waits = client.submit_list(0, &hashes(0..3).concat(), waits);
    client.flush();
    below.rig.expect_gauge(Gauge::SsdReading, 2);
    below.store.change(&hashes([1])[0]);
    found_wrong(&mut client, worker, 5, 1);
    below.store.release();
    let answer = client.completion();
    assert_eq!((answer.request_id, answer.status()), (waits, Status::Ok));
    assert_eq!(answer.count, 1, "the prefix ends before the wrong block");
    assert_eq!(answer.reason, MissReason::Absent as u16);
    load_and_check(&mut client, worker, &memory, &answer, 0..1);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_gauge(Gauge::Leases, 0);
}
