//! What the tier has taken begins, also when the lane never sleeps.

use super::*;

/// A lane that polls for longer than any test takes.
fn awake(options: &mut LaneOptions) {
    options.tier = Some(TierOptions::default());
    options.spin = Duration::from_secs(600);
}

#[test]
fn blocks_are_written_although_the_lane_never_sleeps() {
    let mut below = Below::with(awake);
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..POOL_BLOCKS);
    // Half the pool is written ahead of time, and nobody waits for it.
    below
        .rig
        .expect_sum(&[Counter::SsdWritten], POOL_BLOCKS / 2);
    below.rig.expect_sum(&[Counter::LaneParks], 0);
}

#[test]
fn blocks_come_up_although_the_lane_never_sleeps() {
    let mut below = Below::with(awake);
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    let answer = settled(&mut client, worker, 7, 0..8);
    assert_eq!((answer.status(), answer.count), (Status::Ok, 8));
    load_and_check(&mut client, worker, &memory, &answer, 0..8);
}
