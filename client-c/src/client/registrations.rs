//! Registrations: one id for the engine, whatever id the present daemon gave.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::control::{ClientMessage, PROTOCOL_DEVICES, RegisterSpec};
use pegaflow_shm::status::Status;

use super::devices::PlacesOf;
use super::{Inner, Shared};
use crate::Error;
use crate::completion::RegistrationId;
use crate::cuda::DeviceUse;
use crate::log::LogLevel;
use crate::memory::{HostRegion, Registration, ResolvedRegistration, resolve};
use crate::session::control::Purpose;
use crate::session::{Bound, Session, check_length};
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
    pub(super) asked: bool,
    /// Its id at the present daemon.
    pub(crate) remote: Option<u32>,
    /// The present daemon raises its loads' words.
    pub(crate) signals: bool,
    /// Key of its blocks in the index, once the instance is complete.
    pub(crate) namespace: Option<u32>,
    /// What the present daemon said against it.
    pub(crate) refusal: Option<(Status, String)>,
    /// The refusal was logged, and so has the acceptance to be.
    pub(super) told: bool,
    /// Kept mapped while the daemon may copy into them.
    regions: Vec<Arc<HostRegion>>,
    /// The same of device memory, and what orders copies of it.
    pub(crate) device: Option<DeviceUse>,
    /// Its caller waits for the keeper to bring it to the daemon, and is told what becomes of it.
    pub(super) awaited: bool,
}

impl Registered {
    fn new(resolved: ResolvedRegistration) -> Registered {
        Registered {
            spec: Arc::new(resolved.spec),
            uses_process_memory: resolved.uses_process_memory,
            adopted: false,
            asked: false,
            remote: None,
            signals: false,
            namespace: None,
            refusal: None,
            told: false,
            regions: resolved.regions,
            device: resolved.device,
            awaited: false,
        }
    }

    /// The daemon is gone, and with it what it knew.
    pub(crate) fn forget_daemon(&mut self) {
        (self.remote, self.namespace, self.refusal) = (None, None, None);
        (self.told, self.asked, self.signals) = (false, false, false);
    }

    /// The message that registers it.
    fn message(&self, seq: u64) -> ClientMessage {
        register_message(seq, &self.spec, self.device.as_ref())
    }

    /// Why a daemon of this version cannot take it.
    pub(crate) fn is_beyond(&self, protocol: u32) -> Option<(Status, String)> {
        let replicated = self.spec.groups.iter().find(|group| group.replicated);
        let what = match (&self.device, replicated) {
            _ if protocol >= PROTOCOL_DEVICES => return None,
            (Some(_), _) => "GPU memory".to_owned(),
            (None, Some(group)) => format!("group {}, which is replicated,", group.group),
            (None, None) => return None,
        };
        let text = format!(
            "{what} needs a daemon of protocol {PROTOCOL_DEVICES}, this one speaks {protocol}: \
             upgrade pegaflowd"
        );
        Some((Status::VersionMismatch, text))
    }

