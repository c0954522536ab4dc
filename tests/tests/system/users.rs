//! Who may connect, and what users see of each other.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::process::Task;
use pegaflow_tests::worker::WorkerSpec;
use pegaflow_tests::{WorkerProcess, skip};

use crate::WORKER;

pub const OTHER_USER: &str = "54321";

/// A worker process of another user; `None` where this test may not become one.
pub fn as_other_user(test: &str, daemon: &Daemon) -> Option<WorkerProcess> {
    as_user(test, daemon, OTHER_USER, None)
}

/// A worker process of a user, with one supplementary group or none.
pub fn as_user(
    test: &str,
    daemon: &Daemon,
    uid: &str,
    group: Option<&str>,
) -> Option<WorkerProcess> {
    if !rustix::process::geteuid().is_root() {
        skip(test, "only root can start a process as another user");
        return None;
    }
    // The build's folder need not be open to other users; the daemon's folder is.
    let program = daemon.folder().join("worker-process");
    if !program.exists() {
        std::fs::copy(WORKER, &program).expect("copied");
    }
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", uid, "--regid", uid])
        .arg(match group {
            Some(group) => format!("--groups={group}"),
            None => "--clear-groups".to_owned(),
        })
        .arg(program);
    Some(WorkerProcess::spawn(command))
}

pub fn open(daemon: &Daemon) -> Task {
    let spec = WorkerSpec::default().instance("other-user");
    Task::Open {
        socket: daemon.socket(),
        spec,
    }
}

#[test]
fn a_user_who_is_not_allowed_is_refused_with_the_way_out() {
    let daemon = Daemon::start_with(Config::with(&["--socket-mode", "0666"]));
    let Some(mut stranger) = as_other_user("users::not_allowed", &daemon) else {
        return;
    };
    let answer = stranger.run(&open(&daemon));
    assert_eq!(answer.status, "permission_denied", "{answer:?}");
    assert!(
        answer.error.contains("--allow-uid") && answer.error.contains(OTHER_USER),
        "{answer:?}"
    );
}

#[test]
fn a_socket_that_is_closed_to_others_keeps_them_out() {
    let daemon = Daemon::start();
    let Some(mut stranger) = as_other_user("users::closed_socket", &daemon) else {
        return;
    };
    let answer = stranger.run(&open(&daemon));
    assert!(!answer.is_ok(), "{answer:?}");
    assert!(!answer.error.is_empty());
}

#[test]
fn users_never_see_each_others_blocks() {
    let daemon = Daemon::start_with(Config::with(&["--allow-uid", OTHER_USER]));
    let Some(mut other) = as_other_user("users::isolation", &daemon) else {
        return;
    };
    let mut own = WorkerProcess::start(WORKER, &daemon, &WorkerSpec::default());
    let opened = other.run(&open(&daemon));
    assert!(opened.is_ok(), "{opened:?}");
    let (save, query) = (
        Task::Save { first: 1, count: 5 },
        Task::Query {
            key: 1,
            first: 1,
            count: 5,
        },
    );
    assert_eq!(own.run(&save).count, 5);
    assert_eq!(other.run(&query).count, 0, "another user's block is no hit");
    assert_eq!(other.run(&Task::Probe { first: 1, count: 5 }).count, 0);
    let saved = other.run(&save);
    assert_eq!((saved.count, saved.skipped), (5, 0), "nor is it skipped");
    for worker in [&mut own, &mut other] {
        let hit = worker.run(&Task::Query {
            key: 2,
            first: 1,
            count: 5,
        });
        assert_eq!(hit.count, 5);
        assert!(
            worker
                .run(&Task::Load {
                    lease: hit.lease,
                    first: 1,
                    count: 5
                })
                .is_ok()
        );
    }
}
