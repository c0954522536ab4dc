//! A submission arrives: it is checked, and lists of several chunks are put together.

#![forbid(unsafe_code)]

use std::time::Instant;

use pegaflow_shm::desc::{Completion, DescriptorFault, Op, Submission, flags};
use pegaflow_shm::node::Counter;
use pegaflow_shm::payload::CHUNK_BYTES;
use pegaflow_shm::status::Status;

use crate::lane::machine::Machine;
use crate::lane::request::Request;
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};

impl<M: Machine> Lane<M> {
    /// Handles one submission of a session.
    pub(super) fn submit(
        &mut self,
        session: &mut LaneSession,
        submission: &Submission,
        now: Instant,
    ) -> Result<(), SessionFault> {
        let op = submission.check(session.arena_bytes())?;
        if op == Op::Nop {
            return self.complete(
                session,
                Completion::new(op, submission.request_id, Status::Ok),
            );
        }
        let known = session.requests.contains_key(&submission.request_id);
        if !known && !session.has_credit() {
            return Err(session.credit_fault());
        }
        match op {
            Op::Query | Op::Load | Op::Save => self.submit_list(session, submission, op, now),
            _ if known => {
                let request_id = submission.request_id;
                Err(DescriptorFault::RequestInUse { request_id }.into())
            }
            Op::Release => self.release(session, submission, now),
            Op::Renew => self.renew(session, submission, now),
            Op::Cancel => self.cancel(session, submission),
            Op::Nop => Ok(()),
        }
    }

    fn submit_list(
        &mut self,
        session: &mut LaneSession,
        submission: &Submission,
        op: Op,
        now: Instant,
    ) -> Result<(), SessionFault> {
        if submission.payload_bytes as usize > CHUNK_BYTES {
            return Err(DescriptorFault::PayloadSize {
                bytes: submission.payload_bytes,
                count: submission.count,
            }
            .into());
        }
        let mut chunk = std::mem::take(&mut self.chunk);
        chunk.resize(submission.payload_bytes as usize, 0);
        session
            .copy_payload(submission, &mut chunk)
            .map_err(|_| DescriptorFault::Payload {
                offset: submission.payload_offset,
                bytes: submission.payload_bytes,
                arena_bytes: session.arena_bytes(),
            })?;
        // Only now: what a request holds is let go of through the session's list.
        let request = match session.requests.remove(&submission.request_id) {
            Some(request) => request,
            None => self.new_request(session, submission, op, now),
        };
        let more = submission.flags & flags::MORE != 0;
        let outcome = match request {
            Request::Query(query) => self.query_chunk(session, query, submission, more, &chunk),
            Request::Load(load) => self.load_chunk(session, load, submission, more, &chunk),
            Request::Save(save) => self.save_chunk(session, save, submission, more, &chunk),
        };
        self.chunk = chunk;
        outcome
    }

    fn new_request(
        &mut self,
        session: &LaneSession,
        submission: &Submission,
        op: Op,
        now: Instant,
    ) -> Request {
        let mut request = match op {
            Op::Load => Request::Load(Box::new(self.new_load(submission, now))),
            Op::Save => Request::Save(Box::new(self.new_save(session, submission, now))),
            _ => Request::Query(Box::new(self.new_query(session, submission, now))),
        };
        if self.draining.is_some() {
            let list = match &mut request {
                Request::Query(query) => &mut query.list,
                Request::Load(load) => &mut load.list,
                Request::Save(save) => &mut save.list,
            };
            list.failed = Some((Status::Draining, 0));
        }
        request
    }

    /// Posts a completion and counts it.
    #[inline]
    pub(super) fn complete(
        &mut self,
        session: &mut LaneSession,
        completion: Completion,
    ) -> Result<(), SessionFault> {
        let counter = match Op::from_code(completion.op) {
            Some(Op::Query) => Counter::RequestsQuery,
            Some(Op::Load) => Counter::RequestsLoad,
            Some(Op::Save) => Counter::RequestsSave,
            Some(Op::Release) => Counter::RequestsRelease,
            Some(Op::Renew) => Counter::RequestsRenew,
            Some(Op::Cancel) => Counter::RequestsCancel,
            Some(Op::Nop) | None => Counter::RequestsNop,
        };
        self.tally.add(counter, 1);
        if ![Status::Ok as u8, Status::Loading as u8].contains(&completion.status) {
            self.tally.add(Counter::RequestErrors, 1);
        }
        session.post(&completion)
    }
}
