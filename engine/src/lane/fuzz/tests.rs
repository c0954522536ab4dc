//! Limits that need copies that do not end.

#![forbid(unsafe_code)]

use super::*;

#[test]
fn block_ids_of_a_load_count_until_its_copies_have_ended() {
    let place = Place::new();
    let options = lane_options(place.path());
    let mut rig = Rig::new(&options, false);
    rig.save_honestly();
    rig.lane.options.max_blocks = 2 * HONEST_BLOCKS - 1;
    let hashes: Vec<u8> = (1..=HONEST_BLOCKS as u8).flat_map(|at| [at; 32]).collect();
    let leases = [1, 2, 3].map(|key| {
        let query = Submission {
            arg0: key,
            ..honest(Op::Query, 1 + key, hashes.len(), 0)
        };
        let found = rig.ask_honestly(&hashes, &query).expect("an answer");
        assert_eq!(found.count, HONEST_BLOCKS);
        found.lease
    });
    let blocks: Vec<u8> = (8..8 + HONEST_BLOCKS).flat_map(u32::to_le_bytes).collect();
    let load = |number: usize| honest(Op::Load, 10 + number as u64, blocks.len(), leases[number]);
    rig.clients[HONEST].write_arena(0, &blocks);
    for number in [0, 1] {
        rig.clients[HONEST].publish(&load(number), None);
        rig.turn();
    }
    let refused = rig.clients[HONEST].completion().expect("at once");
    assert_eq!(
        (refused.request_id, refused.status()),
        (11, Status::TooMany)
    );
    assert!(
        rig.clients[HONEST].completion().is_none(),
        "no copy has run"
    );
    rig.settle();
    let loaded = rig.clients[HONEST].completion().expect("an answer");
    assert_eq!((loaded.request_id, loaded.status()), (10, Status::Ok));
    // The room is there again, and the lease of the refused load, too.
    for number in [1, 2] {
        let loaded = rig.ask_honestly(&blocks, &load(number)).expect("an answer");
        assert_eq!((loaded.status(), loaded.count), (Status::Ok, HONEST_BLOCKS));
    }
    rig.close(HONEST);
}
