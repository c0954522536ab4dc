//! What an engine of the soak run does: saves, loads, cancels and forgotten leases at random over a
//! random layout, every loaded byte compared, until its time is over or it is killed.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pegaflow::{BlockHash, Completion, Error, Options, RequestId, Status};
use serde::{Deserialize, Serialize};

use super::engine::options;
use super::rank::{BACKGROUND, GpuSpec, Rank};
use crate::content::{self, Stream};

/// What an engine of the soak run is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Socket of the daemon.
    pub socket: PathBuf,
    /// What to register.
    pub spec: GpuSpec,
    /// Of its random choices.
    pub seed: u64,
    /// How long.
    pub seconds: f64,
    /// Hashes that all engines of the same sizes share.
    pub hashes: u64,
    /// When its time is over, break the GPU's context with requests under way, and stay until
    /// killed.
    pub breaks: bool,
}

/// What it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Saves that were answered with ok.
    pub saves: u64,
    /// Loads that were answered with ok, each compared byte by byte.
    pub loads: u64,
    /// Their bytes.
    pub loaded_bytes: u64,
    /// Loads in steps, of which a stream waited for some.
    pub waits: u64,
    /// Requests that were cancelled.
    pub cancels: u64,
    /// Requests that were refused or failed (a daemon that was away, a lease that ended).
    pub refused: u64,
    /// Comparisons of all memory.
    pub checks: u64,
}

impl Tally {
    /// Adds another engine's.
    pub fn add(&mut self, other: &Tally) {
        self.saves += other.saves;
        self.loads += other.loads;
        self.loaded_bytes += other.loaded_bytes;
        self.waits += other.waits;
        self.cancels += other.cancels;
        self.refused += other.refused;
        self.checks += other.checks;
    }
}

/// Most requests of an engine that are under way at a time.
const MOST_PENDING: usize = 6;
/// Requests until all memory is compared.
const ROUND: usize = 40;

enum Kind {
    Save,
    Load(Vec<BlockHash>),
}

struct Pending {
    request: RequestId,
    group: u16,
    blocks: Vec<u32>,
    kind: Kind,
}

struct Soak {
    rank: Rank,
    random: Stream,
    tally: Tally,
    pending: Vec<Pending>,
    /// Blocks of each group that no request uses.
    free: Vec<Vec<u32>>,
    hashes: u64,
    key: u64,
}

/// Does it.
///
/// # Errors
/// A byte differs, or the GPU fails.
pub fn run(plan: &Plan) -> anyhow::Result<Tally> {
    // The daemon may be killed while the engine starts.
    let options = Options {
        start_without_daemon: Some(true),
        ..options(plan.socket.clone())
    };
    let rank = Rank::open(options, plan.spec.clone())?;
    rank.client.wait_ready(rank.registration, crate::SOON)?;
    let free = rank.groups.iter().map(|group| (0..group.blocks).collect());
    let mut soak = Soak {
        free: free.collect(),
        rank,
        random: Stream::new(&[plan.seed]),
        tally: Tally::default(),
        pending: Vec::new(),
        hashes: plan.hashes,
        key: plan.seed << 32,
    };
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs_f64(plan.seconds) {
        for _ in 0..ROUND {
            soak.step()?;
        }
        if plan.breaks && started.elapsed() >= Duration::from_secs_f64(plan.seconds) {
            if let Err(error) = soak.rank.break_context() {
                // An engine that still runs is killed unheard; one that has ended is a fault.
                eprintln!("{error:#}");
                std::process::exit(1);
            }
            std::thread::sleep(crate::SOON);
        }
        while !soak.pending.is_empty() {
            soak.finish()?;
        }
        // Nothing is under way: every byte is known, those that no block owns included.
        soak.rank.check()?;
        soak.tally.checks += 1;
    }
    Ok(soak.tally)
}

impl Soak {
    fn step(&mut self) -> anyhow::Result<()> {
        if self.pending.len() >= MOST_PENDING || self.random.below(3) == 0 {
            if !self.pending.is_empty() {
                self.finish()?;
            }
            return Ok(());
        }
        let position = self.random.below(self.free.len() as u64) as usize;
        let group = self.rank.groups[position].group;
        let most = self.free[position].len().min(48) as u64;
        if most == 0 {
            return Ok(());
        }
        let count = 1 + self.random.below(most) as usize;
        // Runs are long in an engine that has just started, and short later.
        if self.random.below(2) == 0 {
            self.shuffle(position);
        }
        let first = self.random.below(self.hashes);
        let hashes = content::hashes(first, count);
        match self.random.below(2) {
            0 => self.save(position, group, &hashes),
            _ => self.load(position, group, hashes),
        }
    }

