//! A fault of one GPU, or of one engine, is the end of nothing else.

use emulated_cuda::code::Code;
use pegaflow_tests::eventually;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::{Task, ping};
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{daemon, engine, load, save};

fn on(gpu: u32, number: u64) -> GpuSpec {
    GpuSpec {
        gpu,
        instance: format!("engine {number}"),
        salt: format!("{}", number % 7),
        sizes: number % 7,
        arrangement: number,
        ..GpuSpec::default()
    }
}

#[test]
fn a_sticky_error_of_the_daemon_fails_its_copies_and_the_engine_is_served_again() {
    let gpus = Gpus::emulated(2);
    let daemon = daemon(&gpus);
    let mut hit = engine(&gpus, &daemon, &on(0, 0));
    let mut beside = engine(&gpus, &daemon, &on(1, 1));
    assert!(save(&mut hit, 0, 1, &[0, 1, 2]).is_ok());
    for (round, code) in [
        Code::ILLEGAL_ADDRESS,
        Code::ECC_UNCORRECTABLE,
        Code::LAUNCH_FAILED,
    ]
    .into_iter()
    .enumerate()
    {
        gpus.inject(0, daemon.pid(), 0, code);
        let first = 1000 * (1 + round as u64);
        let failed = save(&mut hit, 0, first, &[3, 1, 0]);
        assert!(!failed.is_ok(), "{failed:?}");
        // The other GPU never noticed.
        let saved = save(&mut beside, 0, first, &[0, 2]);
        assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
        // Nothing of what failed is visible, and what was there before still is.
        let served = eventually(|| {
            let ready = hit.run(&Task::WaitReady);
            ready.is_ok() && save(&mut hit, 0, first + 500, &[0, 1, 2]).is_ok()
        });
        assert!(served, "{}", daemon.log());
        let gone = hit.must(&Task::Query {
            group: 0,
            key: first,
            first,
            count: 3,
        });
        assert_eq!(gone.count, 0);
        let loaded = load(&mut hit, 0, 1, &[2, 0, 3]);
        assert!(loaded.is_ok(), "{loaded:?}\n{}", daemon.log());
        hit.must(&Task::Check);
    }
    let log = daemon.log();
    assert!(log.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{log}");
}

#[test]
fn a_gpu_that_falls_off_leaves_the_others_and_the_daemon_at_work() {
    let gpus = Gpus::emulated(2);
    let daemon = daemon(&gpus);
    let mut lost = engine(&gpus, &daemon, &on(0, 2));
    let mut beside = engine(&gpus, &daemon, &on(1, 3));
    assert!(save(&mut lost, 0, 1, &[0, 1, 2]).is_ok());
    gpus.lose(0, Code::UNKNOWN);
    for first in [10, 20, 30] {
        let saved = save(&mut beside, 0, first, &[0, 2]);
        assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
        let loaded = load(&mut beside, 0, first, &[1, 3]);
        assert!(loaded.is_ok(), "{loaded:?}\n{}", daemon.log());
        assert!(ping(daemon.socket()).is_ok());
    }
    // Nobody copies there: what the dead engine had mapped cannot be closed, which tells.
    lost.kill();
    let told = eventually(|| daemon.log().contains("GPU down"));
    assert!(told, "{}", daemon.log());
    gpus.lose(0, Code::SUCCESS);
    // A new engine on it is served as soon as it works again.
    let mut engine = None;
    let served = eventually(|| {
        let mut next = pegaflow_tests::gpu::engine::Engine::spawn(gpus.command(crate::ENGINE));
        let opened = next.run(&crate::open(&daemon, &on(0, 2)));
        let good = opened.is_ok() && next.run(&Task::WaitReady).is_ok();
        engine = Some(next);
        good && load(engine.as_mut().expect("just made"), 0, 1, &[2, 1, 0]).is_ok()
    });
    assert!(served, "{}", daemon.log());
    engine.expect("served").must(&Task::Check);
}

#[test]
fn an_engine_with_an_illegal_address_of_its_own_ends_and_nobody_else_does() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let mut broken = engine(&gpus, &daemon, &on(0, 4));
    let mut beside = engine(&gpus, &daemon, &on(0, 5));
    gpus.inject(0, broken.pid(), 0, Code::ILLEGAL_ADDRESS);
    let failed = broken.run(&Task::StartSave {
        group: 0,
        first: 1,
        blocks: vec![0, 1],
        after: pegaflow_tests::gpu::engine::After::Stream,
    });
    assert!(!failed.is_ok(), "its own GPU calls fail: {failed:?}");
    broken.kill();
    let saved = save(&mut beside, 0, 1, &[0, 2]);
    assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
    let loaded = load(&mut beside, 0, 1, &[3, 1]);
    assert!(loaded.is_ok(), "{loaded:?}\n{}", daemon.log());
    beside.must(&Task::Check);
}
