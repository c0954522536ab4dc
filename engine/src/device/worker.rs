//! The work of one device's thread: takes tasks, starts chunks, notices their ends, hands tasks
//! back.
//!
//! Loads and saves go side by side, since the bus has a lane for each; each side has two slots, so
//! that the next chunk is queued before the last is done. Loads are looked at first. Within a side
//! the sessions take turns, a chunk each.
//!
//! What must hold: a task comes back exactly once, and only when nothing touches its pages and
//! blocks any more. A chunk's event says so for the chunk. When an event cannot be asked any more,
//! the context is ended first, which ends all that runs in it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::copy::{ByteCopier, CopyError, CopyTask, Direction, StuckCopies};

use super::card::{Card, Workplace};
use super::driver::Context;
use super::error::DriverError;
use super::job::Job;
use super::options::DeviceOptions;
use super::plan::Limits;
use super::side::{Gear, Lengths, Side, take_checksums};
use super::slot::{BOUNCE_BYTES, Kernels, MAX_PAGES, PARTS_BYTES, Slot};
use super::turns::{Head, Turns};

/// Slots of each side.
const SLOTS: usize = 2;
/// Most bytes of a chunk: long enough that the thread has little to do per byte, short enough that
/// an urgent load behind two of them waits for little more than a millisecond.
const CHUNK_BYTES: u64 = 32 << 20;
/// Most bytes of a save's chunk that is a few large copies and no other session's save waits for:
/// each look at the bus costs the thread the same, whatever has gone over it. A save of another
/// session that comes then, and a cancellation, wait for two of them, which take 10 ms; on a slower
/// bus chunks are shorter, so that it is not much more. Loads have a way of their own and do not
/// wait.
const LONG_SAVE_BYTES: u64 = 256 << 20;
/// The same of a load, for whose end an engine waits, perhaps one that asks for another next.
const LONG_LOAD_BYTES: u64 = 64 << 20;
/// As many copies are few: a batch of more keeps the thread for long.
const FEW_COPIES: usize = 128;
/// Most copies of a chunk.
const MAX_COPIES: usize = 2048;
/// Most pages of a chunk without kernel: what the thread plans in a tenth of a millisecond.
const MAX_DIRECT_PAGES: usize = 8192;
/// Runs of pool memory shorter than this are worth the CPU's way.
const SMALL_RUN_BYTES: u64 = 16 << 10;
/// Pieces as few as this are not worth a kernel.
const FEW_PIECES: usize = 4;
/// The least staging slot worth having.
const LEAST_STAGING_BYTES: u64 = 1 << 20;

/// How the thread waits for its next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// Not at all.
    No,
    /// Until there is a task, or this long.
    For(Duration),
    /// Until there is a task.
    ForTask,
}

/// What the thread owns.
pub(super) struct Worker {
    gear: Gear,
    generation: u64,
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Loads, then saves.
    sides: [Side; 2],
    taken: VecDeque<CopyTask>,
    /// The last task that ended was a long one.
    ended_long: bool,
}