    fn shuffle(&mut self, position: usize) {
        let blocks = &mut self.free[position];
        for at in (1..blocks.len()).rev() {
            blocks.swap(at, self.random.below(at as u64 + 1) as usize);
        }
    }

    fn take(&mut self, position: usize, count: usize) -> Vec<u32> {
        let free = &mut self.free[position];
        free.split_off(free.len() - count)
    }

    fn save(&mut self, position: usize, group: u16, hashes: &[BlockHash]) -> anyhow::Result<()> {
        let blocks = self.take(position, hashes.len());
        for (block, hash) in blocks.iter().zip(hashes) {
            let page = self.rank.page_of(group, hash);
            self.rank.put(group, *block, &page)?;
        }
        let after = self.rank.after_stream();
        let (client, registration) = (&self.rank.client, self.rank.registration);
        let started = client.save_after(registration, group, hashes, &blocks, after);
        self.started(started, group, blocks, Kind::Save)
    }

    fn load(&mut self, position: usize, group: u16, hashes: Vec<BlockHash>) -> anyhow::Result<()> {
        self.key += 1;
        let (client, registration) = (&self.rank.client, self.rank.registration);
        let asked = client.query(registration, group, self.key, &hashes, 0);
        let answer = match asked.and_then(|request| self.rank.wait(request)) {
            Ok(answer) if answer.lease != 0 => answer,
            Ok(_) => return Ok(()),
            Err(error) => return self.refused(&error),
        };
        if self.random.below(8) == 0 {
            // Left to expire, as by an engine whose request was aborted.
            return Ok(());
        }
        let hits: Vec<BlockHash> = match &answer.bitmap {
            None => hashes[..answer.count as usize].to_vec(),
            Some(bitmap) => {
                let held = |at: &usize| bitmap[at / 64] >> (at % 64) & 1 == 1;
                (0..hashes.len())
                    .filter(held)
                    .map(|at| hashes[at])
                    .collect()
            }
        };
        let blocks = self.take(position, hits.len());
        let after = self.rank.after_stream();
        let pieces = self.rank.group(group).pieces.len().min(256) as u64;
        let steps = self.random.below(2) * (1 + self.random.below(pieces));
        let (client, lease) = (&self.rank.client, answer.lease);
        let started = if steps == 0 {
            client.load_after(registration, group, lease, 0, &blocks, after)
        } else {
            let into = (0, &blocks[..]);
            client.load_in_steps(registration, group, lease, into, after, steps as u16)
        };
        if let (Ok(request), 1..) = (&started, steps) {
            // What comes next in the stream, saves included, comes after some of the load.
            let wait = 1 + self.random.below(steps) as u32;
            let waits = client.stream_wait(*request, wait, self.rank.after_stream());
            self.tally.waits += u64::from(waits.is_ok());
        }
        self.started(started, group, blocks, Kind::Load(hits))
    }

    fn started(
        &mut self,
        started: Result<RequestId, Error>,
        group: u16,
        blocks: Vec<u32>,
        kind: Kind,
    ) -> anyhow::Result<()> {
        match started {
            Ok(request) => {
                if self.random.below(10) == 0 {
                    let cancel = self.rank.client.cancel(request);
                    let answer = cancel.and_then(|cancel| self.rank.wait(cancel));
                    self.tally.cancels += u64::from(answer.is_ok());
                }
                self.pending.push(Pending {
                    request,
                    group,
                    blocks,
                    kind,
                });
                Ok(())
            }
            Err(error) => {
                self.give_back(group, blocks);
                self.refused(&error)
            }
        }
    }

    fn refused(&mut self, error: &Error) -> anyhow::Result<()> {
        self.tally.refused += 1;
        match error.status() {
            // The request was wrong, and none here is.
            Status::InvalidArgument => Err(anyhow::anyhow!("refused: {error}")),
            _ => {
                std::thread::sleep(Duration::from_millis(2));
                Ok(())
            }
        }
    }

