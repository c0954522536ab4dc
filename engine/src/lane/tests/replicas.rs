//! A replicated group is stored once, whoever saves it, and loaded by every rank.

use pegaflow_shm::desc::Op;
use pegaflow_shm::node::{Counter, Gauge};
use pegaflow_shm::status::Status;

use super::rig::*;

fn replicas() -> Memory {
    let mut memory = Memory::new();
    memory.replicated = true;
    memory
}

fn rank(rig: &mut Rig, rank: u32, memory: &Memory) -> (Client, u32) {
    let client = rig.connect();
    let spec = spec("mla", "", 2, Some(rank));
    let registration = rig.register(&client, spec, &[0], memory).unwrap();
    (client, registration)
}

#[test]
fn what_one_rank_saves_is_sealed_and_every_rank_loads_it() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let (first, second) = (replicas(), replicas());
    let (mut a, ra) = rank(&mut rig, 0, &first);
    let (mut b, rb) = rank(&mut rig, 1, &second);
    for block in 0..4 {
        first.fill(block, 10 + block as u8);
    }
    let names = hashes(0..4);
    let saved = a.save(ra, 0, &names, &[0, 1, 2, 3]);
    assert_eq!((saved.status(), saved.count), (Status::Ok, 4));
    rig.expect_sum(&[Counter::BlocksSealed], 4);
    let again = b.save(rb, 0, &names, &[4, 5, 6, 7]);
    assert_eq!(
        (again.status(), again.count, again.skipped),
        (Status::Ok, 0, 4)
    );
    rig.expect_gauge(Gauge::PoolUsedBytes, 4 * first.page);

    let lease = a.query(ra, 0, &names).lease;
    for (client, registration, memory) in [(&mut b, rb, &second), (&mut a, ra, &first)] {
        let loaded = client.load(registration, 0, lease, &[8, 9, 10, 11]);
        assert_eq!((loaded.status(), loaded.count), (Status::Ok, 4));
        assert!((0..4).all(|block| memory.holds(8 + block, 10 + block as u8)));
    }
    rig.expect_sum(&[Counter::LeasesConsumed], 1);
    rig.expect_gauge(Gauge::BlocksPinned, 0);
}

#[test]
fn saves_of_all_ranks_at_once_store_each_block_once() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let memories = [replicas(), replicas()];
    let mut ranks: Vec<(Client, u32)> = (0..2)
        .map(|number| rank(&mut rig, number, &memories[number as usize]))
        .collect();
    let blocks: Vec<u32> = (0..BLOCKS).collect();
    for round in 0..20 {
        let from = round * u64::from(BLOCKS);
        let payload = save_payload(&hashes(from..from + u64::from(BLOCKS)), &blocks);
        for (client, registration) in &mut ranks {
            let save = list(Op::Save, *registration, 0, blocks.len());
            client.submit_list(0, &payload, save);
        }
        let done: Vec<_> = ranks
            .iter_mut()
            .map(|(client, _)| client.completion())
            .collect();
        assert!(done.iter().all(|done| done.status() == Status::Ok));
        let stored: u32 = done.iter().map(|done| done.count).sum();
        let skipped: u32 = done.iter().map(|done| done.skipped).sum();
        assert_eq!((stored, skipped), (BLOCKS, BLOCKS), "round {round}");
    }
    rig.expect_gauge(Gauge::BlocksUnfinished, 0);
}

#[test]
fn a_rank_that_leaves_takes_no_block_along() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let (first, second) = (replicas(), replicas());
    let (mut a, ra) = rank(&mut rig, 0, &first);
    let (mut b, rb) = rank(&mut rig, 1, &second);
    first.fill(0, 7);
    a.save(ra, 0, &hashes(0..1), &[0]);
    // Half a list of saves is on its way when the rank goes.
    let head = list(Op::Save, ra, 0, 2);
    let half = save_payload(&hashes(10..12), &[1, 2]);
    a.submit_list(0, &half, part(head, 1000, 4, true));
    rig.close(&a);
    let alone = b.save(rb, 0, &hashes(20..21), &[1]);
    assert_eq!(alone.status(), Status::NotReady);

    let (mut a, ra) = rank(&mut rig, 0, &first);
    let kept = b.query(rb, 0, &hashes(0..1));
    assert_eq!(kept.count, 1);
    assert_eq!(b.load(rb, 0, kept.lease, &[5]).status(), Status::Ok);
    assert!(second.holds(5, 7));
    assert_eq!(a.load(ra, 0, kept.lease, &[5]).status(), Status::Ok);
    // What it left half done is stored by whoever comes next, or was.
    let rest = b.save(rb, 0, &hashes(10..14), &[6, 7, 8, 9]);
    assert_eq!(rest.status(), Status::Ok);
    assert_eq!(rest.count + rest.skipped, 4);
    assert_eq!(a.query(ra, 0, &hashes(10..14)).count, 4);
    rig.expect_gauge(Gauge::BlocksUnfinished, 0);
}

#[test]
fn ranks_that_disagree_on_what_is_replicated_do_not_meet() {
    let dir = folder();
    let mut rig = Rig::start(dir.path(), 1);
    let (_a, _) = rank(&mut rig, 0, &replicas());
    let b = rig.connect();
    let spec = spec("mla", "", 2, Some(1));
    let refused = rig.register(&b, spec, &[0], &Memory::new()).unwrap_err();
    assert_eq!(refused.status, Status::BadLayout);
    assert!(
        refused.message.contains("replicated"),
        "{}",
        refused.message
    );
}
