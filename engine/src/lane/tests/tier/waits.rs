//! Saves whose answers wait for a tier that is behind.

use super::*;

/// Saves single blocks, from the first on, until one's answer is held back, and gives that request
/// with its number.
fn save_until_held(
    below: &mut Below,
    (client, worker): (&mut Client, u32),
    memory: &Memory,
    first: u64,
) -> (u64, u64) {
    for number in first..3 * POOL_BLOCKS {
        let block = (number % u64::from(BLOCKS)) as u32;
        memory.fill(block, number as u8);
        let payload = save_payload(&hashes([number]), &[block]);
        let save = client.submit_list(0, &payload, list(Op::Save, worker, 0, 1));
        below.rig.expect_sum(&[Counter::BlocksSealed], number + 1);
        let nop = client.submit(Submission {
            op: Op::Nop as u8,
            ..Submission::zeroed()
        });
        let mut answered = false;
        loop {
            let completion = client.completion();
            answered |= completion.request_id == save;
            if completion.request_id == nop {
                break;
            }
        }
        if !answered {
            return (save, number);
        }
    }
    panic!("no save waits for a tier that writes nothing");
}

fn waits_for(wait: Duration) -> Below {
    Below::with(tier(|tier| tier.save_wait = Some(wait)))
}

/// The pool is full, the tier has begun to write, and now writes no more.
fn behind(wait: Duration) -> (Below, Memory, Client, u32) {
    let mut below = waits_for(wait);
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..POOL_BLOCKS);
    below.rig.expect_gauge(Gauge::SsdWriting, 0);
    assert!(below.rig.node.counter(Counter::SsdWritten) > 0);
    below.store.hold();
    (below, memory, client, worker)
}

#[test]
fn a_save_waits_for_a_tier_that_is_behind_and_no_block_is_lost() {
    let (mut below, memory, mut client, worker) = behind(Duration::from_secs(600));
    let (held, last) = save_until_held(&mut below, (&mut client, worker), &memory, POOL_BLOCKS);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
    // Queries of the pool do not wait with it.
    let answer = client.query_key(worker, 0, 5, &hashes([last]));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    assert_eq!(client.simple(Op::Release, worker, answer.lease), Status::Ok);
    below.store.release();
    let answer = client.completion();
    assert_eq!((answer.request_id, answer.status()), (held, Status::Ok));
    assert_eq!(answer.count, 1);
    save(&mut client, worker, &memory, last + 1..6 * POOL_BLOCKS);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
}

#[test]
fn a_save_waits_for_a_tier_that_has_still_to_make_room_for_its_first_write() {
    let mut below = waits_for(Duration::from_secs(600));
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    below.store.state().refuse_writes = Some(Refused::Busy);
    let (held, last) = save_until_held(&mut below, (&mut client, worker), &memory, 0);
    below.rig.expect_sum(&[Counter::SsdWritten], 0);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
    below.store.state().refuse_writes = None;
    let answer = client.completion();
    assert_eq!((answer.request_id, answer.status()), (held, Status::Ok));
    save(&mut client, worker, &memory, last + 1..6 * POOL_BLOCKS);
    below.rig.expect_sum(&[Counter::SsdUnwritten], 0);
}

#[test]
fn no_save_waits_longer_than_it_may_or_for_a_tier_that_takes_nothing() {
    let (below, memory, mut client, worker) = behind(Duration::from_millis(20));
    save(&mut client, worker, &memory, POOL_BLOCKS..4 * POOL_BLOCKS);
    assert!(below.rig.node.counter(Counter::SsdUnwritten) > 0);
    below.store.release();

    let (below, memory, mut client, worker) = behind(Duration::from_secs(600));
    below.store.release();
    below.store.state().refuse_writes = Some(Refused::Degraded);
    save(&mut client, worker, &memory, POOL_BLOCKS..4 * POOL_BLOCKS);
    assert!(below.rig.node.counter(Counter::SsdUnwritten) > 0);
}

#[test]
fn no_save_waits_longer_than_it_may_for_a_tier_that_goes_on_slowly() {
    let (mut below, memory, mut client, worker) = behind(Duration::from_millis(1000));
    let (held, last) = save_until_held(&mut below, (&mut client, worker), &memory, POOL_BLOCKS);
    // So much more is saved that the tier is behind for long.
    for number in last + 1..last + POOL_BLOCKS / 4 {
        let payload = save_payload(&hashes([number]), &[0]);
        client.submit_list(0, &payload, list(Op::Save, worker, 0, 1));
        below.rig.expect_sum(&[Counter::BlocksSealed], number + 1);
        if number % 8 == 0 {
            below.store.end_one();
        }
    }
    let mut answer = None;
    for _ in 0..POOL_BLOCKS / 6 {
        std::thread::sleep(Duration::from_millis(50));
        below.store.end_one();
        answer = client.try_completion();
        if answer.is_some() {
            break;
        }
    }
    let answer = answer.expect("an answer although the tier is behind");
    assert_eq!((answer.request_id, answer.status()), (held, Status::Ok));
    below.store.release();
}

#[test]
fn a_save_that_waits_can_be_cancelled_and_one_of_a_session_that_ends_is_forgotten() {
    let (mut below, memory, mut client, worker) = behind(Duration::from_secs(600));
    let (held, last) = save_until_held(&mut below, (&mut client, worker), &memory, POOL_BLOCKS);
    client.submit(Submission {
        op: Op::Cancel as u8,
        registration: worker,
        arg0: held,
        ..Submission::zeroed()
    });
    let (save, cancel) = (client.completion(), client.completion());
    assert_eq!((save.request_id, save.status()), (held, Status::Cancelled));
    assert_eq!((save.count, cancel.status()), (1, Status::Ok));
    // What had been saved is there.
    let answer = client.query_key(worker, 0, 5, &hashes([last]));
    assert_eq!((answer.status(), answer.count), (Status::Ok, 1));
    let payload = save_payload(&hashes([last + 1]), &[0]);
    client.submit_list(0, &payload, list(Op::Save, worker, 0, 1));
    below.rig.expect_gauge(Gauge::Requests, 1);
    below.rig.close(&client);
    below.rig.expect_gauge(Gauge::Requests, 0);
    let (mut other, worker) = below.rig.worker("b", "", &memory);
    assert_eq!(other.query_key(worker, 0, 5, &hashes([last])).count, 1);
    below.store.release();
    below.rig.expect_gauge(Gauge::BlocksPinned, 1);
}

#[test]
fn a_stop_answers_the_saves_that_wait() {
    let (mut below, memory, mut client, worker) = behind(Duration::from_secs(600));
    let (held, _) = save_until_held(&mut below, (&mut client, worker), &memory, POOL_BLOCKS);
    let handle = below.rig.lane.handle.clone();
    below.rig.runtime.block_on(handle.drain()).unwrap();
    let answer = client.completion();
    assert_eq!((answer.request_id, answer.status()), (held, Status::Ok));
    below.store.release();
}
