//! A worker process: one rank with its KV memory. Loads, verifies, computes, saves.

#![forbid(unsafe_code)]

use std::time::Instant;

use pegaflow_shm::BlockHash;
use serde::{Deserialize, Serialize};

use super::kv::KvCache;
use super::member::{Identity, Member};
use super::pattern::Pattern;
use super::pipe::{LineReader, LineWriter};
use super::trace::block_hash;
use crate::children;
use crate::error::ToolError;

/// Hidden argument that makes this program a worker.
pub const WORKER_ARGUMENT: &str = "__worker";
/// Most mismatches described in one answer; all are counted.
const DESCRIBED: usize = 4;

/// First message to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStart {
    /// Its instance.
    pub identity: Identity,
    /// Its rank.
    pub rank: u32,
}

/// One request's share of work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// Number of the request in its engine.
    pub number: u64,
    /// Blocks of the request.
    pub hash_ids: Vec<u64>,
    /// Where in the KV memory they go.
    pub blocks: Vec<u32>,
    /// How many of the first ones the lease holds.
    pub hits: u32,
    /// The lease; 0 without hits.
    pub lease: u64,
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TaskDone {
    /// Duration of the load request, if there was one.
    pub load_ns: Option<u64>,
    /// Duration of the save request, if there was one.
    pub save_ns: Option<u64>,
    /// Bytes that the daemon says it loaded.
    pub loaded_bytes: u64,
    /// Bytes that were compared.
    pub verified_bytes: u64,
    /// Bytes that the daemon says it saved.
    pub saved_bytes: u64,
    /// Blocks newly stored.
    pub stored: u64,
    /// Blocks that were held already.
    pub skipped: u64,
    /// Blocks that found no room.
    pub dropped: u64,
    /// Blocks with a wrong byte.
    pub mismatches: u64,
    /// The first of them in words.
    pub described: Vec<String>,
    /// Requests that the daemon did not do.
    pub errors: Vec<String>,
}

/// Answers of a worker and of a scheduler.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Said<T> {
    /// Connected and registered.
    Ready,
    /// A task is done.
    Done(T),
    /// It cannot go on.
    Failed(String),
}

struct Worker {
    member: Member,
    kv: KvCache,
    pattern: Pattern,
    rank: u32,
}

impl Worker {
    fn run(&mut self, task: &Task) -> Result<TaskDone, ToolError> {
        let hashes: Vec<BlockHash> = task.hash_ids.iter().map(|id| block_hash(*id)).collect();
        let seeds: Vec<u64> = hashes.iter().map(|hash| self.pattern.seed(hash)).collect();
        let mut done = TaskDone::default();
        let mut have = (task.hits as usize).min(task.blocks.len());
        if have > 0 && !self.load(task, have, &seeds, &mut done)? {
            // As an engine would: what could not be loaded is computed.
            have = 0;
        }
        if have < task.blocks.len() {
            for (block, seed) in task.blocks[have..].iter().zip(&seeds[have..]) {
                self.kv.compute(*block, *seed)?;
            }
            self.save(&hashes[have..], &task.blocks[have..], &mut done)?;
        }
        Ok(done)
    }

    /// True when the blocks were loaded.
    fn load(
        &mut self,
        task: &Task,
        have: usize,
        seeds: &[u64],
        done: &mut TaskDone,
    ) -> Result<bool, ToolError> {
        let blocks = &task.blocks[..have];
        for block in blocks {
            self.kv.poison(*block, task.number)?;
        }
        let start = Instant::now();
        let completion = self.member.load(task.lease, blocks)?;
        done.load_ns = Some(start.elapsed().as_nanos() as u64);
        if !completion.is_ok() || completion.count as usize != have {
            let (status, count) = (completion.status, completion.count);
            done.errors
                .push(format!("load of {have} blocks: {status}, {count} loaded"));
            return Ok(false);
        }
        let page_bytes = self.kv.shape().page_bytes as u64;
        done.loaded_bytes = completion.bytes;
        for ((block, seed), id) in blocks.iter().zip(seeds).zip(&task.hash_ids) {
            done.verified_bytes += page_bytes;
            let Err(mismatch) = self.kv.verify(*block, *seed)? else {
                continue;
            };
            done.mismatches += 1;
            if done.described.len() < DESCRIBED {
                done.described.push(format!(
                    "request {}, rank {}, hash id {id} in block {block}: {} bytes differ, the first at \
                     byte {} of the page is {:#04x}, should be {:#04x}",
                    task.number, self.rank, mismatch.bytes, mismatch.offset, mismatch.found,
                    mismatch.expected
                ));
            }
        }
        Ok(true)
    }

    fn save(
        &self,
        hashes: &[BlockHash],
        blocks: &[u32],
        done: &mut TaskDone,
    ) -> Result<(), ToolError> {
        let start = Instant::now();
        let completion = self.member.save(hashes, blocks)?;
        done.save_ns = Some(start.elapsed().as_nanos() as u64);
        done.saved_bytes = completion.bytes;
        done.stored = u64::from(completion.count);
        done.skipped = u64::from(completion.skipped);
        done.dropped = u64::from(completion.dropped);
        if !completion.is_ok() {
            done.errors.push(format!(
                "save of {} blocks: {}",
                blocks.len(),
                completion.status
            ));
        }
        Ok(())
    }
}

/// The worker process: serves tasks from standard input until it ends.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn worker_main() -> Result<(), ToolError> {
    children::die_with_parent();
    let mut reader = LineReader::new("scheduler", std::io::stdin());
    let mut writer = LineWriter::new("scheduler", std::io::stdout());
    let served = serve(&mut reader, &mut writer);
    if let Err(error) = &served {
        writer.send(&Said::<TaskDone>::Failed(error.to_string()))?;
    }
    served
}

fn serve(
    reader: &mut LineReader<std::io::Stdin>,
    writer: &mut LineWriter<std::io::Stdout>,
) -> Result<(), ToolError> {
    let WorkerStart { identity, rank } = reader.expect()?;
    let (member, kv) = Member::worker(&identity, rank)?;
    let pattern = Pattern::new(&identity.pattern_name(), 0, rank);
    let mut worker = Worker {
        member,
        kv,
        pattern,
        rank,
    };
    writer.send(&Said::<TaskDone>::Ready)?;
    while let Some(task) = reader.receive::<Task>()? {
        writer.send(&Said::Done(worker.run(&task)?))?;
    }
    Ok(())
}
