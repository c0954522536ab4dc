//! How a client connects, and the sizes of what it shares with the daemon.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use pegaflow_shm::bell::DEFAULT_SPIN_NS;
use pegaflow_shm::control::MAX_NAME_BYTES;
use pegaflow_shm::paths;
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::segment::{MAX_ARENA_CHUNKS, MAX_RING_SLOTS, MIN_RING_SLOTS, SegmentShape};

use crate::Error;
use crate::log::{Log, LogLevel};
use crate::session::address;

/// Longest time that an option gives, so that deadlines can be computed: some decades.
const LONGEST_TIME: Duration = Duration::from_secs(u32::MAX as u64);

/// Options of [`Client::connect`](crate::Client::connect); the default suits an engine process.
#[derive(Clone, Debug)]
pub struct Options {
    /// Node name; `None` takes `PEGAFLOW_NODE`, else `default`.
    pub node: Option<String>,
    /// The daemon's socket; `None` takes `PEGAFLOW_SOCKET`, else the node's usual place.
    pub socket: Option<PathBuf>,
    /// Name of this process in the daemon's tables; empty takes the program's name and pid.
    pub client_name: String,
    /// Bytes of the submission arena, a multiple of 16 KiB: what all unfinished lists share.
    pub arena_bytes: usize,
    /// Slots of the submission ring: a power of two from 16 to 32,768.
    pub ring_slots: u32,
    /// Most unfinished or unconsumed requests: a power of two from 16 to 32,768.
    pub completion_slots: u32,
    /// How long a waiter spins before it sleeps; never more than the time it may wait, and not at
    /// all where the process has one CPU.
    pub spin: Duration,
    /// Longest time that [`Client::connect`](crate::Client::connect) takes, autostart included.
    pub connect_timeout: Duration,
    /// Longest time a registration or another call over the socket takes.
    pub control_timeout: Duration,
    /// Start a daemon when none listens; `None` does so if `PEGAFLOW_AUTOSTART` is `1`.
    pub autostart: Option<bool>,
    /// The daemon's program for autostart; `None` takes `PEGAFLOW_DAEMON`, else looks beside the
    /// library, beside the executable and in `PATH`.
    pub daemon: Option<PathBuf>,
    /// Connect again, and register again, when the daemon was away.
    pub reconnect: bool,
    /// Pause after the first failed attempt to reconnect; it doubles up to [`Self::backoff_max`].
    pub backoff_min: Duration,
    /// Longest pause between two attempts: with the time of one attempt, what a client is later
    /// than its daemon.
    pub backoff_max: Duration,
    /// Connect without a daemon too: the client begins disconnected, keeps trying, and takes
    /// registrations and memory in for the first daemon that comes; while a daemon is away later,
    /// too. `None` does so if `PEGAFLOW_START_WITHOUT_DAEMON` is `1`.
    pub start_without_daemon: Option<bool>,
    /// How much the client says; `None` takes `PEGAFLOW_CLIENT_LOG` (`off`, `warn`, `info`), else
    /// `warn`.
    pub log_level: Option<LogLevel>,
    /// Where it says it; `None` is standard error.
    pub log: Option<Log>,
}

impl Default for Options {
    fn default() -> Options {
        let shape = SegmentShape::DEFAULT_C2D;
        Options {
            node: None,
            socket: None,
            client_name: String::new(),
            arena_bytes: shape.arena_bytes(),
            ring_slots: shape.slots,
            completion_slots: SegmentShape::DEFAULT_D2C.slots,
            spin: Duration::from_nanos(DEFAULT_SPIN_NS),
            connect_timeout: Duration::from_secs(5),
            control_timeout: Duration::from_secs(30),
            autostart: None,
            daemon: None,
            reconnect: true,
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_millis(500),
            start_without_daemon: None,
            log_level: None,
            log: None,
        }
    }
}

/// Options with every default filled in and every value checked.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) options: Options,
    pub(crate) node: String,
    pub(crate) socket: PathBuf,
    /// True where a person named the socket, so that its owner is that person's choice.
    pub(crate) socket_is_explicit: bool,
    pub(crate) client_name: String,
    pub(crate) shape: SegmentShape,
    pub(crate) autostart: bool,
    pub(crate) start_without_daemon: bool,
    pub(crate) log_level: LogLevel,
}

