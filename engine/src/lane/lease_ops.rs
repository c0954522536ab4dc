//! Release, renew, cancel; and what the end of a lease means.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pegaflow_shm::desc::{Completion, Op, Submission};
use pegaflow_shm::node::{Counter, Histogram, LeaseRow};
use pegaflow_shm::status::Status;

use crate::cache::lease::{Ended, LeaseEnd};
use crate::clock::Clock;
use crate::lane::machine::Machine;
use crate::lane::run::Lane;
use crate::lane::session::{LaneSession, SessionFault};

impl<M: Machine> Lane<M> {
    pub(super) fn release(
        &mut self,
        session: &mut LaneSession,
        submission: &Submission,
        now: Instant,
    ) -> Result<(), SessionFault> {
        let id = submission.arg0;
        let status = self.check_lease(session, submission);
        if status.is_ok() {
            let ended = self.leases.end(id, LeaseEnd::Released);
            self.finish_leases(ended);
            self.node
                .observe(Histogram::Release, self.since(now).as_nanos() as u64);
        }
        let mut completion = Completion::new(Op::Release, submission.request_id, status);
        completion.lease = id;
        self.complete(session, completion)
    }

    pub(super) fn renew(
        &mut self,
        session: &mut LaneSession,
        submission: &Submission,
        now: Instant,
    ) -> Result<(), SessionFault> {
        let id = submission.arg0;
        let wanted = match submission.arg1 {
            0 => self.options.lease_ttl,
            ttl_ms => Duration::from_millis(ttl_ms).min(self.options.lease_ttl_max),
        };
        let ttl_ms = wanted.as_millis() as u64;
        let mut status = self.check_lease(session, submission);
        if status.is_ok() {
            status = self
                .leases
                .extend(id, now + wanted, ttl_ms)
                .err()
                .unwrap_or(Status::Ok);
            self.show_lease(id);
        }
        let mut completion = Completion::new(Op::Renew, submission.request_id, status);
        completion.lease = id;
        completion.arg0 = ttl_ms;
        self.complete(session, completion)
    }

    /// A lease may be named by any process of the instance that it was given to.
    fn check_lease(&self, session: &LaneSession, submission: &Submission) -> Status {
        let registration = match session.registration(submission.registration) {
            Ok(registration) => registration,
            Err(status) => return status,
        };
        match self.leases.get(submission.arg0) {
            Ok(lease) if lease.request.instance == registration.instance => Status::Ok,
            Ok(_) => Status::UnknownLease,
            Err(status) => status,
        }
    }

    pub(super) fn cancel(
        &mut self,
        session: &mut LaneSession,
        submission: &Submission,
    ) -> Result<(), SessionFault> {
        let mut status = Status::UnknownRequest;
        if let Some(request) = session.requests.get(&submission.arg0)
            && let Some(copies) = request.copies()
        {
            copies.cancelled.store(true, Ordering::Relaxed);
            status = Status::Ok;
            self.cancel_held(session, submission.arg0)?;
        } else if self.cancel_wait(session, submission.arg0)? {
            status = Status::Ok;
        }
        let mut completion = Completion::new(Op::Cancel, submission.request_id, status);
        completion.arg0 = submission.arg0;
        self.complete(session, completion)
    }

    /// Lets go of the blocks of leases that ended.
    pub(super) fn finish_leases(&mut self, ended: impl IntoIterator<Item = Ended>) {
        for Ended { id, end, lease } in ended {
            self.cache.unpin(lease.domain, &lease.entries);
            self.tally.add(
                match end {
                    LeaseEnd::Consumed => Counter::LeasesConsumed,
                    LeaseEnd::Released => Counter::LeasesReleased,
                    LeaseEnd::Expired => Counter::LeasesExpired,
                    LeaseEnd::Replaced => Counter::LeasesReplaced,
                    LeaseEnd::OwnerGone => Counter::LeasesOwnerGone,
                },
                1,
            );
            self.node
                .write_lease(self.leases.position(id), &bytemuck::Zeroable::zeroed());
            self.recycle(lease.entries);
        }
    }

    /// Writes a lease's row in the node file.
    pub(super) fn show_lease(&self, id: u64) {
        let Ok(lease) = self.leases.get(id) else {
            return;
        };
        let left = lease.deadline.saturating_duration_since(self.clock.now());
        let row = LeaseRow {
            lease: id,
            session: lease.session,
            request_key: lease.request.key,
            expires_unix_ms: self.clock.unix_ms() + left.as_millis() as u64,
            blocks: lease.entries.len() as u32,
            consumed_by: lease.consumed_by(),
            world_size: lease.world_size,
            copies: lease.copies(),
            group: u32::from(lease.request.group),
            namespace: lease.namespace,
        };
        self.node.write_lease(self.leases.position(id), &row);
    }
}
