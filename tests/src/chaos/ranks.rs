//! The worker process: every rank of the instance, each a client of its own with several threads
//! that load, verify, compute and save.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pegaflow::{BlockHash, Completion, Op, Status};

use super::crew::{Job, JobDone, Line, line_path};
use super::engine::{Engine, boot_of, close};
use super::message::fault;
use super::requests::{Door, REQUEST_BOUND};
use super::shape::{BLOCKS_PER_THREAD, THREADS};
use crate::content;
use crate::worker::Worker;

/// How long a thread waits for a job before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Pause before a scheduler that is away is called again.
const PAUSE: Duration = Duration::from_millis(5);

/// Works until the process is to end.
pub fn work(engine: &Engine) {
    std::thread::scope(|scope| {
        for spec in &engine.start.instance.ranks {
            scope.spawn(move || {
                let mut caller = engine.watchdog.caller();
                let Some(worker) = engine.open(&mut caller, spec) else {
                    return;
                };
                std::thread::scope(|scope| {
                    for thread in 0..THREADS {
                        let worker = &worker;
                        scope.spawn(move || Hand::new(engine, worker, thread).work());
                    }
                });
                close(&mut caller, worker);
            });
        }
    });
}

/// One thread of one rank, with blocks of its own.
struct Hand<'a> {
    engine: &'a Engine,
    worker: &'a Worker,
    thread: usize,
    door: Door<'a>,
}

impl<'a> Hand<'a> {
    fn new(engine: &'a Engine, worker: &'a Worker, thread: usize) -> Hand<'a> {
        let door = Door::new(&worker.client, engine.watchdog.caller());
        Hand {
            engine,
            worker,
            thread,
            door,
        }
    }

    fn work(&mut self) {
        let start = &self.engine.start;
        let path = line_path(&start.folder, &start.instance.name, self.thread);
        while !self.engine.is_stopping() {
            let served = UnixStream::connect(&path)
                .and_then(|stream| Line::new(stream, REQUEST_BOUND))
                .and_then(|line| self.serve(line));
            // The scheduler was killed, or is not there yet.
            if served.is_err() {
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn serve(&mut self, mut line: Line) -> io::Result<()> {
        line.send(&self.worker.spec.rank)?;
        while !self.engine.is_stopping() {
            if !line.is_readable(LOOK) {
                continue;
            }
            let job: Job = line.receive()?;
            let done = self.perform(&job);
            self.engine.note_answers(&mut self.door);
            line.send(&done)?;
        }
        Ok(())
    }

    /// Ends only when no copy touches this thread's blocks any more.
    fn perform(&mut self, job: &Job) -> JobDone {
        let first = (self.thread * BLOCKS_PER_THREAD) as u32;
        let middle = first + job.load.len() as u32;
        let end = middle + job.save.len() as u32;
        let (load, save): (Vec<u32>, Vec<u32>) =
            ((first..middle).collect(), (middle..end).collect());
        JobDone {
            loaded: !load.is_empty() && self.load(job, &load),
            stored: self.save(job, &save),
        }
    }

    fn load(&mut self, job: &Job, blocks: &[u32]) -> bool {
        self.worker.wipe(0, blocks);
        let boot = boot_of(&mut self.door);
        let (registration, lease) = (self.worker.registration, job.lease);
        let done = self.request(Op::Load, job.cancel, |client| {
            client.load(registration, 0, lease, 0, blocks)
        });
        let Ok(done) = done else { return false };
        if done.count as usize != blocks.len() {
            let (count, of) = (done.count, blocks.len());
            fault(format!("a load of {of} blocks is ok with {count}"));
        }
        for (block, number) in blocks.iter().zip(&job.load) {
            let hash = content::hash(*number);
            if let Err(mismatch) = self.worker.verify(0, *block, &hash) {
                let rank = self.worker.spec.rank;
                fault(format!(
                    "wrong bytes: block number {number}, rank {rank:?}: {mismatch:?}"
                ));
            }
        }
        self.engine.tally(|tally| {
            tally.loads += 1;
            tally.verified_bytes += done.bytes;
        });
        if let Some(boot) = boot
            && boot_of(&mut self.door).as_ref() == Some(&boot)
        {
            self.engine.is_back(&boot);
        }
        true
    }

    fn save(&mut self, job: &Job, blocks: &[u32]) -> Option<String> {
        if blocks.is_empty() {
            return None;
        }
        let boot = boot_of(&mut self.door)?;
        let hashes: Vec<BlockHash> = job.save.iter().map(|n| content::hash(*n)).collect();
        for (block, hash) in blocks.iter().zip(&hashes) {
            self.worker.compute(0, *block, hash);
        }
        let registration = self.worker.registration;
        let done = self.request(Op::Save, job.cancel, |client| {
            client.save(registration, 0, &hashes, blocks)
        });
        let stored = done.is_ok_and(|done| done.count as usize == blocks.len());
        (stored && boot_of(&mut self.door).as_ref() == Some(&boot)).then_some(boot)
    }

    fn request(
        &mut self,
        op: Op,
        cancel: bool,
        submit: impl Fn(&pegaflow::Client) -> Result<pegaflow::RequestId, pegaflow::Error>,
    ) -> Result<Completion, Status> {
        if !cancel {
            return self.door.finish(op, submit);
        }
        let request = self.door.submit(op, submit)?;
        // Refused if the request was faster; its own answer tells all.
        let _ = self
            .door
            .finish(Op::Cancel, |client| client.cancel(request));
        self.door.complete(op, request)
    }
}
