//! What comes back, held against the truth.

#![forbid(unsafe_code)]

use pegaflow_shm::desc::{Completion, MissReason};
use pegaflow_shm::status::Status;

use crate::sim::kv::Content;
use crate::sim::session::{Asked, Unfinished};
use crate::sim::truth::{Checked, GivenLease, Violation, ensure};
use crate::sim::world::World;

impl World {
    /// A client takes some of its completions.
    pub fn step_take(&mut self) -> Checked {
        let process = self.rng.below(self.processes.len());
        let most = self.rng.between(1, 8);
        self.take(process, most)
    }

    /// Takes up to `most` completions of a process.
    pub fn take(&mut self, process: usize, most: usize) -> Checked {
        let taken = self.take_some(process, most);
        if let Some(session) = self.processes[process].session.as_mut() {
            session.report();
        }
        taken
    }

    fn take_some(&mut self, process: usize, most: usize) -> Checked {
        let hostile = self.is_hostile(process);
        for _ in 0..most {
            let Some(session) = self.processes[process].session.as_mut() else {
                return Ok(());
            };
            if session.opening.is_some() {
                return Ok(());
            }
            if session.asleep {
                if !session.is_rung() {
                    return Ok(());
                }
                session.wake_up();
            }
            let completion = match session.pop() {
                Ok(Some(completion)) => completion,
                Ok(None) => return Ok(()),
                Err(_) if hostile => return Ok(()),
                Err(fault) => {
                    let what = format!("process {process} finds a broken ring: {fault}");
                    return ensure(false, "inv_5_a_faulted_session_affects_no_other", || what);
                }
            };
            if hostile {
                let ended = session.end(completion.request_id);
                let touched = ended.as_ref().and_then(|request| request.asked.blocks());
                let memory = self.processes[process].memory.as_mut();
                if let (Some((at, blocks)), Some(memory)) = (touched, memory) {
                    let busy = &mut memory.groups[at].busy;
                    blocks
                        .iter()
                        .for_each(|block| busy[*block as usize] = false);
                }
                continue;
            }
            self.completed(process, &completion)?;
        }
        Ok(())
    }

    fn completed(&mut self, process: usize, completion: &Completion) -> Checked {
        let id = completion.request_id;
        self.last_completion = Some(*completion);
        let status = completion.status();
        self.note(|| format!("process {process} hears of request {id}: {status:?} {completion:?}"));
        let session = self.processes[process]
            .session
            .as_mut()
            .expect("it took it");
        let Some(request) = session.end(id) else {
            return Err(Violation {
                invariant: "inv_6_one_completion_per_request",
                what: format!("process {process} has no unfinished request {id}: {completion:?}"),
            });
        };
        let asked = request.asked.op() as u8;
        ensure(
            request.rest.is_empty() && completion.op == asked,
            "inv_6_one_completion_per_request",
            || format!("request {id} is answered as {}: {request:?}", completion.op),
        )?;
        self.blocks_are_free(process, &request)?;
        let ok = status == Status::Ok;
        if ok {
            self.count(completion_label(&request.asked));
        }
        ensure(
            status != Status::Internal,
            "inv_6_one_completion_per_request",
            || format!("request {id} met a defect: {completion:?}"),
        )?;
        match &request.asked {
            Asked::Query {
                group,
                key,
                flags,
                hashes,
                ..
            } if status == Status::Loading => {
                ensure(*flags == 0, "inv_6_who_does_not_poll_is_answered", || {
                    format!("{request:?} is answered as loading")
                })?;
                self.is_loading(process, completion, (*group, *key, hashes))
            }
            Asked::Query {
                group,
                hashes,
                result_offset,
                ..
            } if ok => self.queried(process, completion, *group, hashes, *result_offset),
            Asked::Load { .. } => self.loaded(process, &request, status),
            Asked::Release(lease) | Asked::Renew(lease) => {
                let old =
                    self.truth.old_leases.contains(lease) && !self.truth.leases.contains_key(lease);
                ensure(!(ok && old), "inv_4_leases_end_with_their_daemon", || {
                    format!("{request:?} of an earlier daemon: {completion:?}")
                })
            }
            _ => Ok(()),
        }
    }