    /// The keeper waits for the present daemon's answer.
    fn is_unanswered(&self) -> bool {
        self.asked && self.remote.is_none()
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

    pub(super) fn slot(&mut self, id: u32) -> Option<&mut Option<Box<Registered>>> {
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
        let resolved = resolve(registration, &PlacesOf::new(self))?;
        // What cannot be sent would end each session that the keeper tries to send it in.
        let registered = Registered::new(resolved);
        check_length(&registered.message(u64::MAX))?;
        let by_keeper = registered.device.is_some();
        let (spec, uses) = (registered.spec.clone(), registered.uses_process_memory);
        let deadline = Instant::now() + self.resolved.options.control_timeout;
        let (id, session) = {
            let mut inner = self.lock_restored(deadline)?;
            // Under one lock with the look for a session: the keeper brings to the next session
            // what is here before it.
            let session = inner.live.as_ref().map(|live| live.session.clone());
            let alone = session.is_none();
            if alone && !self.resolved.start_without_daemon {
                return Err(inner.disconnected());
            }
            if let Some(session) = &session
                && let Some((status, text)) = registered.is_beyond(session.welcome.protocol)
            {
                return Err(refused(status, &text));
            }
            let registered = Registered {
                adopted: alone || by_keeper,
                awaited: by_keeper && !alone,
                ..registered
            };
            inner.registrations.push(Some(Box::new(registered)));
            (inner.registrations.len() as u32, session)
        };
        let Some(session) = session else {
            return Ok(RegistrationId(id));
        };
        if by_keeper {
            self.await_keeper(id, &session, deadline)?;
            return Ok(RegistrationId(id));
        }
        self.prepare(&session, uses);
        let bound = deadline.saturating_duration_since(Instant::now());
        let purpose = Purpose::Register(id);
        let reply = self.control.call(&session, purpose, &[], bound, |seq| {
            register_message(seq, &spec, None)
        });
        match reply.and_then(|reply| reply.registered()) {
            Ok(_) => self.adopt(id),
            // The daemon went meanwhile: the next one hears of it.
            Err(Error::Disconnected { .. }) if self.resolved.start_without_daemon => self.adopt(id),
            Err(error) => {
                self.give_up(id);
                return Err(error);
            }
        }
        Ok(RegistrationId(id))
    }

    /// From here on the keeper brings a registration to each daemon, and to the present one if that
    /// is another than the one that was asked.
    fn adopt(&self, id: u32) {
        let mut inner = self.lock();
        let Some(registered) = inner.slot(id).and_then(Option::as_mut) else {
            return;
        };
        registered.adopted = true;
        if registered.remote.is_none() {
            self.register_soon.store(true, Ordering::Relaxed);
            self.events.keeper.signal();
        }
    }

    /// Forgets a registration whose caller was told of a failure.
    pub(super) fn give_up(&self, id: u32) {
        let mut inner = self.lock();
        // Dropped after the lock: it may be the last hold on a region.
        let gone = inner.slot(id).and_then(Option::take);
        let session = inner.live.as_ref().map(|live| live.session.clone());
        drop(inner);
        let remote = gone.as_ref().and_then(|gone| gone.remote);
        if let (Some(session), Some(registration)) = (session, remote) {
            // The daemon's consent came when nobody waited any more. A daemon that takes nothing
            // now keeps a registration that nobody uses until the session ends.
            let message = |seq| ClientMessage::Unregister { seq, registration };
            let bound = Bound::now();
            let _ = self
                .control
                .send(&session, Purpose::Removal, &[], bound, message);
        }
    }

    /// The lock, once the present session knows every region: a registration that overtook one
    /// would be refused.
    fn lock_restored(&self, deadline: Instant) -> Result<MutexGuard<'_, Inner>, Error> {
        self.lock_when(deadline, |inner| !inner.restoring)
    }

