//! The daemon put together: claims, pages, lane, sessions, signals, and the way down.
//!
//! Order of the start: node folder locked, socket claimed, HTTP bound, node file written, lane
//! started (the pool comes up; `/health` already answers), socket bound, ready. So nothing slow
//! happens before an error that the operator can fix, and no client connects before it can be
//! served.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`log`] | log lines on standard error |
//! | `node_file` | the `node` file |
//! | `progress` | how far the pool is |
//! | `signals` | SIGTERM, SIGINT, SIGHUP |
//! | `limits` | file descriptors |

#![forbid(unsafe_code)]

mod limits;
pub mod log;
mod node_file;
mod progress;
mod signals;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use pegaflow_shm::BootId;
use pegaflow_shm::node::{NodeFault, NodeWriter};
use pegaflow_shm::paths;
use rustix::rand::{GetRandomFlags, getrandom};
use sd_notify::NotifyState;
use tokio::sync::oneshot;

use crate::config::{Config, Hugepages, Loaded};
use crate::control::listener::{ListenError, SocketClaim};
use crate::control::node_dir::{NodeDir, NodeDirError};
use crate::control::{Control, ControlOptions, HELLO_TIMEOUT, hex};
use crate::device::{DeviceState, Devices};
use crate::fault::{self, CrashPoint};
use crate::isolation::DomainRules;
use crate::lane::{self, LaneOptions, LaneStartError, OpenStore, StartedLane};
use crate::metrics::{Health, HttpError, HttpServer, Phase, publish_devices};
use crate::pool::MemoryNodes;
use crate::tier::ssd::SsdStore;
use progress::Progress;
use signals::Signals;

