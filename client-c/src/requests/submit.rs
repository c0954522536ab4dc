//! Submission: reserve under the lock, write and publish outside it.
//!
//! A request that is accepted has its table slot, its arena chunks, its ring slots and the room for
//! its answer before the first chunk is published, so no request is ever left half sent.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::sync::Arc;

use bytemuck::Zeroable;
use pegaflow_shm::BlockHash;
use pegaflow_shm::control::PROTOCOL_TIERS;
use pegaflow_shm::desc::{Completion as Answer, Op, Submission, flags};
use pegaflow_shm::payload::{encode_blocks, items_per_chunk};
use pegaflow_shm::status::Status;

use super::arena::Chain;
use super::collect::Collector;
use super::results::bitmap_bytes;
use super::table::{Held, ResultSource, local_answer};
use crate::Error;
use crate::client::{Inner, Shared, Wakes};
use crate::completion::{RegistrationId, RequestId};
use crate::cuda::{EventSlot, SignalSlot};
use crate::query::Fetch;
use crate::session::{Live, Session};
use crate::stats::Limits;

thread_local! {
    /// Encoded block ids of one chunk; keeps its room from chunk to chunk.
    static ENCODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A request as the caller wants it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draft<'a> {
    op: Op,
    group: u16,
    registration: Option<RegistrationId>,
    hashes: &'a [BlockHash],
    blocks: &'a [u32],
    arg0: u64,
    arg1: u64,
    arg2: u64,
    cookie: u64,
    fetch: Fetch,
    steps: u16,
}

impl<'a> Draft<'a> {
    fn new(op: Op, registration: Option<RegistrationId>) -> Draft<'a> {
        Draft {
            op,
            group: 0,
            registration,
            hashes: &[],
            blocks: &[],
            arg0: 0,
            arg1: 0,
            arg2: 0,
            cookie: 0,
            fetch: Fetch::Poll,
            steps: 0,
        }
    }

    pub(crate) fn query(
        registration: RegistrationId,
        group: u16,
        key: u64,
        hashes: &'a [BlockHash],
        ttl_ms: u64,
    ) -> Draft<'a> {
        let draft = Draft::new(Op::Query, Some(registration));
        Draft {
            group,
            hashes,
            arg0: key,
            arg2: ttl_ms,
            ..draft
        }
    }

    pub(crate) fn load(
        registration: RegistrationId,
        group: u16,
        lease: u64,
        first: u32,
        blocks: &'a [u32],
    ) -> Draft<'a> {
        let draft = Draft::new(Op::Load, Some(registration));
        Draft {
            group,
            blocks,
            arg0: lease,
            arg1: u64::from(first),
            ..draft
        }
    }

    /// `hashes` and `blocks` are of one length.
    pub(crate) fn save(
        registration: RegistrationId,
        group: u16,
        hashes: &'a [BlockHash],
        blocks: &'a [u32],
    ) -> Draft<'a> {
        Draft {
            group,
            hashes,
            blocks,
            ..Draft::new(Op::Save, Some(registration))
        }
    }

    pub(crate) fn release(registration: RegistrationId, lease: u64) -> Draft<'a> {
        Draft {
            arg0: lease,
            ..Draft::new(Op::Release, Some(registration))
        }
    }

    pub(crate) fn renew(registration: RegistrationId, lease: u64, ttl_ms: u64) -> Draft<'a> {
        let draft = Draft::new(Op::Renew, Some(registration));
        Draft {
            arg0: lease,
            arg1: ttl_ms,
            ..draft
        }
    }

    pub(crate) fn cancel(request: RequestId) -> Draft<'a> {
        Draft {
            arg0: request.0,
            ..Draft::new(Op::Cancel, None)
        }
    }

    pub(crate) fn nop() -> Draft<'a> {
        Draft::new(Op::Nop, None)
    }

    /// What a query does about blocks below the pool.
    pub(crate) fn with_fetch(self, fetch: Fetch) -> Draft<'a> {
        Draft { fetch, ..self }
    }

    /// A load that tells streams of each of so many steps.
    pub(crate) fn in_steps(self, steps: u16) -> Draft<'a> {
        Draft { steps, ..self }
    }

    /// Steps of a load; 0 where it comes whole.
    pub(crate) fn steps(&self) -> u16 {
        self.steps
    }

    /// Cache group.
    pub(crate) fn group(&self) -> u16 {
        self.group
    }

    /// Comes back in the completion.
    pub(crate) fn with_cookie(self, cookie: u64) -> Draft<'a> {
        Draft { cookie, ..self }
    }

    /// What it speaks for; 0, which is none, for what speaks for no registration.
    pub(crate) fn registration(&self) -> RegistrationId {
        self.registration.unwrap_or(RegistrationId(0))
    }

    fn total(&self) -> usize {
        self.hashes.len().max(self.blocks.len())
    }

    fn is_list(&self) -> bool {
        matches!(self.op, Op::Query | Op::Load | Op::Save)
    }

    fn wants_bitmap(&self) -> bool {
        self.op == Op::Query && self.group != 0
    }
}

