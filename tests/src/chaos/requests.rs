//! One request from its submission to its completion, and the answers that may come.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pegaflow::{Client, Completion, Error, Op, RequestId, Status};

use super::message::fault;
use super::timed::{Call, Caller};

/// Bound of one wait; a request that takes longer is waited for again.
const WAIT: Duration = Duration::from_millis(250);
/// A request that is not complete by then never will be: every stop of the daemon is shorter.
pub const REQUEST_BOUND: Duration = Duration::from_secs(30);
/// Pause before a submission that found no room is tried again.
const PAUSE: Duration = Duration::from_micros(200);

/// One thread's way into the library.
pub struct Door<'a> {
    /// The client.
    pub client: &'a Client,
    /// Times its calls.
    pub caller: Caller,
    /// Answers so far, by status.
    pub answers: BTreeMap<&'static str, u64>,
}

impl<'a> Door<'a> {
    /// Through this client.
    pub fn new(client: &'a Client, caller: Caller) -> Door<'a> {
        Door {
            client,
            caller,
            answers: BTreeMap::new(),
        }
    }

    /// Submits and waits. The status is one that may come, or this process ends with a fault.
    pub fn finish(
        &mut self,
        op: Op,
        submit: impl Fn(&Client) -> Result<RequestId, Error>,
    ) -> Result<Completion, Status> {
        let request = self.submit(op, submit)?;
        self.complete(op, request)
    }

    /// Submits, again and again while there is no room.
    pub fn submit(
        &mut self,
        op: Op,
        submit: impl Fn(&Client) -> Result<RequestId, Error>,
    ) -> Result<RequestId, Status> {
        let begun = Instant::now();
        loop {
            let client = self.client;
            let submitted = self
                .caller
                .call(Call::Submit, Duration::ZERO, || submit(client));
            match submitted {
                Ok(request) => return Ok(request),
                Err(Error::Again(_)) if begun.elapsed() < REQUEST_BOUND => {
                    std::thread::sleep(PAUSE);
                }
                Err(Error::Again(what)) => {
                    fault(format!("hang: no room in the {what} for {REQUEST_BOUND:?}"))
                }
                Err(error) => {
                    self.note(op, error.status(), &error.to_string());
                    return Err(error.status());
                }
            }
        }
    }

    /// Waits for the answer to a request.
    pub fn complete(&mut self, op: Op, request: RequestId) -> Result<Completion, Status> {
        let begun = Instant::now();
        loop {
            let client = self.client;
            let waited = self
                .caller
                .call(Call::Wait, WAIT, || client.wait(request, WAIT));
            match waited {
                Ok(completion) => {
                    self.note(op, completion.status, "");
                    return match completion.status {
                        Status::Ok | Status::NoSpace => Ok(completion),
                        status => Err(status),
                    };
                }
                Err(Error::Timeout { .. }) if begun.elapsed() < REQUEST_BOUND => {}
                Err(Error::Timeout { .. }) => fault(format!(
                    "hang: {op:?} is not complete after {REQUEST_BOUND:?}"
                )),
                Err(error) => fault(format!("{op:?} was submitted and cannot be had: {error}")),
            }
        }
    }

    fn note(&mut self, op: Op, status: Status, detail: &str) {
        *self.answers.entry(status.label()).or_default() += 1;
        if !may_come(op, status) {
            fault(format!("{op:?} was answered with `{status}` {detail}"));
        }
    }
}

/// Answers that a daemon that dies, engines that die and leases that expire can bring about.
fn may_come(op: Op, status: Status) -> bool {
    let lease = matches!(
        status,
        Status::UnknownLease | Status::LeaseExpired | Status::LeaseConsumed
    );
    match status {
        // The registration is on its way back, or the daemon holds a dead process's for a moment.
        Status::Ok | Status::Disconnected | Status::NotReady | Status::AlreadyRegistered => true,
        Status::Cancelled => matches!(op, Op::Load | Op::Save),
        Status::UnknownRequest => op == Op::Cancel,
        Status::NoSpace => op == Op::Save,
        Status::Loading => op == Op::Query,
        _ => lease && matches!(op, Op::Load | Op::Release | Op::Renew),
    }
}
