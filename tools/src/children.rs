//! Processes and folders of our own, which must be gone when this program is, however it ends.
//!
//! | end of this program | who cleans up |
//! | --- | --- |
//! | returns or panics | the owners' `Drop` |
//! | SIGINT, SIGTERM, SIGHUP | the thread that [`clean_up_on_signals`] starts |
//! | SIGKILL | the kernel ends children ([`die_with_parent`]), the next run [`sweep`]s folders |

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::node::{Liveness, NodePlace, NodeView, ProcStat};

/// Nodes of our own daemons are called so, followed by this process's id.
pub const OWN_NODE_PREFIX: &str = "pegactl-";

/// How long a process may take to end when asked, before it is killed.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Default)]
struct Leftovers {
    processes: Vec<u32>,
    folders: Vec<PathBuf>,
}

static LEFTOVERS: Mutex<Leftovers> = Mutex::new(Leftovers {
    processes: Vec::new(),
    folders: Vec::new(),
});

fn leftovers() -> MutexGuard<'static, Leftovers> {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers a child until [`forget_process`].
pub fn remember_process(pid: u32) {
    leftovers().processes.push(pid);
}

/// The child is gone.
pub fn forget_process(pid: u32) {
    leftovers().processes.retain(|known| *known != pid);
}

/// Remembers a folder until [`forget_folder`].
pub fn remember_folder(path: &Path) {
    leftovers().folders.push(path.to_owned());
}

/// The folder is gone.
pub fn forget_folder(path: &Path) {
    leftovers().folders.retain(|known| known != path);
}

/// Asks a process to end, and kills it if it does not. `gone` tells (and reaps) whether it is.
pub fn end_process(pid: u32, mut gone: impl FnMut() -> bool) {
    let target = Pid::from_raw(pid.cast_signed());
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = kill(target, signal);
        let asked = Instant::now();
        while asked.elapsed() < PATIENCE {
            if gone() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Call before any other thread starts: interrupting signals end the children and remove the
/// folders first.
pub fn clean_up_on_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        if signals.thread_block().is_err() {
            return;
        }
        std::thread::spawn(move || {
            let signal = signals.wait().unwrap_or(Signal::SIGTERM);
            let known = std::mem::take(&mut *leftovers());
            for pid in known.processes {
                end_process(pid, || {
                    ProcStat::read(pid).is_none_or(|stat| matches!(stat.state, 'Z' | 'X'))
                });
            }
            for folder in known.folders {
                let _ = std::fs::remove_dir_all(folder);
            }
            eprintln!("pegactl: ended by {signal}, own processes and files removed");
            std::process::exit(128 + signal as i32);
        });
    });
}

/// First thing in a child: takes signals that the parent blocked, and the kernel ends this process
/// when the thread that started it ends.
pub fn die_with_parent() {
    // A spawned process inherits the mask of `clean_up_on_signals`.
    let _ = SigSet::all().thread_unblock();
    let parent = nix::unistd::getppid();
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
    // If it died before the call, nobody sends the signal; a new parent tells.
    if nix::unistd::getppid() != parent {
        std::process::exit(1);
    }
}

/// Removes folders of nodes that an earlier run of this program started and could not remove.
pub fn sweep(shm_dir: &Path) {
    let place = |node: String| NodePlace {
        node,
        shm_dir: shm_dir.to_owned(),
    };
    for node in place(String::new()).all_nodes() {
        let Some(owner) = node.strip_prefix(OWN_NODE_PREFIX) else {
            continue;
        };
        let Some(Ok(owner)) = owner.split('-').next().map(str::parse::<u32>) else {
            continue;
        };
        let place = place(node);
        let daemon_dead =
            NodeView::open(&place).map_or(true, |view| view.liveness() == Liveness::Dead);
        if ProcStat::read(owner).is_none() && daemon_dead {
            let _ = std::fs::remove_dir_all(place.dir());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::tests::{fake_node, shm_folder};

    #[test]
    fn a_sweep_removes_what_a_killed_run_left_and_nothing_else() {
        let root = shm_folder();
        let gone = u32::MAX >> 1;
        let left = format!("{OWN_NODE_PREFIX}{gone}-0");
        let ours = format!("{OWN_NODE_PREFIX}{}-0", std::process::id());
        for node in [left.as_str(), ours.as_str(), "production"] {
            fake_node(root.path(), node, gone);
        }
        sweep(root.path());
        assert!(!root.path().join(&left).exists());
        assert!(root.path().join(&ours).exists());
        assert!(root.path().join("production").exists());
    }

    #[test]
    fn a_stubborn_process_is_killed() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id();
        end_process(pid, || matches!(child.try_wait(), Ok(Some(_))));
        assert!(ProcStat::read(pid).is_none());
    }
}