/// What a request was given under the lock.
struct Reserved {
    id: u64,
    session: Arc<Session>,
    chain: Chain,
    template: Submission,
}

impl Shared {
    pub(crate) fn submit(&self, draft: &Draft<'_>) -> Result<RequestId, Error> {
        self.submit_with(draft, None, None)
    }

    /// Submits a save or load that comes after a recorded event, and raises a word as it comes in.
    pub(crate) fn submit_with(
        &self,
        draft: &Draft<'_>,
        after: Option<EventSlot>,
        signal: Option<SignalSlot>,
    ) -> Result<RequestId, Error> {
        self.check_process()?;
        // Copied before the lock is taken.
        let blocks = (draft.op == Op::Load).then(|| Box::from(draft.blocks));
        let mut inner = self.lock();
        let (remote, takes_signals) = match draft.registration {
            Some(id) => {
                let registered = inner.registration(id)?;
                (registered.remote, registered.signals)
            }
            None => (Some(0), false),
        };
        let signal = signal.filter(|_| takes_signals);
        let (Some(remote), true) = (remote, inner.serves()) else {
            return self.offline(inner, draft);
        };
        if draft.is_list() && draft.total() == 0 {
            return self.answer_here(inner, draft, Status::Ok);
        }
        if draft.is_list() && inner.live.as_ref().is_some_and(|l| l.session.is_draining()) {
            // What the daemon would answer, without the way there.
            inner.check_length(draft)?;
            return self.answer_here(inner, draft, Status::Draining);
        }
        if draft.op == Op::Cancel && inner.table.in_flight(draft.arg0).is_none() {
            return Err(Error::UnknownRequest(draft.arg0));
        }
        let number = inner.live.as_ref().map(|live| live.session.number);
        if let Some(slot) = &after
            && !number.is_some_and(|number| slot.is_shared_with(number))
        {
            drop(inner);
            self.wait_here(slot)?;
            return self.submit_with(draft, None, signal);
        }
        let reserved = inner
            .reserve(draft, remote, blocks, (after, signal))
            .inspect_err(|error| {
                if matches!(error, Error::Again(_)) {
                    inner.stats.again += 1;
                }
            })?;
        drop(inner);
        let id = RequestId(reserved.id);
        if let Err(error) = publish(&reserved, draft) {
            // The request ends with the session, so its id stays good.
            let session = &reserved.session;
            self.lose(session.number, error.status(), &error.to_string());
        }
        Ok(id)
    }

    /// The daemon is away, or has not taken the registration back yet.
    #[cold]
    fn offline(&self, inner: Guard<'_>, draft: &Draft<'_>) -> Result<RequestId, Error> {
        if draft.op == Op::Query {
            return self.answer_here(inner, draft, Status::Disconnected);
        }
        match inner.unserved(draft)? {
            Some(error) => Err(error),
            None => Err(inner.disconnected()),
        }
    }

    /// Completes a request without the daemon.
    #[cold]
    fn answer_here(
        &self,
        mut inner: Guard<'_>,
        draft: &Draft<'_>,
        status: Status,
    ) -> Result<RequestId, Error> {
        let source = draft.wants_bitmap().then(|| ResultSource {
            session: None,
            range: None,
            positions: draft.total() as u32,
        });
        let held = Held {
            op: draft.op,
            total: draft.total() as u32,
            chain: Chain::EMPTY,
            slots: 0,
            source,
            cookie: draft.cookie,
            blocks: (draft.op == Op::Load).then(|| Box::from(draft.blocks)),
            after: None,
            signal: None,
        };
        let id = inner
            .table
            .insert(held)
            .ok_or(Error::Again("completion ring"))?;
        inner.stats.submitted += 1;
        let answer: Answer = local_answer(draft.op, id, status);
        let mut wakes = Wakes::default();
        self.finish(&mut inner, id, answer, Collector::Other, &mut wakes);
        drop(inner);
        self.deliver(wakes);
        Ok(RequestId(id))
    }

