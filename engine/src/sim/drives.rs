//! Drives without drives: a store below the pool whose requests go on, fail and end when the
//! simulation says so. What it has outlives the daemon, as far as a crash leaves it.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_ssd::{ShardStats, page_checksum};

use crate::copy::{Direction, NO_CHECKSUM, PageCopy, PoolMemory};
use crate::lane::LaneWake;
use crate::sim::kv::Content;
use crate::sim::plan::TierPlan;
use crate::sim::rng::Rng;
use crate::tier::memory::{fill_page, read_page};
use crate::tier::{BlockStore, PageSpan, Refused, StoreDone, StoreKey, StoreOutcome};

/// What a drive does about requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It serves.
    Fine,
    /// What it has does not end, and it takes more.
    Stalled,
    /// It takes no writes.
    ReadOnly,
    /// It takes nothing.
    Down,
}

/// A page on a drive.
#[derive(Clone, Debug)]
pub struct StoredPage {
    bytes: Vec<u8>,
    /// What it means; `None` where nobody can tell.
    pub content: Option<Content>,
}

/// A block on a drive.
struct Stored {
    pages: Vec<StoredPage>,
    /// It survives a crash.
    durable: bool,
    /// Its checksum is wrong by now.
    rotten: bool,
    /// When it was used last.
    used: u64,
}

/// A request that the lane has not heard the end of.
#[derive(Clone, Debug)]
pub struct DriveRequest {
    pub ticket: u64,
    pub key: StoreKey,
    pub is_write: bool,
    pub spans: Vec<PageSpan>,
    /// The pages of a write as they were when it was taken.
    pages: Vec<StoredPage>,
    /// The lane has had it begin.
    pub started: bool,
    ended: bool,
}

impl DriveRequest {
    /// The copy of pages that it is like: a write reads the pool as a load does.
    pub fn as_task(&self) -> (Direction, Vec<PageCopy>) {
        let pages = self.spans.iter().map(|span| PageCopy {
            pool_offset: span.offset,
            block: 0,
            checksum: NO_CHECKSUM,
        });
        let direction = match self.is_write {
            true => Direction::Load,
            false => Direction::Save,
        };
        (direction, pages.collect())
    }
}

struct Shared {
    plan: TierPlan,
    rng: Rng,
    pool: Option<PoolMemory>,
    wake: Option<Arc<LaneWake>>,
    moods: Vec<Mood>,
    blocks: BTreeMap<StoreKey, Stored>,
    requests: BTreeMap<u64, DriveRequest>,
    next: u64,
    done: VecDeque<StoreDone>,
    /// Requests that were taken since the simulation looked last.
    begun: Vec<u64>,
    /// What the lane did that no store stands.
    fault: Option<String>,
}

impl Shared {
    fn drive_of(&self, key: &StoreKey) -> usize {
        usize::from(key.hash[0]) % self.moods.len()
    }

    fn mood(&self, key: &StoreKey) -> Mood {
        self.moods[self.drive_of(key)]
    }

    fn under_way(&self, key: &StoreKey) -> usize {
        let drive = self.drive_of(key);
        let own = self.requests.values().filter(|request| !request.ended);
        own.filter(|request| self.drive_of(&request.key) == drive)
            .count()
    }

    fn fault(&mut self, what: String) {
        self.fault.get_or_insert(what);
    }

    fn take(&mut self, request: DriveRequest) -> Result<(), Refused> {
        // Who is refused for that tries again when something ends.
        let any = self.requests.values().any(|request| !request.ended);
        let chance = any && self.rng.percent(self.plan.busy);
        if chance || self.under_way(&request.key) >= self.plan.depth {
            return Err(Refused::Busy);
        }
        let pool = self.pool.as_ref().expect("it is open");
        let inside = |span: &PageSpan| span.offset + u64::from(span.bytes) <= pool.bytes();
        assert!(request.spans.iter().all(inside), "{request:?}");
        let ticket = request.ticket;
        let heard = |other: &DriveRequest| other.ticket != ticket;
        if self
            .requests
            .values()
            .any(|other| !heard(other) && !other.ended)
        {
            self.fault(format!("ticket {ticket} is used twice"));
        }
        // Whoever gives a ticket anew has heard of its end.
        self.requests.retain(|_, other| heard(other));
        let number = self.next;
        self.next += 1;
        self.requests.insert(number, request);
        self.begun.push(number);
        Ok(())
    }

