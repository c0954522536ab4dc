//! A daemon of a test's own, and what it must leave behind: nothing but the cache.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pegaflow::{Client, Options};
use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::node::{Counter, Gauge, NodeReader};
use pegaflow_shm::paths;

use crate::{SOON, binaries, eventually, procfs};

/// Files of a node's folder that outlive a daemon: the cache, and the lock that guards it.
const LASTING: [&str; 3] = ["pool", "catalog", "lock"];

/// A daemon on a private node name and socket. Dropping it stops it, checks what is left, and
/// removes the cache.
pub struct Daemon {
    node: String,
    folder: tempfile::TempDir,
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

/// What a daemon is started with; the defaults make a small and quick one.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--pool-size`.
    pub pool: String,
    /// `--extent-size`.
    pub extent: String,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Further environment.
    pub environment: Vec<(String, String)>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            pool: "64MiB".into(),
            extent: "4MiB".into(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }
}

impl Config {
    /// The default with further arguments.
    pub fn with(arguments: &[&str]) -> Config {
        let arguments = arguments.iter().map(ToString::to_string).collect();
        Config {
            arguments,
            ..Config::default()
        }
    }
}

/// A node name that no other test and no other run uses.
pub fn private_node() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "test-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

impl Daemon {
    /// Starts one with the default configuration and waits until it serves.
    pub fn start() -> Daemon {
        Daemon::start_with(Config::default())
    }

    /// Starts one and waits until it serves.
    ///
    /// # Panics
    /// It does not come to serve.
    pub fn start_with(config: Config) -> Daemon {
        let mut daemon = Daemon::prepare(config);
        daemon.launch();
        daemon
    }

    /// Names and folders of a daemon that is not started yet.
    pub fn prepare(config: Config) -> Daemon {
        let folder = tempfile::Builder::new()
            .prefix("pegaflow-test-")
            .tempdir()
            .expect("a folder");
        // Clients of other users must reach the socket, so that it is the daemon that refuses them.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let node = private_node();
        let mut arguments: Vec<OsString> = vec![
            "--node".into(),
            node.clone().into(),
            "--socket".into(),
            folder.path().join("daemon.sock").into(),
            "--pool-size".into(),
            config.pool.into(),
            "--extent-size".into(),
            config.extent.into(),
            "--http".into(),
            "127.0.0.1:0".into(),
        ];
        arguments.extend(config.arguments.into_iter().map(OsString::from));
        Daemon {
            node,
            folder,
            arguments,
            environment: config.environment,
            child: None,
        }
    }