    /// The lock, once something holds.
    pub(super) fn lock_when(
        &self,
        deadline: Instant,
        mut holds: impl FnMut(&Inner) -> bool,
    ) -> Result<MutexGuard<'_, Inner>, Error> {
        let mut inner = self.lock();
        while !holds(&inner) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    what: "the daemon's answer",
                    bound: self.resolved.options.control_timeout,
                });
            }
            let slice = left.min(Duration::from_secs(1));
            let waited = self.changed.wait_timeout(inner, slice);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(inner)
    }

    /// True while a registration uses this region.
    pub(crate) fn uses_region(&self, region: &HostRegion) -> bool {
        let inner = self.lock();
        let mut used = inner
            .registrations
            .iter()
            .flatten()
            .flat_map(|r| &r.regions);
        used.any(|known| known.id == region.id)
    }

    /// Lets the daemon reach this process's memory, where a registration needs it.
    pub(crate) fn prepare(&self, session: &Session, uses_process_memory: bool) {
        if uses_process_memory && session.daemon_pid != 0 {
            allow_tracer(session.daemon_pid);
        }
    }

    pub(crate) fn unregister(&self, id: RegistrationId) -> Result<(), Error> {
        self.check_process()?;
        let deadline = Instant::now() + self.resolved.options.control_timeout;
        self.lock().registration(id)?;
        // The session that has let go of it. While that was waited for, another one may have come
        // up and been told of the registration.
        let mut let_go = None;
        loop {
            let answered = |inner: &Inner| {
                let unanswered = inner.registration(id).is_ok_and(Registered::is_unanswered);
                inner.live.is_none() || !unanswered
            };
            let mut inner = self.lock_when(deadline, answered)?;
            let remote = inner.registration(id).ok().and_then(|known| known.remote);
            let session = inner.live.as_ref().map(|live| live.session.clone());
            let session = session.filter(|session| let_go != Some(session.number));
            let (Some(session), Some(registration)) = (session, remote) else {
                // Dropped after the lock: it may be the last hold on a region.
                let gone = inner.slot(id.0).and_then(Option::take);
                drop(inner);
                drop(gone);
                break;
            };
            drop(inner);
            self.unregister_from(&session, registration, deadline)?;
            let_go = Some(session.number);
        }
        self.changed.notify_all();
        Ok(())
    }

    fn unregister_from(
        &self,
        session: &Session,
        registration: u32,
        deadline: Instant,
    ) -> Result<(), Error> {
        let bound = deadline.saturating_duration_since(Instant::now());
        let message = |seq| ClientMessage::Unregister { seq, registration };
        let reply = self
            .control
            .call(session, Purpose::Removal, &[], bound, message);
        match reply.and_then(|reply| reply.done()) {
            // A daemon that is gone, or does not know it, has nothing left to copy.
            Ok(()) | Err(Error::Disconnected { .. }) => Ok(()),
            Err(Error::Refused {
                status: Status::UnknownRegistration,
                ..
            }) => Ok(()),
            Err(error) => Err(error),
        }
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
    pub(crate) fn accepted(
        &self,
        session: &Session,
        id: u32,
        (remote, signals): (u32, bool),
    ) -> bool {
        let mut inner = self.lock();
        if !inner.is_present(session) {
            // Its id means something else, or nothing, to the present daemon.
            return true;
        }
        let Some(registered) = inner.slot(id).and_then(Option::as_mut) else {
            return false;
        };
        (registered.remote, registered.refusal) = (Some(remote), None);
        registered.signals = signals;
        registered.adopted = true;
        if std::mem::take(&mut registered.told) {
            let label = registered.label(id);
            self.journal
                .note(LogLevel::Warn, || format!("{label} is accepted now"));
        }
        drop(inner);
        self.changed.notify_all();
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
            if !registered.told && !passes && !registered.awaited {
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

    /// Registrations that the present daemon has yet to be asked to take. From here on they count
    /// as asked.
    pub(crate) fn missing_registrations(&self) -> Vec<Missing> {
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
            Some(Missing {
                id,
                spec: registered.spec.clone(),
                uses_process_memory: registered.uses_process_memory,
                device: registered.device.clone(),
            })
        });
        missing.collect()
    }

    /// Why a daemon of this version cannot take a registration.
    pub(crate) fn is_beyond(&self, id: u32, protocol: u32) -> Option<(Status, String)> {
        let inner = self.lock();
        let registered = inner.registration(RegistrationId(id)).ok()?;
        registered.is_beyond(protocol)
    }

    /// Whether somebody still wants a registration.
    pub(crate) fn is_registered(&self, id: u32) -> bool {
        self.lock().registration(RegistrationId(id)).is_ok()
    }
}

/// A registration that the present daemon has not been asked to take.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) id: u32,
    pub(crate) spec: Arc<RegisterSpec>,
    pub(crate) uses_process_memory: bool,
    pub(crate) device: Option<DeviceUse>,
}

/// Whether a refusal can be over without anybody's doing: the daemon is still ending our own last
/// session, or somebody else's.
pub(crate) fn may_pass(status: Status) -> bool {
    matches!(
        status,
        Status::AlreadyRegistered | Status::Limit | Status::Draining
    )
}

