//! Loads in steps: a stream that waits for some of them finds their bytes, and no stream waits for
//! ever.

use emulated_cuda::machine::Machine;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::Task;
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{daemon, engine, lease, save};

/// Slow enough that a stream that does not wait finds what was there before.
fn slow_gpus(us_per_mib: u64) -> Gpus {
    Gpus::with(Machine {
        us_per_mib,
        ..Machine::with_devices(1)
    })
}

#[test]
fn a_stream_finds_each_step_of_a_load_that_it_waited_for() {
    let gpus = slow_gpus(3_000);
    let daemon = daemon(&gpus);
    for sizes in 0..7 {
        let spec = GpuSpec {
            instance: format!("saver {sizes}"),
            salt: format!("{sizes}"),
            sizes,
            ..GpuSpec::default()
        };
        let mut saver = engine(&gpus, &daemon, &spec);
        let mut loader = engine(
            &gpus,
            &daemon,
            &spec.instance(&format!("loader {sizes}"), 5),
        );
        for group in spec.groups() {
            let (number, pieces) = (group.group, group.pieces.len());
            let first = 1000 * u64::from(number);
            let saved = save(&mut saver, number, first, &[3, 1, 4, 0, 5, 9, 2, 6]);
            assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
            for (round, steps) in [1, 2, pieces.min(3), pieces].into_iter().enumerate() {
                let steps = steps.clamp(1, pieces) as u16;
                let held = lease(&mut loader, number, first, 5 + round % 2);
                let task = Task::LoadInSteps {
                    group: number,
                    lease: held,
                    first,
                    blocks: [7, 2, 8, 1, 10, 4][..5 + round % 2].to_vec(),
                    steps,
                };
                let loaded = loader.run(&task);
                assert!(
                    loaded.is_ok(),
                    "{sizes}, {steps} steps: {loaded:?}\n{}",
                    daemon.log()
                );
                assert_eq!(loaded.count as usize, 5 + round % 2, "{loaded:?}");
            }
        }
        loader.must(&Task::Check);
    }
}

#[test]
fn a_stream_goes_on_when_the_daemon_dies_under_the_load_it_waits_for() {
    // 24 MiB take more than half a second.
    let gpus = slow_gpus(25_000);
    let mut daemon = daemon(&gpus);
    let spec = GpuSpec {
        budget: 24 << 20,
        sizes: 1,
        ..GpuSpec::default()
    };
    let mut worker = engine(&gpus, &daemon, &spec);
    let sizes = &spec.groups()[0];
    let blocks: Vec<u32> = (0..sizes.blocks.min(64)).collect();
    let saved = save(&mut worker, 0, 1, &blocks);
    assert!(saved.is_ok(), "{saved:?}\n{}", daemon.log());
    let held = lease(&mut worker, 0, 1, blocks.len());
    let task = Task::LoadInSteps {
        group: 0,
        lease: held,
        first: 1,
        blocks,
        steps: sizes.pieces.len() as u16,
    };
    worker.tell(&task).expect("it listens");
    std::thread::sleep(std::time::Duration::from_millis(30));
    daemon.kill();
    // It is through with its stream, whatever became of the load.
    let answer = worker.hear().expect("it lives");
    assert!(!answer.is_ok(), "{answer:?}");
    daemon.launch();
    worker.must(&Task::WaitReady);
}
