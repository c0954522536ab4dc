//! Everything at once, at random, for a few seconds (`make gpu-soak` for as long as is wanted).

use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::conductor::{Settings, run};

use crate::own_share;

fn settings(gpus: &Gpus, count: u32, kill_daemon: bool) -> Settings {
    Settings {
        seconds: 6.0,
        seed: 11,
        gpus: (0..count).collect(),
        engines: 2,
        budget: 3 << 20,
        pool: "24MiB".into(),
        d2h_limit: None,
        kill_daemon,
        break_contexts: false,
        daemon_share: own_share(gpus),
        environment: gpus.environment(),
    }
}

#[test]
fn no_byte_differs_while_engines_come_and_go_and_are_killed() {
    let gpus = Gpus::emulated(2);
    let summary = run(&settings(&gpus, 2, false)).expect("engines start");
    assert!(summary.is_good(), "{summary:#?}");
    assert!(gpus.used_falls_to(0, 0) && gpus.used_falls_to(1, 0));
}

#[test]
fn no_byte_differs_while_the_daemon_is_killed_as_well() {
    let gpus = Gpus::emulated(1);
    let summary = run(&settings(&gpus, 1, true)).expect("engines start");
    assert!(
        summary.is_good() && summary.daemon_kills > 0,
        "{summary:#?}"
    );
    assert!(gpus.used_falls_to(0, 0));
}

#[test]
fn no_byte_differs_while_saves_are_held_up_by_their_limit() {
    let gpus = Gpus::emulated(1);
    let settings = Settings {
        d2h_limit: Some("20MB".into()),
        ..settings(&gpus, 1, false)
    };
    let summary = run(&settings).expect("engines start");
    assert!(summary.is_good(), "{summary:#?}");
    assert!(gpus.used_falls_to(0, 0));
}