impl Worker {
    /// A worker with its slots in a context, which it binds to the calling thread.
    pub(super) fn new(
        card: Arc<Card>,
        place: Arc<Workplace>,
        (context, generation): (Arc<dyn Context>, u64),
        now: Instant,
    ) -> Result<Worker, DriverError> {
        context.bind()?;
        let options = card.options().clone();
        let kernels = Kernels {
            gather: context.kernel(c"pega_gather")?,
            scatter: context.kernel(c"pega_scatter")?,
            most_blocks: match options.kernel_blocks {
                Some(blocks) => blocks.max(1),
                None => context.multiprocessors()?.max(1),
            },
        };
        let staging_bytes = staging_that_fits(&*context, options.staging_bytes);
        if staging_bytes < options.staging_bytes {
            tracing::warn!(
                device = %card.info().uuid,
                wanted = options.staging_bytes,
                got = staging_bytes,
                "little GPU memory is free: small pieces are copied slower; leave the daemon some \
                 when the engine takes the memory"
            );
        }
        let slots_bytes = 2 * SLOTS as u64 * (staging_bytes + PARTS_BYTES as u64);
        card.counters().set_staging(slots_bytes);
        let side = |direction, long_bytes, limit| {
            let slots = (0..SLOTS).map(|_| Slot::new(&*context, staging_bytes));
            let slots = slots.collect::<Result<Vec<Slot>, DriverError>>()?;
            let lengths = Lengths {
                chunk_bytes: CHUNK_BYTES,
                long_bytes,
                limit,
            };
            Ok::<Side, DriverError>(Side::new(direction, slots, lengths, now))
        };
        let sides = [
            side(Direction::Load, LONG_LOAD_BYTES, None)?,
            side(Direction::Save, LONG_SAVE_BYTES, options.d2h_limit)?,
        ];
        Ok(Worker {
            gear: Gear {
                limits: limits(&options, staging_bytes),
                card,
                place,
                context,
                kernels,
                copier: ByteCopier::new(),
            },
            generation,
            jobs: Vec::new(),
            free: Vec::new(),
            sides,
            taken: VecDeque::new(),
            ended_long: false,
        })
    }

    /// One look at everything: new tasks, chunks that are done, slots that are free. An error is
    /// the device's end: [`Worker::give_up`] follows.
    pub(super) fn turn(&mut self, now: Instant) -> Result<Wait, DriverError> {
        self.take_in(now);
        if let Some(error) = self.gear.card.inbox().take_fault(self.generation) {
            return Err(error);
        }
        for side in 0..self.sides.len() {
            self.notice_ends(side, now)?;
            self.start_chunks(side, now)?;
        }
        Ok(self.how_to_wait(now))
    }

    /// Whether the next task is worth being looked for without sleeping: behind a long one, a
    /// wake-up is of no weight.
    pub(super) fn is_in_haste(&self) -> bool {
        !self.ended_long
    }

