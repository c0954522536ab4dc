//! Nothing that copies touch is let go of before they have drained.

use pegaflow_shm::desc::Op;

use super::rig::*;

/// Pages of which one takes long to copy, next to a message to the lane.
const LARGE_PAGE: u64 = 512 << 10;

/// A worker whose save of many large pages has been taken and is being copied.
fn busy(rig: &mut Rig, memory: &Memory) -> (Client, u32, u64) {
    let (mut client, worker) = rig.worker("a", "", memory);
    let blocks: Vec<u32> = (0..64).collect();
    let payload = save_payload(&hashes(0..64), &blocks);
    let save = client.submit_list(0, &payload, list(Op::Save, worker, 0, 64));
    // Requests are taken in order: after this the copies are handed out.
    client.flush();
    (client, worker, save)
}

fn rig(dir: &std::path::Path) -> Rig {
    Rig::with(dir, 1, |options| {
        (options.pool_bytes, options.extent_bytes) = (128 * LARGE_PAGE, 4 * LARGE_PAGE);
    })
}

#[test]
fn a_session_is_gone_only_after_its_last_copy() {
    let dir = folder();
    let mut rig = rig(dir.path());
    let memory = Memory::with_page(LARGE_PAGE);
    let (client, ..) = busy(&mut rig, &memory);
    rig.close(&client);
    // Each copy found the session, and sealed or gave back what it held: nothing is on its way for
    // ever, so that the next one can have every block.
    let (mut next, worker) = rig.worker("b", "", &memory);
    next.save(worker, 0, &hashes(0..64), &Vec::from_iter(0..64));
    assert_eq!(next.query(worker, 0, &hashes(0..64)).count, 64);
    rig.stop();
}

#[test]
fn a_registration_is_gone_only_after_its_last_copy() {
    let dir = folder();
    let mut rig = rig(dir.path());
    let memory = Memory::with_page(LARGE_PAGE);
    let (mut client, worker, save) = busy(&mut rig, &memory);
    let gone = rig.lane.handle.unregister(client.id, worker);
    rig.runtime.block_on(gone).unwrap();
    // The memory is the engine's again: its save is over, and says so already.
    let done = client
        .try_completion()
        .expect("the save was answered before");
    assert_eq!(done.request_id, save);
    rig.close(&client);
    rig.stop();
}
