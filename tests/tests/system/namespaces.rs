//! Blocks are shared exactly where their bytes mean the same.

use pegaflow_tests::Daemon;
use pegaflow_tests::content::hashes;
use pegaflow_tests::layout::Arrangement;
use pegaflow_tests::worker::{Worker, WorkerSpec};

#[test]
fn two_instances_of_one_namespace_share_blocks() {
    let daemon = Daemon::start();
    let spec = WorkerSpec::default();
    let (left, right) = (
        Worker::ready(daemon.options(), spec.instance("left")),
        Worker::ready(daemon.options(), spec.instance("right")),
    );
    let names = hashes(1, 10);
    left.save(&names[..5]);
    right.save(&names[5..]);
    assert_eq!(left.fetch(1, &names), 10);
    assert_eq!(right.fetch(1, &names), 10);
}

#[test]
fn a_salt_keeps_tenants_apart() {
    let daemon = Daemon::start();
    let spec = WorkerSpec::default();
    let one = Worker::ready(daemon.options(), spec.salt("one").instance("one"));
    let two = Worker::ready(daemon.options(), spec.salt("two").instance("two"));
    let names = hashes(1, 10);
    one.save(&names);
    assert_eq!(two.query(1, &names).count, 0);
    assert_eq!(
        two.client
            .probe(two.registration, 0, &names)
            .expect("probe"),
        0
    );
    two.save(&names);
    assert_eq!(one.fetch(2, &names), 10, "each reads its own bytes");
    assert_eq!(two.fetch(2, &names), 10);
}

#[test]
fn another_layout_or_topology_is_another_namespace() {
    let daemon = Daemon::start();
    let base = WorkerSpec::default();
    let saver = Worker::ready(daemon.options(), base.clone());
    let names = hashes(1, 4);
    saver.save(&names);
    let others = [
        WorkerSpec {
            layers: 4,
            half_bytes: 512,
            ..base.instance("more layers")
        },
        WorkerSpec {
            half_bytes: 512,
            ..base.instance("smaller")
        },
        WorkerSpec {
            arrangement: Arrangement::KvTogether,
            ..base.instance("other segments")
        },
        WorkerSpec {
            groups: vec![0, 1],
            ..base.instance("other groups")
        },
    ];
    for spec in others {
        let other = Worker::ready(daemon.options(), spec);
        assert_eq!(other.query(1, &names).count, 0, "{}", other.spec.instance);
    }
    let first =
        Worker::open(daemon.options(), base.instance("two ranks").rank(0, 2)).expect("open");
    let _second = Worker::ready(daemon.options(), base.instance("two ranks").rank(1, 2));
    first.wait_ready();
    assert_eq!(first.query(1, &names).count, 0);
}

#[test]
fn every_field_of_the_namespace_counts() {
    let daemon = Daemon::start();
    let saver = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 4);
    saver.save(&names);
    let client = daemon.connect();
    let base = WorkerSpec::default().scheduler();
    let same = base.namespace();
    let text = |text: &str| text.to_owned();
    let changed = [
        pegaflow::NamespaceSpec {
            model: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            revision: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            dtype: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            kv_layout: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            topology: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            hash_algorithm: text("other"),
            ..same.clone()
        },
        pegaflow::NamespaceSpec {
            block_tokens: 32,
            ..same
        },
    ];
    for (number, namespace) in changed.into_iter().enumerate() {
        let spec = WorkerSpec::default().instance(&format!("changed-{number}"));
        let memory = pegaflow_tests::memory::KvMemory::allocate(
            &client,
            spec.memory,
            spec.page_bytes() * spec.blocks as usize,
        )
        .expect("memory");
        let registration = pegaflow::Registration {
            namespace,
            ..spec.registration(&[memory])
        };
        let registration = client.register(&registration).expect("registered");
        client
            .wait_ready(registration, pegaflow_tests::SOON)
            .expect("complete");
        let request = client
            .query(registration, 0, 1, &names, 0)
            .expect("submitted");
        let answer = client
            .wait(request, pegaflow_tests::SOON)
            .expect("answered");
        assert_eq!(answer.count, 0, "field {number}");
        client.unregister(registration).expect("unregistered");
    }
}
