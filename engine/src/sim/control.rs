//! The control thread's part: sessions and registrations come and go, and the lane's answers and
//! events arrive.

#![forbid(unsafe_code)]

use std::sync::Arc;

use pegaflow_shm::index::{IndexReader, RawReadMemory};
use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::status::Status;

use crate::lane::api::{
    CloseReason, LaneEvent, NewRegistration, Refusal, RegisteredGroup, SessionOpened,
};
use crate::sim::session::{Session, poll_once};
use crate::sim::truth::{Checked, Violation, ensure};
use crate::sim::world::World;

impl World {
    /// A process goes one step on, or all do: connects, registers, or hears an answer.
    pub fn step_control(&mut self) -> Checked {
        if self.rng.percent(50) {
            let process = self.rng.below(self.processes.len());
            return self.control(process);
        }
        for process in 0..self.processes.len() {
            self.control(process)?;
        }
        Ok(())
    }

    /// Does what a process is waiting for.
    pub fn control(&mut self, process: usize) -> Checked {
        self.hear_events()?;
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(());
        };
        let Some(session) = self.processes[process].session.as_mut() else {
            daemon.sessions += 1;
            let id = daemon.sessions;
            let handle = daemon.lane.handle.clone();
            let uid = self.namespace_of(process).uid;
            let (mut session, new) = Session::new(id, uid, self.plan.slots);
            session.opening = Some(Box::pin(async move { handle.open_session(new).await }));
            session.opening.as_mut().map(poll_once);
            self.processes[process].session = Some(session);
            self.note(|| format!("process {process} connects as session {id}"));
            return Ok(());
        };
        if let Some(opened) = session.opening.as_mut().and_then(poll_once) {
            return self.opened(process, opened);
        }
        if let Some(closed) = session.closing.as_mut().and_then(poll_once) {
            return self.closed(process, closed);
        }
        if let Some(registered) = session.registering.as_mut().and_then(poll_once) {
            session.registering = None;
            return self.registered(process, registered);
        }
        if let Some(left) = session.unregistering.as_mut().and_then(poll_once) {
            session.unregistering = None;
            return self.unregistered(process, left);
        }
        let idle = session.registering.is_none() && session.unregistering.is_none();
        if session.is_open() && session.registration.is_none() && idle {
            self.register(process);
        }
        Ok(())
    }

    fn opened(&mut self, process: usize, opened: Result<SessionOpened, Refusal>) -> Checked {
        let session = self.processes[process].session.as_mut().expect("it opens");
        session.opening = None;
        match opened {
            Ok(opened) => {
                let file = NamedFile::from_fd(opened.index, "index").expect("a file");
                let mapping = file.map_exact(Access::ReadOnly, opened.index_bytes);
                let mapping = Arc::new(mapping.expect("a mapping of the index"));
                let memory = RawReadMemory::from_mapping(mapping).expect("words");
                session.index = Some(IndexReader::open(memory).expect("an index"));
                self.note(|| format!("process {process} is connected"));
                Ok(())
            }
            Err(refusal) => {
                self.processes[process].session = None;
                self.note(|| format!("process {process} is refused: {refusal}"));
                ensure(
                    matches!(refusal.status, Status::Limit | Status::Draining),
                    "inv_8_a_refusal_names_a_limit",
                    || refusal.to_string(),
                )
            }
        }
    }

    fn register(&mut self, process: usize) {
        let spec = self.spec(process);
        let memory = self.processes[process].memory.as_ref();
        let groups = memory.into_iter().flat_map(|memory| &memory.groups);
        let groups = groups.map(|group| RegisteredGroup {
            group: group.group,
            target: group.bound.clone(),
        });
        let registration = NewRegistration {
            events: None,
            signals: None,
            spec,
            groups: groups.collect(),
        };
        let daemon = self.daemon.as_ref().expect("it is connected");
        let handle = daemon.lane.handle.clone();
        let session = self.processes[process]
            .session
            .as_mut()
            .expect("it is open");
        let id = session.id;
        session.registering = Some(Box::pin(
            async move { handle.register(id, registration).await },
        ));
        session.registering.as_mut().map(poll_once);
        self.note(|| format!("process {process} registers"));
    }

    fn registered(&mut self, process: usize, registered: Result<u32, Refusal>) -> Checked {
        self.note(|| format!("process {process} is registered: {registered:?}"));
        let session = self.processes[process]
            .session
            .as_mut()
            .expect("it registers");
        match registered {
            Ok(id) => {
                session.registration = Some(id);
                Ok(())
            }
            Err(refusal) => ensure(
                session.faulted
                    || session.closing.is_some()
                    || matches!(refusal.status, Status::AlreadyRegistered | Status::Limit),
                "inv_5_a_faulted_session_affects_no_other",
                || format!("process {process} cannot register: {refusal}"),
            ),
        }
    }

    fn unregistered(&mut self, process: usize, left: Result<(), Refusal>) -> Checked {
        self.note(|| format!("process {process} has left its instance: {left:?}"));
        let session = self.processes[process].session.as_mut().expect("it leaves");
        session.registration = None;
        session.ready = None;
        self.no_copy_touches(process, "its registration has ended")
    }

    fn closed(&mut self, process: usize, closed: Result<(), Refusal>) -> Checked {
        self.note(|| format!("session of process {process} is closed: {closed:?}"));
        self.processes[process].session = None;
        self.forget_requests(process);
        self.count("sessions closed");
        self.no_copy_touches(process, "its session is closed")
    }

    /// Nothing that a process waited for comes any more.
    pub fn forget_requests(&mut self, process: usize) {
        let memory = self.processes[process].memory.as_mut();
        for group in memory.into_iter().flat_map(|memory| &mut memory.groups) {
            group.busy.fill(false);
        }
    }

    /// No copy uses the memory of a process.
    pub fn no_copy_touches(&self, process: usize, why: &str) -> Checked {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let memory = self.processes[process].memory.as_ref();
        for group in memory.into_iter().flat_map(|memory| &memory.groups) {
            let tasks = daemon.copies.views();
            let touched = tasks
                .iter()
                .any(|task| Arc::ptr_eq(&task.target, &group.bound));
            ensure(!touched, "inv_2_no_block_is_reused_under_a_copy", || {
                format!("process {process}: {why}, and a copy still runs")
            })?;
        }
        Ok(())
    }

    /// Takes what the lane tells.
    pub fn hear_events(&mut self) -> Checked {
        loop {
            let event = self
                .daemon
                .as_mut()
                .map(|daemon| daemon.lane.events.try_recv());
            let Some(Ok(event)) = event else {
                return Ok(());
            };
            self.event(event)?;
        }
    }

    fn process_of(&self, session: u64) -> Option<usize> {
        self.processes.iter().position(|process| {
            let found = process.session.as_ref();
            found.is_some_and(|found| found.id == session)
        })
    }

    fn event(&mut self, event: LaneEvent) -> Checked {
        match event {
            LaneEvent::Ready {
                session, namespace, ..
            } => {
                let Some(process) = self.process_of(session) else {
                    return Ok(());
                };
                let wanted = self.plan.processes[process].namespace;
                let found = *self.truth.rows.entry(namespace).or_insert(wanted);
                self.processes[process]
                    .session
                    .as_mut()
                    .expect("found")
                    .ready = Some(namespace);
                ensure(found == wanted, "inv_3_one_row_names_one_namespace", || {
                    format!("row {namespace} is namespace {found}, and now {wanted} as well")
                })
            }
            LaneEvent::NotReady { session, .. } => {
                if let Some(process) = self.process_of(session) {
                    self.processes[process]
                        .session
                        .as_mut()
                        .expect("found")
                        .ready = None;
                }
                Ok(())
            }
            LaneEvent::Fault { session, message } => {
                let Some(process) = self.process_of(session) else {
                    return Ok(());
                };
                self.note(|| format!("process {process} broke the protocol: {message}"));
                self.count("faults");
                let session = self.processes[process].session.as_ref().expect("found");
                let mut requests = session.requests.values();
                // A client that left a list unfinished for long.
                let slow = requests.any(|request| !request.rest.is_empty())
                    && message.contains("did not come within");
                if !slow && !self.is_hostile(process) {
                    return Err(Violation {
                        invariant: "inv_5_a_faulted_session_affects_no_other",
                        what: format!("process {process} did nothing wrong: {message}"),
                    });
                }
                let session = self.processes[process].session.as_mut().expect("found");
                session.faulted = true;
                self.close(process, CloseReason::Faulted);
                Ok(())
            }
        }
    }

    /// Has a session closed.
    pub fn close(&mut self, process: usize, reason: CloseReason) {
        let Some(daemon) = &self.daemon else {
            return;
        };
        let handle = daemon.lane.handle.clone();
        let Some(session) = self.processes[process].session.as_mut() else {
            return;
        };
        if session.closing.is_some() {
            return;
        }
        let id = session.id;
        session.opening = None;
        session.closing = Some(Box::pin(
            async move { handle.close_session(id, reason).await },
        ));
        session.closing.as_mut().map(poll_once);
        self.note(|| format!("session of process {process} is to be closed: {reason:?}"));
    }

    /// A process dies, leaves, or gives up its registration.
    pub fn step_leave(&mut self) {
        let process = self.rng.below(self.processes.len());
        let choice = self.rng.below(4);
        let Some(session) = self.processes[process].session.as_mut() else {
            return;
        };
        match (choice, session.registration) {
            (0, Some(registration)) if session.is_open() && session.unregistering.is_none() => {
                let daemon = self.daemon.as_ref().expect("it is connected");
                let handle = daemon.lane.handle.clone();
                let id = session.id;
                let leaves = async move { handle.unregister(id, registration).await };
                session.unregistering = Some(Box::pin(leaves));
                session.unregistering.as_mut().map(poll_once);
                self.note(|| format!("process {process} unregisters"));
            }
            (1, _) => self.close(process, CloseReason::Left),
            _ => self.close(process, CloseReason::Died),
        }
    }
}
