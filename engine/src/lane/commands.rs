//! Sessions and registrations come and go.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use pegaflow_shm::control::Mode;
use pegaflow_shm::node::Counter;
use pegaflow_shm::segment::SessionState;
use pegaflow_shm::status::Status;

use crate::cache::DomainError;
use crate::cache::domain::DomainId;
use crate::cache::lease::LeaseEnd;
use crate::catalog::{CatalogError, MAX_NAMESPACES};
use crate::clock::Clock;
use crate::copy::CopyThreads;
use crate::isolation::share::may_take;
use crate::lane::api::{
    CloseReason, LaneCommand, LaneEvent, NewRegistration, NewSession, Refusal, Reply, SessionId,
    SessionOpened,
};
use crate::lane::machine::Machine;
use crate::lane::request::Request;
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, MAX_REGISTRATIONS, Registration};
use crate::registry::{InstanceId, Member, MemberGroup, packed_groups};

impl<M: Machine> Lane<M> {
    /// Handles one command; false ends the lane.
    pub(super) fn command(&mut self, command: LaneCommand) -> bool {
        match command {
            LaneCommand::OpenSession(new, reply) => {
                let opened = self.open_session(*new);
                answer(reply, opened);
            }
            LaneCommand::Register(session, registration, reply) => {
                let mut outcome = Err(unknown_session(session));
                self.with_session(session, |lane, session| {
                    outcome = lane.register(session, *registration);
                    Ok(())
                });
                let registered = outcome.as_ref().ok().copied();
                answer(reply, outcome);
                if let Some(registration) = registered {
                    self.announce(session, registration);
                }
            }
            LaneCommand::Unregister(session, registration, reply) => {
                self.unregister(session, registration, reply);
            }
            LaneCommand::CloseSession(session, reason, reply) => {
                self.close_session(session, reason, reply);
            }
            LaneCommand::Drain(reply) => self.drain(reply),
            LaneCommand::Ping(reply) => answer(reply, ()),
            LaneCommand::Stop => return false,
        }
        true
    }

