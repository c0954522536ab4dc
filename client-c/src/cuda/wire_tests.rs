//! What a daemon hears of device memory: regions, descriptors, events, registrations, orders; after
//! it was away; and when a device fails.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pegaflow_shm::control::{DaemonMessage, DeviceUuid};
use pegaflow_shm::status::Status;

use super::fake::{self as cuda, Kind, allocate};
use super::order::tests::order;
use crate::fake::gpu::Seen;
use crate::fake::{Fake, Rudeness};
use crate::{
    Client, Error, GroupMemory, Log, LogLevel, Mode, NamespaceSpec, Options, Order, Registration,
    RequestId, SegmentMemory,
};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(10);

struct Rig {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    fake: Option<Fake>,
    client: Client,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    fn start(adjust: impl FnOnce(&Fake)) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s.sock");
        let fake = Fake::start(&socket);
        adjust(&fake);
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = lines.clone();
        let options = Options {
            socket: Some(socket.clone()),
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(20),
            control_timeout: LONG,
            log_level: Some(LogLevel::Warn),
            log: Some(Log::new(move |_, line| {
                told.lock().unwrap().push(line.into())
            })),
            ..Options::default()
        };
        let client = Client::connect(options).unwrap();
        client.shared().cuda.use_fake();
        Rig {
            _folder: folder,
            socket,
            fake: Some(fake),
            client,
            lines,
        }
    }

    fn fake(&self) -> &Fake {
        self.fake.as_ref().unwrap()
    }

    fn seen(&self) -> Vec<Seen> {
        self.fake().world.gpu.lock().unwrap().seen.clone()
    }

    fn says(&self, word: &str) -> usize {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| line.contains(word)).count()
    }
}

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn until(mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Eight blocks of 4 KiB at each address.
fn over(addresses: &[u64]) -> Registration {
    let segment = |address: &u64| {
        let address = std::ptr::without_provenance_mut(*address as usize);
        // SAFETY: the fake daemon touches no device memory.
        unsafe { SegmentMemory::at(address, 4096, 4096) }
    };
    Registration {
        instance: "i".into(),
        namespace: NamespaceSpec {
            model: "m".into(),
            dtype: "d".into(),
            hash_algorithm: "h".into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size: 1,
        rank: Some(0),
        mode: Mode::ReadWrite,
        groups: vec![GroupMemory {
            group: 0,
            num_blocks: 8,
            segments: addresses.iter().map(segment).collect(),
            replicated: false,
        }],
    }
}

#[test]
fn an_allocation_is_told_once_and_taken_back_with_its_last_registration() {
    let rig = Rig::start(|_| {});
    let base = allocate(0, MIB, Kind::Plain);
    let one = rig.client.register(&over(&[base, base + 65536])).unwrap();
    let two = rig.client.register(&over(&[base])).unwrap();
    let expected = [
        Seen::Handle(1, MIB),
        Seen::Events(256),
        Seen::Register(vec![1]),
        Seen::Register(vec![1]),
    ];
    assert_eq!(rig.seen(), expected);
    rig.client.unregister(one).unwrap();
    assert_eq!(rig.seen().len(), 4);
    rig.client.unregister(two).unwrap();
    until(|| rig.seen().len() == 5);
    assert_eq!(rig.seen()[4], Seen::Remove(1));
    assert!(cuda::is_undisturbed());
}

#[test]
fn descriptors_follow_in_full_messages() {
    let rig = Rig::start(|_| {});
    let base = allocate(1, 150 * 4096, Kind::Vmm(vec![4096; 150], true));
    let middle = base + 70 * 4096;
    let end = base + 142 * 4096;
    rig.client.register(&over(&[base, middle, end])).unwrap();
    // The segments take up 8 chunks each, with gaps: a region for each run.
    let chunked = |id| Seen::Chunked(id, 8, 8);
    let expected = [
        chunked(1),
        chunked(2),
        chunked(3),
        Seen::Events(256),
        Seen::Register(vec![1, 2, 3]),
    ];
    assert_eq!(rig.seen(), expected);
    let whole = allocate(1, 150 * 4096, Kind::Vmm(vec![4096; 150], true));
    let all: Vec<u64> = (0..19).map(|at| whole + (at * 8).min(142) * 4096).collect();
    rig.client.register(&over(&all)).unwrap();
    let expected = [
        Seen::Chunked(4, 150, 64),
        Seen::Chunks(4, 64),
        Seen::Chunks(4, 22),
        Seen::Register(vec![4]),
    ];
    assert_eq!(rig.seen()[5..], expected);
}

#[test]
fn where_a_driver_has_no_words_a_load_in_steps_comes_whole_and_says_so_once() {
    let rig = Rig::start(|_| {});
    let base = allocate(0, MIB, Kind::Plain);
    let id = rig.client.register(&over(&[base])).unwrap();
    let load = |steps| {
        let blocks = (0, &[0][..]);
        let none = Order::NONE;
        rig.client.load_in_steps(id, 0, 1, blocks, none, steps)
    };
    assert_eq!(load(0).unwrap_err().status(), Status::InvalidArgument);
    let error = load(2).unwrap_err();
    assert_eq!(
        error.status(),
        Status::InvalidArgument,
        "one segment: {error}"
    );
    for _ in 0..2 {
        let request = load(1).unwrap();
        let stream = order(cuda::stream(0, true), false);
        let error = rig.client.stream_wait(request, 1, stream).unwrap_err();
        // Answered meanwhile by the fake daemon, which knows no lease, or still under way.
        let status = error.status();
        assert!(
            matches!(status, Status::DeviceUnavailable | Status::UnknownLease),
            "{error}"
        );
        rig.client.wait(request, LONG).unwrap();
        let gone = rig.client.stream_wait(request, 1, stream).unwrap_err();
        assert_eq!(gone.status(), Status::UnknownRequest);
    }
    let said = || {
        let lines = rig.lines.lock().unwrap().clone();
        lines.iter().filter(|l| l.contains("come whole")).count()
    };
    let deadline = Instant::now() + LONG;
    while said() == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(said(), 1);
}

#[test]
fn requests_name_the_event_and_give_it_back_when_they_complete() {
    let rig = Rig::start(|_| {});
    let base = allocate(0, MIB, Kind::Plain);
    let id = rig.client.register(&over(&[base])).unwrap();
    let (stream, hash) = (cuda::stream(0, true), [[7; 32]]);
    cuda::set_busy(stream, true);
    let after = order(stream, false);
    for _ in 0..2 {
        let save = rig.client.save_after(id, 0, &hash, &[3], after).unwrap();
        let load = rig.client.load_after(id, 0, 9, 0, &[3], after).unwrap();
        let plain = rig.client.save(id, 0, &hash, &[3]).unwrap();
        for request in [save, load, plain] {
            assert!(rig.client.wait(request, LONG).unwrap().is_ok());
        }
    }
    let seen = rig.seen();
    let orders = [Some(0), Some(1), None, Some(1), Some(0), None];
    let (first, last) = (&seen[3..6], &seen[6..9]);
    for (seen, order) in first.iter().chain(last).zip(orders) {
        match order {
            Some(_) => assert!(matches!(seen, Seen::After(Some(0 | 1))), "{seen:?}"),
            None => assert_eq!(*seen, Seen::After(None)),
        }
    }
    assert_ne!(first[0], first[1]);
    assert_eq!(rig.client.stats().waited_orders, 0);
}

#[test]
fn an_order_over_host_memory_is_refused_before_anything_is_sent() {
    let rig = Rig::start(|_| {});
    let memory = rig.client.alloc_host(65536).unwrap();
    let id = rig
        .client
        .register(&over(&[memory.as_ptr().addr() as u64]))
        .unwrap();
    let after = order(cuda::stream(0, true), false);
    let error = rig
        .client
        .save_after(id, 0, &[[7; 32]], &[3], after)
        .unwrap_err();
    assert!(error.to_string().contains("GPU memory"), "{error}");
    let plain = rig
        .client
        .save_after(id, 0, &[[7; 32]], &[3], Order::NONE)
        .unwrap();
    assert!(rig.client.wait(plain, LONG).unwrap().is_ok());
}

#[test]
fn host_and_device_memory_of_one_registration_is_refused_with_both_named() {
    let rig = Rig::start(|_| {});
    let base = allocate(0, MIB, Kind::Plain);
    let error = rig.client.register(&over(&[base, 4096])).unwrap_err();
    assert_eq!(error.status(), Status::BadLayout);
    let text = error.to_string();
    assert!(
        text.contains(&format!("{base:#x}")) && text.contains("0x1000"),
        "{text}"
    );
}

#[test]
fn a_daemon_that_cannot_open_events_is_waited_for_by_the_call() {
    let rig = Rig::start(|fake| fake.world.gpu.lock().unwrap().refuses_events = true);
    let base = allocate(0, MIB, Kind::Plain);
    let id = rig.client.register(&over(&[base])).unwrap();
    let stream = cuda::stream(0, true);
    cuda::set_busy(stream, true);
    let after = order(stream, false);
    let address = stream.addr();
    std::thread::scope(|scope| {
        let saves = scope.spawn(|| rig.client.save_after(id, 0, &[[7; 32]], &[3], after));
        until(|| rig.client.stats().waited_orders == 1);
        assert!(!rig.seen().iter().any(|seen| matches!(seen, Seen::After(_))));
        cuda::set_busy(std::ptr::without_provenance_mut(address), false);
        let request = saves.join().unwrap().unwrap();
        assert!(rig.client.wait(request, LONG).unwrap().is_ok());
    });
    assert_eq!(rig.seen().last(), Some(&Seen::After(None)));
    assert_eq!(rig.says("wait for it in the call"), 1);
}

#[test]
fn a_new_daemon_is_told_everything_anew() {
    let mut rig = Rig::start(|_| {});
    let base = allocate(0, 80 * 4096, Kind::Vmm(vec![4096; 80], true));
    let all: Vec<u64> = (0..10).map(|at| base + at * 8 * 4096).collect();
    let id = rig.client.register(&over(&all)).unwrap();
    let before = rig.seen();
    assert_eq!(before.len(), 4);
    rig.fake.take().unwrap().vanish();
    rig.fake = Some(Fake::start(&rig.socket));
    until(|| rig.client.stats().reconnects == 1);
    rig.client.wait_ready(id, LONG).unwrap();
    assert_eq!(rig.seen(), before);
}

/// The client's daemon becomes this process, which goes on, while the session's socket ends with a
/// load unanswered.
fn end_before_its_process(rig: &mut Rig) -> (Process, RequestId) {
    let base = allocate(0, MIB, Kind::Plain);
    let id = rig.client.register(&over(&[base])).unwrap();
    rig.fake().world.set_rudeness(Rudeness::Mute);
    let request = rig.client.load(id, 0, 1, 0, &[3]).unwrap();
    let process = Process(Command::new("sleep").arg("1000").spawn().unwrap());
    let session = rig.client.shared().session().unwrap();
    session.process.pretend(process.0.id());
    rig.fake.take().unwrap().vanish();
    let early = rig.client.wait(request, Duration::from_millis(200));
    assert!(matches!(early, Err(Error::Timeout { .. })), "{early:?}");
    assert!(!session.is_lost());
    (process, request)
}

#[test]
fn what_a_killed_daemon_may_still_write_is_not_given_back_before_its_process_is_gone() {
    let mut rig = Rig::start(|_| {});
    let (mut process, request) = end_before_its_process(&mut rig);
    process.0.kill().unwrap();
    let answer = rig.client.wait(request, LONG).unwrap();
    assert_eq!(answer.status, Status::Disconnected);
}

#[test]
fn a_client_that_disconnects_does_not_wait_for_a_process_that_does_not_end() {
    let mut rig = Rig::start(|_| {});
    let (_process, _) = end_before_its_process(&mut rig);
    let start = Instant::now();
    drop(rig.client);
    assert!(start.elapsed() < LONG, "it hangs");
}

#[test]
fn an_older_daemon_is_told_nothing_and_the_caller_why() {
    let rig = Rig::start(|fake| {
        let protocol = &fake.world.protocol;
        protocol.store(2, std::sync::atomic::Ordering::Relaxed);
    });
    let base = allocate(0, MIB, Kind::Plain);
    let mut replicated = over(&[4096]);
    replicated.groups[0].replicated = true;
    for registration in [over(&[base]), replicated] {
        let error = rig.client.register(&registration).unwrap_err();
        assert_eq!(error.status(), Status::VersionMismatch);
        let text = error.to_string();
        assert!(
            text.contains("speaks 2") && text.contains("upgrade pegaflowd"),
            "{text}"
        );
    }
    assert_eq!(rig.seen(), []);
    rig.client.register(&over(&[4096])).unwrap();
}

#[test]
fn a_refused_region_fails_its_registration_and_not_the_session() {
    let status = Status::DeviceUnavailable;
    let rig = Rig::start(|fake| fake.world.gpu.lock().unwrap().refuse = Some(status));
    let base = allocate(0, MIB, Kind::Plain);
    let error = rig.client.register(&over(&[base])).unwrap_err();
    assert_eq!(error.status(), status);
    let text = error.to_string();
    assert!(
        text.contains("refused for the test") && text.contains("GPU 0"),
        "{text}"
    );
    rig.fake().world.gpu.lock().unwrap().refuse = None;
    rig.client.register(&over(&[base])).unwrap();
    assert_eq!(rig.client.stats().disconnects, 0);
    assert_eq!(rig.lines.lock().unwrap().len(), 0);
}

#[test]
fn a_device_that_fails_ends_its_registrations_until_it_is_back() {
    let rig = Rig::start(|_| {});
    let base = allocate(2, MIB, Kind::Plain);
    let id = rig.client.register(&over(&[base])).unwrap();
    let device = DeviceUuid(cuda::uuid(2));
    let refuse = |status| rig.fake().world.gpu.lock().unwrap().refuse = status;
    let say = |notice| rig.fake().world.gpu.lock().unwrap().notices.push(notice);
    refuse(Some(Status::DeviceUnavailable));
    let message = "it fell off the bus".to_owned();
    say(DaemonMessage::DeviceDown { device, message });
    let save = || rig.client.save(id, 0, &[[7; 32]], &[3]);
    until(|| matches!(save(), Err(Error::Refused { status, .. }) if status as u32 == 32));
    let error = rig.client.wait_ready(id, LONG).unwrap_err();
    assert!(error.to_string().contains("fell off the bus"), "{error}");
    assert_eq!(rig.client.stats().refused_registrations, 1);
    refuse(None);
    say(DaemonMessage::DeviceUp { device });
    until(|| rig.client.wait_ready(id, LONG).is_ok());
    let after = order(cuda::stream(2, true), false);
    let request = rig
        .client
        .save_after(id, 0, &[[7; 32]], &[3], after)
        .unwrap();
    assert!(rig.client.wait(request, LONG).unwrap().is_ok());
    assert!(matches!(rig.seen().last(), Some(Seen::After(Some(_)))));
    assert_eq!(
        (rig.says("cannot use GPU"), rig.says("can use GPU")),
        (1, 1)
    );
    assert_eq!(rig.client.stats().disconnects, 0);
}