    fn end(&mut self, number: u64, outcome: StoreOutcome) {
        let pool = self.pool.clone().expect("it is open");
        let Some(request) = self.requests.get_mut(&number) else {
            return;
        };
        request.ended = true;
        let request = request.clone();
        if request.is_write {
            let same =
                |(span, page): (&PageSpan, &StoredPage)| read_page(&pool, span) == page.bytes;
            if !request.spans.iter().zip(&request.pages).all(same) {
                self.fault(format!("a page changed while it was written: {request:?}"));
            }
        }
        match outcome {
            StoreOutcome::Written => self.store(&request),
            StoreOutcome::Bad => drop(self.blocks.remove(&request.key)),
            StoreOutcome::Read | StoreOutcome::Failed => {}
        }
        let checksum = |span: &PageSpan| match span.checksum {
            NO_CHECKSUM => NO_CHECKSUM,
            _ => page_checksum(&read_page(&pool, span)),
        };
        let checksums: Vec<u64> = request.spans.iter().map(checksum).collect();
        let wanted = request.spans.iter().map(|span| span.checksum);
        if request.is_write && !wanted.eq(checksums.iter().copied()) {
            self.fault(format!("a page does not have its checksum: {request:?}"));
        }
        self.done.push_back(StoreDone {
            ticket: request.ticket,
            outcome,
            checksums,
        });
        if let Some(wake) = &self.wake {
            wake.wake_if_parked();
        }
    }

    fn store(&mut self, request: &DriveRequest) {
        let stored = Stored {
            pages: request.pages.clone(),
            durable: false,
            rotten: false,
            used: self.next,
        };
        self.blocks.insert(request.key, stored);
        while self.blocks.len() > self.plan.most {
            let oldest = self.blocks.iter().min_by_key(|(_, block)| block.used);
            let oldest = *oldest.expect("there are some").0;
            self.blocks.remove(&oldest);
        }
    }
}

/// Shared by the lane, which asks, and the simulation, which answers.
#[derive(Clone)]
pub struct SimDrives(Arc<Mutex<Shared>>);

