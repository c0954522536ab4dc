//! Several GPUs: each copy goes to the right one, whatever its number is in which process.

use emulated_cuda::control::Count;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::{Engine, Task};
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{ENGINE, config, daemon, engine, load, open, save};

#[test]
fn no_copy_goes_to_another_gpu_than_its_memorys() {
    const GPUS: u8 = 4;
    let gpus = Gpus::emulated(GPUS);
    let daemon = daemon(&gpus);
    let spec = |gpu: u32| GpuSpec {
        gpu,
        instance: format!("on {gpu}"),
        sizes: 1,
        arrangement: u64::from(gpu),
        ..GpuSpec::default()
    };
    let mut engines: Vec<Engine> = (0..u32::from(GPUS))
        .map(|gpu| engine(&gpus, &daemon, &spec(gpu)))
        .collect();
    let page = spec(0).groups()[0].page_bytes() as u64;
    let out = |gpu: usize| gpus.count(gpu, Count::BytesOut);
    for (gpu, engine) in engines.iter_mut().enumerate() {
        let before: Vec<u64> = (0..usize::from(GPUS)).map(out).collect();
        let saved = save(engine, 0, 100 * gpu as u64, &[0, 2, 1]);
        assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
        for (other, before) in before.into_iter().enumerate() {
            let moved = out(other) - before;
            assert_eq!(
                moved,
                if other == gpu { 3 * page } else { 0 },
                "{gpu} {other}"
            );
        }
    }
    for (gpu, engine) in engines.iter_mut().enumerate() {
        let next = (gpu + 1) % usize::from(GPUS);
        let loaded = load(engine, 0, 100 * next as u64, &[3, 0, 1]);
        assert!(loaded.is_ok(), "{loaded:?}");
        engine.must(&Task::Check);
    }
}

#[test]
fn the_gpu_is_found_by_its_uuid_and_not_by_its_number() {
    let gpus = Gpus::emulated(3);
    let mut config = config(&gpus);
    // Its numbers run the other way round.
    config
        .environment
        .push(("CUDA_VISIBLE_DEVICES".into(), "2,1,0".into()));
    let daemon = pegaflow_tests::Daemon::start_with(config);
    let mut command = gpus.command(ENGINE);
    command.env("CUDA_VISIBLE_DEVICES", "2");
    let mut worker = Engine::spawn(command);
    let opened = worker.run(&open(&daemon, &GpuSpec::default()));
    assert!(opened.is_ok(), "{opened:?}\n{}", daemon.log());
    worker.must(&Task::WaitReady);
    assert!(save(&mut worker, 0, 1, &[0, 1]).is_ok());
    let loaded = load(&mut worker, 0, 1, &[2, 3]);
    assert!(loaded.is_ok(), "{loaded:?}");
    worker.must(&Task::Check);
    assert!(gpus.count(2, Count::CopiesOut) > 0);
    assert_eq!(gpus.used_bytes(0), 0, "nobody has used the first GPU");
}

#[test]
fn a_gpu_that_the_daemon_does_not_see_is_refused_by_its_uuid() {
    let gpus = Gpus::emulated(2);
    let mut config = config(&gpus);
    config
        .environment
        .push(("CUDA_VISIBLE_DEVICES".into(), "0".into()));
    let daemon = pegaflow_tests::Daemon::start_with(config);
    let mut worker = Engine::spawn(gpus.command(ENGINE));
    let spec = GpuSpec {
        gpu: 1,
        ..GpuSpec::default()
    };
    let refused = worker.run(&open(&daemon, &spec));
    assert!(!refused.is_ok());
    assert_eq!(refused.status, "device_unavailable", "{refused:?}");
    let start = &gpus.uuid(1)[..8];
    assert!(refused.error.contains(start), "{start}: {refused:?}");
    // The session is as good as any.
    let mut other = engine(&gpus, &daemon, &GpuSpec::default());
    assert!(save(&mut other, 0, 1, &[0, 1]).is_ok());
}
