//! Registrations: one id for the engine, whatever id the present daemon gave.

#![forbid(unsafe_code)]

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::control::{ClientMessage, RegisterSpec};
use pegaflow_shm::status::Status;

use super::{Inner, Shared};
use crate::Error;
use crate::completion::RegistrationId;
use crate::memory::{HostRegion, Registration, ResolvedRegistration, resolve};
use crate::session::Session;
use crate::session::control::Purpose;
use crate::shared::process::allow_tracer;

/// One registration.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) spec: Arc<RegisterSpec>,
    pub(crate) uses_process_memory: bool,
    /// Some daemon has accepted it: the keeper brings it back. Before, that is the caller's affair.
    adopted: bool,
    /// Its id at the present daemon.
    pub(crate) remote: Option<u32>,
    /// Key of its blocks in the index, once the instance is complete.
    pub(crate) namespace: Option<u32>,
    /// What the present daemon said against it.
    pub(crate) refusal: Option<(Status, String)>,
    /// Kept mapped while the daemon may copy into them.
    _regions: Vec<Arc<HostRegion>>,
}

impl Registered {
    fn new(resolved: ResolvedRegistration) -> Registered {
        Registered {
            spec: Arc::new(resolved.spec),
            uses_process_memory: resolved.uses_process_memory,
            adopted: false,
            remote: None,
            namespace: None,
            refusal: None,
            _regions: resolved.regions,
        }
    }

    /// The daemon is gone, and with it what it knew.
    pub(crate) fn forget_daemon(&mut self) {
        (self.remote, self.namespace, self.refusal) = (None, None, None);
    }
}

impl Inner {
    /// A registration of the engine.
    #[inline]
    pub(crate) fn registration(&self, id: RegistrationId) -> Result<&Registered, Error> {
        let slot = (id.0 as usize).wrapping_sub(1);
        let registered = self
            .registrations
            .get(slot)
            .and_then(|slot| slot.as_deref());
        registered.ok_or(Error::UnknownRegistration(id.0))
    }

    fn slot(&mut self, id: u32) -> Option<&mut Option<Box<Registered>>> {
        self.registrations.get_mut((id as usize).wrapping_sub(1))
    }

    fn by_remote(&mut self, remote: u32) -> Option<&mut Registered> {
        let all = self.registrations.iter_mut().flatten();
        all.map(|registered| &mut **registered)
            .find(|known| known.remote == Some(remote))
    }
}

impl Shared {
    pub(crate) fn register(&self, registration: &Registration) -> Result<RegistrationId, Error> {
        self.check_process()?;
        let resolved = resolve(registration, &self.live_regions())?;
        let registered = Registered::new(resolved);
        let (spec, uses) = (registered.spec.clone(), registered.uses_process_memory);
        let session = self.session()?;
        let id = {
            let mut inner = self.lock();
            inner.registrations.push(Some(Box::new(registered)));
            inner.registrations.len() as u32
        };
        self.prepare(&session, uses);
        let bound = self.resolved.options.control_timeout;
        let reply = self
            .control
            .call(&session, Purpose::Register(id), &[], bound, |seq| {
                ClientMessage::Register {
                    seq,
                    registration: Box::new((*spec).clone()),
                }
            });
        match reply.and_then(|reply| reply.registered()) {
            Ok(_) => Ok(RegistrationId(id)),
            Err(error) => {
                // Dropped after the lock: it may be the last hold on a region.
                let _gone = self.lock().slot(id).and_then(Option::take);
                Err(error)
            }
        }
    }

    /// Lets the daemon reach this process's memory, where a registration needs it.
    pub(crate) fn prepare(&self, session: &Session, uses_process_memory: bool) {
        if uses_process_memory && session.daemon_pid != 0 {
            allow_tracer(session.daemon_pid);
        }
    }

    pub(crate) fn unregister(&self, id: RegistrationId) -> Result<(), Error> {
        self.check_process()?;
        let (session, remote) = {
            let inner = self.lock();
            let remote = inner.registration(id)?.remote;
            (inner.live.as_ref().map(|live| live.session.clone()), remote)
        };
        if let (Some(session), Some(registration)) = (session, remote) {
            let bound = self.resolved.options.control_timeout;
            let message = |seq| ClientMessage::Unregister { seq, registration };
            let reply = self
                .control
                .call(&session, Purpose::Removal, &[], bound, message);
            match reply.and_then(|reply| reply.done()) {
                // A daemon that is gone, or does not know it, has nothing left to copy.
                Ok(()) | Err(Error::Disconnected { .. }) => {}
                Err(Error::Refused {
                    status: Status::UnknownRegistration,
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        // Dropped after the lock: it may be the last hold on a region.
        let _gone = self.lock().slot(id.0).and_then(Option::take);
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn wait_ready(&self, id: RegistrationId, timeout: Duration) -> Result<(), Error> {
        self.check_process()?;
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        loop {
            if inner.registration(id)?.namespace.is_some() {
                return Ok(());
            }
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::MAX,
            };
            if left.is_zero() {
                let what = "waiting for all ranks of the instance to register";
                return Err(Error::Timeout {
                    what,
                    bound: timeout,
                });
            }
            let waited = self
                .changed
                .wait_timeout(inner, left.min(Duration::from_secs(1)));
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The daemon accepted a registration: false if it was given up meanwhile.
    pub(crate) fn accepted(&self, id: u32, remote: u32) -> bool {
        let mut inner = self.lock();
        match inner.slot(id).and_then(Option::as_mut) {
            Some(registered) => {
                (registered.remote, registered.refusal) = (Some(remote), None);
                registered.adopted = true;
                true
            }
            None => false,
        }
    }

    /// The daemon refused a registration that it should have back.
    pub(crate) fn refused(&self, id: u32, status: Status, message: String) {
        if let Some(registered) = self.lock().slot(id).and_then(Option::as_mut) {
            registered.refusal = Some((status, message));
        }
    }

    /// The daemon said whether an instance is complete; `namespace` is `None` when it is not.
    pub(crate) fn set_namespace(&self, remote: u32, namespace: Option<u32>) {
        if let Some(registered) = self.lock().by_remote(remote) {
            registered.namespace = namespace;
        }
        self.changed.notify_all();
    }

    /// Registrations that the present daemon has yet to take back: id, spec, and whether there is
    /// process memory in it.
    pub(crate) fn missing_registrations(&self) -> Vec<(u32, Arc<RegisterSpec>, bool)> {
        let inner = self.lock();
        let numbered = (1u32..).zip(&inner.registrations);
        let missing = numbered.filter_map(|(id, slot)| {
            let registered = slot.as_deref()?;
            let row = (id, registered.spec.clone(), registered.uses_process_memory);
            (registered.adopted && registered.remote.is_none()).then_some(row)
        });
        missing.collect()
    }
}