    pub(crate) fn limits(&self) -> Limits {
        if self.check_process().is_err() {
            // The lock may be held for ever by a thread that this fork does not have.
            return Limits::default();
        }
        let inner = self.lock();
        let list = |op| match &inner.live {
            Some(live) => max_items(live, op).0,
            None => {
                let chunks = self
                    .resolved
                    .shape
                    .arena_chunks
                    .min(self.resolved.shape.slots * 3 / 4);
                chunks as usize * items_per_chunk(op)
            }
        };
        let query_hashes = list(Op::Query);
        Limits {
            query_hashes,
            membership_hashes: query_hashes.min(inner.result_positions),
            save_blocks: list(Op::Save),
            load_blocks: list(Op::Load),
            requests: inner
                .live
                .as_ref()
                .map_or(inner.table.capacity(), |l| l.credit as usize),
        }
    }
}

type Guard<'a> = std::sync::MutexGuard<'a, Inner>;

/// Most items of one list, and which size says so.
fn max_items(live: &Live, op: Op) -> (usize, &'static str) {
    let (arena, ring) = (live.session.arena_chunks, live.slots_limit);
    let per_chunk = items_per_chunk(op);
    if arena <= ring {
        (arena as usize * per_chunk, "the arena (option arena_bytes)")
    } else {
        (
            ring as usize * per_chunk,
            "the submission ring (option ring_slots)",
        )
    }
}

impl Inner {
    /// True while requests can go to the daemon.
    #[inline]
    fn serves(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.session.ending().is_none())
    }

    /// Why the present daemon, if any, does not serve the registration of a request.
    pub(crate) fn unserved(&self, draft: &Draft<'_>) -> Result<Option<Error>, Error> {
        let Some(id) = draft.registration else {
            return Ok((!self.serves()).then(|| self.disconnected()));
        };
        let registered = self.registration(id)?;
        if !self.serves() {
            return Ok(Some(self.disconnected()));
        }
        Ok(match (&registered.refusal, registered.remote) {
            (_, Some(_)) => None,
            (Some((status, message)), None) => Some(Error::Refused {
                status: *status,
                message: message.clone(),
            }),
            (None, None) => Some(Error::NotReady(id.0)),
        })
    }

    /// Whether the list is one that the present session can take at all.
    fn check_length(&self, draft: &Draft<'_>) -> Result<(), Error> {
        self.live
            .as_ref()
            .map_or(Ok(()), |live| chunks_of(live, draft).map(drop))
    }

    fn reserve(
        &mut self,
        draft: &Draft<'_>,
        registration: u32,
        blocks: Option<Box<[u32]>>,
        (after, signal): (Option<EventSlot>, Option<SignalSlot>),
    ) -> Result<Reserved, Error> {
        let Some(live) = &mut self.live else {
            return Err(self.disconnected());
        };
        let total = draft.total();
        let chunks = chunks_of(live, draft)?;
        let slots = chunks.max(1);
        if self.table.is_full() || live.in_flight >= live.credit {
            return Err(Error::Again("completion ring"));
        }
        if live.slots_used + slots > live.slots_limit {
            return Err(Error::Again("submission ring"));
        }
        let mut template = Submission {
            op: draft.op as u8,
            group: draft.group,
            registration,
            total: total as u32,
            arg0: draft.arg0,
            arg1: draft.arg1,
            arg2: draft.arg2,
            ..Submission::zeroed()
        };
        if live.session.welcome.protocol >= PROTOCOL_TIERS {
            draft.fetch.apply(&mut template);
        }
        if let Some(slot) = &after {
            template = template.with_after(Some(slot.index()));
        }
        template = template.with_signal(signal.as_ref().map(SignalSlot::signal));
        let chain = live.chunks.take(chunks).ok_or(Error::Again("arena"))?;
        let source = match take_result(live, draft) {
            Ok(source) => source,
            Err(error) => {
                live.chunks.put(chain);
                return Err(error);
            }
        };
        if let Some(range) = source.as_ref().and_then(|source| source.range) {
            template.arg1 = range.offset() as u64;
        }
        let session = live.session.clone();
        (live.in_flight, live.slots_used) = (live.in_flight + 1, live.slots_used + slots);
        let cookie = draft.cookie;
        let held = Held {
            op: draft.op,
            total: total as u32,
            chain,
            slots,
            source,
            cookie,
            blocks,
            after,
            signal,
        };
        let id = self
            .table
            .insert(held)
            .ok_or(Error::Again("completion ring"))?;
        template.request_id = id;
        self.stats.submitted += 1;
        Ok(Reserved {
            id,
            session,
            chain,
            template,
        })
    }
}