    /// No task is left.
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.len() == self.free.len()
    }

    fn take_in(&mut self, now: Instant) {
        let mut taken = std::mem::take(&mut self.taken);
        self.gear.card.inbox().take(&mut taken);
        for task in taken.drain(..) {
            self.take_task(task, now);
        }
        self.taken = taken;
    }

    fn take_task(&mut self, task: CopyTask, now: Instant) {
        let mut job = Job::new(task, now);
        if let Err(error) = self.check(&job.task) {
            job.fail(job.next, error);
        }
        if job.is_over() {
            // Refused, or an empty list.
            self.gear.card.counters().task_out();
            self.gear.place.results.put(job.finish());
            return;
        }
        let (session, side) = (job.task.session, side_of(job.task.direction));
        let number = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[number] = Some(job);
        self.sides[side].turns.add(session, number);
    }

    /// Refuses what names memory of a context that is gone.
    fn check(&self, task: &CopyTask) -> Result<(), CopyError> {
        let device = self.gear.card.info().uuid;
        let target = task.target.device();
        let void = target.is_none_or(|target| target.generation() != self.generation)
            || task.after.as_ref().is_some_and(|after| {
                let events = &after.events;
                events.generation() != self.generation || events.get(after.index).is_none()
            });
        if void {
            return Err(CopyError::DeviceReset { device });
        }
        Ok(())
    }

    /// Takes chunks off their slots that are done, and hands jobs back that are over.
    fn notice_ends(&mut self, side: usize, now: Instant) -> Result<(), DriverError> {
        let begun = Instant::now();
        while let Some(number) = self.sides[side].take_done(&self.gear, now)? {
            let Some(job) = &mut self.jobs[number] else {
                continue;
            };
            job.in_flight -= 1;
            job.busy += begun.elapsed();
            if job.is_over() {
                self.finish(number);
            }
        }
        Ok(())
    }

    fn finish(&mut self, number: usize) {
        let Some(mut job) = self.jobs[number].take() else {
            return;
        };
        // A job is looked at for the last time when its side may start a chunk, which it may not
        // until its limit allows for one.
        let side = side_of(job.task.direction);
        self.sides[side].turns.leave(job.task.session, number);
        self.free.push(number);
        if job.task.direction == Direction::Save {
            take_checksums(&self.gear, &mut job);
        }
        let page_bytes = job.task.target.layout().page_bytes();
        self.ended_long = job.pages_done() as u64 * page_bytes >= CHUNK_BYTES;
        self.gear.card.counters().task_out();
        self.gear.place.results.put(job.finish());
    }

    /// Starts chunks in the slots that are free, as far as there are any to start.
    fn start_chunks(&mut self, side: usize, now: Instant) -> Result<(), DriverError> {
        while let Some(slot) = self.sides[side].free_slot() {
            if self.sides[side].turns.is_empty() || now < self.sides[side].allowed_at {
                break;
            }
            let Some(number) = self.next_job(side, now)? else {
                break;
            };
            let Some(job) = &mut self.jobs[number] else {
                break;
            };
            let begun = Instant::now();
            self.sides[side].look_ahead(&self.gear, job);
            if job.is_planned() {
                // What is wrong with its next page was found just now; its turn ends it.
                job.busy += begun.elapsed();
                continue;
            }
            let started = self.sides[side].start(&self.gear, (slot, number), job, now);
            job.busy += begun.elapsed();
            started?;
        }
        Ok(())
    }

    /// The job whose turn it is. Those at the heads of the queues that are over leave them.
    fn next_job(&mut self, side: usize, now: Instant) -> Result<Option<usize>, DriverError> {
        let mut turns = std::mem::take(&mut self.sides[side].turns);
        let mut broken = None;
        let next = turns.next(|number| match self.look(number, now) {
            Ok(head) => head,
            Err(error) => {
                broken = Some(error);
                Head::Waits
            }
        });
        self.sides[side].turns = turns;
        broken.map_or(Ok(next), Err)
    }

    /// What becomes of a job at the head of its session's queue.
    fn look(&mut self, number: usize, now: Instant) -> Result<Head, DriverError> {
        let Some(job) = &mut self.jobs[number] else {
            return Ok(Head::Over);
        };
        if !job.is_planned() && job.is_cancelled() {
            job.fail(job.next, CopyError::Cancelled);
        }
        if !job.is_planned() && job.looks.is_some_and(|looks| looks.next <= now) {
            self.look_at_event(number, now)?;
        }
        let Some(job) = &self.jobs[number] else {
            return Ok(Head::Over);
        };
        if job.is_over() {
            self.finish(number);
            return Ok(Head::Over);
        }
        Ok(if job.is_planned() {
            Head::Over
        } else if job.looks.is_some() {
            Head::Waits
        } else {
            Head::Ready
        })
    }

    /// Asks for the event that a job comes after.
    fn look_at_event(&mut self, number: usize, now: Instant) -> Result<(), DriverError> {
        let Some(job) = &mut self.jobs[number] else {
            return Ok(());
        };
        let after = job.task.after.as_ref();
        let event = after.and_then(|after| after.events.get(after.index));
        match event.map_or(Ok(true), |event| self.gear.context.is_done(event)) {
            Ok(true) => job.looks = None,
            Ok(false) => {
                if let Some(looks) = &mut job.looks {
                    looks.again(now);
                }
            }
            Err(error) if error.is_sticky() => return Err(error),
            Err(error) => {
                let error = self.gear.card.copy_error(job.task.direction, error);
                job.fail(job.next, error);
            }
        }
        Ok(())
    }

    fn how_to_wait(&self, now: Instant) -> Wait {
        /// Shorter than a sleep takes.
        const SHORT: Duration = Duration::from_micros(8);
        let mut at: Option<Instant> = None;
        let mut earlier = |moment: Instant| at = Some(at.map_or(moment, |at| at.min(moment)));
        for side in &self.sides {
            if let Some(moment) = side.next_look(now) {
                earlier(moment);
            }
            if side.free_slot().is_some() {
                if !side.turns.is_empty() && side.allowed_at > now {
                    earlier(side.allowed_at);
                }
                for (_, jobs) in side.turns.waiting() {
                    let head = jobs.front().and_then(|number| self.jobs[*number].as_ref());
                    if let Some(looks) = head.and_then(|job| job.looks) {
                        earlier(looks.next);
                    }
                }
            }
        }
        match at {
            None => Wait::ForTask,
            Some(at) => match at.saturating_duration_since(now) {
                wait if wait < SHORT => Wait::No,
                wait => Wait::For(wait),
            },
        }
    }

    /// Ends what waits for an event: the daemon stops.
    pub(super) fn cancel_waiting(&mut self) {
        for side in 0..self.sides.len() {
            let mut turns = std::mem::take(&mut self.sides[side].turns);
            let waiting = turns.waiting().flat_map(|(_, jobs)| jobs).copied();
            for number in waiting {
                if let Some(job) = &mut self.jobs[number]
                    && job.looks.is_some()
                {
                    job.fail(job.next, CopyError::Cancelled);
                }
            }
            self.sides[side].turns = std::mem::take(&mut turns);
        }
    }

    /// Sessions one of whose tasks has waited for an event for longer than `bound`.
    pub(super) fn stuck(&self, now: Instant, bound: Duration) -> Vec<StuckCopies> {
        let mut found: Vec<StuckCopies> = Vec::new();
        for (session, jobs) in self.sides.iter().flat_map(|side| side.turns.waiting()) {
            let head = jobs.front().and_then(|number| self.jobs[*number].as_ref());
            let since = head.and_then(|job| job.looks).map(|looks| looks.since);
            if since.is_some_and(|since| now.saturating_duration_since(since) > bound) {
                let tasks = jobs.len();
                match found.iter_mut().find(|stuck| stuck.session == session) {
                    Some(stuck) => stuck.tasks += tasks,
                    None => found.push(StuckCopies { session, tasks }),
                }
            }
        }
        found
    }

    /// The device's end: its context goes, and with it all that runs in it; then the tasks come
    /// back.
    pub(super) fn give_up(mut self, error: DriverError) {
        self.gear.card.go_down(&*self.gear.context, error);
        for side in 0..self.sides.len() {
            let direction = [Direction::Load, Direction::Save][side];
            for (number, from) in self.sides[side].abandon() {
                if let Some(job) = &mut self.jobs[number] {
                    job.in_flight -= 1;
                    job.fail(from, self.gear.card.copy_error(direction, error));
                }
            }
            self.sides[side].turns = Turns::default();
        }
        let device = self.gear.card.info().uuid;
        for number in 0..self.jobs.len() {
            if let Some(job) = &mut self.jobs[number] {
                job.fail(job.next, CopyError::DeviceReset { device });
                debug_assert_eq!(job.in_flight, 0, "every chunk under way is in a slot");
                self.finish(number);
            }
        }
    }
}

