//! One direction over the bus: whose turn it is, its slots, and when their chunks should be done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::copy::{self, ByteCopier, Direction};

use super::card::{Card, Workplace};
use super::counters::ChunkPlan;
use super::driver::{Context, Way};
use super::error::DriverError;
use super::forecast::Forecast;
use super::job::Job;
use super::plan::{Limits, Source};
use super::slot::{Cargo, Flight, Kernels, Slot};
use super::turns::Turns;

/// How long the bus may be busy with a chunk that is longer than others.
const LONGEST: Duration = Duration::from_millis(6);

/// What both directions use.
pub(super) struct Gear {
    pub(super) card: Arc<Card>,
    pub(super) place: Arc<Workplace>,
    pub(super) context: Arc<dyn Context>,
    pub(super) kernels: Kernels,
    pub(super) limits: Limits,
    pub(super) copier: ByteCopier,
}

/// How long the chunks of a direction may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    /// Most bytes of a chunk.
    pub(super) chunk_bytes: u64,
    /// Most bytes of one that is a few large copies and that no other session waits for.
    pub(super) long_bytes: u64,
    /// Most bytes a second; 0 is none, too.
    pub(super) limit: Option<u64>,
}

impl Lengths {
    /// Under a limit chunks are short, so that the bytes go evenly.
    fn paced(self) -> Lengths {
        /// Chunks a second at least.
        const CHUNKS: u64 = 200;
        /// Chunks this short are not cut further.
        const LEAST_BYTES: u64 = 256 << 10;
        let limit = self.limit.filter(|limit| *limit > 0);
        let most = limit.map_or(u64::MAX, |limit| (limit / CHUNKS).max(LEAST_BYTES));
        Lengths {
            chunk_bytes: self.chunk_bytes.min(most),
            long_bytes: self.long_bytes.min(most),
            limit,
        }
    }
}

/// One direction.
pub(super) struct Side {
    direction: Direction,
    way: Way,
    pub(super) turns: Turns,
    slots: Vec<Slot>,
    forecast: Forecast,
    lengths: Lengths,
    /// Under a limit: when the next chunk may start.
    pub(super) allowed_at: Instant,
}

impl Side {
    pub(super) fn new(
        direction: Direction,
        slots: Vec<Slot>,
        lengths: Lengths,
        now: Instant,
    ) -> Side {
        Side {
            direction,
            way: match direction {
                Direction::Load => Way::ToDevice,
                Direction::Save => Way::ToHost,
            },
            turns: Turns::default(),
            slots,
            forecast: Forecast::new(now),
            lengths: lengths.paced(),
            allowed_at: now,
        }
    }

