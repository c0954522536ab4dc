//! The scheduler process: several threads that query, probe, renew, release, leave leases to
//! expire, and hand out loads and saves to the ranks.

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pegaflow::{BlockHash, Completion, Fetch, Op, Status};

use super::crew::{Crew, Job, line_path};
use super::engine::{Engine, boot_of, close};
use super::ledger::Ledger;
use super::message::{Event, fault, say};
use super::requests::{Door, REQUEST_BOUND};
use super::shape::{INCOMPLETE_TTL, InstanceShape, THREADS};
use super::timed::Call;
use crate::content::{self, Stream};
use crate::worker::Worker;

/// Known and fresh blocks of one request; together they fit a thread's blocks.
const MOST_KNOWN: u64 = 16;
const MOST_FRESH: u64 = 8;
/// Blocks that are asked for at once when the ledger is gone through.
const SWEEP_PART: usize = 256;
/// Life of a lease that nobody gives back, in ms.
const SHORT_TTL_MS: u64 = 300;
/// Pause while the daemon is away or ranks are missing.
const PAUSE: Duration = Duration::from_millis(2);

/// What the scheduler's threads share.
struct Head<'a> {
    engine: &'a Engine,
    worker: &'a Worker,
    ledger: Ledger,
    fresh: Fresh,
    keys: AtomicU64,
    swept: Mutex<String>,
}

/// Works until the process is to end.
///
/// # Errors
/// Ledger or lines cannot be made.
pub fn work(engine: &Engine) -> io::Result<()> {
    let start = &engine.start;
    let name = &start.instance.name;
    let ledger = Ledger::open(&start.folder.join(format!("{name}.ledger")))?;
    let mut crews = Vec::new();
    for thread in 0..THREADS {
        let path = line_path(&start.folder, name, thread);
        crews.push(Crew::listen(&path, start.instance.ranks.len())?);
    }
    let mut caller = engine.watchdog.caller();
    let Some(worker) = engine.open(&mut caller, &start.instance.scheduler()) else {
        return Ok(());
    };
    let fresh = Fresh::new(&start.instance, start.spread_s, &ledger);
    let head = Head {
        engine,
        worker: &worker,
        ledger,
        fresh,
        keys: AtomicU64::new(start.seed << 32),
        swept: Mutex::default(),
    };
    std::thread::scope(|scope| {
        for (thread, crew) in crews.into_iter().enumerate() {
            let head = &head;
            scope.spawn(move || Desk::new(head, thread, crew).work());
        }
    });
    close(&mut caller, worker);
    Ok(())
}

/// Numbers of blocks that nobody has saved yet, spread over the time of a scene.
struct Fresh {
    started: Instant,
    at_start: u64,
    most: u64,
    per_second: u64,
    next: AtomicU64,
}

impl Fresh {
    fn new(shape: &InstanceShape, spread_s: u64, ledger: &Ledger) -> Fresh {
        let highest = ledger.highest();
        Fresh {
            started: Instant::now(),
            at_start: highest,
            most: shape.most_blocks,
            per_second: shape.most_blocks / spread_s.max(1) + 1,
            next: AtomicU64::new(highest + 1),
        }
    }

    fn take(&self, count: u64) -> Vec<u64> {
        let elapsed_ms = self.started.elapsed().as_millis() as u64;
        let allowed = self.at_start + 64 + self.per_second * elapsed_ms / 1000;
        if self.next.load(Ordering::Relaxed) + count > allowed.min(self.most) {
            return Vec::new();
        }
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        (first..first + count).collect()
    }
}

/// One thread of the scheduler.
struct Desk<'a> {
    head: &'a Head<'a>,
    thread: usize,
    crew: Crew,
    door: Door<'a>,
    random: Stream,
    /// Blocks whose saving was not confirmed.
    open: Vec<u64>,
}

/// A query's list: blocks that must be hits, and others.
struct Wish {
    known: usize,
    numbers: Vec<u64>,
}

