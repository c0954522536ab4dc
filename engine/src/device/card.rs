//! One device: its context while there is one, what is mapped in it, and who closes that.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use pegaflow_shm::control::DeviceUuid;
use pegaflow_shm::node::{DeviceRow, text_field};
use tokio::sync::mpsc::UnboundedSender;

use crate::copy::{CopyError, CopyTask, Direction, PoolMemory, Results, StuckCopies};

use super::counters::CardCounters;
use super::driver::{ChunkError, Context, DevicePtr, Driver, Event};
use super::error::{DeviceError, DriverError};
use super::events::DeviceEvents;
use super::flights::Flights;
use super::inbox::Inbox;
use super::info::DeviceInfo;
use super::options::DeviceOptions;
use super::pin::Pinning;
use super::region::{DeviceRegion, Mapping, ShareHandle};
use super::thread;

/// What the sessions that have memory on a device must be told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceNews {
    /// All that is mapped there is void: copies fail, registrations end.
    Down { device: DeviceUuid, message: String },
    /// It can be used again, from nothing.
    Up { device: DeviceUuid },
}

/// What is left of a region or of events once nobody uses them.
#[derive(Debug)]
pub(super) enum Leftover {
    Memory { base: DevicePtr, mapping: Mapping },
    Events(Vec<Event>),
}

/// How long copies of other devices may take to end before memory is unpinned: the longest chunk,
/// many times.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Whether the device can be used.
enum Life {
    /// Nobody has needed it yet.
    Unused,
    Open(Arc<dyn Context>),
    Down {
        reason: String,
    },
}

/// A device of the daemon.
pub(crate) struct Card {
    info: DeviceInfo,
    /// Its place among the daemon's devices.
    number: usize,
    driver: Arc<dyn Driver>,
    options: DeviceOptions,
    /// Written to by whoever opens or resets the context, read by whoever makes calls in it that
    /// must not meet a reset.
    life: RwLock<Life>,
    /// Counts contexts: what was made in an earlier one is void. Changes only under `life`.
    generation: AtomicUsize,
    /// IPC allocations that are mapped, so that each is mapped once.
    imports: Mutex<HashMap<[u8; 64], Weak<DeviceRegion>>>,
    /// Regions alive.
    regions: AtomicUsize,
    closer: Mutex<Option<mpsc::Sender<(u64, Leftover)>>>,
    news: UnboundedSender<DeviceNews>,
    /// Where copies come from and go to; set once the pool is there.
    place: OnceLock<Arc<Workplace>>,
    counters: CardCounters,
    thread: Mutex<Option<JoinHandle<()>>>,
    inbox: Inbox,
    /// Sessions that wait for an event that does not happen, as of the last look.
    stuck: Mutex<Vec<StuckCopies>>,
}

/// What the threads of all devices share.
pub(crate) struct Workplace {
    pub(crate) pool: PoolMemory,
    pub(crate) pins: Arc<Pinning>,
    pub(crate) results: Arc<Results>,
    pub(crate) flights: Flights,
}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Card({})", self.info.uuid)
    }
}

