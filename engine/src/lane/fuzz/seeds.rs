//! Sessions as engines have them, then each kind of misbehaviour once.

#![forbid(unsafe_code)]

use crate::fuzz::input::Seed;

const SAVE: u8 = 4;
const QUERY: u8 = 2;
const LOAD: u8 = 3;

fn list(seed: Seed, who: u8, hashes: &[u8]) -> Seed {
    let mut seed = seed.u8(6 | who << 4).u8(2).u8(hashes.len() as u8);
    for hash in hashes {
        seed = seed.u8(*hash);
    }
    seed
}

fn blocks(seed: Seed, who: u8, count: u8) -> Seed {
    seed.u8(6 | who << 4).u8(0).u8(count)
}

/// A descriptor, the lane's turn, and its answer.
fn submit(seed: Seed, who: u8, op: u8, request: u8, count: u8) -> Seed {
    let seed = seed.u8(1 | who << 4).u8(op).u8(count).u8(request);
    seed.u8(10).u8(11 | who << 4)
}

fn save_query_load(seed: Seed, who: u8, group: u8) -> Seed {
    let hashes = [1, 2, 3, 9];
    let group = group << 5;
    let seed = submit(list(seed, who, &hashes), who, SAVE | group, 0, 4);
    let seed = submit(list(seed, who, &hashes), who, QUERY | group, 1, 4);
    submit(blocks(seed, who, 4), who, LOAD | group, 2, 4)
}

/// The corpus.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for shared in 0..2u8 {
        let start = || Seed::default().u8(shared);
        let both = |seed| save_query_load(save_query_load(seed, 0, 0), 1, 0);
        seeds.push(both(start()).0);
        seeds.push(save_query_load(both(start()), 0, 1).0);
        // Release, renew, cancel, nothing.
        for op in [5, 6, 7, 1] {
            seeds.push(submit(both(start()), 0, op, 3, 0).0);
        }
        // Saves of more than fits, so that blocks are evicted and extents change hands.
        let mut many = start();
        for round in 0..6u8 {
            let hashes: Vec<u8> = (0..16).map(|at| at + 4 * round).collect();
            let group = (round & 1) << 5;
            many = submit(
                list(many, round & 1, &hashes),
                round & 1,
                SAVE | group,
                0,
                16,
            );
        }
        seeds.push(save_query_load(many, 0, 0).0);
        // Copies that fail, that are cancelled, and that a session's end overtakes.
        for how in [3u8, 0x13, 0x23, 0] {
            let seed = list(start(), 0, &[1, 2, 3]);
            let seed = seed.u8(1).u8(SAVE).u8(3).u8(0).u8(8).u8(3).u8(9).u8(how);
            seeds.push(seed.u8(1).u8(7).u8(0).u8(1).u8(10).u8(11).0);
        }
        for act in 0..6u8 {
            let seed = list(start(), 0, &[5, 6, 7]);
            let seed = seed
                .u8(1)
                .u8(SAVE)
                .u8(3)
                .u8(0)
                .u8(8)
                .u8(3)
                .u8(15)
                .u8(act)
                .u8(1);
            seeds.push(save_query_load(seed.u8(10), 1, 0).0);
        }
        // Lists in pieces, left unfinished, and time that passes.
        let pieces = list(start(), 0, &[1, 2, 3])
            .u8(1)
            .u8(SAVE | 8)
            .u8(3 | 32)
            .u8(0)
            .u8(6);
        seeds.push(submit(list(pieces, 0, &[4, 5, 6]), 0, SAVE, 0, 3).0);
        let left = list(start(), 0, &[1, 2, 3])
            .u8(1)
            .u8(QUERY | 8)
            .u8(3 | 32)
            .u8(0)
            .u8(6);
        seeds.push(
            left.u8(8)
                .u8(3)
                .u8(13)
                .u8(3)
                .u8(8)
                .u8(3)
                .u8(13)
                .u8(3)
                .u8(10)
                .0,
        );
        // Lies in every word that the daemon reads.
        for word in 0..5u8 {
            let lie = both(start()).u8(12).u8(word).u64(77).u8(10).u8(14).u8(1);
            seeds.push(save_query_load(lie, 1, 0).0);
        }
        for field in 0..8u8 {
            let seed = list(start(), 0, &[1, 2]).u8(1).u8(SAVE).u8(2 | 128).u8(0);
            seeds.push(save_query_load(seed.u8(field).u64(0xffff).u8(10), 1, 0).0);
        }
    }
    seeds
}