    fn open_session(&mut self, new: NewSession) -> Result<SessionOpened, Refusal> {
        let limit = self.options.max_sessions;
        if self.by_id.len() >= limit {
            return Err(Refusal::new(
                Status::Limit,
                format!("{limit} sessions are open: raise --max-sessions or end a process"),
            ));
        }
        if self.draining.is_some() {
            return Err(Refusal::new(
                Status::Draining,
                "the daemon is shutting down",
            ));
        }
        let system = |error: &dyn std::fmt::Display| {
            Refusal::new(Status::SystemError, format!("session {}: {error}", new.id))
        };
        let domain = self
            .cache
            .domain(&new.domain)
            .map_err(|error| match error {
                DomainError::TooMany { .. } => Refusal::new(Status::Limit, error.to_string()),
                DomainError::Index(_) => system(&error),
            })?;
        let (index, index_bytes) = self
            .cache
            .domain_ref(domain)
            .client_index()
            .map_err(|error| system(&error))?;
        let id = new.id;
        let mut session = LaneSession::new(new, domain, self.clock.unix_ms())
            .map_err(|error| Refusal::new(Status::SystemError, format!("session {id}: {error}")))?;
        self.watch(&session)
            .map_err(|error| Refusal::new(Status::SystemError, format!("session {id}: {error}")))?;
        let position = self
            .sessions
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.sessions.push(None);
                self.sessions.len() - 1
            });
        self.node.write_session(position, &session.row());
        session.place = position;
        self.sessions[position] = Some(Box::new(session));
        self.by_id.insert(id, position);
        self.tally.add(Counter::SessionsOpened, 1);
        Ok(SessionOpened { index, index_bytes })
    }

    fn register(
        &mut self,
        session: &mut LaneSession,
        new: NewRegistration,
    ) -> Result<u32, Refusal> {
        let NewRegistration {
            spec,
            groups,
            events,
            signals,
        } = new;
        if session.registrations.len() >= MAX_REGISTRATIONS {
            return Err(Refusal::new(
                Status::Limit,
                format!("a session has at most {MAX_REGISTRATIONS} registrations: unregister one"),
            ));
        }
        for group in &groups {
            let page_bytes = group.target.layout().page_bytes();
            self.cache.pool().check_page(page_bytes).map_err(|error| {
                Refusal::new(Status::BadLayout, format!("group {}: {error}", group.group))
            })?;
        }
        let id = session.next_registration();
        let member = Member {
            session: session.id,
            registration: id,
            groups: groups
                .iter()
                .map(|group| MemberGroup::of(group.target.layout()))
                .collect(),
        };
        let instance = self.registry.join(session.domain, &spec, member)?;
        let registration = Registration {
            id,
            instance,
            rank: spec.rank,
            save_only: spec.mode == Mode::SaveOnly,
            domain: session.domain,
            ready: None,
            places: Vec::new(),
            targets: groups
                .into_iter()
                .map(|group| (group.group, group.target))
                .collect(),
            events,
            signals,
            stepped: Vec::new(),
            copies: 0,
            leaving: None,
        };
        session.registrations.push(registration);
        session.describe(&spec.instance, spec.rank, spec.world_size);
        Ok(id)
    }

    /// Tells everybody concerned when a registration makes its instance complete, or the newcomer
    /// alone when it was complete before.
    fn announce(&mut self, session: SessionId, registration: u32) {
        let Some(instance) = self.instance_of(session, registration) else {
            return;
        };
        let already = self
            .registry
            .get(instance)
            .and_then(|instance| instance.ready);
        if let Some(namespace) = already {
            self.make_ready(session, registration, instance, namespace);
            return;
        }
        let Some(found) = self.registry.get(instance).filter(|i| i.is_complete()) else {
            return;
        };
        let digest = found
            .namespace
            .digest(found.world_size, &packed_groups(found));
        let (domain, world_size, spec) = (found.domain, found.world_size, found.namespace.clone());
        let name = found.name.clone();
        let namespace = match self.namespace(domain, world_size, digest) {
            Ok(namespace) => namespace,
            Err(error) => {
                let message = format!("instance `{name}` cannot start: {error}");
                tracing::error!("{message}");
                let _ = self.events.send(LaneEvent::Fault { session, message });
                return;
            }
        };
        let domain = self.cache.domain_ref(domain).identity.name();
        self.namespaces
            .note(namespace, domain, world_size, digest, &spec);
        if let Some(instance) = self.registry.get_mut(instance) {
            instance.ready = Some(namespace);
        }
        for (session, registration) in self.members_of(instance) {
            self.make_ready(session, registration, instance, namespace);
        }
    }

    /// The namespace's row in the catalog; one that nobody uses makes room when all are taken.
    fn namespace(
        &mut self,
        domain: DomainId,
        world_size: u32,
        digest: [u8; 32],
    ) -> Result<u32, CatalogError> {
        let key = self.cache.domain_ref(domain).identity.key().0;
        let stored = || self.cache.catalog().namespaces();
        let known = stored().any(|row| row.domain_key == key && row.digest == digest);
        let own = stored().filter(|row| row.domain_key == key).count() as u64;
        let free = u64::from(MAX_NAMESPACES) - stored().count() as u64;
        if known || may_take(own, free) {
            let catalog = self.cache.catalog_mut();
            return catalog.add_namespace(key, world_size, digest);
        }
        // Of a table that is full anybody's goes, of one that only this domain uses up its own.
        let mine: Vec<u32> = stored()
            .filter(|row| row.domain_key == key)
            .map(|row| row.slot)
            .collect();
        let in_use: Vec<u32> = self.registry.iter().filter_map(|i| i.ready).collect();
        let stays = |slot| in_use.contains(&slot) || (free > 0 && !mine.contains(&slot));
        let unused = self.cache.unused_namespace(stays);
        let unused = unused.ok_or(CatalogError::NamespacesFull)?;
        let catalog = self.cache.catalog_mut();
        catalog.remove_namespace(unused)?;
        let added = catalog.add_namespace(key, world_size, digest);
        self.namespaces.forget(unused);
        added
    }

    fn instance_of(&self, session: SessionId, registration: u32) -> Option<InstanceId> {
        let session = self.sessions[*self.by_id.get(&session)?].as_ref()?;
        session
            .registration(registration)
            .ok()
            .map(|registration| registration.instance)
    }

    fn members_of(&self, instance: InstanceId) -> Vec<(SessionId, u32)> {
        let instance = self.registry.get(instance);
        let members = instance.into_iter().flat_map(|instance| instance.members());
        members
            .map(|(_, member)| (member.session, member.registration))
            .collect()
    }

    fn make_ready(
        &mut self,
        session: SessionId,
        registration: u32,
        instance: InstanceId,
        namespace: u32,
    ) {
        self.with_session(session, |lane, session| {
            if let Some(member) = session.registration_mut(registration)
                && let Some(instance) = lane.registry.get(instance)
            {
                member.ready = Some(namespace);
                member.places = instance.places(member.rank);
                let session = session.id;
                lane.tell(LaneEvent::Ready {
                    session,
                    registration,
                    namespace,
                });
            }
            Ok(())
        });
    }

    /// Takes a member out of its instance and tells the others when that leaves it incomplete.
    fn leave_instance(&mut self, instance: InstanceId, session: SessionId, registration: u32) {
        let broken = self.registry.leave(instance, session, registration);
        if self.registry.get(instance).is_none() {
            // Nobody can name these leases any more.
            for lease in self.leases.of_instance(instance) {
                let ended = self.leases.end(lease, LeaseEnd::OwnerGone);
                self.finish_leases(ended);
            }
        }
        if !broken {
            return;
        }
        // The namespace's number may come to mean another one: nothing is fetched for it any more.
        self.end_prefetches(|prefetch| prefetch.scope.instance == instance);
        for (session, registration) in self.members_of(instance) {
            self.with_session(session, |lane, session| {
                if let Some(member) = session.registration_mut(registration) {
                    member.ready = None;
                    member.places.clear();
                    lane.tell(LaneEvent::NotReady {
                        session: session.id,
                        registration,
                    });
                }
                Ok(())
            });
        }
    }

    fn unregister(
        &mut self,
        session: SessionId,
        registration: u32,
        reply: Reply<Result<(), Refusal>>,
    ) {
        let unknown = Refusal::new(
            Status::UnknownRegistration,
            format!("session {session} has no registration {registration}"),
        );
        let mut reply = Some(reply);
        let mut instance = None;
        self.with_session(session, |_, session| {
            if let Some(member) = session.registration_mut(registration) {
                instance = member.leaving.is_none().then_some(member.instance);
                member.leaving.get_or_insert_default().extend(reply.take());
            }
            Ok(())
        });
        if let Some(reply) = reply {
            answer(reply, Err(unknown));
        }
        if let Some(instance) = instance {
            self.leave_instance(instance, session, registration);
        }
        self.settle_session(session);
    }

    fn close_session(&mut self, session: SessionId, reason: CloseReason, reply: Reply<()>) {
        let mut reply = Some(reply);
        let mut memberships = Vec::new();
        self.with_session(session, |lane, session| {
            let first = session.closing.is_none();
            session
                .closing
                .get_or_insert((reason, Vec::new()))
                .1
                .extend(reply.take());
            if first {
                lane.abandon_requests(session);
                for member in &mut session.registrations {
                    if member.leaving.is_none() {
                        memberships.push((member.instance, member.id));
                    }
                    member.leaving.get_or_insert_default();
                }
            }
            Ok(())
        });
        if let Some(reply) = reply {
            answer(reply, ());
        }
        for (instance, registration) in memberships {
            self.leave_instance(instance, session, registration);
        }
        self.hand_prefetches_over(session);
        self.end_prefetches(|prefetch| prefetch.session == session);
        if let Some(tier) = self.tier.as_mut() {
            tier.forget_saves(session);
        }
        self.resume_waiters();
        for lease in self.leases.of_session(session) {
            let ended = self.leases.end(lease, LeaseEnd::OwnerGone);
            self.finish_leases(ended);
        }
        self.settle_session(session);
    }

    fn abandon_requests(&mut self, session: &mut LaneSession) {
        let ids: Vec<u64> = session.requests.keys().copied().collect();
        for id in ids {
            match session.requests.get(&id).and_then(Request::copies) {
                Some(copies) if copies.running > 0 => {
                    copies.cancelled.store(true, Ordering::Relaxed);
                }
                _ => {
                    if let Some(Request::Query(mut query)) = session.requests.remove(&id) {
                        self.let_go(&mut query);
                    }
                }
            }
        }
    }

    /// Ends registrations and sessions that wait only for copies that have drained.
    pub(super) fn settle_session(&mut self, session: SessionId) {
        let Some(position) = self.by_id.get(&session).copied() else {
            return;
        };
        let Some(found) = self.sessions[position].as_mut() else {
            return;
        };
        let done = |member: &mut Registration| member.leaving.is_some() && member.copies == 0;
        for member in found.registrations.extract_if(.., done) {
            for reply in member.leaving.into_iter().flatten() {
                answer(reply, Ok(()));
            }
        }
        if found.closing.is_none() || found.copies > 0 {
            return;
        }
        let Some(mut ended) = self.sessions[position].take() else {
            return;
        };
        self.by_id.remove(&session);
        self.workers.end_session(session);
        self.unwatch(&ended);
        if let Err(error) = ended.show_state(SessionState::Closed) {
            tracing::error!(session, %error, "a closed session's state cannot be shown");
        }
        self.node
            .write_session(position, &bytemuck::Zeroable::zeroed());
        if let Some((reason, replies)) = ended.closing.take() {
            self.tally.add(
                match reason {
                    CloseReason::Left | CloseReason::Stopping => Counter::SessionsLeft,
                    CloseReason::Died => Counter::SessionsDied,
                    CloseReason::Faulted => Counter::SessionsFaulted,
                },
                1,
            );
            // The mappings go with the session, before anybody hears that it is over.
            drop(ended);
            for reply in replies {
                answer(reply, ());
            }
        }
    }

    fn drain(&mut self, reply: Reply<()>) {
        for session in self.sessions.iter().flatten() {
            if let Err(error) = session.show_state(SessionState::Draining) {
                tracing::error!(session = session.id, %error, "the session's state cannot be shown");
            }
        }
        self.draining.get_or_insert_default().push(reply);
        self.end_waits();
        self.settle_drain();
    }

    /// Answers a drain once nothing is running.
    pub(super) fn settle_drain(&mut self) {
        if !self.tasks.is_empty() {
            return;
        }
        for reply in self
            .draining
            .iter_mut()
            .flat_map(|replies| replies.drain(..))
        {
            answer(reply, ());
        }
    }

    pub(super) fn tell(&self, event: LaneEvent) {
        if self.events.send(event).is_err() {
            tracing::debug!("the control thread has stopped listening");
        }
    }
}

/// A caller that no longer waits for its answer has ended: nothing is lost.
fn answer<T>(reply: Reply<T>, value: T) {
    let _ = reply.send(value);
}

fn unknown_session(session: SessionId) -> Refusal {
    Refusal::new(Status::Disconnected, format!("session {session} has ended"))
}
