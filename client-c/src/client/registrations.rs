//! Registrations: one id for the engine, whatever id the present daemon gave.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::control::{ClientMessage, RegisterSpec};
use pegaflow_shm::status::Status;

use super::{Inner, Shared};
use crate::Error;
use crate::completion::RegistrationId;
use crate::log::LogLevel;
use crate::memory::{HostRegion, Registration, ResolvedRegistration, resolve};
use crate::session::Session;
use crate::session::control::Purpose;
use crate::shared::process::allow_tracer;
use crate::stats::State;

/// One registration.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) spec: Arc<RegisterSpec>,
    pub(crate) uses_process_memory: bool,
    /// The caller has its id: the keeper brings it to each daemon. Before, that is the caller's
    /// affair.
    adopted: bool,
    /// The keeper has asked the present daemon and has no answer yet.
    asked: bool,
    /// Its id at the present daemon.
    pub(crate) remote: Option<u32>,
    /// Key of its blocks in the index, once the instance is complete.
    pub(crate) namespace: Option<u32>,
    /// What the present daemon said against it.
    pub(crate) refusal: Option<(Status, String)>,
    /// The refusal was logged, and so has the acceptance to be.
    told: bool,
    /// Kept mapped while the daemon may copy into them.
    _regions: Vec<Arc<HostRegion>>,
}

impl Registered {
    fn new(resolved: ResolvedRegistration) -> Registered {
        Registered {
            spec: Arc::new(resolved.spec),
            uses_process_memory: resolved.uses_process_memory,
            adopted: false,
            asked: false,
            remote: None,
            namespace: None,
            refusal: None,
            told: false,
            _regions: resolved.regions,
        }
    }

    /// The daemon is gone, and with it what it knew.
    pub(crate) fn forget_daemon(&mut self) {
        (self.remote, self.namespace, self.refusal) = (None, None, None);
        (self.told, self.asked) = (false, false);
    }

