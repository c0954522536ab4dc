//! Starting the lane: pool, catalog, cache, copy threads, then the thread itself.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use pegaflow_shm::node::Gauge;
use rustix::event::epoll;
use rustix::io::Errno;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::cache::adopt::{OpenError, OpenedCache, open_cache};
use crate::cache::lease::LeaseTable;
use crate::clock::{Clock, SystemClock};
use crate::copy::{CopyOptions, CopyWorkers, PoolMemory, Sampler};
use crate::device::Devices;
use crate::isolation::DomainKey;
use crate::lane::api::{LaneEvent, LaneHandle};
use crate::lane::backlog::Backlog;
use crate::lane::load::SeenBlocks;
use crate::lane::machine::{Machine, RealMachine};
use crate::lane::options::LaneOptions;
use crate::lane::run::{LANE_WAKE, Lane};
use crate::lane::tally::Tally;
use crate::lane::tasks::{TASK_BYTES, TaskTable};
use crate::lane::tier::LaneTier;
use crate::lane::upkeep::{Clocks, NamespaceTable};
use crate::lane::wake::LaneWake;
use crate::registry::Registry;
use crate::tier::BlockStore;

/// Copy tasks between the lane and the copy threads.
const MAX_COPY_TASKS: usize = 1024;
/// How long a copy thread polls for work before it sleeps.
const COPY_SPIN: Duration = Duration::from_micros(20);
/// How long a session's own copy thread sleeps without work before it ends.
const CREW_IDLE: Duration = Duration::from_secs(10);

