//! What is refused at registration, and in which words.

use pegaflow::{Client, Error, GroupMemory, Registration, Status};
use pegaflow_shm::control::{
    ClientMessage, DaemonMessage, GroupLayout, MemoryRef, Mode, RegisterSpec, SegmentLayout,
};
use pegaflow_tests::Daemon;
use pegaflow_tests::content::hashes;
use pegaflow_tests::memory::{KvMemory, MemoryKind};
use pegaflow_tests::raw::RawClient;
use pegaflow_tests::worker::{Worker, WorkerSpec};

#[track_caller]
fn assert_refused(result: Result<impl Sized, Error>, status: Status, words: &str) {
    match result.map(drop) {
        Ok(()) => panic!("not refused, expected {status}: {words}"),
        Err(error) => {
            assert_eq!(error.status(), status, "{error}");
            assert!(
                error.to_string().contains(words),
                "`{error}` does not say `{words}`"
            );
        }
    }
}

#[test]
fn a_rank_that_is_held_cannot_be_registered_again() {
    let daemon = Daemon::start();
    let holder = Worker::ready(daemon.options(), WorkerSpec::default());
    let second = Worker::open(daemon.options(), WorkerSpec::default());
    assert_refused(
        second,
        Status::AlreadyRegistered,
        "rank 0 of instance `engine` is held by session",
    );
    drop(holder);
    let again = pegaflow_tests::eventually(|| {
        Worker::open(daemon.options(), WorkerSpec::default()).is_ok()
    });
    assert!(again, "the rank is free when its holder has left");
}

#[test]
fn ranks_that_disagree_are_refused() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default().rank(0, 2);
    let _holder = Worker::open(daemon.options(), base.clone()).expect("open");
    let others = [
        base.rank(1, 2).salt("other"),
        base.rank(1, 3),
        WorkerSpec {
            save_only: true,
            ..base.rank(1, 2)
        },
    ];
    for spec in others {
        let refused = Worker::open(daemon.options(), spec);
        assert_refused(
            refused,
            Status::NamespaceMismatch,
            "instance `engine` is registered as",
        );
    }
    Worker::ready(daemon.options(), base.rank(1, 2));
}

#[test]
fn contradictions_are_named_before_anything_is_sent() {
    let daemon = Daemon::start();
    let client = daemon.connect();
    let base = WorkerSpec::default();
    let memory = KvMemory::allocate(&client, MemoryKind::Shared, 64 * base.page_bytes());
    let memory = [memory.expect("memory")];
    let cases = [
        (base.rank(2, 2), "ranks are below the world size 2"),
        (base.rank(0, 0), "1 to 128 ranks"),
        (base.rank(0, 129), "1 to 128 ranks"),
        (base.instance(""), "a name of 1 to 128 bytes"),
        (base.salt(&"x".repeat(2000)), "at most 1024 are allowed"),
    ];
    for (spec, words) in cases {
        let refused = client.register(&spec.registration(&memory));
        assert_refused(refused, Status::InvalidArgument, words);
    }
    let nameless = Registration {
        namespace: pegaflow::NamespaceSpec {
            dtype: String::new(),
            ..base.namespace()
        },
        ..base.registration(&memory)
    };
    assert_refused(
        client.register(&nameless),
        Status::InvalidArgument,
        "`dtype` is empty",
    );
}

/// Offset, stride and bytes of a segment.
type Array = (usize, u64, u64);

/// A registration of shared memory of 1 MiB with these segments.
fn register(client: &Client, blocks: u32, segments: &[Array]) -> Result<(), Error> {
    let memory = KvMemory::allocate(client, MemoryKind::Shared, 1 << 20)?;
    let segments = segments
        .iter()
        .map(|(offset, stride, bytes)| memory.segment(*offset, *stride, *bytes))
        .collect();
    let groups = vec![GroupMemory {
        group: 0,
        num_blocks: blocks,
        segments,
        replicated: false,
    }];
    let registration = Registration {
        groups,
        ..WorkerSpec::default().registration(&[])
    };
    client.register(&registration).map(drop)
}

