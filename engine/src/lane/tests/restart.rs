//! What the next daemon finds.

use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::status::Status;

use super::rig::*;
use crate::config::PoolStart;

/// Two ranks, of which both hold group 0 and rank 1 alone holds group 1.
fn ranks(rig: &mut Rig, memory: &[Memory; 2]) -> [(Client, u32); 2] {
    [0, 1].map(|rank: u32| {
        let client = rig.connect();
        let groups: &[u16] = if rank == 0 { &[0] } else { &[0, 1] };
        let spec = spec("a", "", 2, Some(rank));
        let id = rig.register(&client, spec, groups, &memory[rank as usize]);
        (client, id.unwrap())
    })
}

#[test]
fn blocks_of_a_group_that_some_ranks_hold_outlive_the_daemon_and_half_blocks_do_not() {
    let dir = folder();
    let memory = [Memory::new(), Memory::with_page(2 * PAGE)];
    let mut rig = Rig::start(dir.path(), 1);
    let [(mut zero, first), (mut one, second)] = ranks(&mut rig, &memory);
    for (number, memory) in memory.iter().enumerate() {
        for block in 0..4 {
            memory.fill(block, 16 * number as u8 + block as u8 + 1);
        }
    }
    // Blocks 0 and 1 are whole, block 2 has one of two shards.
    assert_eq!(zero.save(first, 0, &hashes(0..3), &[0, 1, 2]).count, 3);
    assert_eq!(one.save(second, 0, &hashes(0..2), &[0, 1]).count, 2);
    assert_eq!(one.save(second, 1, &hashes(7..8), &[3]).count, 1);
    rig.expect_gauge(Gauge::BlocksHeld, 3);
    rig.stop();

    let mut rig = Rig::start(dir.path(), 2);
    rig.expect_sum(&[Counter::AdoptedBlocks], 3);
    let [(mut zero, first), (mut one, second)] = ranks(&mut rig, &memory);
    let answer = zero.query(first, 0, &hashes(0..3));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 2));
    assert_eq!(zero.load(first, 0, answer.lease, &[10, 11]).count, 2);
    assert_eq!(one.load(second, 0, answer.lease, &[10, 11]).count, 2);
    let answer = one.query_key(second, 1, 8, &hashes(7..8));
    assert_eq!((answer.count, one.result_word()), (1, 1));
    assert_eq!(one.load(second, 1, answer.lease, &[12]).count, 1);
    assert!(memory[0].holds(10, 1) && memory[0].holds(11, 2));
    assert!(memory[1].holds(10, 17) && memory[1].holds(11, 18) && memory[1].holds(12, 20));
    rig.expect_gauge(Gauge::BlocksPinned, 0);
    rig.stop();
}

#[test]
fn users_do_not_see_each_others_blocks_after_a_restart_either() {
    let dir = folder();
    let memory = Memory::new();
    let mut rig = Rig::start(dir.path(), 1);
    for (uid, byte) in [(1000, 3), (1001, 4)] {
        let mut client = rig.connect_as(uid);
        let id = rig.register(&client, spec("a", "", 1, Some(0)), &[0], &memory);
        memory.fill(0, byte);
        let names = hashes([u64::from(uid), 5]);
        assert_eq!(client.save(id.unwrap(), 0, &names, &[0, 0]).count, 2);
    }
    rig.expect_gauge(Gauge::BlocksHeld, 4);
    rig.stop();

    let mut rig = Rig::start(dir.path(), 2);
    rig.expect_sum(&[Counter::AdoptedBlocks], 4);
    for (uid, byte) in [(1000u32, 3), (1001, 4)] {
        let mut client = rig.connect_as(uid);
        let id = rig.register(&client, spec("a", "", 1, Some(0)), &[0], &memory);
        let id = id.unwrap();
        let foreign = client.query(id, 0, &hashes([2001 - u64::from(uid)]));
        assert_eq!(foreign.count, 0);
        let lease = client.query(id, 0, &hashes([5])).lease;
        assert_eq!(client.load(id, 0, lease, &[9]).count, 1);
        assert!(memory.holds(9, byte), "user {uid}");
    }
    rig.stop();
}

#[test]
fn a_lane_over_another_ones_pool_is_refused_and_takes_nothing_away() {
    let dir = folder();
    let memory = Memory::new();
    let mut rig = Rig::start(dir.path(), 1);
    let (mut client, worker) = rig.worker("a", "", &memory);
    client.save(worker, 0, &hashes(0..4), &[0, 1, 2, 3]);
    for (boot, pool) in [(2, PoolStart::Adopt), (3, PoolStart::Fresh)] {
        let second = Rig::try_with(dir.path(), boot, |options| options.pool = pool);
        let refused = second.err().expect("refused").to_string();
        assert!(refused.contains("in use by another"), "{pool:?}: {refused}");
    }
    // A new session is given the index file, and the next lane finds the pool.
    let (mut late, other) = rig.worker("b", "", &memory);
    assert_eq!(late.query(other, 0, &hashes(0..4)).count, 4);
    rig.stop();
    let rig = Rig::start(dir.path(), 4);
    rig.expect_sum(&[Counter::AdoptedBlocks], 4);
    rig.stop();
}
