//! What a session may share of GPU memory, up to where the driver would take over.

use pegaflow_shm::control::{
    DeviceHandle, DeviceUuid, IpcHandle, MAX_DEVICE_EVENTS, MAX_MESSAGE_CHUNKS, MAX_REGION_CHUNKS,
};

use super::*;

const DEVICE: DeviceUuid = DeviceUuid([0xd0; 16]);

fn add(region: u32, bytes: u64, handle: DeviceHandle) -> ClientMessage {
    ClientMessage::AddDeviceRegion {
        seq: 1,
        region,
        bytes,
        device: DEVICE,
        handle,
    }
}

fn chunked(region: u32, count: usize) -> ClientMessage {
    let chunks = vec![4096; count];
    add(region, 4096 * count as u64, DeviceHandle::Vmm { chunks })
}

fn more(region: u32) -> ClientMessage {
    ClientMessage::AddDeviceChunks { seq: 1, region }
}

fn events(count: usize) -> ClientMessage {
    ClientMessage::AddEvents {
        seq: 1,
        device: DEVICE,
        handles: vec![IpcHandle([3; 64]); count],
    }
}

fn ipc() -> DeviceHandle {
    let handle = IpcHandle([7; 64]);
    DeviceHandle::Ipc { handle }
}

/// Sends so many descriptors along.
fn ask(client: &Client, message: &ClientMessage, count: usize) -> DaemonMessage {
    let file = fs::File::open("/dev/null").unwrap();
    client.send_fds(message, &vec![file.as_fd(); count]);
    client.receive()
}

fn is_failed(answer: &DaemonMessage, wanted: Status, words: &[&str]) {
    let DaemonMessage::Failed {
        status, message, ..
    } = answer
    else {
        panic!("{answer:?}");
    };
    assert_eq!(*status, wanted, "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

const DONE: DaemonMessage = DaemonMessage::Done { seq: 1 };

#[test]
fn a_daemon_without_gpus_says_so_and_the_session_goes_on() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    for message in [add(1, 4096, ipc()), events(1)] {
        let answer = client.ask(&message);
        is_failed(&answer, Status::DeviceUnavailable, &["uses no GPU"]);
    }
    let answer = ask(&client, &chunked(1, 2), 2);
    is_failed(&answer, Status::DeviceUnavailable, &["uses no GPU"]);
    let lost = client.ask(&register(worker(vec![group(MemoryRef::Region(1))])));
    is_failed(&lost, Status::BadLayout, &["region 1"]);
}

#[test]
fn descriptors_of_a_region_come_in_order_and_in_full_messages() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let full = MAX_MESSAGE_CHUNKS;
    assert_eq!(ask(&client, &chunked(5, full + 2), full), DONE);
    let again = ask(&client, &chunked(5, 1), 1);
    is_failed(&again, Status::InvalidArgument, &["region 5 exists"]);
    let other = ask(&client, &chunked(6, 1), 1);
    is_failed(
        &other,
        Status::InvalidArgument,
        &["region 5", "2 descriptors"],
    );
    let unknown = ask(&client, &more(6), 2);
    is_failed(&unknown, Status::InvalidArgument, &["awaited for region 6"]);
    let last = ask(&client, &more(5), 2);
    is_failed(&last, Status::DeviceUnavailable, &["uses no GPU"]);
    // Wrong numbers of them end it.
    for (first, second) in [(full - 1, 0), (full, 1)] {
        let begun = ask(&client, &chunked(5, full + 2), first);
        let answer = if begun == DONE {
            ask(&client, &more(5), second)
        } else {
            begun
        };
        is_failed(&answer, Status::InvalidArgument, &["were due"]);
        let over = ask(&client, &more(5), 2);
        is_failed(&over, Status::InvalidArgument, &["awaited for region 5"]);
    }
    // And so does taking it back.
    assert_eq!(ask(&client, &chunked(5, full + 2), full), DONE);
    let remove = ClientMessage::RemoveRegion { seq: 1, region: 5 };
    assert_eq!(client.ask(&remove), DONE);
    client.is_failed(&remove, Status::InvalidArgument, "no region 5");
}

#[test]
fn what_is_too_much_or_does_not_add_up_is_refused_by_name() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let sizes = |bytes, chunks| add(1, bytes, DeviceHandle::Vmm { chunks });
    let invalid = Status::InvalidArgument;
    let cases = [
        (
            add(1, MAX_DEVICE_BYTES + 1, ipc()),
            Status::Limit,
            "one session",
        ),
        (chunked(1, MAX_REGION_CHUNKS + 1), Status::Limit, "8192"),
        (sizes(4096, vec![4096, 1]), invalid, "add up"),
        (sizes(0, vec![u64::MAX, 1]), invalid, "add up"),
        (sizes(4096, vec![4096, 0]), invalid, "add up"),
        (events(MAX_DEVICE_EVENTS + 1), Status::Limit, "at most 256"),
        (events(0), invalid, "no events"),
    ];
    for (message, status, word) in cases {
        client.is_failed(&message, status, word);
    }
    let handle = ask(&client, &add(1, 4096, ipc()), 1);
    is_failed(&handle, invalid, &["1 descriptors"]);
}

#[test]
fn sessions_together_hold_a_bounded_number_of_descriptors() {
    let rig = Rig::start();
    let (one, ..) = rig.session();
    let (two, ..) = rig.session();
    let full = MAX_MESSAGE_CHUNKS;
    assert_eq!(ask(&one, &chunked(1, MAX_REGION_CHUNKS), full), DONE);
    let refused = ask(&two, &chunked(1, full + 1), full);
    is_failed(&refused, Status::Limit, &["at a time", "try again"]);
    drop(one);
    rig.wait_seen(&Seen::Closed(1, CloseReason::Left));
    wait_until(
        || rig.control.shared.awaited_chunks.available_permits() == MAX_AWAITED_CHUNKS,
        "the descriptors are let go of",
    );
    assert_eq!(ask(&two, &chunked(1, full + 1), full), DONE);
}

#[test]
fn a_failing_device_is_no_news_to_a_session_that_has_nothing_there() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let message = "it fell off the bus".to_owned();
    let down = hub::Notice::DeviceDown {
        device: DEVICE,
        message,
    };
    rig.control.shared.hub.tell_all(&down);
    let up = hub::Notice::DeviceUp { device: DEVICE };
    rig.control.shared.hub.tell_all(&up);
    client.is_failed(&events(0), Status::InvalidArgument, "no events");
}

#[test]
fn a_session_with_a_half_shared_region_hears_of_its_device_s_end_and_return() {
    let rig = Rig::start();
    let (client, ..) = rig.session();
    let full = MAX_MESSAGE_CHUNKS;
    assert_eq!(ask(&client, &chunked(1, full + 1), full), DONE);
    let message = "it fell off the bus".to_owned();
    let device = DEVICE;
    let down = hub::Notice::DeviceDown {
        device,
        message: message.clone(),
    };
    rig.control.shared.hub.tell_all(&down);
    assert_eq!(
        client.receive(),
        DaemonMessage::DeviceDown { device, message }
    );
    let over = ask(&client, &more(1), 1);
    is_failed(&over, Status::InvalidArgument, &["awaited for region 1"]);
    rig.control
        .shared
        .hub
        .tell_all(&hub::Notice::DeviceUp { device });
    assert_eq!(client.receive(), DaemonMessage::DeviceUp { device });
}