/// How long a thread that opened the memory of a process waits for another one to open.
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long sessions may take to close once the lane has drained.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// The daemon cannot run, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The node's folder.
    #[error(transparent)]
    NodeDir(#[from] NodeDirError),
    /// The session socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The HTTP pages.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Pool, catalog, index or threads.
    #[error(transparent)]
    Lane(#[from] LaneStartError),
    /// The node file.
    #[error("node file {path}: {problem}")]
    NodeFile {
        /// The file.
        path: PathBuf,
        /// What failed.
        problem: String,
    },
    /// A layout mismatch inside this program.
    #[error(transparent)]
    NodeFault(#[from] NodeFault),
    /// Runtime, signals or random numbers.
    #[error("{operation} failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The error.
        source: io::Error,
    },
    /// The lane thread is gone.
    #[error("the lane thread has ended by itself: the log has the reason; start pegaflowd again")]
    LaneEnded,
    /// A second signal came, or the limit passed, before running requests were completed.
    #[error("stopped before running requests were completed: {reason}")]
    Cut {
        /// Which of the two.
        reason: &'static str,
    },
}

/// Runs the daemon until a signal stops it.
///
/// # Errors
/// See [`DaemonError`]; what was made before the error is taken back.
pub fn run(loaded: &Loaded) -> Result<(), DaemonError> {
    for note in &loaded.notes {
        tracing::warn!("{note}");
    }
    limits::raise_descriptors(loaded.config.max_sessions);
    let runtime = tokio::runtime::Builder::new_current_thread()
        // Threads that opened a process's memory do not outlive its session by long.
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .enable_all()
        .build()
        .map_err(|source| DaemonError::System {
            operation: "starting the runtime",
            source,
        })?;
    let outcome = runtime.block_on(serve(Arc::new(loaded.config.clone())));
    // A pool that is still coming up holds no promise to anybody: do not wait for its threads.
    runtime.shutdown_background();
    outcome
}

/// What is there before the lane.
struct Prepared {
    config: Arc<Config>,
    node_dir: NodeDir,
    claim: SocketClaim,
    boot_id: BootId,
    node: NodeWriter,
    health: Arc<Health>,
    devices: Devices,
}

async fn serve(config: Arc<Config>) -> Result<(), DaemonError> {
    let mut signals = Signals::new()?;
    let node_dir = NodeDir::open(&paths::node_dir(&config.node))?;
    fault::point(CrashPoint::Locked);
    let claim = SocketClaim::take(&config.socket, config.serves_others())?;
    let http = match config.http {
        Some(address) => Some(HttpServer::bind(address).await?),
        None => None,
    };
    let boot_id = new_boot_id()?;
    let http_address = http.as_ref().map(HttpServer::address);
    let node = node_file::create(node_dir.path(), &config, boot_id, http_address)?;
    let health = Arc::new(Health::default());
    if let Some(http) = http {
        tracing::info!(address = %http.address(), "HTTP pages /metrics and /health");
        tokio::spawn(http.serve(node.reader(), health.clone()));
    }
    let devices = open_devices(&config);
    let prepared = Prepared {
        config,
        node_dir,
        claim,
        boot_id,
        node,
        health,
        devices,
    };
    let Some(lane) = start_lane(&prepared, &mut signals).await? else {
        tracing::info!("stopped before the pool was up");
        return Ok(());
    };
    serve_sessions(prepared, lane, signals).await
}

/// Looks for GPUs and says what there is. Loads a library and asks it for names: no context yet.
fn open_devices(config: &Config) -> Devices {
    let devices = Devices::open(config.device_options());
    match devices.state() {
        DeviceState::Absent { reason } => tracing::info!(reason, "no GPU is used"),
        DeviceState::Present { driver, devices } => {
            for device in devices {
                tracing::info!(
                    uuid = %device.uuid,
                    name = device.name,
                    ordinal = device.ordinal,
                    bus = device.pci_bus_id,
                    numa_node = device.numa_node,
                    memory = %ByteSize(device.memory_bytes),
                    driver,
                    "GPU"
                );
            }
        }
    }
    devices
}

fn new_boot_id() -> Result<BootId, DaemonError> {
    let mut boot_id = BootId::default();
    match getrandom(&mut boot_id, GetRandomFlags::empty()) {
        Ok(count) if count == boot_id.len() => Ok(boot_id),
        Ok(_) => Err(system("getrandom", io::ErrorKind::UnexpectedEof.into())),
        Err(errno) => Err(system("getrandom", errno.into())),
    }
}

fn system(operation: &'static str, source: io::Error) -> DaemonError {
    DaemonError::System { operation, source }
}

fn lane_options(prepared: &Prepared) -> LaneOptions {
    let config = &prepared.config;
    let gpus = match prepared.devices.state() {
        DeviceState::Present { devices, .. } => devices,
        DeviceState::Absent { .. } => Vec::new(),
    };
    let gpus = gpus.iter().map(|device| device.numa_node);
    LaneOptions {
        dir: prepared.node_dir.path().to_owned(),
        rules: DomainRules::of(config),
        boot_id: prepared.boot_id,
        node_name: config.node.clone(),
        node: prepared.node.clone(),
        pool_bytes: config.pool_bytes,
        extent_bytes: config.extent_bytes,
        nodes: MemoryNodes::of_gpus(Path::new("/sys"), gpus),
        hugepages: config.hugepages == Hugepages::Advise,
        max_blocks: config.max_blocks,
        policy: config.policy,
        admission: config.admission,
        copy_threads: config.copy_threads as usize,
        checksum: config.checksum,
        lease_ttl: config.lease_ttl,
        lease_ttl_max: config.lease_ttl_max,
        incomplete_ttl: config.incomplete_ttl,
        max_leases: config.max_leases as usize,
        max_sessions: config.max_sessions as usize,
        max_instances: config.max_instances as usize,
        spin: Duration::from_micros(u64::from(config.spin_us)),
        pool: config.pool,
        tier: config.tier_options(),
    }
}

/// What opens the SSD tier; `None` without one.
fn open_store(config: &Config, progress: Arc<Progress>) -> Option<OpenStore> {
    let options = config.ssd_options()?;
    Some(Box::new(move |pool, wake| {
        progress.waits_for_drives();
        Ok(Box::new(SsdStore::open(options, pool, wake)?))
    }))
}

/// Brings the lane up on a thread of its own; `None` when a signal came first.
async fn start_lane(
    prepared: &Prepared,
    signals: &mut Signals,
) -> Result<Option<StartedLane>, DaemonError> {
    let options = lane_options(prepared);
    let progress = Arc::new(Progress::new(options.pool_bytes));
    tracing::info!(
        node = %prepared.config.node,
        pool = %ByteSize(options.pool_bytes),
        extent = %ByteSize(options.extent_bytes),
        start = ?options.pool,
        "bringing the pool up"
    );
    let (sender, mut started) = oneshot::channel();
    let devices = prepared.devices.clone();
    let told = progress.clone();
    let store = open_store(&prepared.config, progress.clone());
    std::thread::Builder::new()
        .name("start".into())
        .spawn(move || {
            let outcome = lane::start(options, &devices, store, &|bytes| told.set(bytes));
            // Nobody waits any more when a signal ended the start.
            let _ = sender.send(outcome);
        })
        .map_err(|source| system("starting a thread", source))?;
    tokio::select! {
        outcome = &mut started => {
            progress.finish();
            let outcome = outcome.map_err(|_| DaemonError::LaneEnded)?;
            Ok(Some(outcome?))
        }
        () = progress.report() => Ok(None),
        () = signals.stop() => {
            notify(&[NotifyState::Stopping]);
            Ok(None)
        }
    }
}

async fn serve_sessions(
    prepared: Prepared,
    lane: StartedLane,
    mut signals: Signals,
) -> Result<(), DaemonError> {
    let StartedLane {
        handle,
        mut events,
        thread,
    } = lane;
    let Prepared {
        config,
        node_dir,
        claim,
        boot_id,
        node,
        health,
        devices,
    } = prepared;
    let (publishing, publishing_to) = (devices.clone(), node.clone());
    let options = ControlOptions {
        node: config.node.clone(),
        boot_id,
        rules: DomainRules::of(&config),
        max_sessions: config.max_sessions,
        hello_timeout: HELLO_TIMEOUT,
        lease_ttl: config.lease_ttl,
        devices,
        sessions_dir: node_dir.sessions(),
    };
    let control = Control::new(options, handle.clone(), node);
    fault::point(CrashPoint::BeforeSocket);
    let listener = claim.listen(config.socket_mode)?;
    health.set_phase(Phase::Ok);
    let (watched, beats) = (handle.clone(), health.clone());
    tokio::spawn(async move { beats.watch_lane(&watched).await });
    tokio::spawn(publish_devices(publishing, publishing_to));
    let delivering = control.clone();
    let mut lane_ended = tokio::spawn(async move { delivering.deliver(&mut events).await });
    let status = format!(
        "serving {} with a pool of {}",
        config.socket.display(),
        ByteSize(config.pool_bytes)
    );
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    tracing::info!(
        socket = %config.socket.display(),
        pool = %ByteSize(config.pool_bytes),
        boot_id = %hex(&boot_id),
        "ready"
    );

    tokio::select! {
        () = control.accept(&listener) => {}
        () = signals.stop() => {}
        _ = &mut lane_ended => return Err(DaemonError::LaneEnded),
    }

    drop(listener);
    health.set_phase(Phase::Draining);
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("completing running requests"),
    ]);
    tracing::info!(limit = ?config.drain_timeout, "stopping: no new work, completing running requests");
    control.announce_draining(config.drain_timeout);
    let cut = tokio::select! {
        drained = tokio::time::timeout(config.drain_timeout, handle.drain()) => {
            drained.is_err().then_some("--drain-timeout passed")
        }
        () = signals.stop() => Some("a second signal came"),
    };
    if let Some(reason) = cut {
        return Err(DaemonError::Cut { reason });
    }
    fault::point(CrashPoint::Drained);
    if !control.close_all(CLOSE_LIMIT).await {
        tracing::warn!("some sessions did not close in time");
    }
    if handle.stop().is_ok() && thread.join().is_err() {
        return Err(DaemonError::LaneEnded);
    }
    fault::point(CrashPoint::LaneStopped);
    node_dir.remove_index_files()?;
    fault::point(CrashPoint::IndexRemoved);
    drop((claim, node_dir));
    tracing::info!("stopped; sealed blocks stay in shared memory for the next start");
    Ok(())
}

/// Tells the service manager, if one asked for it.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager could not be notified");
    }
}
