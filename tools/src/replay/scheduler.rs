//! The scheduler process of an engine: probes, queries, hands blocks to its workers.

#![forbid(unsafe_code)]

use std::process::{ChildStdin, ChildStdout};
use std::time::Instant;

use pegaflow_shm::BlockHash;
use pegaflow_shm::status::Status;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::member::{Identity, Member};
use super::pipe::{self, ChildProcess, LineReader, LineWriter};
use super::trace::{Request, block_hash};
use super::worker::{Said, Task, TaskDone, WORKER_ARGUMENT, WorkerStart};
use crate::children;
use crate::error::ToolError;

/// Hidden argument that makes this program a scheduler.
pub const SCHEDULER_ARGUMENT: &str = "__scheduler";

/// First message to a scheduler.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SchedulerStart {
    /// Its instance.
    pub identity: Identity,
    /// Number of the engine, from 0.
    pub engine: u64,
    /// Decides which KV blocks a request gets.
    pub seed: u64,
}

/// One request, done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestDone {
    /// Blocks.
    pub blocks: u64,
    /// Prefix by the shared index.
    pub probed: u32,
    /// Prefix by the lease.
    pub hits: u32,
    /// Why the first block after it missed.
    pub reason: String,
    /// Duration of the probe.
    pub probe_ns: u64,
    /// Duration of the query, of its first answer if that was `loading`.
    pub query_ns: u64,
    /// How long it took until blocks had come up from below the pool, if some were there.
    pub fetch_ns: Option<u64>,
    /// What each rank did.
    pub ranks: Vec<TaskDone>,
    /// Requests that the daemon did not do.
    pub errors: Vec<String>,
}

/// A worker process and the lines to and from it.
pub struct WorkerProcess {
    process: ChildProcess,
    tasks: LineWriter<ChildStdin>,
    answers: LineReader<ChildStdout>,
}

impl WorkerProcess {
    /// Starts a rank; it connects and registers meanwhile.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(identity: &Identity, rank: u32) -> Result<WorkerProcess, ToolError> {
        let name = format!("{} rank {rank}", identity.instance);
        let (process, mut tasks, answers) = pipe::start(&name, WORKER_ARGUMENT)?;
        tasks.send(&WorkerStart {
            identity: identity.clone(),
            rank,
        })?;
        Ok(WorkerProcess {
            process,
            tasks,
            answers,
        })
    }

    /// Hands it a task.
    ///
    /// # Errors
    /// It is gone.
    pub fn send(&mut self, task: &Task) -> Result<(), ToolError> {
        self.tasks.send(task)
    }

    /// Its next answer; `None` for ready.
    ///
    /// # Errors
    /// It failed or is gone.
    pub fn answer(&mut self) -> Result<Option<TaskDone>, ToolError> {
        match self.answers.expect::<Said<TaskDone>>()? {
            Said::Ready => Ok(None),
            Said::Done(done) => Ok(Some(done)),
            Said::Failed(what) => Err(ToolError::Child {
                process: "a worker".into(),
                what,
            }),
        }
    }

    /// Ends it in an orderly way.
    ///
    /// # Errors
    /// It failed or does not end.
    pub fn finish(self) -> Result<(), ToolError> {
        drop(self.tasks);
        self.process.finish()
    }
}

struct Scheduler {
    member: Member,
    workers: Vec<WorkerProcess>,
    engine: u64,
    number: u64,
    /// Ids of the KV blocks in shuffled order, and where the next request's begin.
    free: Vec<u32>,
    next_free: usize,
}

impl Scheduler {
    /// Blocks for a request; no request runs beside it, so all are free.
    fn take_blocks(&mut self, count: usize) -> Vec<u32> {
        let from = self.next_free;
        self.next_free = (from + count) % self.free.len();
        (0..count)
            .map(|at| self.free[(from + at) % self.free.len()])
            .collect()
    }

    fn run(&mut self, request: Request) -> Result<RequestDone, ToolError> {
        let hashes: Vec<BlockHash> = request.hash_ids.iter().map(|id| block_hash(*id)).collect();
        self.number += 1;
        let key = self.engine << 48 | self.number;
        let start = Instant::now();
        let probed = self.member.probe(&hashes)?;
        let probe_ns = start.elapsed().as_nanos() as u64;
        let start = Instant::now();
        let mut answer = self.member.query(key, &hashes)?;
        let query_ns = start.elapsed().as_nanos() as u64;
        let mut fetch_ns = None;
        if answer.status == Status::Loading {
            answer = self.member.query_and_wait(key, &hashes)?;
            fetch_ns = Some(start.elapsed().as_nanos() as u64);
        }
        let mut errors = Vec::new();
        if !answer.is_ok() {
            errors.push(format!(
                "query of {} blocks: {}",
                hashes.len(),
                answer.status
            ));
        }
        let hits = if answer.is_ok() { answer.count } else { 0 };
        let task = Task {
            number: self.number,
            blocks: self.take_blocks(hashes.len()),
            hash_ids: request.hash_ids,
            hits,
            lease: answer.lease,
        };
        for worker in &mut self.workers {
            worker.send(&task)?;
        }
        let mut ranks = Vec::with_capacity(self.workers.len());
        for worker in &mut self.workers {
            ranks.extend(worker.answer()?);
        }
        Ok(RequestDone {
            blocks: hashes.len() as u64,
            probed,
            hits,
            reason: answer.reason.label().to_owned(),
            probe_ns,
            query_ns,
            fetch_ns,
            ranks,
            errors,
        })
    }
}

/// The scheduler process: serves requests from standard input until it ends.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn scheduler_main() -> Result<(), ToolError> {
    children::die_with_parent();
    let mut reader = LineReader::new("replay", std::io::stdin());
    let mut writer = LineWriter::new("replay", std::io::stdout());
    let served = serve(&mut reader, &mut writer);
    if let Err(error) = &served {
        writer.send(&Said::<RequestDone>::Failed(error.to_string()))?;
    }
    served
}

fn serve(
    reader: &mut LineReader<std::io::Stdin>,
    writer: &mut LineWriter<std::io::Stdout>,
) -> Result<(), ToolError> {
    let SchedulerStart {
        identity,
        engine,
        seed,
    } = reader.expect()?;
    let workers: Result<Vec<WorkerProcess>, ToolError> = (0..identity.world_size)
        .map(|rank| WorkerProcess::start(&identity, rank))
        .collect();
    let mut workers = workers?;
    for worker in &mut workers {
        worker.answer()?;
    }
    let member = Member::scheduler(&identity)?;
    member.wait_ready()?;
    let mut free: Vec<u32> = (0..identity.kv.num_blocks).collect();
    free.shuffle(&mut SmallRng::seed_from_u64(seed));
    let mut scheduler = Scheduler {
        member,
        workers,
        engine,
        number: 0,
        free,
        next_free: 0,
    };
    writer.send(&Said::<RequestDone>::Ready)?;
    while let Some(request) = reader.receive::<Request>()? {
        writer.send(&Said::Done(scheduler.run(request)?))?;
    }
    for worker in scheduler.workers {
        worker.finish()?;
    }
    Ok(())
}