impl Options {
    pub(crate) fn resolve(mut self) -> Result<Resolved, Error> {
        for time in [
            &mut self.connect_timeout,
            &mut self.control_timeout,
            &mut self.backoff_max,
        ] {
            *time = LONGEST_TIME.min(*time);
        }
        let node = self.node.clone().unwrap_or_else(paths::node_from_env);
        paths::check_node_name(&node)
            .map_err(|fault| Error::argument("node", node.clone(), fault.to_string()))?;
        let from_env = std::env::var_os("PEGAFLOW_SOCKET").is_some();
        let socket_is_explicit = self.socket.is_some() || from_env;
        let named = self
            .socket
            .clone()
            .unwrap_or_else(|| paths::socket_path(&node));
        // A daemon that is started for it gets the path and works in another folder.
        let socket = std::path::absolute(&named).map_err(|error| {
            Error::argument("socket", named.display().to_string(), error.to_string())
        })?;
        address(&socket)?;
        let client_name = resolve_name(&self.client_name)?;
        let shape = self.shape()?;
        check_slots("completion_slots", self.completion_slots)?;
        if self.backoff_min.is_zero() || self.backoff_max < self.backoff_min {
            let value = format!("{:?} to {:?}", self.backoff_min, self.backoff_max);
            return Err(Error::argument("backoff", value, "give 0 < min <= max"));
        }
        let autostart = switch(self.autostart, "PEGAFLOW_AUTOSTART");
        let start_without_daemon =
            switch(self.start_without_daemon, "PEGAFLOW_START_WITHOUT_DAEMON");
        if self.start_without_daemon == Some(true) && !self.reconnect {
            let way_out = "needs reconnect: no daemon would ever be looked for";
            return Err(Error::argument("start_without_daemon", "on", way_out));
        }
        let log_level = match self.log_level {
            Some(level) => level,
            None => LogLevel::from_env()?.unwrap_or(LogLevel::Warn),
        };
        Ok(Resolved {
            start_without_daemon: start_without_daemon && self.reconnect,
            options: self,
            node,
            socket,
            socket_is_explicit,
            client_name,
            shape,
            autostart,
            log_level,
        })
    }

    fn shape(&self) -> Result<SegmentShape, Error> {
        check_slots("ring_slots", self.ring_slots)?;
        let chunks = self.arena_bytes / CHUNK_BYTES;
        if !self.arena_bytes.is_multiple_of(CHUNK_BYTES)
            || chunks == 0
            || chunks > MAX_ARENA_CHUNKS as usize
        {
            let way_out = format!("a multiple of {CHUNK_BYTES}, at most {MAX_ARENA_CHUNKS} times");
            return Err(Error::argument(
                "arena_bytes",
                self.arena_bytes.to_string(),
                way_out,
            ));
        }
        Ok(SegmentShape {
            slots: self.ring_slots,
            arena_chunks: chunks as u32,
        })
    }
}

/// What the options say, else the environment.
fn switch(wanted: Option<bool>, variable: &str) -> bool {
    wanted.unwrap_or_else(|| std::env::var_os(variable).is_some_and(|value| value == "1"))
}

fn check_slots(name: &'static str, slots: u32) -> Result<(), Error> {
    if slots.is_power_of_two() && (MIN_RING_SLOTS..=MAX_RING_SLOTS).contains(&slots) {
        return Ok(());
    }
    let way_out = format!("a power of two from {MIN_RING_SLOTS} to {MAX_RING_SLOTS}");
    Err(Error::argument(name, slots.to_string(), way_out))
}

fn resolve_name(given: &str) -> Result<String, Error> {
    if given.len() > MAX_NAME_BYTES {
        let way_out = format!("at most {MAX_NAME_BYTES} bytes");
        return Err(Error::argument("client_name", given.to_owned(), way_out));
    }
    if !given.is_empty() {
        return Ok(given.to_owned());
    }
    let program = std::env::current_exe().ok();
    let stem = program
        .as_deref()
        .and_then(|path| path.file_name())
        .and_then(|name| name.to_str());
    let short: String = stem.unwrap_or("client").chars().take(32).collect();
    Ok(format!("{short}-{}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes_are_refused_by_name() {
        let bad = [
            Options {
                ring_slots: 1000,
                ..Options::default()
            },
            Options {
                completion_slots: 8,
                ..Options::default()
            },
            Options {
                arena_bytes: 100,
                ..Options::default()
            },
            Options {
                arena_bytes: 0,
                ..Options::default()
            },
            Options {
                node: Some("../x".into()),
                ..Options::default()
            },
            Options {
                client_name: "x".repeat(200),
                ..Options::default()
            },
            Options {
                backoff_min: Duration::ZERO,
                ..Options::default()
            },
            Options {
                socket: Some(format!("/{}", "x".repeat(200)).into()),
                start_without_daemon: Some(true),
                ..Options::default()
            },
            Options {
                start_without_daemon: Some(true),
                reconnect: false,
                ..Options::default()
            },
        ];
        for options in bad {
            assert!(matches!(options.resolve(), Err(Error::Argument { .. })));
        }
    }

    #[test]
    fn an_unnamed_client_is_named_by_program_and_pid() {
        let name = Options::default().resolve().unwrap().client_name;
        assert!(name.ends_with(&std::process::id().to_string()), "{name}");
    }
}