/// The message that registers.
pub(crate) fn register_message(
    seq: u64,
    spec: &RegisterSpec,
    device: Option<&DeviceUse>,
) -> ClientMessage {
    let signals = device.and_then(|used| used.signals.as_ref().ok());
    ClientMessage::Register {
        seq,
        registration: Box::new(spec.clone()),
        signals: signals.map(|signals| signals.region()),
    }
}

pub(super) fn refused(status: Status, message: &str) -> Error {
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
    use crate::client::Wakes;
    use crate::fake::{Fake, Rudeness};
    use crate::session::control::Reply;
    use crate::{Client, Options};

    fn options(folder: &tempfile::TempDir) -> Options {
        Options {
            socket: Some(folder.path().join("test.sock")),
            autostart: Some(false),
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(50),
            ..Options::default()
        }
    }

    fn scheduler() -> Registration {
        Registration {
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
        }
    }

    const LONG: Duration = Duration::from_secs(10);

    fn until(mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < LONG);
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_registration_accepted_by_a_session_just_lost_reaches_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(&folder);
        let socket = options.socket.clone().unwrap();
        let fake = Fake::start_with(&socket, Rudeness::Deaf);
        let client = Client::connect(options).unwrap();
        let shared = client.shared();
        let old = shared.session().unwrap();
        std::thread::scope(|scope| {
            let registers = scope.spawn(|| client.register(&scheduler()));
            until(|| shared.control.purpose(1).is_some());
            // The keeper has the answer in its hands while another thread loses the session.
            let mut wakes = Wakes::default();
            let status = Status::Disconnected;
            shared.lose_locked(&mut shared.lock(), old.number, status, "test", &mut wakes);
            assert!(shared.accepted(&old, 1, (77, false)));
            shared.control.answer(1, Reply::Registered(77));
            shared.deliver(wakes);
            let id = registers.join().unwrap().unwrap();
            fake.world.set_rudeness(Rudeness::None);
            client.wait_ready(id, LONG).unwrap();
        });
    }

    #[test]
    fn a_registration_whose_answer_is_under_way_is_taken_back_before_its_memory_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            start_without_daemon: Some(true),
            ..options(&folder)
        };
        let socket = options.socket.clone().unwrap();
        let client = Client::connect(options).unwrap();
        let id = client.register(&scheduler()).unwrap();
        let fake = Fake::start_with(&socket, Rudeness::Deaf);
        let shared = client.shared();
        until(|| shared.lock().registration(id).unwrap().is_unanswered());
        std::thread::scope(|scope| {
            let ends = scope.spawn(|| client.unregister(id));
            std::thread::sleep(Duration::from_millis(20));
            fake.world.set_rudeness(Rudeness::None);
            ends.join().unwrap().unwrap();
            let count = |counter: &std::sync::atomic::AtomicU32| counter.load(Ordering::Relaxed);
            assert_eq!(count(&fake.world.registrations), 1);
            assert_eq!(count(&fake.world.unregistered), 1);
        });
        let again = client.unregister(id).unwrap_err();
        assert!(matches!(again, Error::UnknownRegistration(_)));
    }

    #[test]
    fn what_an_earlier_session_says_counts_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(&folder);
        let _fake = Fake::start(options.socket.as_deref().unwrap());
        let client = Client::connect(options).unwrap();
        let id = client.register(&scheduler()).unwrap();
        let shared = client.shared();
        let old = shared.session().unwrap();
        shared.lose(old.number, Status::Disconnected, "for the test");
        // Late answers of the old session, before and after the next one is up.
        for _ in 0..2 {
            let before = shared.lock().registration(id).unwrap().remote;
            assert!(
                shared.accepted(&old, id.0, (4711, false)),
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
            client.wait_ready(id, LONG).unwrap();
        }
        assert!(!shared.announce(&old));
    }
}
