//! All GPUs of the daemon.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use pegaflow_shm::control::DeviceUuid;
use pegaflow_shm::node::DeviceRow;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::copy::{PoolMemory, Results};

use super::card::{Card, DeviceNews, Workplace};
use super::cuda::{Cuda, version_text};
use super::driver::Driver;
use super::error::DeviceError;
use super::events::DeviceEvents;
use super::flights::Flights;
use super::info::{DeviceInfo, DeviceState};
use super::options::{DeviceChoice, DeviceOptions, PinMode};
use super::pin::{Pinning, RANGE_BYTES};
use super::region::{DeviceRegion, ShareHandle};

/// The GPUs, or the reason why there are none. A handle: clones name the same.
#[derive(Clone)]
pub struct Devices {
    inner: Arc<Inner>,
}

struct Inner {
    state: DeviceState,
    cards: Vec<Arc<Card>>,
    news: Mutex<Option<UnboundedReceiver<DeviceNews>>>,
    pin: PinMode,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Devices").field(&self.inner.state).finish()
    }
}

impl Devices {
    /// No GPUs.
    pub fn none() -> Devices {
        Devices::absent("GPUs are not used here".into())
    }

    fn absent(reason: String) -> Devices {
        Devices {
            inner: Arc::new(Inner {
                state: DeviceState::Absent { reason },
                cards: Vec::new(),
                news: Mutex::default(),
                pin: PinMode::Off,
            }),
        }
    }

    /// Loads the driver and looks at its devices; [`Devices::state`] says what was found. No
    /// context is opened and no GPU memory used before the first import.
    pub fn open(options: DeviceOptions) -> Devices {
        if options.choice == DeviceChoice::Off {
            return Devices::absent("they are switched off by the configuration".into());
        }
        match Cuda::load() {
            Ok(driver) => Devices::with_driver(Arc::new(driver), options),
            Err(error) => Devices::absent(error.to_string()),
        }
    }

    pub(super) fn with_driver(driver: Arc<dyn Driver>, options: DeviceOptions) -> Devices {
        let found = match driver.devices() {
            Ok(found) if found.is_empty() => {
                let reason = "the driver shows no device: `nvidia-smi -L` must list one; in a \
                              container, give it GPUs (--gpus all)";
                return Devices::absent(reason.into());
            }
            Ok(found) => found,
            Err(error) => return Devices::absent(format!("the driver cannot be asked: {error}")),
        };
        let found = match choose(found, &options.choice) {
            Ok(found) => found,
            Err(error) => return Devices::absent(error.to_string()),
        };
        for info in found.iter().filter(|info| info.is_emulated()) {
            tracing::warn!(
                name = info.name,
                "an emulated GPU: a driver for tests is loaded"
            );
        }
        let (sender, news) = unbounded_channel();
        let cards = found
            .iter()
            .enumerate()
            .map(|(number, info)| {
                Card::new(
                    (number, info.clone()),
                    driver.clone(),
                    options.clone(),
                    sender.clone(),
                )
            })
            .collect();
        Devices {
            inner: Arc::new(Inner {
                state: DeviceState::Present {
                    driver: version_text(driver.version()),
                    devices: found,
                },
                cards,
                news: Mutex::new(Some(news)),
                pin: options.pin,
            }),
        }
    }

    /// What was found.
    pub fn state(&self) -> DeviceState {
        self.inner.state.clone()
    }

    /// What befalls the devices from now on, for one listener: `None` for the second, and without
    /// devices.
    pub(crate) fn take_news(&self) -> Option<UnboundedReceiver<DeviceNews>> {
        let mut news = self
            .inner
            .news
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        news.take()
    }

    /// Says between which memory and the devices copies go, and who is told when they are done.
    /// Once, before the first task. With [`PinMode::Start`] the pool is pinned before it returns.
    pub(crate) fn serve(&self, pool: PoolMemory, results: Arc<Results>) {
        let pins = Pinning::new(pool.clone(), RANGE_BYTES, self.inner.pin);
        let place = Arc::new(Workplace {
            pool,
            pins,
            results,
            flights: Flights::new(self.cards().len()),
        });
        for card in self.cards() {
            card.serve(place.clone());
        }
        if self.inner.pin == PinMode::Start {
            // One pins for all; another is asked only where a device permits nothing.
            self.cards().iter().any(|card| place.pins.pin_now(card));
        }
    }

    /// A row of the node file for each device.
    pub fn rows(&self) -> Vec<DeviceRow> {
        self.cards().iter().map(|card| card.row()).collect()
    }

