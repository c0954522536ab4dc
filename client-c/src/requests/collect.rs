//! From the completion ring into the request table.
//!
//! What the daemon wrote is judged here: a completion for an unknown request, for another operation
//! or with impossible numbers ends the session with that as the reason.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use pegaflow_shm::desc::{Completion as Answer, MissReason, Op};
use pegaflow_shm::ring::RingFault;
use pegaflow_shm::status::Status;

use super::table::{Held, ResultSource};
use crate::client::{Inner, Shared, Wakes};
use crate::completion::Completion;
use crate::session::Live;

/// Who collects: what a poller finds it hands out itself, and wakes no other poller for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collector {
    Poller,
    Other,
}

/// A completion that no correct daemon posts.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompletionFault {
    #[error("completion ring: {0}")]
    Ring(#[from] RingFault),
    #[error("completion for unknown request {0:#x}")]
    UnknownRequest(u64),
    #[error("completion of operation {found} for request {id:#x}, a {expected:?}")]
    Op { id: u64, expected: Op, found: u8 },
    #[error("completion of request {id:#x} gives unknown miss reason {found}")]
    Reason { id: u64, found: u16 },
    #[error("completion of request {id:#x} speaks of {found} blocks, the request had {total}")]
    Count { id: u64, found: u64, total: u32 },
}

impl Shared {
    /// Moves what the daemon has posted into the table, at most one ring of it.
    pub(crate) fn collect(&self, inner: &mut Inner, by: Collector, wakes: &mut Wakes) {
        let Some(live) = &mut inner.live else { return };
        let (number, mut budget) = (live.session.number, live.consumer.capacity());
        let mut any = false;
        let fault = loop {
            let Some(live) = &mut inner.live else { return };
            match live.consumer.try_pop() {
                Ok(Some(body)) => {
                    any = true;
                    if let Err(fault) = self.accept(inner, &Answer::from_body(body), by, wakes) {
                        break Some(fault);
                    }
                    budget -= 1;
                    if budget == 0 {
                        break None;
                    }
                }
                Ok(None) => break None,
                Err(fault) => break Some(fault.into()),
            }
        };
        if any && let Some(live) = &mut inner.live {
            live.consumer.report();
            live.session.set_position(live.consumer.position());
        }
        if let Some(fault) = fault {
            let (status, reason) = (Status::ProtocolError, fault.to_string());
            self.lose_locked(inner, number, status, &reason, wakes);
        }
    }

    fn accept(
        &self,
        inner: &mut Inner,
        answer: &Answer,
        by: Collector,
        wakes: &mut Wakes,
    ) -> Result<(), CompletionFault> {
        let id = answer.request_id;
        let held = inner
            .table
            .in_flight(id)
            .ok_or(CompletionFault::UnknownRequest(id))?;
        judge(held, answer)?;
        let (chain, slots) = (held.chain, held.slots);
        if let Some(live) = &mut inner.live {
            live.chunks.put(chain);
            live.slots_used -= slots;
            live.in_flight -= 1;
        }
        self.finish(inner, id, *answer, by, wakes);
        Ok(())
    }

    /// Enters a request's answer, whoever made it.
    #[inline]
    pub(crate) fn finish(
        &self,
        inner: &mut Inner,
        id: u64,
        answer: Answer,
        by: Collector,
        wakes: &mut Wakes,
    ) {
        let stats = &mut inner.stats;
        stats.completed += 1;
        let answered = [Status::Ok as u8, Status::Loading as u8].contains(&answer.status);
        stats.failed += u64::from(!answered);
        match Op::from_code(answer.op) {
            Some(Op::Load) => stats.loaded_bytes += answer.bytes,
            Some(Op::Save) => stats.saved_bytes += answer.bytes,
            _ => {}
        }
        if inner.table.finish(id, answer) {
            self.deliveries.fetch_add(1, Ordering::Relaxed);
            wakes.leader |= inner.leader == Some(id);
            wakes.followers |= inner.followers > 0;
        } else if by == Collector::Other
            && !inner.local_signalled
            && self.fd_mode.load(Ordering::Relaxed)
        {
            inner.local_signalled = true;
            wakes.local = true;
        }
    }

    /// Copies the bitmaps of membership queries out and gives their room back; keeps the blocks of
    /// failed loads.
    pub(crate) fn resolve(&self, completions: &mut [Completion]) {
        for completion in completions {
            // Of a load that went well, it is dropped here, outside of the lock.
            let blocks = completion.blocks.take();
            if let (Some(blocks), false) = (blocks, completion.is_ok()) {
                self.unloaded().keep(completion.request.0, blocks);
            }
            if let Some(source) = completion.source.take() {
                self.resolve_one(completion, source);
            }
        }
    }

    #[cold]
    fn resolve_one(&self, completion: &mut Completion, source: ResultSource) {
        let positions = source.positions as usize;
        let mut words = vec![0u64; positions.div_ceil(64)].into_boxed_slice();
        if let (Some(session), Some(range)) = (&source.session, source.range) {
            if completion.status.is_ok() && session.read_result(range.offset(), &mut words).is_err()
            {
                words.fill(0);
            }
            let mut inner = self.lock();
            let present = |live: &&mut Live| live.session.number == session.number;
            if let Some(live) = inner.live.as_mut().filter(present) {
                live.results.put(range);
            }
        }
        if let (Some(last), rest @ 1..) = (words.last_mut(), positions % 64) {
            *last &= (1 << rest) - 1;
        }
        completion.bitmap = Some(words);
    }
}

fn judge(held: &Held, answer: &Answer) -> Result<(), CompletionFault> {
    let id = answer.request_id;
    if answer.op != held.op as u8 {
        return Err(CompletionFault::Op {
            id,
            expected: held.op,
            found: answer.op,
        });
    }
    if usize::from(answer.reason) >= MissReason::ALL.len() {
        return Err(CompletionFault::Reason {
            id,
            found: answer.reason,
        });
    }
    let found = match held.op {
        Op::Query | Op::Load => u64::from(answer.count),
        Op::Save => u64::from(answer.count) + u64::from(answer.skipped) + u64::from(answer.dropped),
        _ => 0,
    };
    if found > u64::from(held.total) {
        return Err(CompletionFault::Count {
            id,
            found,
            total: held.total,
        });
    }
    Ok(())
}
