//! GPU memory of the engine: found out by its address, shared with the daemon, ordered by events.
//!
//! Nothing here loads the CUDA driver or makes a context where the engine has not: a process
//! without GPU never hears of it. Each call of the driver runs in the context that the memory
//! belongs to, and leaves the calling thread's own as it was.
//!
//! | file | what it does |
//! | --- | --- |
//! | `driver` | the driver's functions, looked up in the library that the process has loaded |
//! | `device` | a GPU and the context that the engine uses it with |
//! | `locate` | what kind of memory an address is |
//! | `region` | allocations as the daemon gets them: one region each |
//! | `events` | interprocess events, recorded on the engine's streams |
//! | `order` | what a save or load comes after |
//! | `signals` | words that a load raises as it comes in, for which streams wait |

mod device;
mod driver;
mod events;
mod locate;
mod order;
mod region;
mod signals;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire_tests;

pub use driver::CudaError;
pub use order::Order;

pub(crate) use device::Device;
pub(crate) use events::{DeviceEvents, EventSlot};
pub(crate) use locate::{Location, Place, Span};
pub(crate) use region::DeviceRegion;
pub(crate) use signals::{LOAD_WAIT_BOUND, SignalSlot, Signals};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use driver::{Driver, NoDriver};

use crate::Error;

/// What a client knows of the GPUs of its process.
#[derive(Debug, Default)]
pub(crate) struct Cuda {
    known: Mutex<Known>,
    /// Takes the place of the process's driver.
    #[cfg(test)]
    fake: std::sync::OnceLock<Driver>,
}

#[derive(Debug, Default)]
struct Known {
    devices: Vec<Weak<Device>>,
    regions: Vec<Weak<DeviceRegion>>,
    events: Vec<Weak<DeviceEvents>>,
    /// Kept as long as the client: a load's word may be the last that holds them, where the client
    /// is locked.
    signals: Option<Arc<Signals>>,
    /// It was said why loads come whole that were to come in steps.
    whole_loads_said: bool,
}

/// Device memory of one registration, and what orders its copies.
#[derive(Clone, Debug)]
pub(crate) struct DeviceUse {
    pub(crate) regions: Vec<Arc<DeviceRegion>>,
    pub(crate) events: Arc<DeviceEvents>,
    /// What its loads raise; or why there is nothing that a stream could wait for.
    pub(crate) signals: Result<Arc<Signals>, Arc<str>>,
}

impl Cuda {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the fake for the process's driver.
    #[cfg(test)]
    pub(crate) fn use_fake(&self) {
        self.fake.get_or_init(fake::driver);
    }

    fn driver(&self) -> Result<Driver, NoDriver> {
        #[cfg(test)]
        if let Some(fake) = self.fake.get() {
            return Ok(*fake);
        }
        Driver::of_process()
    }

    /// What kind of memory an address is.
    pub(crate) fn locate(&self, address: u64) -> Result<Location, Error> {
        let driver = match self.driver() {
            Ok(driver) => driver,
            Err(NoDriver::NotLoaded) => return Ok(Location::Process),
            Err(error @ NoDriver::TooOld(_)) => return Err(Error::Driver(error.to_string())),
        };
        locate::locate(driver, address)
    }

    /// True once: that loads come whole has to be said.
    pub(crate) fn is_news_of_whole_loads(&self) -> bool {
        !std::mem::replace(&mut self.known().whole_loads_said, true)
    }

    /// The client's signals, if there are any.
    pub(crate) fn signals(&self) -> Option<Arc<Signals>> {
        self.known().signals.clone()
    }

    /// Finds or makes the client's signals, in memory that `allocate` shares with the daemon.
    ///
    /// # Errors
    /// That fails, or the driver refuses the memory.
    pub(crate) fn share_signals(
        &self,
        events: &DeviceEvents,
        allocate: impl FnOnce(usize) -> Result<crate::memory::HostMemory, Error>,
    ) -> Result<Arc<Signals>, Error> {
        if let Some(known) = self.signals() {
            return Ok(known);
        }
        events.device().driver.check_words()?;
        // Without the lock: the daemon is asked. Of two threads that make some, one's serve.
        let made = Signals::new(allocate(Signals::BYTES)?, events.device().clone())?;
        let made = Arc::new(made);
        Ok(self.known().signals.get_or_insert(made).clone())
    }

    /// Finds or makes the regions that these spans of device memory lie in, and the events of their
    /// device. Returns the regions in the order of the spans, one for each.
    ///
    /// # Errors
    /// Memory that cannot be shared, spans of several devices, or a failure of the driver.
    pub(crate) fn share(
        &self,
        spans: &[Span],
        owner: &Weak<crate::client::Shared>,
        events: u32,
        mut next_region: impl FnMut() -> u32,
    ) -> Result<(Vec<Arc<DeviceRegion>>, Arc<DeviceEvents>), Error> {
        let driver = self
            .driver()
            .map_err(|error| Error::Driver(error.to_string()))?;
        // Held throughout, so that two registrations of one allocation share one region.
        let mut known = self.known();
        let device = device::common(driver, spans, &mut known.devices)?;
        known.regions.retain(|region| region.strong_count() > 0);
        let held: Vec<Arc<DeviceRegion>> = known.regions.iter().filter_map(Weak::upgrade).collect();
        let made = region::share(&device, spans, held, |shape| {
            DeviceRegion::new(next_region(), device.clone(), shape, owner.clone())
        })?;
        for region in &made {
            let region = Arc::downgrade(region);
            if !known.regions.iter().any(|known| known.ptr_eq(&region)) {
                known.regions.push(region);
            }
        }
        known.events.retain(|events| events.strong_count() > 0);
        let mut all = known.events.iter().filter_map(Weak::upgrade);
        let events = match all.find(|events| Arc::ptr_eq(events.device(), &device)) {
            Some(events) => events,
            None => {
                let made = Arc::new(DeviceEvents::create(device, events)?);
                known.events.push(Arc::downgrade(&made));
                made
            }
        };
        Ok((made, events))
    }
}
