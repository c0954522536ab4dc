//! A store in memory that tests steer: it can hold requests up, refuse them and fail them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use pegaflow_ssd::{NO_CHECKSUM, ShardStats, page_checksum};

use crate::copy::PoolMemory;
use crate::lane::LaneWake;
use crate::tier::{BlockStore, PageSpan, Refused, StoreDone, StoreKey, StoreOutcome};

/// What a test does to the store, and what it can see of it.
#[derive(Default)]
pub struct State {
    /// What is stored.
    pub blocks: BTreeMap<StoreKey, Vec<Vec<u8>>>,
    /// Requests do not end.
    pub held: bool,
    /// But for so many.
    pub ends: usize,
    /// Requests for these do not end, as if on a drive of their own.
    pub held_keys: BTreeSet<BlockHash>,
    /// Reads of these are refused, as if their drive's queue were full.
    pub busy_keys: BTreeSet<BlockHash>,
    /// Writes are refused with this.
    pub refuse_writes: Option<Refused>,
    /// Reads are refused with this.
    pub refuse_reads: Option<Refused>,
    /// How the next reads end instead of well.
    pub reads_end: Option<StoreOutcome>,
    /// How the next writes end instead of well.
    pub writes_end: Option<StoreOutcome>,
    /// Requests that are taken at a time; 0 for any number.
    pub depth: usize,
    /// Names of the blocks read, in the order of the requests.
    pub reads: Vec<StoreKey>,
    /// Memory of these changes before they are written.
    pub changes: BTreeSet<BlockHash>,
    /// Where the blocks read came to lie.
    pub filled: Vec<(StoreKey, PageSpan)>,
    /// Most blocks that it keeps, those used last; 0 for any number.
    pub most: usize,
    /// What is stored, in the order of its last use.
    order: Vec<StoreKey>,
    /// Blocks written.
    pub writes: usize,
    pending: Vec<Request>,
    pool: Option<PoolMemory>,
    wake: Option<Arc<LaneWake>>,
}

impl State {
    fn used(&mut self, key: &StoreKey) {
        self.order.retain(|other| other != key);
        self.order.push(*key);
    }
}

struct Request {
    ticket: u64,
    key: StoreKey,
    pages: Vec<PageSpan>,
    write: bool,
    started: bool,
}

/// The test's end of a store.
#[derive(Clone, Default)]
pub struct Handle(Arc<Mutex<State>>);

impl Handle {
    /// Looks or steers.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that have not ended.
    pub fn pending(&self) -> usize {
        self.state().pending.len()
    }

    /// Holds requests up from now on.
    pub fn hold(&self) {
        self.state().held = true;
    }

    /// Lets requests end.
    pub fn release(&self) {
        let mut state = self.state();
        state.held = false;
        state.held_keys.clear();
        if let Some(wake) = &state.wake {
            wake.wake();
        }
    }

    /// Lets one request end, whatever becomes of the others.
    pub fn end_one(&self) {
        let mut state = self.state();
        state.ends += 1;
        if let Some(wake) = &state.wake {
            wake.wake();
        }
    }

    /// Lets requests end but those for these blocks.
    pub fn hold_only(&self, keys: impl IntoIterator<Item = BlockHash>) {
        let mut state = self.state();
        state.held = false;
        state.held_keys = keys.into_iter().collect();
        if let Some(wake) = &state.wake {
            wake.wake();
        }
    }

    /// One bit of a block that was read, or is to be written, changes in the pool.
    pub fn change(&self, hash: &BlockHash) {
        let state = self.state();
        let filled = state.filled.iter().map(|(key, span)| (key, span));
        let pending = state.pending.iter().map(|one| (&one.key, &one.pages[0]));
        let span = filled
            .chain(pending)
            .rev()
            .find(|(key, _)| key.hash == *hash);
        let (_, span) = span.expect("it was read, or is to be written");
        flip(state.pool.as_ref().expect("opened"), span);
    }

    /// The lane's end.
    pub fn open(&self, pool: &PoolMemory, wake: Arc<LaneWake>) -> Box<dyn BlockStore> {
        let mut state = self.state();
        state.pending.clear();
        state.wake = Some(wake);
        state.pool = Some(pool.clone());
        Box::new(MemoryStore {
            state: self.0.clone(),
            pool: pool.clone(),
        })
    }
}

/// Memory changes by itself.
fn flip(pool: &PoolMemory, span: &PageSpan) {
    let byte = place(pool, span).wrapping_add(99);
    // SAFETY: the span lies in the pool, which `pool` keeps mapped, and no copy of it runs.
    unsafe { byte.write(byte.read() ^ 1) };
}

fn place(pool: &PoolMemory, span: &PageSpan) -> *mut u8 {
    assert!(span.offset + u64::from(span.bytes) <= pool.bytes());
    pool.base().as_ptr().wrapping_add(span.offset as usize)
}

/// The bytes of a page of the pool that belongs to a store.
pub fn read_page(pool: &PoolMemory, span: &PageSpan) -> Vec<u8> {
    let mut bytes = vec![0; span.bytes as usize];
    // SAFETY: the span lies in the pool, which `pool` keeps mapped; the lane leaves its pages alone
    // until the request has ended.
    unsafe { std::ptr::copy(place(pool, span), bytes.as_mut_ptr(), bytes.len()) };
    bytes
}