impl Card {
    pub(super) fn new(
        (number, info): (usize, DeviceInfo),
        driver: Arc<dyn Driver>,
        options: DeviceOptions,
        news: UnboundedSender<DeviceNews>,
    ) -> Arc<Card> {
        Arc::new(Card {
            info,
            number,
            driver,
            options,
            life: RwLock::new(Life::Unused),
            generation: AtomicUsize::new(0),
            imports: Mutex::default(),
            regions: AtomicUsize::new(0),
            closer: Mutex::default(),
            news,
            place: OnceLock::new(),
            counters: CardCounters::default(),
            thread: Mutex::default(),
            inbox: Inbox::default(),
            stuck: Mutex::default(),
        })
    }

    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Its place among the daemon's devices.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    pub(super) fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// Number of the context that lives now; what has another one is void.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire) as u64
    }

    /// Regions that are alive, those of earlier contexts included.
    pub(crate) fn regions(&self) -> usize {
        self.regions.load(Ordering::Relaxed)
    }

    pub(super) fn count_region(&self, joins: bool) {
        if joins {
            self.regions.fetch_add(1, Ordering::Relaxed);
        } else {
            self.regions.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Opens the context if there is none yet.
    fn open(self: &Arc<Self>) -> Result<(), DeviceError> {
        let device = self.info.uuid;
        let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
        match &*life {
            Life::Open(_) => return Ok(()),
            Life::Down { reason } => {
                let reason = reason.clone();
                return Err(DeviceError::Down { device, reason });
            }
            Life::Unused => {}
        }
        let context = self.driver.open(self.info.ordinal);
        let context = context.map_err(|source| DeviceError::Driver {
            device,
            what: "opening a context",
            source,
            way_out: "is its memory used up, or is it in exclusive mode?",
        })?;
        self.start_closer()?;
        self.generation.fetch_add(1, Ordering::Release);
        let (name, ordinal) = (&self.info.name, self.info.ordinal);
        if let Ok((free, total)) = context.memory() {
            tracing::info!(%device, ordinal, name, free, total, "GPU context opened");
        }
        *life = Life::Open(context);
        drop(life);
        self.start_thread()?;
        self.pin_pool();
        Ok(())
    }

    /// Has the pool pinned, now that there is a context.
    fn pin_pool(self: &Arc<Self>) {
        if let Some(place) = self.place.get() {
            place.pins.context_opened(self);
        }
    }

    pub(super) fn counters(&self) -> &CardCounters {
        &self.counters
    }

    /// What it is and has done. Its state is that of the last look while it is changing.
    pub(super) fn row(&self) -> DeviceRow {
        let state = match self.life.try_read().as_deref() {
            Ok(Life::Unused) => 0,
            Ok(Life::Open(_)) => 1,
            // Who writes brings it up or down.
            Ok(Life::Down { .. }) | Err(_) => 2,
        };
        let figures = self.counters.read();
        DeviceRow {
            used: 1,
            state,
            ordinal: self.info.ordinal,
            regions: self.regions() as u32,
            saved_bytes: figures.saved_bytes,
            loaded_bytes: figures.loaded_bytes,
            save_busy_nanos: figures.save_busy_nanos,
            load_busy_nanos: figures.load_busy_nanos,
            direct_bytes: figures.direct_bytes,
            staged_bytes: figures.staged_bytes,
            bounced_bytes: figures.bounced_bytes,
            tasks: figures.tasks,
            staging_bytes: figures.staging_bytes,
            downs: figures.downs,
            uuid: text_field(&self.info.uuid.to_string()),
            name: text_field(&self.info.name),
        }
    }

    /// Bytes of the pool that are pinned.
    pub(super) fn pinned_bytes(&self) -> u64 {
        let place = self.place.get();
        place.map_or(0, |place| place.pins.map().pinned_bytes())
    }

    /// Says where copies come from and go to.
    pub(super) fn serve(&self, place: Arc<Workplace>) {
        if self.place.set(place).is_err() {
            tracing::error!(device = %self.info.uuid, "a device serves one pool only");
        }
    }

    /// Starts the copy thread in an open context, unless it runs or has nothing to serve yet.
    fn start_thread(self: &Arc<Self>) -> Result<(), DeviceError> {
        let mut thread = lock(&self.thread);
        let (Some(place), None) = (self.place.get().cloned(), &*thread) else {
            return Ok(());
        };
        let life = self.life.read().unwrap_or_else(PoisonError::into_inner);
        let Life::Open(context) = &*life else {
            return Ok(());
        };
        let opened = (context.clone(), self.generation());
        drop(life);
        let card = self.clone();
        let started = Builder::new()
            .name(format!("gpu{}-copy", self.info.ordinal))
            .spawn(move || thread::run(&card, &place, opened));
        *thread = Some(started.map_err(|error| DeviceError::Thread {
            device: self.info.uuid,
            reason: error.to_string(),
        })?);
        Ok(())
    }

    /// Queues a task whose target lies on this device, or gives it back: then no thread serves it.
    pub(crate) fn submit(self: &Arc<Self>, task: CopyTask) -> Result<(), CopyTask> {
        if lock(&self.thread).is_none() {
            if let Err(error) = self.start_thread() {
                tracing::error!(%error, "copies of a GPU's memory fail");
            }
            if lock(&self.thread).is_none() {
                return Err(task);
            }
        }
        self.counters.task_in();
        self.inbox.push(task);
        Ok(())
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Lets the thread end when its tasks have, those that wait for events at once.
    pub(crate) fn stop(&self) {
        self.inbox.stop();
    }

    /// Waits until the thread has ended; false when it has not by `deadline`.
    pub(crate) fn ended_by(&self, deadline: Instant) -> bool {
        const PAUSE: Duration = Duration::from_millis(1);
        let Some(thread) = lock(&self.thread).take() else {
            return true;
        };
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        // It ends the process where it panics.
        thread.join().is_ok()
    }

    pub(super) fn note_stuck(&self, found: Vec<StuckCopies>) {
        *lock(&self.stuck) = found;
    }

    /// Sessions whose copies wait for an event that does not happen.
    pub(crate) fn stuck(&self) -> Vec<StuckCopies> {
        lock(&self.stuck).clone()
    }

    pub(super) fn copy_error(&self, direction: Direction, error: DriverError) -> CopyError {
        CopyError::Device {
            device: self.info.uuid,
            direction,
            error,
        }
    }

    /// The device has failed: tells the sessions, and ends the context. When it returns nothing
    /// that was started in the context touches any memory.
    pub(super) fn go_down(&self, context: &dyn Context, error: DriverError) {
        let device = self.info.uuid;
        let reason = error.to_string();
        tracing::error!(%device, reason, "GPU down: its sessions are told, others go on");
        let message = format!("GPU {device} failed: {reason}");
        // Nobody listens when the daemon stops.
        let _ = self.news.send(DeviceNews::Down { device, message });
        let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
        *life = Life::Down { reason };
        self.counters.went_down();
        let place = self.place.get();
        // The context's end unpins what it has pinned for all: not under another device's copies.
        if let Some(place) = place
            && place.pins.withdraw(self.info.ordinal)
            && !place.flights.drained(self.number, DRAIN_LIMIT)
        {
            tracing::error!(%device, "another GPU does not end its copies: they may go astray");
        }
        if let Err(error) = context.reset() {
            tracing::warn!(%device, %error, "ending the failed context");
        }
        if let Some(place) = place {
            place.flights.end_all(self.number);
        }
    }

    /// A new context after a fault. The device is up once [`Card::come_up`] is called.
    pub(super) fn reopen(self: &Arc<Self>) -> Result<(Arc<dyn Context>, u64), DriverError> {
        let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
        let context = self.driver.open(self.info.ordinal)?;
        let generation = self.generation.fetch_add(1, Ordering::Release) as u64 + 1;
        *life = Life::Open(context.clone());
        drop(life);
        self.pin_pool();
        Ok((context, generation))
    }

    /// The thread serves the context with this number.
    pub(super) fn come_up(&self, generation: u64) {
        if generation > 1 {
            let device = self.info.uuid;
            tracing::info!(%device, generation, "GPU up again");
            let _ = self.news.send(DeviceNews::Up { device });
        }
    }

    /// Makes calls in the context, bound to this thread, which is not reset meanwhile.
    pub(super) fn with_context<T>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<dyn Context>) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        loop {
            let life = self.life.read().unwrap_or_else(PoisonError::into_inner);
            match &*life {
                Life::Open(context) => {
                    let bound = context.bind();
                    let done = bound.map_err(|e| self.failed("binding the context", e));
                    let done = done.and_then(|()| work(context));
                    if let Err(DeviceError::Driver { source, .. }) = &done {
                        self.suspect(&**context, *source);
                    }
                    return done;
                }
                Life::Down { reason } => {
                    let (device, reason) = (self.info.uuid, reason.clone());
                    return Err(DeviceError::Down { device, reason });
                }
                Life::Unused => {}
            }
            drop(life);
            self.open()?;
        }
    }

    /// A call in the context has failed, perhaps because of what a client gave: has the device's
    /// thread begin anew if a call that depends on nobody fails as well.
    fn suspect(&self, context: &dyn Context, error: DriverError) {
        if error.is_sticky() && context.memory().is_err_and(|error| error.is_sticky()) {
            self.inbox.report(self.generation(), error);
        }
    }

    fn failed(&self, what: &'static str, source: DriverError) -> DeviceError {
        DeviceError::Driver {
            device: self.info.uuid,
            what,
            source,
            way_out: "see `pegactl doctor`",
        }
    }

    pub(super) fn import(
        self: &Arc<Self>,
        bytes: u64,
        handle: ShareHandle,
    ) -> Result<Arc<DeviceRegion>, DeviceError> {
        if bytes == 0 {
            let device = self.info.uuid;
            return Err(DeviceError::Empty { device });
        }
        match handle {
            ShareHandle::Ipc(handle) => self.import_ipc(bytes, &handle),
            ShareHandle::Vmm(chunks) => self.import_chunks(bytes, &chunks),
        }
    }

    fn import_ipc(
        self: &Arc<Self>,
        asked_bytes: u64,
        handle: &[u8; 64],
    ) -> Result<Arc<DeviceRegion>, DeviceError> {
        let device = self.info.uuid;
        // One at a time, so that two sessions with the same allocation find each other's.
        let mut imports = lock(&self.imports);
        let known = imports.get(handle).and_then(Weak::upgrade);
        let region = match known.filter(|region| region.generation() == self.generation()) {
            Some(region) => region,
            None => {
                let region = self.with_context(|context| {
                    let base = context.open_memory(handle).map_err(|source| {
                        DeviceError::Driver {
                            device,
                            what: "opening an allocation of another process",
                            source,
                            way_out: "share plain cuMemAlloc memory of a live process in the same \
                                      IPC namespace (containers: --ipc=host), of this device",
                        }
                    })?;
                    let checked = self.check_import(&**context, base);
                    if checked.is_err()
                        && let Err(error) = context.close_memory(base)
                    {
                        tracing::warn!(%device, %error, "an allocation stays mapped");
                    }
                    let (card, generation) = (self.clone(), self.generation());
                    let range = (base, checked?);
                    let region = DeviceRegion::new(card, generation, range, Mapping::Ipc);
                    Ok(Arc::new(region))
                })?;
                imports.retain(|_, region| region.strong_count() > 0);
                imports.insert(*handle, Arc::downgrade(&region));
                region
            }
        };
        drop(imports);
        if asked_bytes > region.bytes() {
            return Err(DeviceError::TooLarge {
                device,
                asked_bytes,
                bytes: region.bytes(),
            });
        }
        Ok(region)
    }

    /// The size of an allocation that was mapped, if it lies on this device.
    fn check_import(&self, context: &dyn Context, base: DevicePtr) -> Result<u64, DeviceError> {
        let actual = context.device_of(base);
        let actual = actual.map_err(|e| self.failed("finding an allocation's device", e))?;
        if actual != self.info.ordinal {
            return Err(DeviceError::WrongDevice {
                device: self.info.uuid,
                actual: format!("ordinal {actual}"),
            });
        }
        let bytes = context.allocation_bytes(base);
        bytes.map_err(|e| self.failed("finding an allocation's size", e))
    }

    fn import_chunks(
        self: &Arc<Self>,
        asked_bytes: u64,
        chunks: &[(std::os::fd::OwnedFd, u64)],
    ) -> Result<Arc<DeviceRegion>, DeviceError> {
        let device = self.info.uuid;
        let sizes: Vec<u64> = chunks.iter().map(|(_, bytes)| *bytes).collect();
        let sum = sizes
            .iter()
            .try_fold(0u64, |sum, bytes| sum.checked_add(*bytes));
        let chunk_bytes = sum.unwrap_or(u64::MAX);
        if chunk_bytes != asked_bytes {
            return Err(DeviceError::ChunkSizes {
                device,
                chunk_bytes,
                asked_bytes,
            });
        }
        self.with_context(|context| {
            let base = context.map_chunks(chunks).map_err(|error| match error {
                ChunkError::Driver(source) => DeviceError::Driver {
                    device,
                    what: "mapping physical allocations of another process",
                    source,
                    way_out: "export them as POSIX descriptors, with the sizes they were made with",
                },
                ChunkError::OtherDevice(ordinal) => DeviceError::WrongDevice {
                    device,
                    actual: format!("ordinal {ordinal}"),
                },
            })?;
            let range = (base, chunk_bytes);
            let (card, generation) = (self.clone(), self.generation());
            let region = DeviceRegion::new(card, generation, range, Mapping::Vmm(sizes));
            Ok(Arc::new(region))
        })
    }

    pub(super) fn import_events(
        self: &Arc<Self>,
        handles: &[[u8; 64]],
    ) -> Result<Arc<DeviceEvents>, DeviceError> {
        let events = self.with_context(|_| {
            let events = DeviceEvents::new(self.clone(), self.generation());
            Ok(Arc::new(events))
        })?;
        self.append_events(&events, handles)?;
        Ok(events)
    }

    pub(super) fn append_events(
        self: &Arc<Self>,
        events: &DeviceEvents,
        handles: &[[u8; 64]],
    ) -> Result<(), DeviceError> {
        let device = self.info.uuid;
        self.with_context(|context| {
            if events.generation() != self.generation() {
                let reason = "its context was made anew since the first events came".into();
                return Err(DeviceError::Down { device, reason });
            }
            let mut opened = Vec::with_capacity(handles.len());
            for handle in handles {
                match context.open_event(handle) {
                    Ok(event) => opened.push(event),
                    Err(source) => {
                        self.leave(self.generation(), Leftover::Events(opened));
                        return Err(DeviceError::Driver {
                            device,
                            what: "opening an event of another process",
                            source,
                            way_out: "make it with interprocess and disable-timing flags on this \
                                      device, or let the client wait for its stream itself",
                        });
                    }
                }
            }
            events.append(opened);
            Ok(())
        })
    }

    /// Hands over what nobody uses any more. Never blocks: the driver may take its time with it.
    pub(super) fn leave(&self, generation: u64, leftover: Leftover) {
        if let Some(closer) = &*lock(&self.closer) {
            // It ends only with the process.
            let _ = closer.send((generation, leftover));
        }
    }

    fn start_closer(self: &Arc<Self>) -> Result<(), DeviceError> {
        let mut closer = lock(&self.closer);
        if closer.is_some() {
            return Ok(());
        }
        let (sender, leftovers) = mpsc::channel();
        let card = Arc::downgrade(self);
        let started = Builder::new()
            .name(format!("gpu{}-close", self.info.ordinal))
            .spawn(move || close_all(&card, &leftovers));
        started.map_err(|error| DeviceError::Thread {
            device: self.info.uuid,
            reason: error.to_string(),
        })?;
        *closer = Some(sender);
        Ok(())
    }

    fn close(&self, generation: u64, leftover: Leftover) {
        let life = self.life.read().unwrap_or_else(PoisonError::into_inner);
        let Life::Open(context) = &*life else {
            return;
        };
        if generation != self.generation() {
            return;
        }
        let closed = context.bind().and_then(|()| match leftover {
            Leftover::Memory {
                base,
                mapping: Mapping::Ipc,
            } => context.close_memory(base),
            Leftover::Memory {
                base,
                mapping: Mapping::Vmm(chunks),
            } => context.unmap_chunks(base, &chunks),
            Leftover::Events(events) => events
                .into_iter()
                .try_for_each(|event| context.destroy_event(event)),
        });
        if let Err(error) = closed {
            tracing::warn!(device = %self.info.uuid, %error, "a client's GPU memory stays mapped");
            // What is mapped keeps its memory from everybody; only the context's end lets go of it.
            if error.is_sticky() {
                self.inbox.report(generation, error);
            }
        }
    }
}

#[cfg(test)]
impl Card {
    /// The context that is open.
    pub(super) fn opened_for_tests(&self) -> (Arc<dyn Context>, u64) {
        match &*self.life.read().unwrap_or_else(PoisonError::into_inner) {
            Life::Open(context) => (context.clone(), self.generation()),
            _ => panic!("no context is open"),
        }
    }
}

/// The closing thread: undoes imports until the device is gone.
fn close_all(card: &Weak<Card>, leftovers: &mpsc::Receiver<(u64, Leftover)>) {
    while let Ok((generation, leftover)) = leftovers.recv() {
        let Some(card) = card.upgrade() else {
            return;
        };
        card.close(generation, leftover);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