    /// Bytes of the pool that are pinned for the devices.
    pub fn pinned_bytes(&self) -> u64 {
        self.cards().first().map_or(0, |card| card.pinned_bytes())
    }

    pub(crate) fn cards(&self) -> &[Arc<Card>] {
        &self.inner.cards
    }

    fn card(&self, device: DeviceUuid) -> Result<&Arc<Card>, DeviceError> {
        if let DeviceState::Absent { reason } = &self.inner.state {
            let reason = reason.clone();
            return Err(DeviceError::Absent { reason });
        }
        let found = self.cards().iter().find(|card| card.info().uuid == device);
        found.ok_or_else(|| {
            let known = self.cards().iter();
            let known: Vec<String> = known.map(|card| card.info().uuid.to_string()).collect();
            let known = known.join(", ");
            DeviceError::UnknownDevice { device, known }
        })
    }

    /// Maps an allocation of another process. Of an IPC handle, `bytes` is what the client wants of
    /// it; the region is all of it. Blocks, for 0.3 s where it is the first on its device.
    ///
    /// # Errors
    /// No such device, the device is down, or the driver refuses the handle.
    pub fn import(
        &self,
        device: DeviceUuid,
        bytes: u64,
        handle: ShareHandle,
    ) -> Result<Arc<DeviceRegion>, DeviceError> {
        self.card(device)?.import(bytes, handle)
    }

    /// Opens events of another process. Blocks like [`Devices::import`].
    ///
    /// # Errors
    /// As for [`Devices::import`].
    pub fn import_events(
        &self,
        device: DeviceUuid,
        handles: &[[u8; 64]],
    ) -> Result<Arc<DeviceEvents>, DeviceError> {
        self.card(device)?.import_events(handles)
    }

    /// Opens more events behind those that `events` has. All of them or none.
    ///
    /// # Errors
    /// As for [`Devices::import`].
    pub fn append_events(
        &self,
        events: &DeviceEvents,
        handles: &[[u8; 64]],
    ) -> Result<(), DeviceError> {
        events.card().append_events(events, handles)
    }
}

/// `--devices` leaves none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--devices names none of those that the driver shows: {shown}")]
struct NoneChosen {
    shown: String,
}

/// Those of the devices that the configuration wants.
fn choose(found: Vec<DeviceInfo>, choice: &DeviceChoice) -> Result<Vec<DeviceInfo>, NoneChosen> {
    let DeviceChoice::Only(wanted) = choice else {
        return Ok(found);
    };
    let shown = found.iter().map(|info| info.uuid.to_string());
    let shown = shown.collect::<Vec<_>>().join(", ");
    for uuid in wanted {
        if !found.iter().any(|info| info.uuid == *uuid) {
            tracing::warn!(%uuid, shown, "--devices names a GPU that the driver does not show");
        }
    }
    let chosen = found.into_iter().filter(|info| wanted.contains(&info.uuid));
    let chosen: Vec<DeviceInfo> = chosen.collect();
    if chosen.is_empty() {
        return Err(NoneChosen { shown });
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_gpus_an_import_says_why() {
        let error = Devices::none()
            .import(DeviceUuid([1; 16]), 1, ShareHandle::Ipc([0; 64]))
            .expect_err("no device");
        assert!(
            matches!(&error, DeviceError::Absent { reason } if !reason.is_empty()),
            "{error}"
        );
    }

    #[test]
    fn only_the_named_devices_are_used_and_none_is_a_reason() {
        let info = |byte| DeviceInfo {
            uuid: DeviceUuid([byte; 16]),
            name: "a GPU".into(),
            ordinal: u32::from(byte),
            pci_bus_id: String::new(),
            numa_node: None,
            memory_bytes: 1,
        };
        let only = |bytes: &[u8]| {
            let wanted = bytes.iter().map(|byte| DeviceUuid([*byte; 16])).collect();
            choose(vec![info(1), info(2)], &DeviceChoice::Only(wanted))
        };
        assert_eq!(only(&[2, 9]), Ok(vec![info(2)]));
        let shown = only(&[9]).expect_err("none is there").shown;
        assert!(shown.contains(&DeviceUuid([1; 16]).to_string()), "{shown}");
        let all = choose(vec![info(1), info(2)], &DeviceChoice::Auto);
        assert_eq!(all.map(|all| all.len()), Ok(2));
    }

    #[test]
    fn switched_off_devices_are_absent_with_that_reason() {
        let options = DeviceOptions {
            choice: DeviceChoice::Off,
            ..DeviceOptions::default()
        };
        let DeviceState::Absent { reason } = Devices::open(options).state() else {
            panic!("present");
        };
        assert!(reason.contains("configuration"), "{reason}");
    }
}