    /// A request that has ended leaves its blocks alone.
    fn blocks_are_free(&mut self, process: usize, request: &Unfinished) -> Checked {
        let Some((at, blocks)) = request.asked.blocks() else {
            return Ok(());
        };
        let memory = self.processes[process].memory.as_mut().expect("a rank");
        let group = &mut memory.groups[at];
        for block in blocks {
            group.busy[*block as usize] = false;
        }
        let daemon = self.daemon.as_ref().expect("it answered");
        for task in daemon.copies.views() {
            if !std::sync::Arc::ptr_eq(&task.target, &group.bound) {
                continue;
            }
            let touched = task.pages.iter().find(|page| blocks.contains(&page.block));
            ensure(
                touched.is_none(),
                "inv_2_no_block_is_reused_under_a_copy",
                || format!("{request:?} has ended, and a copy still touches {touched:?}"),
            )?;
        }
        Ok(())
    }

    fn queried(
        &mut self,
        process: usize,
        completion: &Completion,
        group: u16,
        hashes: &[u64],
        result_offset: u64,
    ) -> Checked {
        let count = completion.count as usize;
        let hits: Vec<u64> = if group == 0 {
            hashes.iter().take(count).copied().collect()
        } else {
            let session = self.processes[process]
                .session
                .as_ref()
                .expect("it took it");
            let bits = session.result_bits(result_offset, hashes.len());
            let hits = hashes.iter().zip(bits).filter(|(_, hit)| *hit);
            hits.map(|(hash, _)| *hash).collect()
        };
        let says_all = completion.reason == MissReason::None as u16;
        ensure(
            count <= hashes.len()
                && (count == 0) == (completion.lease == 0)
                && says_all == (count == hashes.len()),
            "inv_4_a_lease_for_hits_and_only_for_hits",
            || format!("{} hashes asked for: {completion:?}", hashes.len()),
        )?;
        if completion.lease == 0 {
            return Ok(());
        }
        ensure(
            hits.len() == count,
            "inv_4_a_lease_for_hits_and_only_for_hits",
            || format!("{hits:?} of {hashes:?}: {completion:?}"),
        )?;
        let plan = &self.plan.processes[process];
        let lease = GivenLease {
            instance: plan.instance,
            group,
            hits,
        };
        self.truth.leases.insert(completion.lease, lease);
        Ok(())
    }

    fn loaded(&mut self, process: usize, request: &Unfinished, status: Status) -> Checked {
        let Asked::Load {
            at,
            group,
            lease,
            first,
            blocks,
        } = &request.asked
        else {
            return Ok(());
        };
        let plan = self.plan.processes[process].clone();
        let namespace = &self.plan.namespaces[plan.namespace];
        let rank = plan.rank.unwrap_or(0) as usize;
        let shard = namespace
            .shard(rank, *group)
            .map_or(u16::MAX, |(shard, _)| shard);
        let given = self.truth.leases.get(lease);
        let memory = self.processes[process].memory.as_mut().expect("a rank");
        for (position, block) in blocks.iter().enumerate() {
            ensure(
                memory.is_intact(*at, *block),
                "inv_3_bytes_loaded_are_bytes_saved",
                || format!("block {block} of process {process} after {request:?}: {status:?}"),
            )?;
            let found = memory.groups[*at].content[*block as usize];
            if status == Status::Ok {
                let expected = given
                    .filter(|lease| lease.instance == plan.instance && lease.group == *group)
                    .and_then(|lease| lease.hits.get(first + position))
                    .map(|hash| Content {
                        namespace: plan.namespace,
                        group: *group,
                        hash: *hash,
                        shard,
                        version: 0,
                    });
                let right = expected.zip(found).is_some_and(|(e, f)| e.same_shard(&f));
                ensure(right, "inv_3_bytes_loaded_are_bytes_saved", || {
                    format!(
                        "block {block} of process {process}: {found:?} instead of {expected:?}, \
                         {request:?}"
                    )
                })?;
            } else if !matches!(status, Status::CopyFailed | Status::Cancelled) {
                let untouched = found.is_some_and(|found| found.is_mark());
                ensure(untouched, "inv_3_a_refused_load_writes_nothing", || {
                    format!("block {block} of process {process}: {found:?} after {status:?}")
                })?;
            }
        }
        // What failed half-way is made known again.
        for block in blocks {
            if memory.groups[*at].content[*block as usize].is_none() {
                memory.mark(*at, *block, process as u64);
            }
        }
        Ok(())
    }
}

fn completion_label(asked: &Asked) -> &'static str {
    match asked {
        Asked::Nop => "nop ok",
        Asked::Query { .. } => "query ok",
        Asked::Save { .. } => "save ok",
        Asked::Load { .. } => "load ok",
        Asked::Release(_) => "release ok",
        Asked::Renew(_) => "renew ok",
        Asked::Cancel => "cancel ok",
    }
}
