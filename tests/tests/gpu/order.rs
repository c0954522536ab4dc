//! Copies come after the engine's stream or event, and an engine that never gets there holds up
//! nobody else.

use pegaflow_tests::daemon::Daemon;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::{After, Engine, Task};
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{ENGINE, daemon, engine, lease, load, open, own_share, save};

const BLOCKS: [u32; 5] = [1, 7, 0, 6, 2];

fn start_save(first: u64, after: After) -> Task {
    Task::StartSave {
        group: 0,
        first,
        blocks: BLOCKS.to_vec(),
        after,
    }
}

/// The save that is under way stores its five blocks, and another engine gets all their bytes.
fn expect_saved(daemon: &Daemon, late: &mut Engine, other: &mut Engine) {
    let saved = late.must(&Task::Finish);
    assert_eq!(saved.count, 5, "{saved:?}\n{}", daemon.log());
    late.must(&Task::Check);
    let loaded = load(other, 0, 1, &[0, 1, 2, 3, 4]);
    assert!(loaded.is_ok(), "{loaded:?}");
    other.must(&Task::Check);
}

#[test]
fn a_save_has_the_bytes_that_the_driver_still_brings_when_a_copy_has_returned() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let spec = GpuSpec {
        sizes: 8,
        mapped: true,
        ..GpuSpec::default()
    };
    let mut command = gpus.command(ENGINE);
    command.env(emulated_cuda::machine::LATE_VARIABLE, "30000");
    let mut late = Engine::spawn(command);
    late.must(&open(&daemon, &spec));
    late.must(&Task::WaitReady);
    let mut other = engine(&gpus, &daemon, &spec.instance("other", 7));
    late.must(&start_save(1, After::Stream));
    expect_saved(&daemon, &mut late, &mut other);
}

#[test]
fn a_save_has_the_bytes_that_the_stream_writes_late() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    for (sizes, after) in [
        (0, After::HeldStream),
        (1, After::HeldEvent),
        (3, After::HeldStream),
    ] {
        let spec = GpuSpec {
            instance: format!("late {sizes}"),
            salt: format!("{sizes}"),
            sizes,
            ..GpuSpec::default()
        };
        let mut late = engine(&gpus, &daemon, &spec);
        let mut other = engine(&gpus, &daemon, &spec.instance(&format!("other {sizes}"), 7));
        late.must(&start_save(1, after));
        // Until the gate is opened the blocks hold what they held before.
        late.must(&Task::IsDone { within_ms: 150 });
        let early = other.must(&Task::Query {
            group: 0,
            key: 1,
            first: 1,
            count: 5,
        });
        assert_eq!(
            early.count, 0,
            "nothing is visible before its bytes are there"
        );
        late.must(&Task::OpenGate);
        expect_saved(&daemon, &mut late, &mut other);
    }
}

#[test]
fn a_load_overwrites_blocks_only_when_the_stream_is_through_with_them() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let mut worker = engine(&gpus, &daemon, &GpuSpec::default());
    assert!(save(&mut worker, 0, 1, &BLOCKS).is_ok());
    assert!(save(&mut worker, 0, 100, &[8, 9]).is_ok());
    let lease = lease(&mut worker, 0, 1, 2);
    worker.must(&Task::StartLoad {
        group: 0,
        lease,
        first: 1,
        blocks: vec![8, 9],
        after: After::HeldEvent,
    });
    worker.must(&Task::IsDone { within_ms: 150 });
    // Still what was computed there.
    worker.must(&Task::Check);
    worker.must(&Task::OpenGate);
    worker.must(&Task::Finish);
    worker.must(&Task::Check);
}

#[test]
fn an_engine_whose_stream_hangs_holds_up_its_own_copies_only() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let spec = GpuSpec::default();
    let mut hung = engine(&gpus, &daemon, &spec.instance("hung", 1));
    for first in 0..20 {
        hung.must(&start_save(1000 * first, After::HeldStream));
    }
    let mut other = engine(&gpus, &daemon, &spec.instance("other", 2));
    for first in [1, 21, 41] {
        let saved = save(&mut other, 0, 100_000 + first, &BLOCKS);
        assert!(saved.is_ok(), "{saved:?}");
        let loaded = load(&mut other, 0, 100_000 + first, &[10, 11, 3, 4, 5]);
        assert!(loaded.is_ok(), "{loaded:?}");
        other.must(&Task::Check);
    }
    hung.must(&Task::IsDone { within_ms: 1 });
    // What it has never come to is over with its end, its memory included.
    hung.kill();
    other.finish();
    let most = own_share(&gpus);
    assert!(gpus.used_falls_to(0, most), "{}", gpus.used_bytes(0));
}
