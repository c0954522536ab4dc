//! Registrations of device memory: where it lies, how they come to a daemon, and what becomes of
//! them when a GPU fails.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pegaflow_shm::control::{DeviceUuid, MAX_DEVICE_EVENTS};
use pegaflow_shm::status::Status;

use super::registrations::refused;
use super::{Inner, Shared};
use crate::Error;
use crate::completion::{RegistrationId, RequestId};
use crate::cuda::{DeviceEvents, DeviceRegion, EventSlot, Location, Order, Span};
use crate::log::LogLevel;
use crate::memory::{HostRegion, Places};
use crate::requests::Draft;
use crate::session::Session;

/// Where this client's process has its memory.
pub(super) struct PlacesOf<'a> {
    shared: &'a Shared,
    host: Vec<Arc<HostRegion>>,
}

impl PlacesOf<'_> {
    pub(super) fn new(shared: &Shared) -> PlacesOf<'_> {
        let host = shared.live_regions();
        PlacesOf { shared, host }
    }
}

impl Places for PlacesOf<'_> {
    fn host_regions(&self) -> &[Arc<HostRegion>] {
        &self.host
    }

    fn locate(&self, address: u64) -> Result<Location, Error> {
        self.shared.cuda.locate(address)
    }

    fn share(&self, spans: &[Span]) -> Result<(Vec<Arc<DeviceRegion>>, Arc<DeviceEvents>), Error> {
        let Shared { cuda, weak, .. } = self.shared;
        let slots = self.shared.resolved.options.completion_slots;
        let events = slots.min(MAX_DEVICE_EVENTS as u32);
        cuda.share(spans, weak, events, || self.shared.next_region())
    }
}

impl Shared {
    /// Waits until the keeper has brought a registration of device memory, with its regions and
    /// events, to this session's daemon.
    pub(super) fn await_keeper(
        &self,
        id: u32,
        session: &Session,
        deadline: Instant,
    ) -> Result<(), Error> {
        self.register_soon.store(true, Ordering::Relaxed);
        self.events.keeper.signal();
        let is_settled = |inner: &Inner| {
            let found = inner.registration(RegistrationId(id));
            let is_answered =
                found.is_ok_and(|found| found.remote.is_some() || found.refusal.is_some());
            is_answered || !inner.is_present(session)
        };
        let settled = self.lock_when(deadline, is_settled).and_then(|mut inner| {
            let is_present = inner.is_present(session);
            let disconnected = inner.disconnected();
            let Some(registered) = inner.slot(id).and_then(Option::as_mut) else {
                return Err(Error::UnknownRegistration(id));
            };
            registered.awaited = false;
            match &registered.refusal {
                _ if registered.remote.is_some() => Ok(()),
                Some((status, message)) => Err(refused(*status, message)),
                None if is_present || self.resolved.start_without_daemon => Ok(()),
                None => Err(disconnected),
            }
        });
        settled.inspect_err(|_| self.give_up(id))
    }

    /// The present daemon can no longer use a device: what lies on it is registered anew when it
    /// can.
    pub(crate) fn device_down(&self, session: &Session, device: DeviceUuid, message: &str) {
        let mut inner = self.lock();
        if !inner.is_present(session) {
            return;
        }
        let mut lost = 0;
        for registered in inner.registrations.iter_mut().flatten() {
            let Some(used) = &registered.device else {
                continue;
            };
            if used.events.device().uuid() != device {
                continue;
            }
            used.regions.iter().for_each(|region| region.set_told(0));
            used.events.forget();
            lost += u32::from(registered.remote.is_some());
            (registered.remote, registered.namespace) = (None, None);
            let refusal = (Status::DeviceUnavailable, message.to_owned());
            registered.refusal = Some(refusal);
            (registered.asked, registered.told) = (false, true);
        }
        drop(inner);
        self.journal.note(LogLevel::Warn, || {
            format!("the daemon cannot use GPU {device}: {message}; {lost} registrations on it end")
        });
        self.changed.notify_all();
    }

    /// The present daemon can use a device again.
    pub(crate) fn note_device_up(&self, device: DeviceUuid) {
        self.journal.note(LogLevel::Warn, || {
            format!("the daemon can use GPU {device} again")
        });
    }

    /// Why events of a device order nothing at a distance: each ordered call then waits itself.
    pub(crate) fn note_unshared_events(&self, events: &DeviceEvents, why: &str) {
        let device = events.device();
        self.journal.note(LogLevel::Warn, || {
            format!(
                "events of {device} cannot be shared with the daemon: {why}; saves and loads that \
                 come after a stream or an event wait for it in the call"
            )
        });
    }

    /// The same where this process cannot share them with any.
    pub(crate) fn note_own_events(&self, events: &DeviceEvents) {
        if let Err(why) = events.handles()
            && events.is_news()
        {
            self.note_unshared_events(events, &why.to_string());
        }
    }

    /// Submits a save or load that comes after the engine's pending work.
    pub(crate) fn submit_after(&self, draft: &Draft<'_>, order: Order) -> Result<RequestId, Error> {
        self.check_process()?;
        if !order.is_some() {
            return self.submit(draft);
        }
        let events = {
            let inner = self.lock();
            if let Some(error) = inner.unserved(draft)? {
                return Err(error);
            }
            let registered = inner.registration(draft.registration())?;
            registered.device.as_ref().map(|used| used.events.clone())
        };
        let Some(events) = events else {
            let way_out = "a stream or event orders copies of GPU memory, and the registration has \
                           none: wait for it before the call";
            return Err(Error::argument("order", format!("{order:?}"), way_out));
        };
        self.submit_with(draft, events.record(order)?)
    }

    /// Waits for the engine's work in the call, where the daemon cannot look at the event.
    pub(crate) fn wait_here(&self, slot: &EventSlot) -> Result<(), Error> {
        self.lock().stats.waited_orders += 1;
        slot.wait(self.resolved.options.control_timeout)
    }
}
