//! Registrations of device memory: where it lies, how they come to a daemon, and what becomes of
//! them when a GPU fails.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pegaflow_shm::control::{DeviceUuid, MAX_DEVICE_EVENTS, RegisterSpec};
use pegaflow_shm::desc::MAX_LOAD_STEPS;
use pegaflow_shm::status::Status;

use super::registrations::refused;
use super::{Inner, Shared};
use crate::Error;
use crate::completion::{RegistrationId, RequestId};
use crate::cuda::{DeviceEvents, DeviceUse, EventSlot, LOAD_WAIT_BOUND, Location, Order, Span};
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

    fn share(&self, spans: &[Span]) -> Result<DeviceUse, Error> {
        let Shared { cuda, weak, .. } = self.shared;
        let slots = self.shared.resolved.options.completion_slots;
        let events = slots.min(MAX_DEVICE_EVENTS as u32);
        let (regions, events) = cuda.share(spans, weak, events, || self.shared.next_region())?;
        let signals = cuda.share_signals(&events, |bytes| self.shared.alloc_host(bytes));
        Ok(DeviceUse {
            regions,
            events,
            signals: signals.map_err(|why| why.to_string().into()),
        })
    }
}

/// A load comes in no more steps than its group has segments.
fn check_steps(draft: &Draft<'_>, spec: &RegisterSpec) -> Result<(), Error> {
    let mut groups = spec.groups.iter();
    let group = groups.find(|group| group.group == draft.group());
    let most = group.map_or(0, |group| group.segments.len());
    let most = most.min(usize::from(MAX_LOAD_STEPS));
    // A group that is not there is the daemon's to refuse.
    if group.is_none() || usize::from(draft.steps()) <= most {
        return Ok(());
    }
    let way_out = format!("at most {most}, for the segments of the group");
    Err(Error::argument("steps", draft.steps().to_string(), way_out))
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
            registered.signals = false;
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
        if !order.is_some() && draft.steps() == 0 {
            return self.submit(draft);
        }
        let (used, takes_signals) = {
            let inner = self.lock();
            if let Some(error) = inner.unserved(draft)? {
                return Err(error);
            }
            let registered = inner.registration(draft.registration())?;
            check_steps(draft, &registered.spec)?;
            (registered.device.clone(), registered.signals)
        };
        let Some(used) = used else {
            let way_out = "streams and events order copies of GPU memory, and the registration has \
                           none: wait for it before the call, and for the load's completion";
            let value = format!("{order:?}, {} steps", draft.steps());
            return Err(Error::argument("order or steps", value, way_out));
        };
        let signal = match used.signals {
            _ if draft.steps() == 0 => None,
            Ok(signals) if takes_signals => Some(signals.take(draft.steps())?),
            Ok(_) => {
                self.note_whole_loads("the daemon is too old: upgrade pegaflowd");
                None
            }
            Err(why) => {
                self.note_whole_loads(&why);
                None
            }
        };
        self.submit_with(draft, used.events.record(order)?, signal)
    }

    /// Says once why loads come whole that were to come in steps.
    fn note_whole_loads(&self, why: &str) {
        if self.cuda.is_news_of_whole_loads() {
            self.journal.note(LogLevel::Warn, || {
                format!("streams cannot wait for loads, which come whole: {why}")
            });
            // It is the keeper that says it.
            self.events.keeper.signal();
        }
    }

    /// Makes a stream wait for the first steps of a load that is under way.
    pub(crate) fn stream_wait(
        &self,
        request: RequestId,
        steps: u32,
        stream: Order,
    ) -> Result<(), Error> {
        self.check_process()?;
        let mut inner = self.lock();
        if let Some(status) = inner.table.answered(request.0) {
            return match status {
                Status::Ok => Ok(()),
                status => Err(refused(status, "the load that the stream was to wait for")),
            };
        }
        let held = inner.table.in_flight(request.0);
        let held = held.ok_or(Error::UnknownRequest(request.0))?;
        let slot = held.signal.as_ref();
        let Some((signals, signal)) = slot.map(|slot| (slot.signals().clone(), slot.signal()))
        else {
            let text = "the request is no load in steps, or neither driver nor daemon can tell a \
                        stream of it: wait for its completion instead";
            return Err(refused(Status::DeviceUnavailable, text));
        };
        // The driver may take its time. Should the load end meanwhile, its word stays raised.
        drop(inner);
        signals.make_wait(signal, steps, stream)
    }

    /// Lets streams go that wait for loads which do not go on.
    pub(crate) fn end_stale_waits(&self) {
        let Some(signals) = self.cuda.signals() else {
            return;
        };
        let ended = signals.end_stale(Instant::now(), LOAD_WAIT_BOUND);
        if ended > 0 {
            self.journal.note(LogLevel::Warn, || {
                format!(
                    "{ended} loads have not come in {} s: streams that wait for them go on without \
                     their blocks",
                    LOAD_WAIT_BOUND.as_secs()
                )
            });
        }
    }

    /// Waits for the engine's work in the call, where the daemon cannot look at the event.
    pub(crate) fn wait_here(&self, slot: &EventSlot) -> Result<(), Error> {
        self.lock().stats.waited_orders += 1;
        slot.wait(self.resolved.options.control_timeout)
    }
}