    /// A command that runs this daemon, with its log appended to [`Self::log_path`].
    pub fn command(&self) -> Command {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("a log");
        let mut command = Command::new(binaries::pegaflowd());
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        for (name, _) in std::env::vars_os() {
            let kept = name == "PEGAFLOW_SHM_DIR";
            if !kept && (name == "NOTIFY_SOCKET" || name.to_string_lossy().starts_with("PEGAFLOW_"))
            {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts the daemon again after [`Self::kill`] or [`Self::stop`], on the same node and socket.
    ///
    /// # Panics
    /// It does not come to serve.
    pub fn launch(&mut self) {
        self.spawn();
        let serves = eventually(|| self.is_serving() || self.has_ended());
        assert!(
            serves && !self.has_ended(),
            "pegaflowd did not come up:\n{}",
            self.log()
        );
    }

    /// Starts the daemon and does not wait for anything.
    ///
    /// # Panics
    /// It runs already, or there is no such program.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "already running");
        self.child = Some(self.command().spawn().expect("pegaflowd starts"));
    }

    /// True once the started daemon takes connections.
    pub fn is_serving(&self) -> bool {
        let pid = self.pid();
        procfs::listens(&self.socket())
            && self
                .node_reader()
                .is_some_and(|node| node.header().pid == pid)
    }

    /// True from [`Self::spawn`] or [`Self::launch`] until it was killed or stopped.
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// The running daemon's boot id in hex.
    pub fn boot_id(&self) -> String {
        let boot_id = self.node_file().header().boot_id;
        boot_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn has_ended(&mut self) -> bool {
        let child = self.child.as_mut().expect("started");
        child.try_wait().expect("wait").is_some()
    }

    /// Changes the value of an option for the next [`Self::launch`].
    ///
    /// # Panics
    /// The option was not given before.
    pub fn set_argument(&mut self, option: &str, value: &str) {
        let at = self
            .arguments
            .iter()
            .position(|argument| argument == option);
        self.arguments[at.expect("an option that was given") + 1] = value.into();
    }

    /// Sets or removes an environment variable for the next [`Self::launch`].
    pub fn set_environment(&mut self, name: &str, value: Option<&str>) {
        self.environment.retain(|(known, _)| known != name);
        self.environment
            .extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// Node name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Session socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("daemon.sock")
    }

    /// A folder of the test's own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Folder of the shared files.
    pub fn shm(&self) -> PathBuf {
        paths::node_dir(&self.node)
    }

    /// Where the log goes.
    pub fn log_path(&self) -> PathBuf {
        self.folder.path().join("daemon.log")
    }

    /// The log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Options with which a client finds this daemon, and no other.
    pub fn options(&self) -> Options {
        Options {
            node: Some(self.node.clone()),
            socket: Some(self.socket()),
            autostart: Some(false),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_millis(100),
            ..Options::default()
        }
    }

    /// A client of this process.
    ///
    /// # Panics
    /// The daemon refuses it.
    pub fn connect(&self) -> Client {
        match Client::connect(self.options()) {
            Ok(client) => client,
            Err(error) => panic!("connect: {error}\n{}", self.log()),
        }
    }

    /// The node file, mapped; also of a daemon that died.
    pub fn node_reader(&self) -> Option<NodeReader> {
        let file = NamedFile::open(&self.shm().join("node"), "node", Access::ReadOnly).ok()?;
        NodeReader::open(Arc::new(file.map(Access::ReadOnly).ok()?)).ok()
    }

    fn node_file(&self) -> NodeReader {
        self.node_reader()
            .expect("the node file of a running daemon can be read")
    }

    /// A counter of the running daemon.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.node_file().counter(counter)
    }

    /// A gauge of the running daemon.
    pub fn gauge(&self, gauge: Gauge) -> u64 {
        self.node_file().gauge(gauge)
    }

    /// Waits until a counter, which the daemon publishes every so often, has at least this value.
    pub fn counter_reaches(&self, counter: Counter, value: u64) -> bool {
        eventually(|| self.counter(counter) >= value)
    }

    /// Waits until a counter has this value.
    pub fn counter_becomes(&self, counter: Counter, value: u64) -> bool {
        eventually(|| self.counter(counter) == value)
    }

    /// Waits until a gauge has this value.
    pub fn gauge_becomes(&self, gauge: Gauge, value: u64) -> bool {
        eventually(|| self.gauge(gauge) == value)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a pid fits");
        kill(Pid::from_raw(pid), signal).expect("the daemon is there to be signalled");
    }

    /// Kills it as the kernel would for want of memory.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.take().expect("running").wait().expect("wait");
    }

    /// Kills it if it runs, stopped by a signal or not.
    pub fn kill_if_running(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }

    /// Asks it to stop and waits for its end.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("running");
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = child.try_wait().expect("wait") {
                return status;
            }
            if Instant::now() > deadline {
                let pid = child.id();
                child.kill().expect("kill");
                child.wait().expect("wait");
                panic!(
                    "pegaflowd {pid} did not end within {SOON:?}:\n{}",
                    self.log()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// True while the process runs.
    pub fn is_alive(&self) -> bool {
        self.child
            .as_ref()
            .is_some_and(|child| procfs::is_alive(child.id()))
    }

    /// What the stopped daemon has left beyond the cache: should be empty.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        if self.socket().exists() {
            left.push(self.socket());
        }
        let Ok(entries) = fs::read_dir(self.shm()) else {
            return left;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let lasting = LASTING.iter().any(|file| name == **file);
            let empty_folder =
                fs::read_dir(entry.path()).is_ok_and(|mut files| files.next().is_none());
            // The next start makes the indices anew; the node's last figures stay for `pegactl`.
            let remade = name == "node" || name.to_string_lossy().starts_with("index-");
            if !lasting && !empty_folder && !remade {
                left.push(entry.path());
            }
        }
        left
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut fault = None;
        if self.child.is_some() {
            if std::thread::panicking() {
                eprintln!("--- log of {}\n{}", self.node, self.log());
                // It may have ended by itself, which is why the test fails.
                if let Some(mut child) = self.child.take() {
                    child.kill().ok();
                    child.wait().ok();
                }
            } else {
                let status = self.stop();
                let left = self.leftovers();
                if !status.success() {
                    fault = Some(format!("pegaflowd ended with {status}:\n{}", self.log()));
                } else if !left.is_empty() {
                    fault = Some(format!("left behind: {left:?}"));
                }
            }
        }
        fs::remove_dir_all(self.shm()).ok();
        if let Some(fault) = fault {
            panic!("{fault}");
        }
    }
}