    /// For lines about it.
    fn label(&self, id: u32) -> String {
        let spec = &self.spec;
        let rank = spec
            .rank
            .map_or("scheduler".into(), |rank| format!("rank {rank}"));
        format!("registration {id} ({rank} of instance `{}`)", spec.instance)
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

impl Inner {
    /// Why a registration is not ready after this time.
    fn not_ready(&self, id: RegistrationId, bound: Duration) -> Result<Error, Error> {
        let registered = self.registration(id)?;
        let state = match (&registered.refusal, &self.live) {
            (Some((status, message)), _) => return Ok(refused(*status, message)),
            (None, None) => self.disconnected().to_string(),
            (None, Some(_)) if registered.remote.is_none() => {
                "the daemon has not answered yet".to_owned()
            }
            (None, Some(_)) => {
                let (world, instance) = (registered.spec.world_size, &registered.spec.instance);
                format!("not all {world} ranks of instance `{instance}` are registered")
            }
        };
        Ok(Error::NotReadyInTime {
            registration: id.0,
            bound,
            state,
        })
    }
}

impl Shared {
    pub(crate) fn register(&self, registration: &Registration) -> Result<RegistrationId, Error> {
        self.check_process()?;
        let resolved = resolve(registration, &self.live_regions())?;
        let registered = Registered::new(resolved);
        let (spec, uses) = (registered.spec.clone(), registered.uses_process_memory);
        let (id, session) = {
            let mut inner = self.lock();
            // Under one lock with the look for a session: the keeper brings to the next session
            // what is here before it.
            let session = inner.live.as_ref().map(|live| live.session.clone());
            let alone = session.is_none();
            if alone && !self.resolved.start_without_daemon {
                return Err(inner.disconnected());
            }
            let adopted = alone;
            let registered = Registered {
                adopted,
                ..registered
            };
            inner.registrations.push(Some(Box::new(registered)));
            (inner.registrations.len() as u32, session)
        };
        let Some(session) = session else {
            return Ok(RegistrationId(id));
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
            Err(Error::Disconnected { .. }) if self.resolved.start_without_daemon => {
                // The daemon went meanwhile: the next one hears of it.
                if let Some(registered) = self.lock().slot(id).and_then(Option::as_mut) {
                    registered.adopted = true;
                }
                self.register_soon.store(true, Ordering::Relaxed);
                self.events.keeper.signal();
                Ok(RegistrationId(id))
            }
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
            if let Some((status, message)) = &inner.registration(id)?.refusal
                && !may_pass(*status)
            {
                return Err(refused(*status, message));
            }
            if self.state() == State::Closed && inner.live.is_none() {
                return Err(inner.disconnected());
            }
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::MAX,
            };
            if left.is_zero() {
                return Err(inner.not_ready(id, timeout)?);
            }
            let waited = self
                .changed
                .wait_timeout(inner, left.min(Duration::from_secs(1)));
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The daemon of this session accepted a registration: false if it was given up meanwhile.
    pub(crate) fn accepted(&self, session: &Session, id: u32, remote: u32) -> bool {
        let mut inner = self.lock();
        if !inner.is_present(session) {
            // Its id means something else, or nothing, to the present daemon.
            return true;
        }
        let Some(registered) = inner.slot(id).and_then(Option::as_mut) else {
            return false;
        };
        (registered.remote, registered.refusal) = (Some(remote), None);
        registered.adopted = true;
        if std::mem::take(&mut registered.told) {
            let label = registered.label(id);
            self.journal
                .note(LogLevel::Warn, || format!("{label} is accepted now"));
        }
        true
    }

    /// The daemon of this session refused a registration that it should have back. `patient`: it
    /// may be a matter of moments.
    pub(crate) fn refused(
        &self,
        session: &Session,
        id: u32,
        (status, message): (Status, String),
        patient: bool,
    ) {
        let mut inner = self.lock();
        if !inner.is_present(session) {
            return;
        }
        if let Some(registered) = inner.slot(id).and_then(Option::as_mut) {
            let passes = patient && may_pass(status);
            if !registered.told && !passes {
                registered.told = true;
                let label = registered.label(id);
                self.journal.note(LogLevel::Warn, || {
                    format!("{label} is refused, trying on: {status}: {message}")
                });
            }
            registered.refusal = Some((status, message));
            registered.asked = false;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// The daemon said whether an instance is complete; `namespace` is `None` when it is not.
    pub(crate) fn set_namespace(&self, session: &Session, remote: u32, namespace: Option<u32>) {
        let mut inner = self.lock();
        if inner.is_present(session)
            && let Some(registered) = inner.by_remote(remote)
        {
            registered.namespace = namespace;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Registrations that the present daemon has yet to be asked to take: id, spec, and whether
    /// there is process memory in it. From here on they count as asked.
    pub(crate) fn missing_registrations(&self) -> Vec<(u32, Arc<RegisterSpec>, bool)> {
        let mut inner = self.lock();
        let numbered = (1u32..).zip(&mut inner.registrations);
        let missing = numbered.filter_map(|(id, slot)| {
            let registered = slot.as_deref_mut()?;
            if !registered.adopted
                || registered.remote.is_some()
                || std::mem::replace(&mut registered.asked, true)
            {
                return None;
            }
            Some((id, registered.spec.clone(), registered.uses_process_memory))
        });
        missing.collect()
    }
}

/// Whether a refusal can be over without anybody's doing: the daemon is still ending our own last
/// session, or somebody else's.
pub(crate) fn may_pass(status: Status) -> bool {
    matches!(
        status,
        Status::AlreadyRegistered | Status::Limit | Status::Draining
    )
}

fn refused(status: Status, message: &str) -> Error {
    Error::Refused {
        status,
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use pegaflow_shm::control::Mode;
    use pegaflow_shm::namespace::NamespaceSpec;

    use super::*;
    use crate::fake::Fake;
    use crate::{Client, Options};

    #[test]
    fn what_an_earlier_session_says_counts_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("test.sock");
        let _fake = Fake::start(&socket);
        let options = Options {
            socket: Some(socket),
            autostart: Some(false),
            ..Options::default()
        };
        let client = Client::connect(options).unwrap();
        let registration = Registration {
            instance: "i".into(),
            namespace: NamespaceSpec {
                model: "m".into(),
                dtype: "d".into(),
                hash_algorithm: "h".into(),
                block_tokens: 16,
                ..NamespaceSpec::default()
            },
            world_size: 1,
            rank: None,
            mode: Mode::ReadWrite,
            groups: Vec::new(),
        };
        let bound = Duration::from_secs(10);
        let id = client.register(&registration).unwrap();
        let shared = client.shared();
        let old = shared.session().unwrap();
        shared.lose(old.number, Status::Disconnected, "for the test");
        // Late answers of the old session, before and after the next one is up.
        for _ in 0..2 {
            let before = shared.lock().registration(id).unwrap().remote;
            assert!(
                shared.accepted(&old, id.0, 4711),
                "and nothing is taken back"
            );
            shared.set_namespace(&old, 4711, Some(9));
            let refusal = (Status::Limit, String::new());
            shared.refused(&old, id.0, refusal, false);
            let inner = shared.lock();
            let registered = inner.registration(id).unwrap();
            assert_ne!(registered.remote, Some(4711));
            assert!(registered.remote == before || before.is_none());
            assert!(registered.refusal.is_none() && registered.namespace != Some(9));
            drop(inner);
            client.wait_ready(id, bound).unwrap();
        }
        assert!(!shared.announce(&old));
    }
}
