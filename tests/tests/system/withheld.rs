//! Processes that withhold the memory they registered (userfaultfd, registered and never answered):
//! copies of it wait for ever, and nobody else does.

use std::time::Instant;

use pegaflow_shm::node::{Counter, Gauge, SessionRow};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::memory::MemoryKind;
use pegaflow_tests::process::Task;
use pegaflow_tests::withheld::Withheld;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{SOON, WorkerProcess, eventually, procfs, skip};

use crate::WORKER;

/// More saves than a session has copy threads.
const SAVES: u64 = 6;

/// True when the test cannot run here, which has then been said.
fn refused(test: &str) -> bool {
    let why = Withheld::refused();
    if let Some(why) = &why {
        skip(test, why);
    }
    why.is_some()
}

/// A process that saves from, and loads into, memory it withholds.
fn hostile(daemon: &Daemon, instance: &str, first: u64, held: (u64, usize)) -> WorkerProcess {
    let spec = WorkerSpec {
        memory: MemoryKind::Withheld,
        ..WorkerSpec::default().instance(instance)
    };
    let mut process = WorkerProcess::start(WORKER, daemon, &spec);
    assert!(process.run(&Task::WaitReady).is_ok());
    for save in 0..SAVES {
        let first = first + save * 8;
        let started = process.run(&Task::StartSave { first, count: 8 });
        assert!(started.is_ok(), "{started:?}");
    }
    let (first, count) = held;
    let key = 1;
    let answer = process.run(&Task::Query { key, first, count });
    assert_eq!(answer.count as usize, count, "{answer:?}");
    let lease = answer.lease;
    let started = process.run(&Task::StartLoad { lease, count });
    assert!(started.is_ok(), "{started:?}");
    process
}

fn row_of(daemon: &Daemon, pid: u32) -> Option<SessionRow> {
    let rows = daemon.node_reader()?.sessions();
    rows.into_iter().find(|row| row.pid == pid)
}

#[test]
fn a_process_that_withholds_its_memory_holds_up_nobody_but_itself() {
    if refused("a_process_that_withholds_its_memory_holds_up_nobody_but_itself") {
        return;
    }
    let daemon = Daemon::start_with(Config::with(&["--copy-threads", "2"]));
    let standing = MemoryKind::ALL.map(|memory| {
        let spec = WorkerSpec {
            memory,
            ..WorkerSpec::default().instance(&format!("{memory:?}"))
        };
        Worker::ready(daemon.options(), spec)
    });
    let names = hashes(1, 16);
    standing[0].save(&names);
    // The worker with process memory may have two of its own yet to come.
    let threads = procfs::threads(daemon.pid()) + 2;
    let mut processes: Vec<WorkerProcess> = (0..3)
        .map(|number| {
            let first = 10_000 * (number + 1);
            hostile(&daemon, &format!("hostile-{number}"), first, (1, 16))
        })
        .collect();
    let all = 3 * (SAVES + 1);
    assert!(daemon.gauge_becomes(Gauge::CopyTasks, all));
    for round in 0..30u64 {
        for (kind, worker) in standing.iter().enumerate() {
            let new = hashes(1_000_000 + (round * 2 + kind as u64) * 100, 16);
            assert_eq!(worker.save(&new).count, 16, "round {round}");
            assert_eq!(worker.fetch(round * 2, &new), 16);
            assert_eq!(worker.fetch(round * 2 + 1, &names), 16);
        }
    }
    assert_eq!(
        daemon.gauge(Gauge::CopyTasks),
        all,
        "nothing of it came to an end"
    );

    assert!(
        daemon.gauge_becomes(Gauge::CopyTasksStuck, all),
        "{}",
        daemon.log()
    );
    let log = daemon.log();
    for process in &processes {
        let row = row_of(&daemon, process.pid()).expect("its session");
        assert_eq!(u64::from(row.stuck_copies), SAVES + 1);
        let line = log.lines().find(|line| {
            line.contains("holds up copies") && line.contains(&format!("pid={}", process.pid()))
        });
        let line = line.unwrap_or_else(|| panic!("not named:\n{log}"));
        assert!(line.contains(&format!("session={}", row.session)), "{line}");
    }
    assert_eq!(
        log.matches("holds up copies").count(),
        3,
        "once each:\n{log}"
    );

    // One leaves its session and lives on: the session waits, its name is free.
    assert!(processes[0].run(&Task::Leave).is_ok());
    let again = WorkerSpec::default().instance("hostile-0");
    let heir = Worker::ready(daemon.options(), again);
    assert_eq!(heir.fetch(1, &names), 16);
    assert_eq!(daemon.gauge(Gauge::CopyTasks), all);
    let left = row_of(&daemon, processes[0].pid());
    assert!(left.is_some(), "its memory is in use");

    for process in &mut processes {
        process.kill();
    }
    assert!(
        daemon.gauge_becomes(Gauge::CopyTasks, 0),
        "{}",
        daemon.log()
    );
    assert!(daemon.gauge_becomes(Gauge::CopyTasksStuck, 0));
    assert!(daemon.gauge_becomes(Gauge::Sessions, 3), "{}", daemon.log());
    assert!(daemon.gauge_becomes(Gauge::Leases, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    assert!(daemon.gauge_becomes(Gauge::BlocksUnfinished, 0));
    assert!(eventually(|| procfs::threads(daemon.pid()) <= threads));
    let theirs = hashes(10_000, 8);
    assert_eq!(standing[1].query(1000, &theirs).count, 0, "never a hit");
    assert_eq!(standing[1].save(&theirs).count, 8);
    assert_eq!(standing[0].fetch(1001, &theirs), 8);
}

#[test]
fn a_stop_keeps_its_limit_though_a_process_withholds_its_memory() {
    if refused("a_stop_keeps_its_limit_though_a_process_withholds_its_memory") {
        return;
    }
    let mut daemon = Daemon::start_with(Config::with(&["--drain-timeout", "1s"]));
    let names = hashes(1, 16);
    let standing = Worker::ready(daemon.options(), WorkerSpec::default());
    standing.save(&names);
    let mut process = hostile(&daemon, "hostile", 10_000, (1, 16));
    assert!(daemon.gauge_becomes(Gauge::CopyTasks, SAVES + 1));
    let began = Instant::now();
    let status = daemon.stop();
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(
        daemon.log().contains("--drain-timeout passed"),
        "{}",
        daemon.log()
    );
    assert!(daemon.leftovers().is_empty(), "{:?}", daemon.leftovers());

    // The process lives, and nothing of it hinders the next daemon.
    drop(standing);
    daemon.launch();
    assert_eq!(daemon.counter(Counter::AdoptedBlocks), 16);
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    assert_eq!(worker.fetch(1, &names), 16);
    for save in 0..SAVES {
        let lost = hashes(10_000 + save * 8, 8);
        assert_eq!(worker.query(2 + save, &lost).count, 0, "never sealed");
    }
    process.kill();
}
