//! Processes that connect, work and die, again and again: nothing of them stays.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pegaflow_shm::node::Gauge;
use pegaflow_tests::content::{Stream, hashes};
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::dying::{DIE_ARGUMENT, Death, Fate};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{SOON, eventually, procfs, trials};

use crate::WORKER;

/// Processes that live at once.
const AT_ONCE: usize = 3;
/// Cycles before the daemon's use of everything is noted.
const WARM_UP: u64 = Death::ALL.len() as u64 * 2;
/// What the daemon's allocator may keep, in KiB, whatever the number of cycles.
const MEMORY_SLACK_KIB: u64 = 8 << 10;

/// What the daemon and its folder hold while one engine is connected.
#[derive(Debug)]
struct Holdings {
    memory_kib: u64,
    descriptors: usize,
    mappings: usize,
    threads: u64,
    files: Vec<String>,
    shared_kib: u64,
}

impl Holdings {
    fn of(daemon: &Daemon) -> Holdings {
        let descriptors = procfs::settled_descriptors(daemon.pid());
        let pid = daemon.pid();
        let status = |field| procfs::status_number(pid, field).expect("a running daemon");
        Holdings {
            memory_kib: status("RssAnon"),
            descriptors,
            mappings: procfs::shared_mappings(pid),
            threads: status("Threads"),
            files: procfs::files_below(&daemon.shm()),
            shared_kib: procfs::allocated_kib(&daemon.shm()),
        }
    }
}

fn start_victim(daemon: &Daemon, cycle: u64, random: &mut Stream) -> (Death, Child) {
    let all = Death::ALL;
    // Each once, then at random.
    let death = match all.get(cycle as usize) {
        Some(death) => *death,
        None => all[random.below(all.len() as u64) as usize],
    };
    let spec = WorkerSpec {
        memory: MemoryKind::ALL[random.below(2) as usize],
        half_bytes: 4 << 10,
        ..WorkerSpec::default().instance(&format!("victim-{cycle}"))
    };
    let spec = if death == Death::HalfSaved {
        spec.salt("two ranks")
    } else {
        spec
    };
    let fate = Fate {
        death,
        socket: daemon.socket(),
        spec,
        seed: 10 + cycle,
    };
    let fate = serde_json::to_string(&fate).expect("a fate can be written");
    let mut command = Command::new(WORKER);
    command.args([DIE_ARGUMENT, &fate]).stdin(Stdio::null());
    (death, command.spawn().expect("the victim starts"))
}

/// A victim dies as it was told to; one that ends otherwise has failed before.
fn await_death(death: Death, victim: &mut Child, daemon: &Daemon) {
    let deadline = Instant::now() + SOON;
    let status = loop {
        if let Some(status) = victim.try_wait().expect("wait") {
            break status;
        }
        assert!(Instant::now() < deadline, "{death:?} does not die");
        std::thread::sleep(Duration::from_millis(1));
    };
    let by_itself = matches!(death, Death::Exit | Death::DropsSocket | Death::Leaves);
    assert_eq!(
        (status.success(), status.code().is_none()),
        (by_itself, !by_itself),
        "{death:?}: {status}\n{}",
        daemon.log()
    );
}

fn alone_again(daemon: &Daemon) {
    let expected = [
        (Gauge::Sessions, 1),
        (Gauge::Instances, 1),
        (Gauge::Leases, 0),
        (Gauge::BlocksPinned, 0),
        (Gauge::BlocksUnfinished, 0),
        (Gauge::CopyTasks, 0),
        (Gauge::Requests, 0),
    ];
    for (gauge, value) in expected {
        assert!(
            daemon.gauge_becomes(gauge, value),
            "{gauge:?} is {}\n{}",
            daemon.gauge(gauge),
            daemon.log()
        );
    }
}

#[test]
fn processes_that_connect_work_and_die_leave_memory_descriptors_and_shm_as_before() {
    let cycles = trials("PEGAFLOW_CYCLES", 60);
    let daemon = Daemon::start_with(Config {
        pool: "16MiB".into(),
        extent: "1MiB".into(),
        ..Config::with(&["--incomplete-ttl", "1s"])
    });
    let spec = WorkerSpec {
        half_bytes: 2 << 10,
        ..WorkerSpec::default().instance("standing").salt("standing")
    };
    let standing = Worker::ready(daemon.options(), spec);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stops = StopAtEnd(&stop);
        scope.spawn(|| {
            let names = hashes(1, 16);
            while !stop.load(Ordering::Relaxed) {
                let round = rounds.fetch_add(1, Ordering::Relaxed);
                standing.save(&names);
                standing.fetch(round, &names);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let mut random = Stream::new(&[trials("PEGAFLOW_CYCLES_SEED", 5)]);
        let mut living = Vec::new();
        let mut before = None;
        for cycle in 0..cycles.max(WARM_UP + 1) {
            living.push(start_victim(&daemon, cycle, &mut random));
            if living.len() >= AT_ONCE || cycle == WARM_UP {
                let upto = if cycle == WARM_UP { 0 } else { AT_ONCE - 1 };
                while living.len() > upto {
                    let (death, mut victim) = living.remove(0);
                    await_death(death, &mut victim, &daemon);
                }
            }
            if cycle == WARM_UP {
                alone_again(&daemon);
                before = Some(Holdings::of(&daemon));
            }
        }
        for (death, mut victim) in living {
            await_death(death, &mut victim, &daemon);
        }
        alone_again(&daemon);
        let before: Holdings = before.expect("warmed up");
        // Those of sessions that ended go after them.
        let threads = || procfs::status_number(daemon.pid(), "Threads");
        eventually(|| threads().is_none_or(|now| now <= before.threads));
        let after = Holdings::of(&daemon);
        println!("{cycles} cycles: before {before:?}, after {after:?}");
        assert!(
            after.memory_kib <= before.memory_kib + MEMORY_SLACK_KIB
                && after.descriptors <= before.descriptors
                && after.mappings <= before.mappings
                && after.threads <= before.threads
                && after.shared_kib <= before.shared_kib + MEMORY_SLACK_KIB,
            "before {before:?}, after {after:?}\n{}",
            daemon.log()
        );
        assert_eq!(after.files, before.files);
    });
    assert_eq!(standing.client.stats().disconnects, 0);
    assert!(rounds.load(Ordering::Relaxed) > 1);
}

/// Ends the standing engine's thread whatever happens, so that the scope can end.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
