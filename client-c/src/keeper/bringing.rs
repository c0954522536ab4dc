//! Bringing registrations of device memory to a daemon: regions and their descriptors, events, and
//! then the registration, each once the one before it was answered.
//!
//! The descriptors of one region can be thousands, which neither this process nor the socket would
//! hold at once; and what the daemon has against a region or an event concerns the registrations
//! that need it, not the session.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use pegaflow_shm::control::{ClientMessage, MAX_MESSAGE_CHUNKS};
use pegaflow_shm::status::Status;

use crate::Error;
use crate::client::{Missing, Shared, register_message};
use crate::cuda::{DeviceEvents, DeviceRegion, DeviceUse};
use crate::session::Session;
use crate::session::control::{Purpose, Reply};

/// Registrations on their way to the present daemon.
#[derive(Debug, Default)]
pub(super) struct Bringing {
    waiting: VecDeque<Missing>,
    /// The step of the first of them that is not answered.
    step: Option<Step>,
}

#[derive(Debug)]
enum Step {
    Region {
        region: Arc<DeviceRegion>,
        /// Physical allocations whose descriptors were sent.
        sent: usize,
    },
    Events(Arc<DeviceEvents>),
}

/// What to send next, and what it is about.
pub(super) struct Parcel {
    pub(super) purpose: Purpose,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) message: Box<dyn FnOnce(u64) -> ClientMessage>,
}

/// A registration that cannot be brought, and why.
pub(super) struct Refusal {
    pub(super) id: u32,
    pub(super) status: Status,
    pub(super) message: String,
}

impl Bringing {
    pub(super) fn add(&mut self, missing: Missing) {
        self.waiting.push_back(missing);
    }

    /// Another session begins.
    pub(super) fn reset(&mut self) {
        *self = Bringing::default();
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What to send now, unless an answer is waited for or nothing is left.
    pub(super) fn next(
        &mut self,
        shared: &Shared,
        session: &Session,
    ) -> Result<Option<Parcel>, Refusal> {
        if self.step.is_some() {
            return Ok(None);
        }
        while let Some(first) = self.waiting.front() {
            if !shared.is_registered(first.id) {
                self.waiting.pop_front();
                continue;
            }
            let next = first
                .device
                .as_ref()
                .and_then(|used| missing_of(used, session));
            if let Some(used) = &first.device {
                shared.note_own_events(&used.events);
            }
            let Some(step) = next else {
                let Missing {
                    id, spec, device, ..
                } = first;
                let (id, spec, device) = (*id, spec.clone(), device.clone());
                self.waiting.pop_front();
                return Ok(Some(Parcel {
                    purpose: Purpose::Register(id),
                    fds: Vec::new(),
                    message: Box::new(move |seq| register_message(seq, &spec, device.as_ref())),
                }));
            };
            let parcel = match &step {
                Step::Region { region, .. } => first_of_region(region),
                Step::Events(events) => all_events(events),
            };
            return self.take_step(step, parcel).map(Some);
        }
        Ok(None)
    }

    /// The daemon's answer to the present step: whether more of it is to be sent.
    pub(super) fn answered(
        &mut self,
        shared: &Shared,
        session: &Session,
        reply: &Reply,
    ) -> Result<Option<Parcel>, Refusal> {
        let Some(step) = self.step.take() else {
            return Ok(None);
        };
        match (step, reply) {
            (Step::Region { region, sent }, Reply::Done) if sent < region.chunks() => {
                if self
                    .waiting
                    .front()
                    .is_some_and(|m| shared.is_registered(m.id))
                {
                    let parcel = more_of_region(&region, sent);
                    return self
                        .take_step(Step::Region { region, sent }, parcel)
                        .map(Some);
                }
                // Nobody wants it any more, and the daemon has half of it.
                region.set_told(session.number);
            }
            (Step::Region { region, .. }, Reply::Done) => region.set_told(session.number),
            (Step::Region { region, .. }, Reply::Failed { status, message }) => {
                let (base, bytes) = (region.base(), region.bytes());
                let device = region.device();
                let text = format!("{bytes} bytes at {base:#x} on {device}: {message}");
                return Err(self.refuse(*status, text));
            }
            (Step::Events(events), Reply::Failed { message, .. }) => {
                events.set_told(session.number, false);
                shared.note_unshared_events(&events, message);
            }
            (Step::Events(events), _) => events.set_told(session.number, true),
            (Step::Region { .. }, _) => {}
        }
        Ok(None)
    }

    fn take_step(
        &mut self,
        mut step: Step,
        parcel: Result<Parcel, Error>,
    ) -> Result<Parcel, Refusal> {
        match parcel {
            Ok(parcel) => {
                if let Step::Region { sent, .. } = &mut step {
                    *sent += parcel.fds.len();
                }
                self.step = Some(step);
                Ok(parcel)
            }
            Err(error) => Err(self.refuse(error.status(), error.to_string())),
        }
    }

    /// Gives the first registration up.
    fn refuse(&mut self, status: Status, message: String) -> Refusal {
        let id = self.waiting.pop_front().map_or(0, |missing| missing.id);
        Refusal {
            id,
            status,
            message,
        }
    }
}

/// What a session's daemon has not been told of what a registration needs.
fn missing_of(used: &DeviceUse, session: &Session) -> Option<Step> {
    let (events, number) = (&used.events, session.number);
    let mut regions = used.regions.iter();
    if let Some(region) = regions.find(|region| !region.is_told(number)) {
        let region = region.clone();
        return Some(Step::Region { region, sent: 0 });
    }
    let is_settled = events.is_told(number) || events.is_refused(number);
    (events.handles().is_ok() && !is_settled).then(|| Step::Events(events.clone()))
}

fn first_of_region(region: &Arc<DeviceRegion>) -> Result<Parcel, Error> {
    let fds = region.export(0, region.chunks().min(MAX_MESSAGE_CHUNKS))?;
    let (id, bytes, device) = (region.id(), region.bytes(), region.device().uuid());
    let handle = region.handle();
    Ok(Parcel {
        purpose: Purpose::Device,
        fds,
        message: Box::new(move |seq| ClientMessage::AddDeviceRegion {
            seq,
            region: id,
            bytes,
            device,
            handle,
        }),
    })
}

fn more_of_region(region: &Arc<DeviceRegion>, sent: usize) -> Result<Parcel, Error> {
    let fds = region.export(sent, (region.chunks() - sent).min(MAX_MESSAGE_CHUNKS))?;
    let region = region.id();
    Ok(Parcel {
        purpose: Purpose::Device,
        fds,
        message: Box::new(move |seq| ClientMessage::AddDeviceChunks { seq, region }),
    })
}

fn all_events(events: &Arc<DeviceEvents>) -> Result<Parcel, Error> {
    let handles = events.handles().map_err(Clone::clone)?.to_vec();
    let device = events.device().uuid();
    Ok(Parcel {
        purpose: Purpose::Device,
        fds: Vec::new(),
        message: Box::new(move |seq| ClientMessage::AddEvents {
            seq,
            device,
            handles,
        }),
    })
}