impl<'a> Desk<'a> {
    fn new(head: &'a Head<'a>, thread: usize, crew: Crew) -> Desk<'a> {
        let door = Door::new(&head.worker.client, head.engine.watchdog.caller());
        let random = Stream::new(&[head.engine.start.seed, thread as u64]);
        Desk {
            head,
            thread,
            crew,
            door,
            random,
            open: Vec::new(),
        }
    }

    fn work(&mut self) {
        while !self.head.engine.is_stopping() {
            let complete = self.crew.is_complete();
            let done = match self.random.below(20) {
                0..=13 if complete => self.request(),
                14..=15 => self.probe(),
                16 => self.leave(),
                17 => self.renew(),
                _ => self.query_and_release(),
            };
            if done.is_err() {
                std::thread::sleep(PAUSE);
            }
            if self.thread == 0 {
                self.sweep();
            }
            self.head.engine.note_answers(&mut self.door);
        }
    }

    fn wish(&mut self) -> Wish {
        let shape = &self.head.engine.start.instance;
        if shape.evicts {
            let first = 1 + self.random.below(shape.most_blocks);
            let numbers = (first..=first + self.random.below(MOST_KNOWN + MOST_FRESH)).collect();
            return Wish { known: 0, numbers };
        }
        let count = self.random.below(MOST_KNOWN + 1) as usize;
        let mut numbers = self.head.ledger.sample(&mut self.random, count);
        let known = numbers.len();
        let others = 1 + self.random.below(MOST_FRESH);
        if self.open.is_empty() {
            self.open = self.head.fresh.take(others);
        }
        numbers.extend(&self.open);
        Wish { known, numbers }
    }

    /// Asks for a lease. Of blocks that were seen sealed, each is a hit.
    fn query(&mut self, wish: &Wish, ttl_ms: u64) -> Result<Completion, Status> {
        let boot = boot_of(&mut self.door);
        let hashes: Vec<BlockHash> = wish.numbers.iter().map(|n| content::hash(*n)).collect();
        let key = self.head.keys.fetch_add(1, Ordering::Relaxed);
        let fetch = self.draw_fetch();
        let registration = self.head.worker.registration;
        let asked = Instant::now();
        let answer = loop {
            let answer = self.door.finish(Op::Query, |client| {
                client.query_with(registration, 0, key, &hashes, ttl_ms, fetch)
            });
            match answer {
                Err(Status::Loading) if fetch != Fetch::Poll || !self.has_below() => {
                    fault(format!("a query with {fetch:?} is answered `loading`"))
                }
                Err(Status::Loading) if asked.elapsed() > REQUEST_BOUND => {
                    fault(format!("hang: a query is loading for {REQUEST_BOUND:?}"))
                }
                // Some change their mind.
                Err(Status::Loading) if self.random.below(8) > 0 => std::thread::sleep(PAUSE),
                answer => break answer?,
            }
        };
        let hits = answer.count as usize;
        if hits < wish.known {
            let (number, reason) = (wish.numbers[hits], answer.reason);
            fault(format!(
                "lost: block number {number} was sealed and is a miss ({reason:?}) at boot {boot:?}"
            ));
        }
        self.note_sealed(&wish.numbers[wish.known..hits]);
        if let Some(boot) = boot.filter(|_| hits > 0)
            && boot_of(&mut self.door).as_ref() == Some(&boot)
        {
            self.head.engine.is_back(&boot);
            self.head.engine.tally(|tally| tally.hits += 1);
        }
        Ok(answer)
    }

    fn has_below(&self) -> bool {
        self.head.engine.start.instance.below
    }

    /// What a query does about blocks below the pool, where there may be some.
    fn draw_fetch(&mut self) -> Fetch {
        if !self.has_below() {
            return Fetch::Poll;
        }
        match self.random.below(6) {
            0 => Fetch::Never,
            1 => Fetch::Wait(None),
            2 => Fetch::Wait(Some(Duration::from_millis(self.random.below(20)))),
            _ => Fetch::Poll,
        }
    }

    fn note_sealed(&mut self, numbers: &[u64]) {
        if numbers.is_empty() || self.head.engine.start.instance.evicts {
            return;
        }
        self.open.retain(|number| !numbers.contains(number));
        match self.head.ledger.add(numbers) {
            Ok(new) => self.head.engine.tally(|tally| tally.sealed += new),
            Err(error) => fault(format!("the ledger cannot be written: {error}")),
        }
    }

    /// What an engine does: query, load the hits in every rank, compute and save the rest.
    fn request(&mut self) -> Result<(), Status> {
        let wish = self.wish();
        if wish.numbers.is_empty() {
            return Err(Status::Again);
        }
        let answer = self.query(&wish, 0)?;
        let (load, save) = wish.numbers.split_at(answer.count as usize);
        let job = Job {
            lease: answer.lease,
            load: load.to_vec(),
            save: save.to_vec(),
            cancel: self.random.below(16) == 0,
        };
        let begun = Instant::now();
        let done = self.crew.run(&job).ok_or(Status::Disconnected)?;
        // Shards that went to different daemons, or came too late for each other, seal nothing.
        let stored = &done[0].stored;
        if stored.is_some()
            && done.iter().all(|rank| rank.stored == *stored)
            && begun.elapsed() < INCOMPLETE_TTL / 2
        {
            self.note_sealed(save);
        }
        if answer.lease != 0 && !done.iter().all(|rank| rank.loaded) {
            self.release(answer.lease)?;
        }
        Ok(())
    }

    fn release(&mut self, lease: u64) -> Result<(), Status> {
        let registration = self.head.worker.registration;
        self.door
            .finish(Op::Release, |client| client.release(registration, lease))
            .map(drop)
    }

    fn query_and_release(&mut self) -> Result<(), Status> {
        let answer = self.known_query(0)?;
        match answer.lease {
            0 => Ok(()),
            lease => self.release(lease),
        }
    }

    fn known_query(&mut self, ttl_ms: u64) -> Result<Completion, Status> {
        let mut wish = self.wish();
        if wish.known > 0 {
            wish.numbers.truncate(wish.known);
        }
        if wish.numbers.is_empty() {
            return Err(Status::Again);
        }
        self.query(&wish, ttl_ms)
    }

    /// A lease that ends by its time to live, or with the daemon.
    fn leave(&mut self) -> Result<(), Status> {
        self.known_query(SHORT_TTL_MS).map(drop)
    }

    fn renew(&mut self) -> Result<(), Status> {
        let answer = self.known_query(SHORT_TTL_MS)?;
        if answer.lease == 0 {
            return Ok(());
        }
        let registration = self.head.worker.registration;
        self.door.finish(Op::Renew, |client| {
            client.renew(registration, answer.lease, 2 * SHORT_TTL_MS)
        })?;
        self.release(answer.lease)
    }

    /// A probe is a hint: only how long it takes can be wrong.
    fn probe(&mut self) -> Result<(), Status> {
        let numbers = self.head.ledger.sample(&mut self.random, 64);
        let hashes: Vec<BlockHash> = numbers.iter().map(|n| content::hash(*n)).collect();
        let (client, registration) = (self.door.client, self.head.worker.registration);
        let found = self.door.caller.call(Call::Probe, Duration::ZERO, || {
            client.probe(registration, 0, &hashes)
        });
        match found {
            Ok(found) if found as usize <= hashes.len() => Ok(()),
            Ok(found) => fault(format!("a probe of {} blocks found {found}", hashes.len())),
            Err(error) => fault(format!("probe: {error}")),
        }
    }

    /// Goes through the whole ledger once for each boot of the daemon.
    fn sweep(&mut self) {
        let Some(boot) = boot_of(&mut self.door) else {
            return;
        };
        let swept = &self.head.swept;
        if *swept.lock().unwrap_or_else(PoisonError::into_inner) == boot {
            return;
        }
        let blocks = self.head.ledger.len();
        for first in (0..blocks).step_by(SWEEP_PART) {
            let count = SWEEP_PART.min(blocks - first);
            let numbers = self.head.ledger.part(first, count);
            let wish = Wish {
                known: numbers.len(),
                numbers,
            };
            let Ok(answer) = self.query(&wish, 0) else {
                return;
            };
            if answer.lease != 0 && self.release(answer.lease).is_err() {
                return;
            }
        }
        if boot_of(&mut self.door).as_ref() == Some(&boot) {
            boot.clone_into(&mut swept.lock().unwrap_or_else(PoisonError::into_inner));
            let blocks = blocks as u64;
            say(&Event::Swept { boot, blocks });
        }
    }
}
