//! Connecting for the first time, and starting a daemon where none listens.
//!
//! Two clients that start at once take turns on a lock file: the second finds the first one's
//! daemon. The daemon becomes the leader of a session of its own and outlives the client; what it
//! prints goes to a log file beside its socket.

#![forbid(unsafe_code)]

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::Error;
use crate::options::Resolved;
use crate::session::{Bound, Channel, ConnectError};
use crate::shared::process::detach;

/// Name of the daemon's program.
const PROGRAM: &str = "pegaflowd";
/// Pause between two looks at a daemon that is starting.
const PAUSE: Duration = Duration::from_millis(10);

/// Connects, starting a daemon if nobody listens and the options say so.
pub(crate) fn connect(resolved: &Resolved, deadline: Instant) -> Result<Channel, Error> {
    let bound = Bound::until(deadline);
    match Channel::connect(&resolved.socket, bound) {
        Ok(channel) => Ok(channel),
        Err(ConnectError::Failed(error)) => Err(error),
        Err(ConnectError::NobodyListens(errno)) if !resolved.autostart => {
            let cause = std::io::Error::from(errno);
            let hint = "start pegaflowd, or set PEGAFLOW_AUTOSTART=1, or begin without it: option \
                        start_without_daemon or PEGAFLOW_START_WITHOUT_DAEMON=1";
            Err(no_daemon(resolved, format!("{cause}; {hint}")))
        }
        Err(ConnectError::NobodyListens(_)) => start(resolved, deadline),
    }
}

fn start(resolved: &Resolved, deadline: Instant) -> Result<Channel, Error> {
    let bound = Bound::until(deadline);
    let folder = resolved.socket.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| no_daemon(resolved, format!("creating {}: {error}", folder.display())))?;
    let _lock = lock(resolved, deadline)?;
    // Whoever held the lock before may have started one.
    if let Ok(channel) = Channel::connect(&resolved.socket, bound) {
        return Ok(channel);
    }
    let program = find_program(resolved)?;
    let log = resolved.socket.with_extension("log");
    let mut starting = Starting(spawn(resolved, &program, &log)?);
    let tried = || format!("autostart of {}, log {}", program.display(), log.display());
    loop {
        match Channel::connect(&resolved.socket, bound) {
            Ok(channel) => return Ok(channel),
            Err(ConnectError::Failed(error)) => return Err(error),
            Err(ConnectError::NobodyListens(_)) => {}
        }
        if let Ok(Some(status)) = starting.0.try_wait() {
            // A daemon that found another one of its node running leaves; then that one listens.
            return Channel::connect(&resolved.socket, bound)
                .map_err(|_| no_daemon(resolved, format!("{}: it ended with {status}", tried())));
        }
        if Instant::now() >= deadline {
            let bound = resolved.options.connect_timeout;
            return Err(no_daemon(
                resolved,
                format!("{}: it runs but does not listen after {bound:?}", tried()),
            ));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Stands between this process and a daemon that it starts: see [`detach`]. When it is dropped, the
/// daemon descends from this process no more.
struct Starting(Child);

impl Drop for Starting {
    fn drop(&mut self) {
        // Neither fails for a child that nobody else waits for; the daemon's status is in its log.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lock(resolved: &Resolved, deadline: Instant) -> Result<File, Error> {
    let path = resolved.socket.with_extension("start-lock");
    let failed = |error: std::io::Error| {
        no_daemon(resolved, format!("start lock {}: {error}", path.display()))
    };
    let file = open_private(&path).map_err(failed)?;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Opens for appending a file that only this user can read; never through a link.
fn open_private(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(flags.bits() as i32)
        .open(path)
}

fn spawn(resolved: &Resolved, program: &Path, log: &Path) -> Result<Child, Error> {
    let output = || match open_private(log) {
        Ok(file) => Stdio::from(file),
        Err(_) => Stdio::null(),
    };
    let mut command = Command::new(program);
    command.arg("--node").arg(&resolved.node);
    command.arg("--socket").arg(&resolved.socket);
    command
        .stdin(Stdio::null())
        .stdout(output())
        .stderr(output());
    command.current_dir("/");
    detach(&mut command);
    command.spawn().map_err(|error| {
        no_daemon(
            resolved,
            format!("autostart of {}: {error}", program.display()),
        )
    })
}

/// The daemon's program, from the options, the environment, or one of the usual places.
fn find_program(resolved: &Resolved) -> Result<PathBuf, Error> {
    let named = resolved.options.daemon.clone();
    if let Some(path) = named.or_else(|| std::env::var_os("PEGAFLOW_DAEMON").map(PathBuf::from)) {
        return Ok(path);
    }
    let mut candidates = Vec::new();
    for beside in [crate::ffi::library_path(), std::env::current_exe().ok()] {
        let Some(folder) = beside.as_deref().and_then(Path::parent) else {
            continue;
        };
        candidates.push(folder.join(PROGRAM));
        candidates.push(folder.join("../bin").join(PROGRAM));
    }
    if let Some(path) = std::env::var_os("PATH") {
        candidates.extend(std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)));
    }
    let found = candidates.iter().find(|path| path.is_file());
    found.cloned().ok_or_else(|| {
        let places: Vec<String> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let detail = format!(
            "autostart found no {PROGRAM}; set PEGAFLOW_DAEMON. Looked at {}",
            places.join(", ")
        );
        no_daemon(resolved, detail)
    })
}

fn no_daemon(resolved: &Resolved, detail: String) -> Error {
    Error::NoDaemon {
        socket: resolved.socket.clone(),
        detail,
    }
}
