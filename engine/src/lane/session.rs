//! One session as the lane sees it: rings, bells, registrations, unfinished requests.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use pegaflow_shm::bell::{BellFd, Sleeper, Waker};
use pegaflow_shm::desc::{Completion, DescriptorFault, MAX_LOAD_STEPS, Submission};
use pegaflow_shm::mapping::{Mapping, MappingError, SharedU32};
use pegaflow_shm::node::{SessionRow, text_field};
use pegaflow_shm::ring::{Consumer, Producer, RawRing, RingFault};
use pegaflow_shm::segment::{
    CONSUMED_OFFSET, SLEEP_EPOCH_OFFSET, SLOTS_OFFSET, STATE_OFFSET, SessionState,
};
use pegaflow_shm::status::Status;
use pegaflow_shm::sync::Ordering;

use crate::cache::domain::DomainId;
use crate::copy::{BoundLayout, RegionMapping, Signal};
use crate::device::{AfterEvent, DeviceEvents};
use crate::lane::api::{CloseReason, NewSession, Refusal, Reply, SessionId};
use crate::lane::request::Request;
use crate::registry::{GroupPlace, InstanceId};

/// Most registrations of one session.
pub(super) const MAX_REGISTRATIONS: usize = 64;

/// What a session did that ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionFault {
    #[error("submission ring: {0}")]
    Ring(#[from] RingFault),
    #[error("descriptor: {0}")]
    Descriptor(#[from] DescriptorFault),
    #[error("a submission slot was claimed and not published for {0} s")]
    Stalled(u64),
    #[error("request {0}: the rest of its list did not come within {1} s")]
    Abandoned(u64, u64),
}

/// A registration of the session.
pub(super) struct Registration {
    /// Its id. Ids are not used twice in a session, so that a late chunk of a request never meets
    /// the memory of another registration.
    pub id: u32,
    pub instance: InstanceId,
    pub rank: Option<u32>,
    pub save_only: bool,
    pub domain: DomainId,
    /// Namespace, while the instance is complete.
    pub ready: Option<u32>,
    /// Groups that can be named, while the instance is complete.
    pub places: Vec<GroupPlace>,
    /// Memory of the groups this rank registered.
    pub targets: Vec<(u16, Arc<BoundLayout>)>,
    /// Events that its copies may have to come after.
    pub events: Option<Arc<DeviceEvents>>,
    /// Words that its loads raise.
    pub signals: Option<Arc<RegionMapping>>,
    /// Groups cut into as many steps as loads wanted last.
    pub stepped: Vec<(u16, Arc<[Arc<BoundLayout>]>)>,
    /// Copy tasks that use the memory.
    pub copies: u32,
    /// Set once it is to end; the reply goes out with the last copy.
    pub leaving: Option<Vec<Reply<Result<(), Refusal>>>>,
}

impl Registration {
    /// What the copies of a save or load come after.
    pub(super) fn after(
        &self,
        submission: &Submission,
    ) -> Result<Option<AfterEvent>, DescriptorFault> {
        let Some(index) = submission.after() else {
            return Ok(None);
        };
        let count = self.events.as_ref().map_or(0, |events| events.len());
        match &self.events {
            Some(events) if (index as usize) < count => Ok(Some(AfterEvent {
                events: events.clone(),
                index,
            })),
            _ => Err(DescriptorFault::Event {
                index,
                count: count as u32,
            }),
        }
    }

    /// The word that a load raises.
    pub(super) fn signal(
        &self,
        submission: &Submission,
    ) -> Result<Option<Signal>, DescriptorFault> {
        let Some(signal) = submission.signal() else {
            return Ok(None);
        };
        let bytes = self.signals.as_ref().map_or(0, |region| region.bytes());
        let target = self.target(submission.group);
        let segments = target.map_or(1, |target| target.layout().segment_bytes().len());
        let end = (u64::from(signal.word) + 1) * size_of::<u32>() as u64;
        let known = signal.steps <= MAX_LOAD_STEPS
            && usize::from(signal.steps) <= segments
            && signal.base.checked_add(u32::from(signal.steps)).is_some();
        match &self.signals {
            Some(region) if end <= bytes && known => Ok(Some(Signal::new(region.clone(), signal))),
            _ => Err(DescriptorFault::Signal {
                signal,
                bytes,
                segments,
            }),
        }
    }

    /// A group's memory, cut into steps; `None` where it lies on no device.
    pub(super) fn steps(
        &mut self,
        group: u16,
        target: &Arc<BoundLayout>,
        steps: u16,
    ) -> Option<Arc<[Arc<BoundLayout>]>> {
        let mut known = self.stepped.iter();
        if let Some((_, known)) =
            known.find(|(known, cut)| *known == group && cut.len() == usize::from(steps))
        {
            return Some(known.clone());
        }
        let bytes = target.layout().segment_bytes();
        let end_of = |step: usize| {
            let segments = step * bytes.len() / usize::from(steps);
            bytes[..segments].iter().sum::<u64>()
        };
        let cut = (0..usize::from(steps)).map(|step| target.slice(end_of(step), end_of(step + 1)));
        let cut = cut.collect::<Option<Arc<[_]>>>()?;
        self.stepped.retain(|(known, _)| *known != group);
        self.stepped.push((group, cut.clone()));
        Some(cut)
    }

    pub(super) fn place(&self, group: u16) -> Option<GroupPlace> {
        self.places
            .iter()
            .find(|place| place.group == group)
            .copied()
    }

    pub(super) fn target(&self, group: u16) -> Option<&Arc<BoundLayout>> {
        self.targets
            .iter()
            .find(|(number, _)| *number == group)
            .map(|(_, target)| target)
    }
}

/// A session.
pub(super) struct LaneSession {
    pub id: SessionId,
    pub domain: DomainId,
    /// Its place in the lane's list.
    pub place: usize,
    pub registrations: Vec<Registration>,
    last_registration: u32,
    pub requests: HashMap<u64, Request>,
    /// Block ids that its unfinished loads keep.
    pub listed_blocks: usize,
    /// Copy tasks of the session.
    pub copies: u32,
    /// Of these, those that its process holds up, as of the last look.
    pub stuck_copies: u32,
    /// Set once the session is to end; the replies go out with the last copy.
    pub closing: Option<(CloseReason, Vec<Reply<()>>)>,
    /// It broke the protocol: its ring is not read any more.
    pub faulted: bool,
    pub lane_bell: OwnedFd,
    /// Since when its ring has had a gap.
    pub stalled_since: Option<Instant>,
    submissions: Consumer<RawRing>,
    completions: Producer<RawRing>,
    completion_slots: u32,
    sleeper: Sleeper<SharedU32>,
    waker: Waker<SharedU32>,
    client_bell: BellFd,
    c2d: Arc<Mapping>,
    d2c: Arc<Mapping>,
    arena_offset: usize,
    arena_bytes: u32,
    result_offset: usize,
    result_bytes: u64,
    posted: bool,
    row: SessionRow,
}

impl LaneSession {
    pub(super) fn new(
        new: NewSession,
        domain: DomainId,
        connected_unix_ms: u64,
    ) -> Result<LaneSession, MappingError> {
        let (c2d, d2c) = (new.c2d, new.d2c);
        let submissions = RawRing::for_consumer(
            &c2d,
            SLOTS_OFFSET,
            new.c2d_shape.slots,
            &d2c,
            CONSUMED_OFFSET,
        )?;
        let completions = RawRing::for_producer(
            &d2c,
            SLOTS_OFFSET,
            new.d2c_shape.slots,
            &c2d,
            CONSUMED_OFFSET,
        )?;
        let sleeper = Sleeper::new(SharedU32::new(&d2c, SLEEP_EPOCH_OFFSET)?);
        let waker = Waker::new(SharedU32::new(&c2d, SLEEP_EPOCH_OFFSET)?);
        let row = SessionRow {
            session: new.id,
            pid: new.pid,
            uid: new.uid,
            domain: text_field(new.domain.name()),
            connected_unix_ms,
            submission_slots: new.c2d_shape.slots,
            completion_slots: new.d2c_shape.slots,
            submissions: 0,
            completions: 0,
            unfinished: 0,
            registrations: 0,
            copies: 0,
            stuck_copies: 0,
            rank: u32::MAX,
            world_size: 0,
            client_name: text_field(&new.client_name),
            instance: [0; 64],
        };
        let session = LaneSession {
            id: new.id,
            domain,
            place: 0,
            registrations: Vec::new(),
            last_registration: 0,
            requests: HashMap::new(),
            listed_blocks: 0,
            copies: 0,
            stuck_copies: 0,
            closing: None,
            faulted: false,
            lane_bell: new.lane_bell,
            stalled_since: None,
            submissions: Consumer::new(submissions),
            completions: Producer::new(completions),
            completion_slots: new.d2c_shape.slots,
            sleeper,
            waker,
            client_bell: new.client_bell,
            arena_offset: new.c2d_shape.arena_offset(),
            arena_bytes: new.c2d_shape.arena_bytes() as u32,
            result_offset: new.d2c_shape.arena_offset(),
            result_bytes: new.d2c_shape.arena_bytes() as u64,
            c2d,
            d2c,
            posted: false,
            row,
        };
        session.show_state(SessionState::Active)?;
        Ok(session)
    }

    /// The next submission, its state-free fields not yet checked.
    #[inline]
    pub(super) fn next_submission(&mut self) -> Result<Option<Submission>, SessionFault> {
        let body = self.submissions.try_pop()?;
        if body.is_some() {
            self.row.submissions += 1;
        }
        Ok(body.map(Submission::from_body))
    }

    /// True when a submission may be waiting.
    pub(super) fn has_submission(&self) -> bool {
        !self.faulted && self.closing.is_none() && self.submissions.ready()
    }

    /// True when a slot was claimed by a thread that has not published it, and others after it
    /// have.
    pub(super) fn is_stalled(&self) -> bool {
        self.submissions.stalled()
    }

    #[cfg(test)]
    pub(super) fn completion_slots(&self) -> u32 {
        self.completion_slots
    }

    pub(super) fn arena_bytes(&self) -> u32 {
        self.arena_bytes
    }

    /// Copies a submission's payload, whose bounds were checked, into `out`.
    pub(super) fn copy_payload(
        &self,
        submission: &Submission,
        out: &mut [u8],
    ) -> Result<(), MappingError> {
        self.c2d
            .copy_out(self.arena_offset + submission.payload_offset as usize, out)
    }

    /// True when a result of `bytes` may be written at `offset` of the result arena.
    pub(super) fn result_fits(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(8)
            && offset
                .checked_add(bytes)
                .is_some_and(|end| end <= self.result_bytes)
    }

    pub(super) fn write_result(&self, offset: u64, bytes: &[u8]) -> Result<(), MappingError> {
        self.d2c
            .copy_in(self.result_offset + offset as usize, bytes)
    }

    /// Requests that this session may not exceed: it has no more completion slots.
    pub(super) fn has_credit(&self) -> bool {
        self.requests.len() < self.completion_slots as usize
    }

    pub(super) fn credit_fault(&self) -> SessionFault {
        DescriptorFault::Credit {
            limit: self.completion_slots,
        }
        .into()
    }

    /// Posts a completion; the client is woken by [`Self::ring`].
    #[inline]
    pub(super) fn post(&mut self, completion: &Completion) -> Result<(), SessionFault> {
        self.posted = true;
        self.row.completions += 1;
        self.completions
            .try_push(&completion.to_body())
            .map_err(|_| self.credit_fault())
    }

    /// Wakes the client if it sleeps and something was posted. True if it was woken.
    #[inline]
    pub(super) fn ring(&mut self) -> bool {
        if !std::mem::take(&mut self.posted) || !self.waker.should_ring() {
            return false;
        }
        if let Err(error) = self.client_bell.ring() {
            tracing::debug!(session = self.id, %error, "the client's bell is gone");
        }
        true
    }

    pub(super) fn arm(&mut self) {
        self.sleeper.arm();
    }

    pub(super) fn disarm(&mut self) {
        self.sleeper.disarm();
    }

    pub(super) fn show_state(&self, state: SessionState) -> Result<(), MappingError> {
        // Relaxed: the client reads it as a hint. What was posted is ordered by the ring alone, and
        // that the session is over comes over the socket.
        self.d2c
            .atomic_u32(STATE_OFFSET)?
            .store(state as u32, Ordering::Relaxed);
        Ok(())
    }

    /// A registration that is not about to end.
    #[inline]
    pub(super) fn registration(&self, id: u32) -> Result<&Registration, Status> {
        self.registrations
            .iter()
            .find(|registration| registration.id == id && registration.leaving.is_none())
            .ok_or(Status::UnknownRegistration)
    }

    pub(super) fn registration_mut(&mut self, id: u32) -> Option<&mut Registration> {
        self.registrations
            .iter_mut()
            .find(|registration| registration.id == id)
    }

    /// The id for a new registration.
    pub(super) fn next_registration(&mut self) -> u32 {
        self.last_registration += 1;
        self.last_registration
    }

    /// Process of the client.
    pub(super) fn pid(&self) -> u32 {
        self.row.pid
    }

    /// Its row in the node file.
    pub(super) fn row(&self) -> SessionRow {
        SessionRow {
            unfinished: self.requests.len() as u32,
            registrations: self.registrations.len() as u32,
            copies: self.copies,
            stuck_copies: self.stuck_copies,
            ..self.row
        }
    }

    /// Shows the first registration in tables.
    pub(super) fn describe(&mut self, instance: &str, rank: Option<u32>, world_size: u32) {
        if self.row.world_size == 0 {
            self.row.instance = text_field(instance);
            self.row.rank = rank.unwrap_or(u32::MAX);
            self.row.world_size = world_size;
        }
    }
}
