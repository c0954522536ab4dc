//! A daemon of our own: its own node name, its own socket, gone at the end.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::children;
use crate::doctor::try_connect;
use crate::error::ToolError;
use crate::node::{NodePlace, NodeView, ProcStat};

/// Hidden argument: become the daemon that follows, ending with the parent.
pub const RUN_ARGUMENT: &str = "__run-daemon";
/// Longest start; a large pool is populated in it.
const START_PATIENCE: Duration = Duration::from_secs(120);
const DAEMON_PROGRAM: &str = "pegaflowd";
const LOG_TAIL_LINES: usize = 30;

static STARTED: AtomicU32 = AtomicU32::new(0);

/// What our daemon is like.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// Pool in bytes.
    pub pool_bytes: u64,
    /// Extent in bytes; `None` takes the daemon's default.
    pub extent_bytes: Option<u64>,
    /// Most blocks; `None` takes the daemon's default.
    pub max_blocks: Option<u64>,
    /// Eviction policy; `None` takes the daemon's default.
    pub policy: Option<String>,
    /// Admission; `None` takes the daemon's default.
    pub admission: Option<String>,
    /// Copy threads; `None` takes the daemon's default.
    pub copy_threads: Option<u32>,
    /// `--checksum`; `None` takes the daemon's default.
    pub checksum: Option<String>,
    /// Further arguments, as they are.
    pub further: Vec<String>,
}

impl DaemonSpec {
    /// A daemon with this pool and defaults elsewhere.
    pub fn with_pool(pool_bytes: u64) -> DaemonSpec {
        DaemonSpec {
            pool_bytes,
            extent_bytes: None,
            max_blocks: None,
            policy: None,
            admission: None,
            copy_threads: None,
            checksum: None,
            further: Vec::new(),
        }
    }

    fn arguments(&self, node: &str, socket: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut flag = |name: &str, value: OsString| {
            arguments.push(name.into());
            arguments.push(value);
        };
        flag("--node", node.into());
        flag("--socket", socket.into());
        flag("--pool-size", self.pool_bytes.to_string().into());
        flag("--http", "off".into());
        flag("--log-level", "info".into());
        let optional = [
            (
                "--extent-size",
                self.extent_bytes.map(|bytes| bytes.to_string()),
            ),
            (
                "--max-blocks",
                self.max_blocks.map(|blocks| blocks.to_string()),
            ),
            ("--policy", self.policy.clone()),
            ("--admission", self.admission.clone()),
            ("--checksum", self.checksum.clone()),
            (
                "--copy-threads",
                self.copy_threads.map(|threads| threads.to_string()),
            ),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                flag(name, value.into());
            }
        }
        arguments.extend(self.further.iter().map(OsString::from));
        arguments
    }
}

/// A running daemon that ends with this value.
pub struct OwnDaemon {
    child: Child,
    /// Folder of the socket and the log.
    folder: Option<tempfile::TempDir>,
    place: NodePlace,
    socket: PathBuf,
    log: PathBuf,
    /// Program and flags.
    command_line: Vec<OsString>,
    started_in: Duration,
}

/// The daemon's program: beside this one, in PATH, or where PEGAFLOW_DAEMON says.
fn find_program() -> Result<PathBuf, ToolError> {
    if let Some(named) = std::env::var_os("PEGAFLOW_DAEMON") {
        return Ok(PathBuf::from(named));
    }
    let own = std::env::current_exe().map_err(ToolError::io("this program's path"))?;
    let beside = own.parent().unwrap_or(Path::new("/")).to_owned();
    // Test and bench programs lie one folder below the programs.
    let mut folders = vec![beside.clone()];
    folders.extend(beside.parent().map(Path::to_owned));
    folders.extend(
        std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths),
    );
    folders
        .into_iter()
        .map(|folder| folder.join(DAEMON_PROGRAM))
        .find(|program| program.is_file())
        .ok_or(ToolError::NoDaemonBinary { beside })
}

impl OwnDaemon {
    /// Starts a daemon and waits until its socket accepts.
    ///
    /// # Errors
    /// No program, or it ended or did not accept within two minutes; its log is part of the error.
    pub fn start(spec: &DaemonSpec, shm_dir: &Path) -> Result<OwnDaemon, ToolError> {
        children::sweep(shm_dir);
        let program = find_program()?;
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let node = format!(
            "{}{}-{number}",
            children::OWN_NODE_PREFIX,
            std::process::id()
        );
        let folder = tempfile::Builder::new()
            .prefix("pegactl-")
            .tempdir()
            .map_err(ToolError::io("making a temporary folder"))?;
        let socket = folder.path().join("pegaflow.sock");
        let log = folder.path().join("pegaflowd.log");
        let mut command_line = vec![program.into_os_string()];
        command_line.extend(spec.arguments(&node, &socket));
        let started = Instant::now();
        let child = spawn(&command_line, shm_dir, &log)?;
        children::remember_folder(folder.path());
        let place = NodePlace {
            node,
            shm_dir: shm_dir.to_owned(),
        };
        children::remember_folder(&place.dir());
        let mut daemon = OwnDaemon {
            child,
            folder: Some(folder),
            place,
            socket,
            log,
            command_line,
            started_in: Duration::ZERO,
        };
        daemon.wait_until_it_accepts(started)?;
        Ok(daemon)
    }

    /// Ends it as a crash would, and waits until it is gone.
    ///
    /// # Errors
    /// It cannot be signalled.
    pub fn kill(&mut self) -> Result<(), ToolError> {
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map_err(ToolError::io("killing the daemon"))?;
        children::forget_process(self.child.id());
        Ok(())
    }

