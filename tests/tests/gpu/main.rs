//! GPU memory through the whole system: a real daemon, engines in processes of their own, and the
//! emulated driver between them and memory. One file per concept; a test's name is the guarantee
//! that it tries to break.

#![forbid(unsafe_code)]

mod absent;
mod bytes;
mod devices;
mod example;
mod faults;
mod order;
mod returned;
mod soak;
mod steps;

use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::{After, Engine, Reply, Task};
use pegaflow_tests::gpu::rank::GpuSpec;

/// The program of [`Engine`].
const ENGINE: &str = env!("CARGO_BIN_EXE_gpu-engine");

/// A daemon that sees these GPUs.
fn daemon(gpus: &Gpus) -> Daemon {
    Daemon::start_with(config(gpus))
}

/// What such a daemon is started with.
fn config(gpus: &Gpus) -> Config {
    Config {
        pool: "128MiB".into(),
        environment: gpus.environment(),
        ..Config::default()
    }
}

/// An engine that sees these GPUs and has registered.
fn engine(gpus: &Gpus, daemon: &Daemon, spec: &GpuSpec) -> Engine {
    let mut engine = Engine::spawn(gpus.command(ENGINE));
    let opened = engine.run(&open(daemon, spec));
    assert!(opened.is_ok(), "{opened:?}\n{}", daemon.log());
    engine.must(&Task::WaitReady);
    engine
}

fn open(daemon: &Daemon, spec: &GpuSpec) -> Task {
    Task::Open {
        socket: daemon.socket(),
        spec: spec.clone(),
    }
}

/// What the daemon itself keeps of a GPU at most: its context and staging.
fn own_share(gpus: &Gpus) -> u64 {
    const STAGING: u64 = 130 << 20;
    gpus.context_bytes() + STAGING
}

/// Saves blocks under the hashes from `first` on, and waits.
fn save(engine: &mut Engine, group: u16, first: u64, blocks: &[u32]) -> Reply {
    let started = engine.run(&Task::StartSave {
        group,
        first,
        blocks: blocks.to_vec(),
        after: After::Stream,
    });
    if started.is_ok() {
        engine.run(&Task::Finish)
    } else {
        started
    }
}

/// Asks for the hashes from `first` on; gives the lease of all of them.
fn lease(engine: &mut Engine, group: u16, first: u64, count: usize) -> u64 {
    let key = first << 8 | u64::from(group);
    let answer = engine.must(&Task::Query {
        group,
        key,
        first,
        count,
    });
    assert_eq!(answer.count as usize, count, "{answer:?}");
    answer.lease
}

/// Loads what was saved under the hashes from `first` on into blocks, and waits.
fn load(engine: &mut Engine, group: u16, first: u64, blocks: &[u32]) -> Reply {
    let lease = lease(engine, group, first, blocks.len());
    engine.must(&Task::StartLoad {
        group,
        lease,
        first,
        blocks: blocks.to_vec(),
        after: After::Stream,
    });
    engine.run(&Task::Finish)
}