/// The lane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LaneStartError {
    /// Pool, catalog or index.
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// A descriptor or thread cannot be made.
    #[error("starting the lane: {0}")]
    System(#[from] io::Error),
    /// A descriptor cannot be made.
    #[error("starting the lane: {0}")]
    Errno(#[from] Errno),
    /// The SSD tier.
    #[error("SSD tier: {0}")]
    Ssd(#[from] pegaflow_ssd::OpenError),
}

/// Opens the tier below the pool, given the pool's memory and what wakes the lane.
pub type OpenStore = Box<
    dyn FnOnce(&PoolMemory, Arc<LaneWake>) -> Result<Box<dyn BlockStore>, pegaflow_ssd::OpenError>
        + Send,
>;

/// A running lane.
pub struct StartedLane {
    /// For commands.
    pub handle: LaneHandle,
    /// What it tells.
    pub events: UnboundedReceiver<LaneEvent>,
    /// Ends after [`crate::lane::api::LaneCommand::Stop`].
    pub thread: JoinHandle<()>,
}

/// Brings the cache up and starts the lane thread. `progress` is told the bytes of the pool that
/// are populated so far, from several threads.
///
/// # Errors
/// The pool does not fit, its files cannot be made, or a thread cannot be started.
pub fn start(
    options: LaneOptions,
    devices: &Devices,
    open_store: Option<OpenStore>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<StartedLane, LaneStartError> {
    let cpus = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let mut options = options;
    if cpus.get() == 1 && !options.spin.is_zero() {
        tracing::info!("one CPU: the lane sleeps at once, since clients run only when it does not");
        options.spin = Duration::ZERO;
    }
    let threads = NonZeroUsize::new(options.copy_threads).unwrap_or(NonZeroUsize::MIN);
    let opened = open_cache(&options, threads, progress)?;
    let wake = Arc::new(LaneWake::new()?);
    let copy_wake = wake.clone();
    let mut workers = CopyWorkers::start(
        CopyOptions {
            threads: threads.get(),
            crew_threads: threads.get(),
            crew_idle: CREW_IDLE,
            max_tasks: MAX_COPY_TASKS,
            spin: COPY_SPIN,
        },
        opened.pool_memory.clone(),
        move || copy_wake.wake_if_parked(),
    )?;
    workers.serve_devices(devices.clone(), opened.pool_memory.clone());
    // What a killed daemon's drives may still have been writing to has drained: their rings kept
    // the pool's lock, which is this daemon's by now.
    let store = match open_store {
        Some(open) => Some(open(&opened.pool_memory, wake.clone())?),
        None => None,
    };
    let parts = MachineParts::<RealMachine> {
        clock: SystemClock,
        workers,
        wake,
        store,
        crowded: cpus <= threads,
    };
    let BuiltLane {
        lane,
        handle,
        events,
    } = build(options, opened, parts)?;
    let thread = std::thread::Builder::new()
        .name("lane".into())
        .spawn(move || run(lane))?;
    Ok(StartedLane {
        handle,
        events,
        thread,
    })
}

/// The machine's side of a lane.
pub(super) struct MachineParts<M: Machine> {
    pub clock: M::Clock,
    pub workers: M::Copies,
    pub wake: Arc<LaneWake>,
    /// The tier below the pool.
    pub store: Option<Box<dyn BlockStore>>,
    /// There are no more CPUs than copy threads.
    pub crowded: bool,
}

/// A lane that nobody turns yet.
pub(super) struct BuiltLane<M: Machine> {
    pub lane: Lane<M>,
    pub handle: LaneHandle,
    pub events: UnboundedReceiver<LaneEvent>,
}

/// Puts a lane together over an opened cache.
pub(super) fn build<M: Machine>(
    options: LaneOptions,
    opened: OpenedCache,
    parts: MachineParts<M>,
) -> Result<BuiltLane<M>, LaneStartError> {
    let MachineParts {
        clock,
        workers,
        wake,
        store,
        crowded,
    } = parts;
    let tier_options = options.tier.unwrap_or_default();
    let tier = store.map(|store| {
        Box::new(LaneTier::new(
            store,
            tier_options,
            Sampler::new(options.checksum),
        ))
    });
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &epoll,
        wake.fd(),
        epoll::EventData::new_u64(LANE_WAKE),
        epoll::EventFlags::IN,
    )?;
    let node = options.node.clone();
    node.set(Gauge::PoolBytes, opened.cache.pool().pool_bytes());
    node.set(
        Gauge::PoolExtents,
        u64::from(opened.cache.pool().stats().extents),
    );
    node.set(Gauge::BlocksMax, u64::from(options.max_blocks));
    node.set(Gauge::CopyThreads, options.copy_threads.max(1) as u64);
    let mut tally = Tally::new();
    tally.add(
        pegaflow_shm::node::Counter::AdoptedBlocks,
        opened.adopted_blocks,
    );
    tally.add(
        pegaflow_shm::node::Counter::AdoptDiscarded,
        opened.discarded_pages,
    );
    let (command_sender, commands) = mpsc::channel();
    let (events, event_receiver) = unbounded_channel();
    let handle = LaneHandle::new(command_sender, wake.clone());
    let mut namespaces = NamespaceTable::default();
    for namespace in opened.cache.catalog().namespaces() {
        let domain = opened.cache.name_of_domain(DomainKey(namespace.domain_key));
        namespaces.note_adopted(&namespace, domain);
    }
    let mut lane: Lane<M> = Lane {
        cache: opened.cache,
        leases: LeaseTable::new(options.max_leases, &options.boot_id),
        registry: Registry::new(options.max_instances),
        sessions: Vec::new(),
        by_id: HashMap::new(),
        workers,
        task_bytes: TASK_BYTES,
        backlog: Backlog::new(options.copy_threads.max(1)),
        tasks: TaskTable::default(),
        tally,
        namespaces,
        clocks: Clocks::new(clock.now()),
        clock,
        commands,
        events,
        wake,
        epoll,
        draining: None,
        crowded,
        ended_long: false,
        suspect_gap: false,
        chunk: Vec::new(),
        blocks: Vec::new(),
        seen_blocks: SeenBlocks::default(),
        entry_lists: Vec::new(),
        page_lists: Vec::new(),
        sampler: Sampler::new(options.checksum),
        pages: Vec::new(),
        ended: Vec::new(),
        tier,
        missed: Vec::new(),
        node,
        options,
    };
    let now = lane.clock.now();
    lane.publish(now);
    Ok(BuiltLane {
        lane,
        handle,
        events: event_receiver,
    })
}

/// A lane that panics may have left private state half changed. Shared memory is consistent at
/// every instruction, so the daemon ends at once and the next one takes the sealed blocks over.
fn run(lane: Lane<RealMachine>) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| lane.run())).is_err() {
        tracing::error!("the lane panicked: the daemon aborts, its pool stays for the next one");
        std::process::abort();
    }
}