/// Fills the beginning of a page of the pool that belongs to a store.
pub fn fill_page(pool: &PoolMemory, span: &PageSpan, bytes: &[u8]) {
    assert!(bytes.len() <= span.bytes as usize);
    // SAFETY: as in `read_page`.
    unsafe { std::ptr::copy(bytes.as_ptr(), place(pool, span), bytes.len()) };
}

struct MemoryStore {
    state: Arc<Mutex<State>>,
    pool: PoolMemory,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(
        &self,
        refused: impl Fn(&State) -> Option<Refused>,
        request: Request,
    ) -> Result<(), Refused> {
        let mut state = self.lock();
        if let Some(why) = refused(&state) {
            return Err(why);
        }
        if state.depth > 0 && state.pending.len() >= state.depth {
            return Err(Refused::Busy);
        }
        state.pending.push(request);
        Ok(())
    }
}

impl BlockStore for MemoryStore {
    fn lookup(&self, key: &StoreKey) -> Option<Vec<u32>> {
        let state = self.lock();
        let pages = state.blocks.get(key)?;
        Some(pages.iter().map(|page| page.len() as u32).collect())
    }

    fn write(
        &mut self,
        _: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused> {
        let known = self.lock().blocks.contains_key(key);
        let request = Request {
            ticket,
            key: *key,
            pages: pages.to_vec(),
            write: true,
            started: false,
        };
        let refused = |state: &State| known.then_some(Refused::Known).or(state.refuse_writes);
        self.take(refused, request)?;
        self.lock().writes += 1;
        Ok(())
    }

    fn read(
        &mut self,
        _: Instant,
        ticket: u64,
        key: &StoreKey,
        pages: &[PageSpan],
    ) -> Result<(), Refused> {
        let request = Request {
            ticket,
            key: *key,
            pages: pages.to_vec(),
            write: false,
            started: false,
        };
        let hash = key.hash;
        let busy = |state: &State| state.busy_keys.contains(&hash).then_some(Refused::Busy);
        self.take(|state| state.refuse_reads.or(busy(state)), request)?;
        self.lock().reads.push(*key);
        Ok(())
    }

    fn start(&mut self) {
        let mut state = self.lock();
        let mut any = false;
        for request in &mut state.pending {
            any |= !std::mem::replace(&mut request.started, true);
        }
        if any && let Some(wake) = &state.wake {
            wake.wake();
        }
    }

    fn poll(&mut self, _: Instant, done: &mut Vec<StoreDone>) {
        let mut state = self.lock();
        for request in std::mem::take(&mut state.pending) {
            let held = !request.started || (state.held && state.ends == 0);
            if held || state.held_keys.contains(&request.key.hash) {
                state.pending.push(request);
                continue;
            }
            state.ends -= usize::from(state.held);
            if request.write && state.changes.contains(&request.key.hash) {
                flip(&self.pool, &request.pages[0]);
            }
            let wrong = request.write
                && request.pages.iter().any(|span| {
                    span.checksum != NO_CHECKSUM
                        && page_checksum(&read_page(&self.pool, span)) != span.checksum
                });
            let mut checksums = Vec::new();
            let mut outcome = match request.write {
                true => StoreOutcome::Written,
                false => StoreOutcome::Read,
            };
            if let Some(other) = match request.write {
                true => state.writes_end,
                false => state.reads_end,
            } {
                if other == StoreOutcome::Bad {
                    state.blocks.remove(&request.key);
                }
                outcome = other;
            } else if wrong {
                outcome = StoreOutcome::Bad;
            } else if request.write {
                let read = |span: &PageSpan| read_page(&self.pool, span);
                let pages = request.pages.iter().map(read).collect();
                state.blocks.insert(request.key, pages);
                state.used(&request.key);
                if state.most > 0 && state.blocks.len() > state.most {
                    let oldest = state.order.remove(0);
                    state.blocks.remove(&oldest);
                }
            } else if let Some(pages) = state.blocks.get(&request.key).cloned() {
                let place = (request.key, request.pages[0]);
                state.filled.push(place);
                for (span, bytes) in request.pages.iter().zip(&pages) {
                    assert_eq!(span.bytes as usize, bytes.len());
                    fill_page(&self.pool, span, bytes);
                    checksums.push(match span.checksum {
                        NO_CHECKSUM => NO_CHECKSUM,
                        _ => page_checksum(bytes),
                    });
                }
            } else {
                outcome = StoreOutcome::Failed;
            }
            done.push(StoreDone {
                ticket: request.ticket,
                outcome,
                checksums,
            });
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        None
    }

    fn remove(&mut self, key: &StoreKey) {
        self.lock().blocks.remove(key);
    }

    fn touch(&mut self, key: &StoreKey) {
        self.lock().used(key);
    }

    fn shards(&self) -> Vec<ShardStats> {
        Vec::new()
    }

    fn close(self: Box<Self>, _: Duration) -> bool {
        let mut state = self.lock();
        // The pool is its next owner's.
        state.pool = None;
        state.pending.is_empty()
    }
}