    fn give_back(&mut self, group: u16, blocks: Vec<u32>) {
        let mut groups = self.rank.groups.iter();
        let position = groups.position(|known| known.group == group);
        self.free[position.expect("a group of the rank")].extend(blocks);
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        let at = self.random.below(self.pending.len() as u64) as usize;
        let pending = self.pending.swap_remove(at);
        let result = self.rank.wait(pending.request);
        if let Err(error @ Error::Timeout { .. }) = &result {
            anyhow::bail!("a request hangs: {error}");
        }
        let done = result.as_ref().is_ok_and(Completion::is_ok);
        if !done {
            self.tally.refused += 1;
        }
        match pending.kind {
            Kind::Save if done => self.tally.saves += 1,
            Kind::Save => {}
            Kind::Load(hashes) => {
                for (block, hash) in pending.blocks.iter().zip(&hashes) {
                    let found = self.rank.page(pending.group, *block)?;
                    if done {
                        let page = self.rank.page_of(pending.group, hash);
                        if found != page {
                            let place = (pending.group, *block);
                            let what = self.autopsy(place, hash, (&found, &page));
                            let (group, spec) = (pending.group, &self.rank.spec);
                            anyhow::bail!("block {block} of {group} differs: {what}; {spec:?}");
                        }
                        self.rank.expect(pending.group, *block, &page);
                    } else {
                        // What a load that failed has left is nobody's to say.
                        self.rank.expect(pending.group, *block, &found);
                    }
                }
                if done {
                    self.tally.loads += 1;
                    let answer = result.context("a load that succeeded")?;
                    self.tally.loaded_bytes += answer.bytes;
                }
            }
        }
        self.give_back(pending.group, pending.blocks);
        Ok(())
    }

    /// Whatever helps to tell where other bytes came from than those of a load.
    fn autopsy(
        &mut self,
        (group, block): (u16, u32),
        hash: &BlockHash,
        (found, page): (&[u8], &[u8]),
    ) -> String {
        let first = self.tell_apart((group, block), found, page);
        std::thread::sleep(Duration::from_millis(100));
        let later = match self.rank.page(group, block) {
            Ok(later) if later == found => "the same 100 ms later".into(),
            Ok(later) if later == page => "as it should be 100 ms later".into(),
            Ok(later) => self.tell_apart((group, block), &later, page),
            Err(error) => format!("{error:#}"),
        };
        // The pool's bytes, or the way from there?
        let again = match self.load_again((group, block), hash) {
            Ok(again) if again == page => "loaded again it is as it should be".into(),
            Ok(again) if again == found => "loaded again it is the same".into(),
            Ok(again) => {
                let what = self.tell_apart((group, block), &again, page);
                format!("loaded again: {what}")
            }
            Err(error) => format!("not loaded again: {error:#}"),
        };
        let stats = self.rank.client.stats();
        let (tally, reconnects) = (self.tally, stats.reconnects);
        format!("{first}; {later}; {again}; {reconnects} reconnects, {tally:?}")
    }

    fn load_again(
        &mut self,
        (group, block): (u16, u32),
        hash: &BlockHash,
    ) -> anyhow::Result<Vec<u8>> {
        self.key += 1;
        let (client, registration) = (&self.rank.client, self.rank.registration);
        // Something else first, so that a load of nothing shows.
        let blank = vec![0x3C; self.rank.group(group).page_bytes()];
        let asked = client.query(registration, group, self.key, &[*hash], 0)?;
        let lease = self.rank.wait(asked)?.lease;
        anyhow::ensure!(lease != 0, "it is not held any more");
        self.rank.put(group, block, &blank)?;
        let client = &self.rank.client;
        let request = client.load(registration, group, lease, 0, &[block])?;
        let answer = self.rank.wait(request)?;
        anyhow::ensure!(answer.is_ok(), "{:?}", answer.status);
        self.rank.page(group, block)
    }

    fn tell_apart(&self, (group, block): (u16, u32), found: &[u8], page: &[u8]) -> String {
        let differs = |at: &usize| found[*at] != page[*at];
        let Some(first) = (0..page.len()).find(differs) else {
            return "no byte differs".into();
        };
        let last = (0..page.len()).rfind(differs).unwrap_or(first);
        let count = (0..page.len()).filter(differs).count();
        let whose = |bytes: &[u8], at: usize| {
            let end = (at + 16).min(page.len());
            let (part, before) = (&bytes[at..end], self.rank.expected(group, block));
            if part.iter().all(|byte| *byte == BACKGROUND) {
                return "those of memory that nobody has written".to_owned();
            }
            if part == &before[at..end] {
                return "what the block held before".to_owned();
            }
            let is_of = |number: &u64| {
                let other = self.rank.page_of(group, &content::hash(*number));
                part == &other[at..end]
            };
            match (0..self.hashes + 48).find(is_of) {
                Some(number) => format!("of hash {number}"),
                None => format!("of nobody ({part:x?})"),
            }
        };
        let (begin, end) = (whose(found, first), whose(found, last.saturating_sub(15)));
        let bytes = page.len();
        format!(
            "{count} bytes from {first} to {last} of {bytes}, which are {begin} at first and {end} \
             at last"
        )
    }
}
