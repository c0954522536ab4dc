//! GPU memory goes back to the device when its engine is done with it, however that ends.

use pegaflow_tests::content::Stream;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::{After, Engine, Task};
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{ENGINE, daemon, engine, open, own_share, save};

fn spec(mapped: bool, number: u64) -> GpuSpec {
    GpuSpec {
        instance: format!("engine {number}"),
        arrangement: number,
        sizes: number % 7,
        salt: format!("{}", number % 7),
        budget: 24 << 20,
        mapped,
        ..GpuSpec::default()
    }
}

#[test]
fn an_engine_killed_at_any_time_gives_its_memory_back() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let mut random = Stream::new(&[4]);
    // From here on only engines come and go.
    let first = engine(&gpus, &daemon, &spec(false, 0));
    drop(first);
    assert!(
        gpus.used_falls_to(0, own_share(&gpus)),
        "{}",
        gpus.used_bytes(0)
    );
    let idle = gpus.used_bytes(0);
    for number in 1..25 {
        let mut engine = Engine::spawn(gpus.command(ENGINE));
        engine
            .tell(&open(&daemon, &spec(number % 3 == 0, number)))
            .expect("it listens");
        for first in 0..4 {
            let task = Task::StartSave {
                group: 0,
                first: 100 * number + 10 * first,
                blocks: vec![0, 3, 1, 2],
                after: After::Stream,
            };
            engine.tell(&task).expect("it listens");
        }
        std::thread::sleep(std::time::Duration::from_millis(random.below(120)));
        engine.kill();
        assert!(
            gpus.used_falls_to(0, idle),
            "engine {number}: {} of {idle} bytes\n{}",
            gpus.used_bytes(0),
            daemon.log()
        );
    }
}

#[test]
fn an_engine_that_unregisters_and_lives_on_gives_its_memory_back() {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    let mut worker = engine(&gpus, &daemon, &spec(false, 1));
    let saved = save(&mut worker, 0, 1, &[0, 1, 2]);
    assert!(saved.is_ok(), "{saved:?}");
    worker.must(&Task::Leave);
    let most = own_share(&gpus) + gpus.context_bytes();
    assert!(
        gpus.used_falls_to(0, most),
        "{}\n{}",
        gpus.used_bytes(0),
        daemon.log()
    );
    worker.must(&open(&daemon, &spec(true, 8)));
    worker.must(&Task::WaitReady);
    worker.must(&Task::Check);
}

#[test]
fn a_daemon_that_is_killed_holds_nothing_and_its_successor_serves_the_same_memory() {
    let gpus = Gpus::emulated(1);
    let mut daemon = daemon(&gpus);
    let mut worker = engine(&gpus, &daemon, &spec(false, 2));
    let saved = save(&mut worker, 0, 1, &[0, 1, 2]);
    assert!(saved.is_ok(), "{saved:?}");
    daemon.kill();
    let engine_alone = gpus.context_bytes() + (40 << 20);
    assert!(
        gpus.used_falls_to(0, engine_alone),
        "{}",
        gpus.used_bytes(0)
    );
    daemon.launch();
    worker.must(&Task::WaitReady);
    let loaded = crate::load(&mut worker, 0, 1, &[3, 0, 1]);
    assert!(loaded.is_ok(), "{loaded:?}\n{}", daemon.log());
    worker.must(&Task::Check);
    let saved = save(&mut worker, 0, 500, &[2, 1]);
    assert!(saved.is_ok(), "{saved:?}");
}

#[test]
fn a_daemon_that_stops_gives_all_of_the_gpu_back() {
    let gpus = Gpus::emulated(1);
    let mut daemon = daemon(&gpus);
    let mut worker = engine(&gpus, &daemon, &spec(true, 3));
    assert!(save(&mut worker, 0, 1, &[0, 1, 2]).is_ok());
    assert!(daemon.stop().success(), "{}", daemon.log());
    drop(worker);
    assert!(gpus.used_falls_to(0, 0), "{}", gpus.used_bytes(0));
}