/// The place of a direction's side.
fn side_of(direction: Direction) -> usize {
    match direction {
        Direction::Load => 0,
        Direction::Save => 1,
    }
}

/// What plans may use; each side says how long its chunks are.
fn limits(options: &DeviceOptions, staging_bytes: u64) -> Limits {
    Limits {
        chunk_bytes: CHUNK_BYTES,
        long_bytes: CHUNK_BYTES,
        few_copies: FEW_COPIES,
        staging_bytes,
        bounce_bytes: BOUNCE_BYTES,
        crossover_bytes: options.crossover_bytes,
        small_run_bytes: SMALL_RUN_BYTES,
        few: FEW_PIECES,
        max_copies: MAX_COPIES,
        max_pages: MAX_PAGES,
        max_direct_pages: MAX_DIRECT_PAGES,
    }
}

/// The largest size up to `wanted` at which all slots fit the device's free memory twice, 0 when
/// none does: the rest is the engine's.
fn staging_that_fits(context: &dyn Context, wanted: u64) -> u64 {
    let slots = 2 * SLOTS as u64;
    let free = context.memory().map_or(0, |(free, _)| free);
    let mut bytes = wanted;
    while bytes * slots * 2 > free && bytes >= LEAST_STAGING_BYTES {
        bytes /= 2;
    }
    if bytes >= LEAST_STAGING_BYTES || bytes == wanted {
        bytes
    } else {
        0
    }
}