    /// Starts it again after [`kill`](Self::kill), over what it left; returns when that was.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_again(&mut self) -> Result<Instant, ToolError> {
        let started = Instant::now();
        self.child = spawn(&self.command_line, &self.place.shm_dir, &self.log)?;
        self.wait_until_it_accepts(started)?;
        Ok(started)
    }

    /// How long the last start took until the socket accepted.
    pub fn started_in(&self) -> Duration {
        self.started_in
    }

    /// Its session socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its node.
    pub fn place(&self) -> &NodePlace {
        &self.place
    }

    fn wait_until_it_accepts(&mut self, started: Instant) -> Result<(), ToolError> {
        loop {
            if try_connect(&self.socket).is_ok() {
                self.started_in = started.elapsed();
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.failure(format!("the daemon ended at its start: {status}")));
            }
            if started.elapsed() > START_PATIENCE {
                let seconds = START_PATIENCE.as_secs();
                return Err(self.failure(format!("the daemon did not accept within {seconds} s")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// An error about this daemon with the end of its log.
    pub fn failure(&self, message: String) -> ToolError {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
        ToolError::Daemon {
            message,
            log: tail,
            log_path: self.log.clone(),
        }
    }

    /// True while its process lives.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        let pid = self.child.id();
        if self.is_alive() {
            children::end_process(pid, || !matches!(self.child.try_wait(), Ok(None)));
        }
        children::forget_process(pid);
        let node_dir = self.place.dir();
        let _ = std::fs::remove_dir_all(&node_dir);
        children::forget_folder(&node_dir);
        if let Some(folder) = self.folder.take() {
            children::forget_folder(folder.path());
            let _ = folder.close();
        }
    }
}

/// Starts the program with its output appended to `log`; it ends with this process.
fn spawn(command_line: &[OsString], shm_dir: &Path, log: &Path) -> Result<Child, ToolError> {
    let mut options = std::fs::OpenOptions::new();
    let opened = options.create(true).append(true).open(log);
    let log_file = opened.map_err(ToolError::io("making the log file"))?;
    let own = std::env::current_exe().map_err(ToolError::io("this program's path"))?;
    let output = log_file.try_clone();
    let mut command = Command::new(own);
    command
        .arg(RUN_ARGUMENT)
        .args(command_line)
        .env("PEGAFLOW_SHM_DIR", shm_dir)
        .stdin(Stdio::null())
        .stdout(output.map_err(ToolError::io("the log file"))?)
        .stderr(log_file);
    for (name, _) in std::env::vars_os() {
        // What the caller set for its own daemon must not change ours.
        let foreign = name.to_string_lossy().starts_with("PEGAFLOW_");
        if foreign && name != "PEGAFLOW_SHM_DIR" {
            command.env_remove(name);
        }
    }
    let child = command
        .spawn()
        .map_err(ToolError::io("starting the daemon"))?;
    children::remember_process(child.id());
    Ok(child)
}

/// The daemon that a bench or a replay talks to: our own, or one that runs already.
pub struct DaemonInUse {
    own: Option<OwnDaemon>,
    place: NodePlace,
    socket: PathBuf,
}

impl DaemonInUse {
    /// The running one at `socket`, or one of our own.
    ///
    /// # Errors
    /// It does not answer, or does not start.
    pub fn new(
        socket: Option<&Path>,
        place: &NodePlace,
        spec: &DaemonSpec,
    ) -> Result<DaemonInUse, ToolError> {
        match socket {
            Some(socket) => {
                let what = format!("connecting to the daemon at {}", socket.display());
                try_connect(socket).map_err(ToolError::errno(what))?;
                Ok(DaemonInUse {
                    own: None,
                    place: place.clone(),
                    socket: socket.to_owned(),
                })
            }
            None => {
                let own = OwnDaemon::start(spec, &place.shm_dir)?;
                let (place, socket) = (own.place.clone(), own.socket.clone());
                Ok(DaemonInUse {
                    own: Some(own),
                    place,
                    socket,
                })
            }
        }
    }

    /// Its session socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its node.
    pub fn place(&self) -> &NodePlace {
        &self.place
    }

    /// Its node file.
    ///
    /// # Errors
    /// It cannot be read; with a running daemon, `--node` may name another one.
    pub fn view(&self) -> Result<NodeView, ToolError> {
        NodeView::open(&self.place)
    }

    /// CPU seconds that it has used, if its process can be seen.
    pub fn cpu_seconds(&self) -> Option<f64> {
        let pid = self.view().ok()?.header.pid;
        Some(ProcStat::read(pid)?.cpu_seconds())
    }

    /// Adds our own daemon's log to an error, if the daemon is why there is one.
    pub fn explain(&mut self, error: ToolError) -> ToolError {
        let Some(own) = &mut self.own else {
            return error;
        };
        if own.is_alive() {
            error
        } else {
            own.failure(format!("the daemon ended: {error}"))
        }
    }
}

/// Hidden command: ends with its parent, and becomes the daemon named by the arguments.
///
/// # Errors
/// Only if it could not become it.
pub fn run_daemon(arguments: &[OsString]) -> Result<(), ToolError> {
    children::die_with_parent();
    let Some((program, rest)) = arguments.split_first() else {
        return Err(ToolError::Plan(format!("{RUN_ARGUMENT} needs a program")));
    };
    let error = Command::new(program).args(rest).exec();
    Err(ToolError::io(format!(
        "starting {}",
        program.to_string_lossy()
    ))(error))
}
