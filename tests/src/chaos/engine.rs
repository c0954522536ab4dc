//! What both kinds of engine process share, and their `main`.

#![forbid(unsafe_code)]

use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pegaflow::{Client, Error, Options, Status};

use super::message::{EngineStart, Event, Role, Tally, fault, monotonic_ns, say};
use super::requests::Door;
use super::timed::{Call, Caller, Watchdog};
use super::{ranks, scheduler};
use crate::worker::{Worker, WorkerSpec};

/// First argument of a program that is to become an engine process.
pub const ENGINE_ARGUMENT: &str = "__engine";
/// Longest time of a call over the socket.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What the end of a client may take.
const LEAVE_BOUND: Duration = Duration::from_millis(500);
/// Pause between two attempts to start while the daemon is away.
const PAUSE: Duration = Duration::from_millis(5);
/// How often figures are told.
const TELL: Duration = Duration::from_millis(100);

/// What the threads of an engine process share.
pub struct Engine {
    /// What it was told.
    pub start: EngineStart,
    /// Times its calls.
    pub watchdog: Arc<Watchdog>,
    stop: AtomicBool,
    tally: Mutex<Tally>,
    /// Boot id of the daemon with which it has been of service last.
    back: Mutex<String>,
}

impl Engine {
    /// True once the conductor wants its end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Adds to the figures.
    pub fn tally(&self, add: impl FnOnce(&mut Tally)) {
        add(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes the answers that a thread got.
    pub fn note_answers(&self, door: &mut Door<'_>) {
        self.tally(|tally| {
            for (label, count) in std::mem::take(&mut door.answers) {
                *tally.answers.entry(label.to_owned()).or_default() += count;
            }
        });
    }

    /// Tells the conductor, once for each boot id, that this process is of service again.
    pub fn is_back(&self, boot: &str) {
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        if *back != boot {
            boot.clone_into(&mut back);
            let at_ns = monotonic_ns();
            let boot = boot.to_owned();
            say(&Event::Back { boot, at_ns });
        }
    }

    fn tell(&self) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.calls = self.watchdog.calls();
        say(&Event::Tally(tally.clone()));
    }

    /// Connects and registers; tries again while the daemon is away or still holds the rank for a
    /// process that died. `None` when the process is to end.
    pub fn open(&self, caller: &mut Caller, spec: &WorkerSpec) -> Option<Worker> {
        while !self.is_stopping() {
            let client = caller.call(Call::Connect, CONNECT_TIMEOUT, || {
                Client::connect(self.options())
            });
            let opened = client.and_then(|client| {
                let bound = CONTROL_TIMEOUT * 2 + LEAVE_BOUND;
                caller.call(Call::Register, bound, || {
                    Worker::with_client(client, spec.clone())
                })
            });
            match opened {
                Ok(worker) => return Some(worker),
                Err(error) => check_refusal(&error),
            }
            std::thread::sleep(PAUSE);
        }
        None
    }

    fn options(&self) -> Options {
        Options {
            socket: Some(self.start.socket.clone()),
            client_name: format!("{} {:?}", self.start.instance.name, self.start.role),
            autostart: Some(false),
            connect_timeout: CONNECT_TIMEOUT,
            control_timeout: CONTROL_TIMEOUT,
            ..Options::default()
        }
    }
}

/// Boot id of the daemon that the client has a session with.
pub fn boot_of(door: &mut Door<'_>) -> Option<String> {
    let client = door.client;
    let info = door
        .caller
        .call(Call::Info, Duration::ZERO, || client.session_info());
    Some(info?.boot_id)
}

/// A daemon that is away, dies meanwhile or still ends a dead process's session: anything else may
/// never be.
fn check_refusal(error: &Error) {
    let expected = matches!(
        error.status(),
        Status::NoDaemon
            | Status::Disconnected
            | Status::Timeout
            | Status::AlreadyRegistered
            | Status::SystemError
            | Status::Draining
    );
    if !expected {
        fault(format!("connecting or registering: {error}"));
    }
}

/// Ends a client within the bound.
pub fn close(caller: &mut Caller, worker: Worker) {
    let bound = LEAVE_BOUND + CONTROL_TIMEOUT;
    caller.call(Call::Disconnect, bound, || drop(worker));
}

/// The `main` of an engine process: reads what it is to be, and works until the end of its input.
///
/// # Errors
/// The input is no [`EngineStart`], or there is no folder.
pub fn main() -> anyhow::Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let start: EngineStart = serde_json::from_str(&line)?;
    let watchdog = Watchdog::start(Duration::from_millis(start.slack_ms));
    let engine = Arc::new(Engine {
        start,
        watchdog,
        stop: AtomicBool::new(false),
        tally: Mutex::default(),
        back: Mutex::default(),
    });
    let told = engine.clone();
    std::thread::spawn(move || {
        // Whatever comes, or an error: it is the end.
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        told.stop.store(true, Ordering::Relaxed);
    });
    let teller = engine.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(TELL);
            teller.tell();
        }
    });
    match engine.start.role {
        Role::Scheduler => scheduler::work(&engine)?,
        Role::Ranks => ranks::work(&engine),
    }
    engine.tell();
    Ok(())
}
