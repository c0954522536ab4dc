//! Events that order the daemon's copies after the engine's work.
//!
//! Each device has a fixed number of them, made once and shared with each daemon once. A request
//! takes one, records it on the engine's stream before its submission is published, and gives it
//! back when it completes: until then the daemon may look at it, and would see a later recording.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::control::IpcHandle;

use super::device::Device;
use super::driver::{CudaError, Event, Stream};
use super::order::{Kind, Order};
use crate::Error;

/// Streams that pass events of the engine on. Several, so that one that never happens holds up few
/// others.
const RELAYS: usize = 4;

/// First and longest pause of a thread that waits for an event itself.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));

/// The events of one device.
#[derive(Debug)]
pub(crate) struct DeviceEvents {
    device: Arc<Device>,
    events: Vec<Event>,
    /// What the daemon opens them with; or why other processes cannot.
    shared: Result<Vec<IpcHandle>, CudaError>,
    free: Mutex<Vec<u32>>,
    relays: Vec<Stream>,
    next_relay: AtomicU32,
    /// Number of the session whose daemon has them.
    told: AtomicU64,
    /// Number of the session whose daemon could not open them.
    refused: AtomicU64,
    /// It was said that they cannot be shared.
    was_said: AtomicBool,
}

/// One event of a device, recorded; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct EventSlot {
    events: Arc<DeviceEvents>,
    index: u32,
}

impl DeviceEvents {
    /// Makes `count` events, shareable ones where the driver can.
    pub(super) fn create(device: Arc<Device>, count: u32) -> Result<DeviceEvents, CudaError> {
        let entered = device.enter()?;
        let mut made = DeviceEvents {
            device: device.clone(),
            events: Vec::with_capacity(count as usize),
            shared: Ok(Vec::with_capacity(count as usize)),
            free: Mutex::new((0..count).rev().collect()),
            relays: Vec::with_capacity(RELAYS),
            next_relay: AtomicU32::new(0),
            told: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            was_said: AtomicBool::new(false),
        };
        let driver = device.driver;
        for _ in 0..count {
            made.add_event()?;
        }
        for _ in 0..RELAYS {
            made.relays.push(driver.create_stream()?);
        }
        drop(entered);
        Ok(made)
    }

    fn add_event(&mut self) -> Result<(), CudaError> {
        let driver = self.device.driver;
        if let Ok(handles) = &mut self.shared {
            match driver.create_event(true) {
                Ok(event) => {
                    self.events.push(event);
                    match driver.event_handle(event) {
                        Ok(handle) => handles.push(handle),
                        Err(error) => self.shared = Err(error),
                    }
                    return Ok(());
                }
                Err(error) => self.shared = Err(error),
            }
        }
        self.events.push(driver.create_event(false)?);
        Ok(())
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What the daemon opens them with, in their order; or why no other process can.
    pub(crate) fn handles(&self) -> Result<&[IpcHandle], &CudaError> {
        self.shared.as_deref()
    }

    /// True once: that they cannot be shared has to be said.
    pub(crate) fn is_news(&self) -> bool {
        !self.was_said.swap(true, Ordering::Relaxed)
    }

    /// Whether this session's daemon has them.
    pub(crate) fn is_told(&self, session: u64) -> bool {
        self.told.load(Ordering::Relaxed) == session
    }

    /// Whether this session's daemon has been asked to open them and could not.
    pub(crate) fn is_refused(&self, session: u64) -> bool {
        self.refused.load(Ordering::Relaxed) == session
    }

    /// This session's daemon has them, or could not open them.
    pub(crate) fn set_told(&self, session: u64, accepted: bool) {
        let (told, refused) = if accepted { (session, 0) } else { (0, session) };
        self.told.store(told, Ordering::Relaxed);
        self.refused.store(refused, Ordering::Relaxed);
    }

    /// No daemon has them any more.
    pub(crate) fn forget(&self) {
        self.told.store(0, Ordering::Relaxed);
        self.refused.store(0, Ordering::Relaxed);
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event and records it after what `order` names. `None` if nothing is pending.
    ///
    /// # Errors
    /// [`Error::Again`] when all are in use, a stream under capture, or a failure of the driver.
    pub(crate) fn record(self: &Arc<Self>, order: Order) -> Result<Option<EventSlot>, Error> {
        if !order.is_some() {
            return Ok(None);
        }
        let index = self.free().pop().ok_or(Error::Again("list of events"))?;
        let slot = EventSlot {
            events: self.clone(),
            index,
        };
        match order.0 {
            Kind::None => {}
            Kind::Stream(stream) => self.after_stream(slot.event(), stream)?,
            Kind::Event(event) => {
                let _entered = self.device.enter()?;
                self.relay(slot.event(), event)?;
            }
        }
        Ok(Some(slot))
    }

    fn after_stream(&self, event: Event, stream: Stream) -> Result<(), Error> {
        let driver = self.device.driver;
        let own = driver.context_for(stream)?;
        let context = own.unwrap_or(self.device.context());
        let entered = driver.enter(Some(context))?;
        if driver.is_capturing(stream)? {
            let value = format!("{:p}", stream.0);
            let way_out = "the stream is being captured into a graph: save and load outside of it";
            return Err(Error::argument("order", value, way_out));
        }
        if context == self.device.context() {
            return Ok(driver.record(event, stream)?);
        }
        // An event is recorded in its own context only: one of the stream's passes it on.
        let passing = driver.create_event(false)?;
        let recorded = driver.record(passing, stream);
        drop(entered);
        let relayed = recorded.and_then(|()| {
            let _entered = self.device.enter()?;
            self.relay(event, passing)
        });
        let _entered = driver.enter(Some(context))?;
        // The driver keeps it until it has happened.
        driver.destroy_event(passing)?;
        Ok(relayed?)
    }

    /// Records `event` after another one.
    fn relay(&self, event: Event, after: Event) -> Result<(), CudaError> {
        let next = self.next_relay.fetch_add(1, Ordering::Relaxed) as usize;
        let relay = self.relays[next % self.relays.len()];
        self.device.driver.make_wait(relay, after)?;
        self.device.driver.record(event, relay)
    }
}

impl Drop for DeviceEvents {
    fn drop(&mut self) {
        let driver = self.device.driver;
        // A driver that is shutting down has ended them already.
        let Ok(_entered) = self.device.enter() else {
            return;
        };
        for stream in self.relays.drain(..) {
            let _ = driver.destroy_stream(stream);
        }
        for event in self.events.drain(..) {
            let _ = driver.destroy_event(event);
        }
    }
}

impl EventSlot {
    fn event(&self) -> Event {
        self.events.events[self.index as usize]
    }

    /// Its place in the list that the daemon has.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Whether this session's daemon can look at it.
    pub(crate) fn is_shared_with(&self, session: u64) -> bool {
        self.events.is_told(session)
    }

    /// Waits here until it has happened.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `bound`, or a failure of the engine's work.
    pub(crate) fn wait(&self, bound: Duration) -> Result<(), Error> {
        let (mut pause, longest) = PAUSES;
        let deadline = Instant::now() + bound;
        loop {
            let happened = {
                let _entered = self.events.device.enter()?;
                self.events.device.driver.has_happened(self.event())?
            };
            if happened {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: "the engine's stream or event (this call waits for it itself)",
                    bound,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
    }
}

impl Drop for EventSlot {
    fn drop(&mut self) {
        self.events.free().push(self.index);
    }
}
