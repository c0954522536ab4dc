//! A query that was cancelled while it waited leaves nothing to its successors.

use super::*;

#[test]
fn the_number_of_a_query_that_was_cancelled_beside_another_waits_for_its_own_blocks() {
    let mut below = Below::start();
    let memory = Memory::new();
    let (mut client, worker) = below.rig.worker("a", "", &memory);
    save(&mut client, worker, &memory, 0..2 * POOL_BLOCKS);
    below.store.hold();
    let ask = |client: &mut Client, request_id, key, numbers: std::ops::Range<u64>| {
        let query = Submission {
            request_id,
            ..reach(worker, key, flags::WAIT, 4, 0)
        };
        client.submit_list(0, &hashes(numbers).concat(), query);
    };
    // Two wait for the same blocks; the first one changes its mind, and its number is used again
    // for others.
    ask(&mut client, 1000, 9, 0..4);
    ask(&mut client, 1001, 9, 0..4);
    client.submit(Submission {
        op: Op::Cancel as u8,
        registration: worker,
        arg0: 1000,
        ..Submission::zeroed()
    });
    let cancelled = client.completion();
    assert_eq!(
        (cancelled.request_id, cancelled.status()),
        (1000, Status::Cancelled)
    );
    assert_eq!(client.completion().status(), Status::Ok);
    ask(&mut client, 1000, 10, 4..8);
    client.flush();
    below.rig.expect_gauge(Gauge::SsdReading, 8);
    below.store.hold_only(hashes(4..8));
    let first = client.completion();
    assert_eq!((first.request_id, first.count), (1001, 4));
    load_and_check(&mut client, worker, &memory, &first, 0..4);
    below.store.release();
    let second = client.completion();
    assert_eq!((second.request_id, second.count), (1000, 4));
    load_and_check(&mut client, worker, &memory, &second, 4..8);
    below.rig.expect_gauge(Gauge::Prefetches, 0);
    below.rig.expect_gauge(Gauge::BlocksPinned, 0);
}