impl SimDrives {
    pub fn new(plan: TierPlan, rng: Rng) -> SimDrives {
        SimDrives(Arc::new(Mutex::new(Shared {
            rng,
            pool: None,
            wake: None,
            moods: vec![Mood::Fine; plan.drives],
            blocks: BTreeMap::new(),
            requests: BTreeMap::new(),
            next: 0,
            done: VecDeque::new(),
            begun: Vec::new(),
            fault: None,
            plan,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lane's end.
    pub fn open(&self, pool: &PoolMemory, wake: Arc<LaneWake>) -> Box<dyn BlockStore> {
        let mut shared = self.lock();
        shared.pool = Some(pool.clone());
        shared.wake = Some(wake);
        Box::new(SimStore(self.clone()))
    }

    /// What no store stands, if the lane did it.
    pub fn fault(&self) -> Option<String> {
        self.lock().fault.clone()
    }

    /// Requests taken since this was asked last, with their numbers.
    pub fn take_begun(&self) -> Vec<(u64, DriveRequest)> {
        let mut shared = self.lock();
        let begun = std::mem::take(&mut shared.begun);
        let known = begun.into_iter().filter_map(|number| {
            let request = shared.requests.get(&number)?;
            Some((number, request.clone()))
        });
        known.collect()
    }

    /// Says what the pages of a write mean.
    pub fn tell_content(&self, number: u64, contents: &[Option<Content>]) {
        let mut shared = self.lock();
        let Some(request) = shared.requests.get_mut(&number) else {
            return;
        };
        let key = request.key;
        for (page, content) in request.pages.iter_mut().zip(contents) {
            page.content = *content;
        }
        let (pages, ended) = (request.pages.clone(), request.ended);
        // The end of the daemon ends what it has begun in the same breath.
        if let (true, Some(stored)) = (ended, shared.blocks.get_mut(&key)) {
            stored.pages = pages;
        }
    }

    /// Requests that have begun and not ended, and whose drive would end them now.
    pub fn numbers(&self) -> Vec<u64> {
        let shared = self.lock();
        let open = shared
            .requests
            .iter()
            .filter(|(_, request)| request.started && !request.ended)
            .filter(|(_, request)| shared.mood(&request.key) != Mood::Stalled);
        open.map(|(number, _)| *number).collect()
    }

    /// Requests whose end the lane has not heard of, given the tickets that it waits for.
    pub fn unheard(&self, tickets: &[u64]) -> Vec<DriveRequest> {
        let shared = self.lock();
        let unheard = shared.requests.values();
        let unheard = unheard.filter(|request| tickets.contains(&request.ticket));
        unheard.cloned().collect()
    }

    /// Requests that have not ended.
    pub fn open_requests(&self) -> Vec<DriveRequest> {
        let shared = self.lock();
        let open = shared.requests.values().filter(|request| !request.ended);
        open.cloned().collect()
    }

    pub fn request(&self, number: u64) -> Option<DriveRequest> {
        self.lock().requests.get(&number).cloned()
    }

    /// The drive has read into some of a request's pages: they hold neither old nor new bytes.
    pub fn scribble_if_read(&self, number: u64, pages: usize, noise: u64) {
        let shared = self.lock();
        let open = |one: &&DriveRequest| !one.ended && !one.is_write;
        let Some(request) = shared.requests.get(&number).filter(open) else {
            return;
        };
        let pool = shared.pool.as_ref().expect("it is open");
        for span in request.spans.iter().take(pages) {
            fill_page(pool, span, &noise.to_le_bytes());
        }
    }

    /// Ends a request as its drive would: what its pages hold then, if that is known.
    pub fn end(&self, number: u64, fails: bool) -> (StoreOutcome, Vec<Option<Content>>) {
        let mut shared = self.lock();
        let request = shared.requests[&number].clone();
        let fails = fails || shared.mood(&request.key) == Mood::Down;
        let unknown = vec![None; request.spans.len()];
        if request.is_write {
            let outcome = match fails {
                true => StoreOutcome::Failed,
                false => StoreOutcome::Written,
            };
            shared.end(number, outcome);
            return (outcome, unknown);
        }
        let pool = shared.pool.clone().expect("it is open");
        let found = shared.blocks.get(&request.key);
        let (outcome, pages) = match found {
            Some(stored) if stored.rotten => (StoreOutcome::Bad, Some(stored.pages.clone())),
            Some(stored) if !fails => (StoreOutcome::Read, Some(stored.pages.clone())),
            _ => (StoreOutcome::Failed, None),
        };
        let mut contents = unknown;
        for (at, page) in pages.iter().flatten().enumerate() {
            fill_page(&pool, &request.spans[at], &page.bytes);
            if outcome == StoreOutcome::Bad {
                fill_page(&pool, &request.spans[at], &[0xbd; 16]);
            } else {
                contents[at] = page.content;
            }
        }
        shared.end(number, outcome);
        (outcome, contents)
    }

    /// One drive changes its mood.
    pub fn set_mood(&self, drive: usize, mood: Mood) {
        self.lock().moods[drive] = mood;
    }

    pub fn drives(&self) -> usize {
        self.lock().moods.len()
    }

    /// Every drive serves.
    pub fn heal(&self) {
        self.lock().moods.fill(Mood::Fine);
    }

    /// What was written before is safe.
    pub fn commit(&self) {
        for block in self.lock().blocks.values_mut() {
            block.durable = true;
        }
    }

    /// Some block's bytes change on the medium.
    pub fn rot(&self, rng: &mut Rng) {
        let mut shared = self.lock();
        let count = shared.blocks.len();
        if count > 0 {
            let at = rng.below(count);
            let block = shared.blocks.values_mut().nth(at).expect("one of them");
            block.rotten = true;
        }
    }

    /// Blocks that can be read, with their sizes.
    pub fn sound_blocks(&self) -> Vec<(StoreKey, Vec<u32>)> {
        let shared = self.lock();
        let sound = shared.blocks.iter().filter(|(_, block)| !block.rotten);
        let sizes = sound.map(|(key, block)| {
            let sizes = block.pages.iter().map(|page| page.bytes.len() as u32);
            (*key, sizes.collect())
        });
        sizes.collect()
    }

    pub fn holds(&self, key: &StoreKey) -> bool {
        self.lock().blocks.contains_key(key)
    }

    /// The daemon is gone: what was not durable may be lost. What a drive was reading it may still
    /// have read before the next daemon opens it.
    pub fn crash(&self, rng: &mut Rng) {
        let open: Vec<u64> = {
            let shared = self.lock();
            let open = shared.requests.iter().filter(|(_, request)| !request.ended);
            open.map(|(number, _)| *number).collect()
        };
        for number in open {
            let is_write = self.lock().requests[&number].is_write;
            if is_write && rng.percent(50) {
                let request = self.lock().requests[&number].clone();
                self.lock().store(&request);
            }
            self.scribble_if_read(number, rng.below(4), rng.next());
        }
        let mut shared = self.lock();
        shared
            .blocks
            .retain(|_, block| block.durable || rng.percent(50));
        shared.forget_daemon();
    }
}

impl Shared {
    fn forget_daemon(&mut self) {
        self.requests.clear();
        self.done.clear();
        self.begun.clear();
        self.pool = None;
        self.wake = None;
    }
}

struct SimStore(SimDrives);

impl BlockStore for SimStore {
    fn lookup(&self, key: &StoreKey) -> Option<Vec<u32>> {
        let shared = self.0.lock();
        if shared.mood(key) == Mood::Down {
            return None;
        }
        let pages = &shared.blocks.get(key)?.pages;
        Some(pages.iter().map(|page| page.bytes.len() as u32).collect())
    }

    fn write(
        &mut self,
        _: Instant,
        ticket: u64,
        key: &StoreKey,
        spans: &[PageSpan],
    ) -> Result<(), Refused> {
        let mut shared = self.0.lock();
        let mut open = shared
            .requests
            .values()
            .filter(|one| one.is_write && !one.ended);
        if shared.blocks.contains_key(key) || open.any(|one| one.key == *key) {
            return Err(Refused::Known);
        }
        if matches!(shared.mood(key), Mood::ReadOnly | Mood::Down) {
            return Err(Refused::Degraded);
        }
        let limited = shared.plan.limited;
        if shared.rng.percent(limited) {
            return Err(Refused::RateLimited);
        }
        let pool = shared.pool.clone().expect("it is open");
        let page = |span: &PageSpan| StoredPage {
            bytes: read_page(&pool, span),
            content: None,
        };
        shared.take(DriveRequest {
            ticket,
            key: *key,
            is_write: true,
            spans: spans.to_vec(),
            pages: spans.iter().map(page).collect(),
            started: false,
            ended: false,
        })
    }

    fn read(
        &mut self,
        _: Instant,
        ticket: u64,
        key: &StoreKey,
        spans: &[PageSpan],
    ) -> Result<(), Refused> {
        let sizes = self.lookup(key).ok_or(Refused::Absent)?;
        let mut shared = self.0.lock();
        if !spans.iter().map(|span| span.bytes).eq(sizes) {
            return Err(Refused::Absent);
        }
        let same = |one: &&DriveRequest| !one.is_write && !one.ended && one.key == *key;
        if shared.requests.values().any(|one| same(&one)) {
            shared.fault(format!("{key:?} is fetched twice at a time"));
        }
        shared.take(DriveRequest {
            ticket,
            key: *key,
            is_write: false,
            spans: spans.to_vec(),
            pages: Vec::new(),
            started: false,
            ended: false,
        })
    }

    fn start(&mut self) {
        for request in self.0.lock().requests.values_mut() {
            request.started = true;
        }
    }

    fn poll(&mut self, _: Instant, done: &mut Vec<StoreDone>) {
        done.extend(self.0.lock().done.drain(..));
    }

    fn next_deadline(&self) -> Option<Instant> {
        None
    }

    fn remove(&mut self, key: &StoreKey) {
        self.0.lock().blocks.remove(key);
    }

    fn touch(&mut self, key: &StoreKey) {
        let mut shared = self.0.lock();
        let now = shared.next;
        if let Some(block) = shared.blocks.get_mut(key) {
            block.used = now;
        }
    }

    fn shards(&self) -> Vec<ShardStats> {
        Vec::new()
    }

    /// What a drive does not end stays undone; all that was written is durable.
    fn close(mut self: Box<Self>, _: Duration) -> bool {
        self.start();
        let numbers = self.0.numbers();
        for number in numbers {
            self.0.end(number, false);
        }
        self.0.commit();
        self.0.open_requests().is_empty()
    }
}