#[test]
fn impossible_layouts_are_refused_by_name_and_value() {
    let daemon = Daemon::start();
    let client = daemon.connect();
    let cases: [(u32, &[Array], &str); 4] = [
        (
            8,
            &[(0, 512, 1024)],
            "stride too small: block_stride 512 < bytes 1024",
        ),
        (
            8,
            &[(0, 1024, 1024), (4096, 1024, 1024)],
            "both use byte 0x1000 of region",
        ),
        (
            8,
            &[(0, 2048, 1024), (512, 2048, 1024)],
            "both use byte 0x200 of region",
        ),
        (
            8,
            &[(0, 4096, 64), (64, 2048, 64)],
            "their strides differ (4096 and 2048)",
        ),
    ];
    for (blocks, segments, words) in cases {
        assert_refused(
            register(&client, blocks, segments),
            Status::BadLayout,
            words,
        );
    }
    let partly = register(&client, 2048, &[(0, 1024, 1024)]);
    assert_refused(
        partly,
        Status::InvalidArgument,
        "lies only partly in the host memory",
    );
    register(&client, 8, &[(0, 2048, 1024), (1024, 2048, 1024)]).expect("interleaved is fine");
}

#[test]
fn a_client_without_the_library_gets_the_same_answers() {
    let daemon = Daemon::start();
    let client = RawClient::open(&daemon.socket());
    let process = |base, block_stride, bytes| SegmentLayout {
        memory: MemoryRef::Process,
        base,
        block_stride,
        bytes,
    };
    let region = SegmentLayout {
        memory: MemoryRef::Region(5),
        ..process(0, 64, 64)
    };
    let cases: [(u32, Vec<SegmentLayout>, &str); 10] = [
        (4, vec![], "no segments"),
        (0, vec![process(1 << 20, 64, 64)], "zero blocks"),
        (4, vec![process(1 << 20, 64, 0)], "zero bytes"),
        (4, vec![process(1 << 20, 32, 64)], "stride too small"),
        (
            u32::MAX,
            vec![process(1 << 20, 64, 64)],
            "4294967295 blocks, at most",
        ),
        (
            4,
            vec![process(1 << 20, u64::MAX / 2, 64)],
            "does not fit 64 bits",
        ),
        (4, vec![process(0, 64, 64)], "is null or below"),
        (4, vec![process(1 << 47, 64, 64)], "beyond user space"),
        (
            4,
            vec![process(1 << 20, 64, 64), process(1 << 20, 64, 64)],
            "both use byte",
        ),
        (4, vec![region], "region 5 is not registered"),
    ];
    for (number, (num_blocks, segments, words)) in cases.into_iter().enumerate() {
        let seq = number as u64 + 10;
        let registration = Box::new(RegisterSpec {
            instance: "raw".into(),
            namespace: WorkerSpec::default().namespace(),
            world_size: 1,
            rank: Some(0),
            mode: Mode::ReadWrite,
            groups: vec![GroupLayout {
                group: 0,
                num_blocks,
                segments,
                replicated: false,
            }],
        });
        client.socket.send(
            &ClientMessage::Register {
                seq,
                registration,
                signals: None,
            },
            &[],
        );
        let Some((
            DaemonMessage::Failed {
                seq: back,
                status,
                message,
            },
            _,
        )) = client.socket.receive()
        else {
            panic!("not refused: {words}");
        };
        assert_eq!((back, status), (seq, Status::BadLayout), "{message}");
        assert!(
            message.contains(words),
            "`{message}` does not say `{words}`"
        );
    }
}

#[test]
fn a_page_larger_than_an_extent_is_refused_with_the_way_out() {
    let daemon = Daemon::start();
    let spec = WorkerSpec {
        half_bytes: 3 << 20,
        layers: 1,
        blocks: 1,
        ..WorkerSpec::default()
    };
    let refused = Worker::open(daemon.options(), spec);
    assert_refused(refused, Status::BadLayout, "--extent-size");
}

#[test]
fn an_unregistered_rank_is_refused_and_can_come_back() {
    let daemon = Daemon::start();
    let spec = WorkerSpec::default();
    let worker = Worker::ready(daemon.options(), spec.clone());
    let names = hashes(1, 3);
    worker.save(&names);
    worker
        .client
        .unregister(worker.registration)
        .expect("unregistered");
    let refused = worker.client.query(worker.registration, 0, 1, &names, 0);
    assert_refused(refused, Status::UnknownRegistration, "register first");
    assert_refused(
        worker.client.unregister(worker.registration),
        Status::UnknownRegistration,
        "register first",
    );
    let again = Worker::ready(daemon.options(), spec);
    assert_eq!(again.fetch(1, &names), 3);
}