    /// A slot in which nothing is under way.
    pub(super) fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(|slot| slot.flight.is_none())
    }

    /// A chunk that is done, by its job; its slot is free from now on.
    pub(super) fn take_done(
        &mut self,
        gear: &Gear,
        now: Instant,
    ) -> Result<Option<usize>, DriverError> {
        for number in 0..self.slots.len() {
            let slot = &mut self.slots[number];
            let Some(flight) = slot.flight else {
                continue;
            };
            if !flight.awaited.is_due(now) {
                continue;
            }
            // SAFETY: a flight's chunk was started in this slot; its job holds pages and layout,
            // and the workplace the pool.
            let done =
                unsafe { slot.is_done(&*gear.context, self.way, &gear.place.pool, gear.copier) }?;
            if done {
                slot.flight = None;
                if flight.pinned {
                    gear.place.flights.end(gear.card.number());
                }
                let bytes = slot.chunk.bytes;
                let plan = ChunkPlan {
                    staged: slot.chunk.staged.is_some(),
                    bounced: slot.chunk.bounced,
                };
                let others = self
                    .slots
                    .iter_mut()
                    .filter_map(|slot| slot.flight.as_mut());
                let others = others.map(|flight| &mut flight.awaited);
                let busy = self.forecast.done(flight.awaited, others, now);
                let counters = gear.card.counters();
                counters.chunk_done(self.direction, plan, bytes, busy);
                return Ok(Some(flight.job));
            }
            if let Some(flight) = &mut slot.flight {
                flight.awaited.is_unfinished(now);
            }
        }
        Ok(None)
    }

    /// Starts the next chunk of a job in a free slot. After an error that is not the device's end,
    /// the job has failed from the chunk on; the chunk is under way all the same.
    ///
    /// # Panics
    /// The job goes the other way: its chunk would be written over what it is to be read from.
    pub(super) fn start(
        &mut self,
        gear: &Gear,
        (slot, number): (usize, usize),
        job: &mut Job,
        now: Instant,
    ) -> Result<(), DriverError> {
        assert_eq!(
            job.task.direction, self.direction,
            "a job of the other side"
        );
        let target = job.task.target.clone();
        let Some(device) = target.device() else {
            return Ok(());
        };
        let source = Source {
            parts: device.parts(),
            page_bytes: target.layout().page_bytes(),
            pages: &job.task.pages[..job.seen],
            pins: gear.place.pins.map(),
        };
        let limits = Limits {
            chunk_bytes: self.lengths.chunk_bytes,
            long_bytes: self.longest(),
            ..gear.limits
        };
        let slot = &mut self.slots[slot];
        let (flights, device_number) = (&gear.place.flights, gear.card.number());
        flights.begin(device_number);
        limits.plan(&source, job.next, &mut slot.chunk);
        let pinned = !slot.chunk.bounced;
        if !pinned {
            flights.end(device_number);
        }
        let cargo = Cargo {
            way: self.way,
            target: &target,
            parts: device.parts(),
            pages: &job.task.pages,
        };
        // SAFETY: pages and blocks up to `seen`, which the plan ends at, were checked, and the
        // layout's generation was found to be that of the context; the lane gives pages and blocks
        // to nobody else before the task comes back, which is after the chunk; the job keeps the
        // layout alive, and the workplace the pool. The slot is free.
        let (queued, recorded) = unsafe {
            slot.start(
                &*gear.context,
                &gear.kernels,
                cargo,
                &gear.place.pool,
                gear.copier,
            )
        };
        recorded?;
        let bytes = slot.chunk.bytes;
        let started = job.next;
        job.started(slot.chunk.to);
        slot.flight = Some(Flight {
            job: number,
            pinned,
            awaited: self.forecast.start(bytes, now),
        });
        if let Some(limit) = self.lengths.limit {
            let pause = Duration::from_nanos((bytes as f64 * 1e9 / limit as f64) as u64);
            self.allowed_at = self.allowed_at.max(now) + pause;
        }
        if let Err(error) = queued {
            if error.is_sticky() {
                return Err(error);
            }
            job.fail(started, gear.card.copy_error(self.direction, error));
        }
        Ok(())
    }

    /// Most bytes of the next chunk: in a whole number of others' chunks, as much as the bus takes
    /// no longer for than whoever comes next may have to wait.
    fn longest(&self) -> u64 {
        let Lengths {
            chunk_bytes,
            long_bytes,
            ..
        } = self.lengths;
        if self.turns.sessions() > 1 {
            return chunk_bytes;
        }
        let in_time = self.forecast.bytes_in(LONGEST);
        let whole = in_time - in_time % chunk_bytes.max(1);
        long_bytes.min(whole.max(chunk_bytes))
    }

    /// The jobs whose chunks are under way, with where those begin. All slots are free afterwards:
    /// their context is gone.
    pub(super) fn abandon(&mut self) -> Vec<(usize, super::plan::Cursor)> {
        let flights = self.slots.drain(..).filter_map(|slot| {
            let flight = slot.flight?;
            Some((flight.job, slot.chunk.from))
        });
        flights.collect()
    }

    /// Looks at the pages that the next chunk may have: whether they lie in the pool and their
    /// blocks in the layout and, of a load, whether the bytes are those of their checksums. What is
    /// wrong ends the job there.
    pub(super) fn look_ahead(&self, gear: &Gear, job: &mut Job) {
        let page_bytes = job.task.target.layout().page_bytes();
        // One that the chunk before began, and one that it may begin.
        let most = (self.longest() / page_bytes.max(1)) as usize + 2;
        let pages = job.seen..job.reach(most);
        if pages.is_empty() {
            return;
        }
        if let Err(error) = copy::check_pages(&gear.place.pool, &job.task, pages.clone()) {
            job.fail(job.next, error);
            return;
        }
        job.seen = pages.end;
        if job.task.direction == Direction::Load {
            let checked = &job.task.pages[pages.clone()];
            // SAFETY: the pages were found inside the pool; a load's pages belong to sealed blocks
            // that a lease holds: nobody writes to them.
            let (sound, corrupt) =
                unsafe { copy::verify_checksums(&gear.place.pool, page_bytes, checked) };
            if corrupt.is_some() {
                job.seen = pages.start + sound;
                (job.sound, job.corrupt) = (job.seen, corrupt);
            }
        }
    }

    /// When to look at the slots again: `None` when nothing is under way.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        let flights = self.slots.iter().filter_map(|slot| slot.flight);
        Forecast::next_look(flights.map(|flight| flight.awaited), now)
    }
}

/// Takes the checksums of the pages that a save has brought in.
pub(super) fn take_checksums(gear: &Gear, job: &mut Job) {
    let pages_done = job.pages_done();
    let page_bytes = job.task.target.layout().page_bytes();
    let pages = &mut job.task.pages[..pages_done];
    // SAFETY: the pages were found inside the pool, and are this save's alone, whose copies are
    // done.
    unsafe { copy::take_checksums(&gear.place.pool, page_bytes, pages) };
}
