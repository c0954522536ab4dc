//! Checksums of the pool go down with a block and come up with it.

use super::*;
use crate::copy::ChecksumMode;

fn checked(wanted: &mut LaneOptions) {
    options(wanted);
    wanted.checksum = ChecksumMode::Always;
}

#[test]
fn a_page_that_changes_before_it_is_written_to_the_tier_is_a_miss_and_never_a_wrong_byte() {
    let mut below = Below::with(|wanted| {
        tier(|tier| tier.admit = AdmitWhen::Seal)(wanted);
        wanted.checksum = ChecksumMode::Always;
    });
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    below.store.state().changes.extend(hashes([3]));
    save(&mut client, worker, &memory, 0..8);
    let ended = [Counter::SsdWritten, Counter::SsdWriteFailed];
    below.rig.expect_sum(&ended, 8);
    below.rig.expect_sum(&[Counter::ChecksumMismatches], 1);
    below.rig.expect_sum(&[Counter::SsdWriteFailed], 1);
    assert_eq!(
        below.store.state().blocks.len(),
        7,
        "the wrong one is not there"
    );
    below.rig.expect_gauge(Gauge::BlocksHeld, 7);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
    let answer = settled(&mut client, worker, 7, 0..8);
    assert_eq!(
        (answer.status(), answer.count),
        (Status::Ok, 3),
        "a miss from there on"
    );
    load_and_check(&mut client, worker, &memory, &answer, 0..3);
    below.store.state().changes.clear();
    save(&mut client, worker, &memory, 3..4);
    let answer = settled(&mut client, worker, 8, 0..8);
    assert_eq!(
        (answer.status(), answer.count),
        (Status::Ok, 8),
        "it can be saved again"
    );
    load_and_check(&mut client, worker, &memory, &answer, 0..8);
    below.rig.expect_sum(&[Counter::ChecksumMismatches], 1);
}

#[test]
fn a_page_that_changes_after_its_block_came_back_is_found() {
    let mut below = Below::with(checked);
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let answer = settled(&mut client, worker, 7, 0..4);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 4));
    below.store.change(&hashes([2])[0]);
    let loaded = client.load(worker, 0, answer.lease, &[128, 129, 130, 131]);
    assert_eq!(loaded.status(), Status::CopyFailed);
    below.rig.expect_sum(&[Counter::ChecksumMismatches], 1);
    let answer = settled(&mut client, worker, 8, 0..4);
    assert_eq!(answer.count, 2, "neither in the pool nor below it");
    load_and_check(&mut client, worker, &memory, &answer, 0..2);
}