/// Arena chunks that a request takes.
fn chunks_of(live: &Live, draft: &Draft<'_>) -> Result<u32, Error> {
    if !draft.is_list() {
        return Ok(0);
    }
    let (total, (limit, limit_name)) = (draft.total(), max_items(live, draft.op));
    if total > limit {
        return Err(Error::TooMany {
            op: draft.op,
            count: total,
            limit_name,
            limit,
        });
    }
    Ok(total.div_ceil(items_per_chunk(draft.op)) as u32)
}

fn take_result(live: &mut Live, draft: &Draft<'_>) -> Result<Option<ResultSource>, Error> {
    if !draft.wants_bitmap() {
        return Ok(None);
    }
    let (total, limit) = (draft.total(), live.results.max_positions());
    if total > limit {
        debug_assert!(bitmap_bytes(total) > bitmap_bytes(limit));
        let limit_name = "the daemon's result arena";
        return Err(Error::TooMany {
            op: draft.op,
            count: total,
            limit_name,
            limit,
        });
    }
    let range = live
        .results
        .take(total)
        .ok_or(Error::Again("result arena"))?;
    let session = Some(live.session.clone());
    Ok(Some(ResultSource {
        session,
        range: Some(range),
        positions: total as u32,
    }))
}

/// Writes and publishes chunk by chunk: the daemon works on the first while the rest is copied.
fn publish(reserved: &Reserved, draft: &Draft<'_>) -> Result<(), Error> {
    let Reserved {
        session,
        chain,
        template,
        ..
    } = reserved;
    if chain.count == 0 {
        push(session, template)?;
        return Ok(());
    }
    let (per_chunk, total) = (items_per_chunk(draft.op), draft.total());
    for (number, chunk) in chain.chunks(&session.links).enumerate() {
        let start = number * per_chunk;
        let end = total.min(start + per_chunk);
        let (flags, bytes) = write_chunk(session, draft, chunk, start..end)?;
        let more = if end < total { flags::MORE } else { 0 };
        let submission = Submission {
            flags: template.flags | flags | more,
            payload_offset: session.chunk_offset(chunk),
            payload_bytes: bytes as u32,
            count: (end - start) as u32,
            ..*template
        };
        push(session, &submission)?;
    }
    Ok(())
}

#[inline]
fn push(session: &Session, submission: &Submission) -> Result<(), Error> {
    // There is room for every chunk of an accepted request unless the daemon's progress is a lie.
    let pushed = session.push(&submission.to_body());
    pushed.map_err(|error| Error::Protocol(format!("submission ring: {error}")))?;
    session.wake_daemon();
    Ok(())
}

/// Returns the flags that tell how the blocks are encoded, and the bytes written.
fn write_chunk(
    session: &Session,
    draft: &Draft<'_>,
    chunk: u32,
    range: std::ops::Range<usize>,
) -> Result<(u8, usize), Error> {
    let mut at = 0;
    if !draft.hashes.is_empty() {
        let hashes = bytemuck::cast_slice(&draft.hashes[range.clone()]);
        session.write_chunk(chunk, 0, hashes)?;
        at = hashes.len();
    }
    if draft.blocks.is_empty() {
        return Ok((0, at));
    }
    ENCODED.with_borrow_mut(|encoded| {
        encoded.clear();
        let flags = encode_blocks(&draft.blocks[range], encoded);
        session.write_chunk(chunk, at, encoded)?;
        Ok((flags, at + encoded.len()))
    })
}
