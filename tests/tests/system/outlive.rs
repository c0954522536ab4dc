//! An engine that outlives its daemon, in every order of events.

use bytemuck::Zeroable;
use pegaflow::Status;
use pegaflow_shm::control::{ClientMessage, DaemonMessage, Mode, RegisterSpec};
use pegaflow_shm::desc::{Op, Submission};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::Daemon;
use pegaflow_tests::raw::RawClient;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{SOON, eventually};

/// Registers a scheduler of the instance without the library.
fn raw_scheduler(daemon: &Daemon, spec: &WorkerSpec) -> (RawClient, u32) {
    let client = RawClient::open(&daemon.socket());
    let registration = RegisterSpec {
        instance: spec.instance.clone(),
        namespace: spec.namespace(),
        world_size: spec.world_size,
        rank: None,
        mode: Mode::ReadWrite,
        groups: Vec::new(),
    };
    let registration = Box::new(registration);
    let message = ClientMessage::Register {
        seq: 1,
        registration,
    };
    client.socket.send(&message, &[]);
    match client.socket.receive() {
        Some((DaemonMessage::Registered { registration, .. }, _)) => (client, registration),
        other => panic!("not registered: {other:?}"),
    }
}

/// What the daemon says to an operation on a lease that comes without the library.
fn raw_lease(client: &mut RawClient, op: Op, registration: u32, lease: u64) -> Status {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    client.push(Submission {
        op: op as u8,
        registration,
        request_id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
        arg0: lease,
        ..Submission::zeroed()
    });
    client.ring();
    client.pop(SOON).expect("an answer").status()
}

#[test]
fn a_lease_of_another_boot_names_nothing_whoever_presents_it() {
    let mut daemon = Daemon::start();
    let spec = WorkerSpec {
        world_size: 1,
        ..WorkerSpec::default()
    };
    let worker = Worker::ready(daemon.options(), spec.clone());
    let names = hashes(1, 40);
    worker.save(&names);
    let leases = |keys: std::ops::Range<u64>| -> Vec<u64> {
        keys.map(|key| worker.query(key, &names).lease).collect()
    };
    let old = leases(1..20);
    assert!(old.iter().all(|lease| *lease != 0));
    daemon.kill();
    daemon.launch();
    assert!(eventually(|| worker.client.stats().reconnects == 1));
    worker.wait_ready();
    // As many leases in the same places, so that an id without a boot would name one of them.
    let new = leases(1..20);
    assert!(new.iter().all(|lease| *lease != 0 && !old.contains(lease)));
    let (mut raw, registration) = raw_scheduler(&daemon, &spec);
    for lease in &old {
        assert_eq!(
            worker.load_in(0, *lease, 0, &[7]).status,
            Status::UnknownLease
        );
        for op in [Op::Renew, Op::Release] {
            let said = raw_lease(&mut raw, op, registration, *lease);
            assert_eq!(said, Status::UnknownLease, "{op:?}");
        }
    }
    for lease in &new {
        let said = raw_lease(&mut raw, Op::Renew, registration, *lease);
        assert_eq!(said, Status::Ok, "the new ones live");
    }
    worker.load_and_verify(new[0], &names);
}
