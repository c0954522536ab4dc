//! What is hot in the pool stays on the tier.

use super::*;

#[test]
fn a_block_that_queries_find_in_the_pool_does_not_age_on_the_tier() {
    let mut below = Below::with(tier(|tier| tier.admit = AdmitWhen::Seal));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    below.store.state().most = 8;
    let is_there = |number: u64| {
        let state = below.store.state();
        state
            .blocks
            .keys()
            .any(|key| key.hash == hashes([number])[0])
    };
    let ended = [Counter::SsdWritten];
    save(&mut client, worker, &memory, 0..2);
    below.rig.expect_sum(&ended, 2);
    for number in 2..16 {
        for key in 0..200 {
            let answer = client.query_key(worker, 0, key, &hashes([0]));
            assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
            client.simple(Op::Release, worker, answer.lease);
        }
        save(&mut client, worker, &memory, number..number + 1);
        below.rig.expect_sum(&ended, number + 1);
    }
    assert!(is_there(0), "asked for all the time");
    assert!(!is_there(1), "asked for by nobody");
    assert_eq!(below.store.state().writes, 16, "nothing is written twice");
}
