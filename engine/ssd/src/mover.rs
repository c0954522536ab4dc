//! Moves pages and tables of one shard: cuts them into pieces for the engine, gathers small pages
//! that follow one another in the file into one, takes checksums, and bounces what direct I/O does
//! not take as it lies.
//!
//! A mover belongs to the shard's thread. It knows nothing of segments and blocks.

mod check;
mod command;
mod part;
mod sums;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::io::{Ended, Engine, Kind};
use crate::memory::{Area, aligned};
use crate::oldest::Oldest;
use crate::stats::ShardFault;

pub(crate) use command::{Alignment, Command, Done, Moved, Op};
use part::{Part, Task};

/// The largest piece. Larger pages are moved in several at a time.
const PIECE_BYTES: u32 = 4 << 20;
/// The size of a bounce buffer.
pub(crate) const BOUNCE_BYTES: u32 = 128 << 10;
/// After so many bytes of checksums the drive gets what it can take.
const STEP_BYTES: u64 = 1 << 20;
/// After so many the results go out.
const TURN_BYTES: u64 = 8 << 20;

/// Moves pages and tables.
pub(crate) struct Mover<E> {
    engine: E,
    pool: Area,
    bounce: Area,
    bounce_free: Vec<u32>,
    alignment: Alignment,
    tasks: Vec<Option<Task>>,
    tasks_free: Vec<u32>,
    parts: Vec<Option<Part>>,
    /// Tasks whose pages a part moves behind its first one's, by part.
    joined: Vec<Vec<u32>>,
    parts_free: Vec<u32>,
    /// Tasks that still need pieces, most urgent first.
    urgent: VecDeque<u32>,
    reads: VecDeque<u32>,
    writes: VecDeque<u32>,
    /// Parts of which the engine moved only some.
    again: Vec<u32>,
    /// Tasks of which all is moved and whose checksum is not looked at.
    moved: VecDeque<u32>,
    running: u32,
    running_writes: u32,
    ended: Vec<Ended>,
    /// Parts in the order in which the engine was given them, ended ones among them.
    order: VecDeque<(u32, Instant)>,
    oldest: Arc<Oldest>,
}

/// Bounce buffers for an engine of that depth, one per piece.
pub(crate) fn bounce_area(depth: u32) -> Area {
    aligned(BOUNCE_BYTES as usize * depth as usize)
}

impl<E: Engine> Mover<E> {
    /// A mover over an engine. `bounce` is from [`bounce_area`].
    pub fn new(engine: E, pool: Area, bounce: Area, alignment: Alignment) -> Self {
        let depth = engine.depth();
        Self {
            engine,
            pool,
            bounce_free: (0..(bounce.bytes / u64::from(BOUNCE_BYTES)) as u32).collect(),
            bounce,
            alignment,
            tasks: Vec::new(),
            tasks_free: Vec::new(),
            parts: (0..depth).map(|_| None).collect(),
            joined: (0..depth).map(|_| Vec::new()).collect(),
            parts_free: (0..depth).collect(),
            urgent: VecDeque::new(),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            again: Vec::new(),
            moved: VecDeque::new(),
            running: 0,
            running_writes: 0,
            ended: Vec::new(),
            order: VecDeque::new(),
            oldest: Arc::new(Oldest::new()),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Where it notes since when the engine has had what it has had longest.
    pub fn oldest(&self) -> Arc<Oldest> {
        Arc::clone(&self.oldest)
    }

    #[cfg(test)]
    pub fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// Whether nothing is waiting or at the engine.
    pub fn is_idle(&self) -> bool {
        self.tasks_free.len() == self.tasks.len()
    }

    /// Takes a command.
    pub fn take(&mut self, command: Command) {
        let queue = match command.op {
            Op::Write { .. } => &mut self.writes,
            Op::Read { .. } => &mut self.reads,
            Op::Table(_) | Op::Sync => &mut self.urgent,
        };
        let task = Task::new(command);
        let index = self.tasks_free.pop().unwrap_or_else(|| {
            self.tasks.push(None);
            self.tasks.len() as u32 - 1
        });
        self.tasks[index as usize] = Some(task);
        queue.push_back(index);
    }

    /// Gives the engine what it can take, waits at most `timeout` for something to end (no time is
    /// no wait), and appends what has ended.
    ///
    /// # Errors
    /// The engine cannot be used any more.
    pub fn turn(&mut self, timeout: Option<Duration>, out: &mut Vec<Done>) -> io::Result<()> {
        self.issue();
        let timeout = if self.moved.is_empty() { timeout } else { None };
        self.wait(timeout)?;
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES && !self.moved.is_empty() {
            // Checksums take time: the drive gets its next requests first.
            self.issue();
            self.wait(None)?;
            let mut step_bytes = 0;
            while step_bytes < STEP_BYTES
                && let Some(index) = self.moved.pop_front()
            {
                step_bytes += self.finish(index, out);
            }
            turn_bytes += step_bytes;
        }
        Ok(())
    }

    /// Lets the engine work, and takes in what has ended.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.note_oldest();
        let mut ended = std::mem::take(&mut self.ended);
        let waited = self.engine.wait(timeout, &mut ended);
        for end in ended.drain(..) {
            self.end(end);
        }
        self.ended = ended;
        self.note_oldest();
        waited
    }

    fn note_oldest(&mut self) {
        while let Some(&(slot, at)) = self.order.front() {
            let part = self.parts[slot as usize].as_ref();
            if part.is_some_and(|part| part.given == Some(at)) {
                break;
            }
            self.order.pop_front();
        }
        self.oldest.note(self.order.front().map(|&(_, at)| at));
    }

    /// Ends everything that is left, for an engine that is gone.
    pub fn abandon(self, out: &mut Vec<Done>) {
        drop(self.engine);
        for task in self.tasks.into_iter().flatten() {
            out.push(Done {
                id: task.command.id,
                result: Err(ShardFault::Stopped),
                took: task.command.at.elapsed(),
                checksums: Duration::ZERO,
            });
        }
    }

    /// The queue to take the next piece from. Reads go first: somebody waits for them. A quarter of
    /// the pieces is for writes nevertheless, or memory would never become free.
    fn next_queue(&self) -> Option<Kind> {
        let owed = self.running_writes < self.engine.depth().div_ceil(4);
        if !self.urgent.is_empty() {
            Some(Kind::Sync)
        } else if !self.writes.is_empty() && (owed || self.reads.is_empty()) {
            Some(Kind::Write)
        } else if !self.reads.is_empty() {
            Some(Kind::Read)
        } else {
            None
        }
    }

    fn issue(&mut self) {
        while let Some(part) = self.again.pop() {
            self.give(part);
        }
        while self.running < self.engine.depth() && !self.parts_free.is_empty() {
            let Some(kind) = self.next_queue() else { break };
            let index = self.queue(kind)[0];
            if self.task(index).fault.is_some() {
                // It ends with the last of its open parts.
                self.queue(kind).pop_front();
                continue;
            }
            let Some(part) = self.next_part(kind) else {
                break;
            };
            self.give(part);
        }
    }

    fn queue(&mut self, kind: Kind) -> &mut VecDeque<u32> {
        match kind {
            Kind::Sync => &mut self.urgent,
            Kind::Write => &mut self.writes,
            Kind::Read => &mut self.reads,
        }
    }

    fn task(&mut self, index: u32) -> &mut Task {
        self.tasks[index as usize]
            .as_mut()
            .expect("it has open parts or is queued")
    }

    /// Gives a part, or the rest of one, to the engine.
    fn give(&mut self, slot: u32) {
        let now = Instant::now();
        let open = self.parts[slot as usize].as_mut();
        let part = open.expect("it is open");
        part.given = Some(now);
        let part = *part;
        self.order.push_back((slot, now));
        let piece = self.piece(slot, &part);
        let kind = piece.kind;
        self.running += 1;
        self.running_writes += u32::from(kind == Kind::Write);
        if self.engine.submit(piece).is_err() {
            // There was room, so the engine is broken; its next wait says how.
            self.end(Ended {
                id: u64::from(slot),
                result: Err(libc::EIO),
            });
        }
    }

    /// Takes in the end of a piece.
    fn end(&mut self, end: Ended) {
        let slot = end.id as u32;
        let mut part = self.parts[slot as usize].expect("the engine ends what was given to it");
        let alignment = self.alignment.offset;
        let (is_write, is_sync) = match self.task(part.task).command.op {
            Op::Write { .. } | Op::Table(_) => (true, false),
            Op::Read { .. } => (false, false),
            Op::Sync => (false, true),
        };
        self.running -= 1;
        self.running_writes -= u32::from(is_write);
        let left = part.padded - part.moved;
        let fault = match end.result {
            Err(errno) => Some(ShardFault::from_errno(errno)),
            Ok(_) if is_sync => None,
            Ok(moved) if moved >= left => None,
            // A read that stops short of padding at the file's end has what was wanted.
            Ok(moved) if !is_write && part.moved + moved >= part.bytes => None,
            Ok(0) if !is_write => Some(ShardFault::Truncated),
            Ok(moved) => {
                let even = moved - moved % alignment;
                if even > 0 {
                    part.moved += even;
                    part.given = None;
                    self.parts[slot as usize] = Some(part);
                    self.again.push(slot);
                    return;
                }
                Some(ShardFault::Io(libc::EIO))
            }
        };
        if fault.is_some() && !self.joined[slot as usize].is_empty() {
            self.part_company(slot, &part);
            return;
        }
        if fault.is_some() {
            self.task(part.task).fault = fault;
        }
        self.finish_part(slot, &part);
    }

    /// The engine has moved what it was to move of a part.
    fn finish_part(&mut self, slot: u32, part: &Part) {
        self.take_out(slot, part);
        let joined = std::mem::take(&mut self.joined[slot as usize]);
        self.free_part(slot, part);
        for &index in std::iter::once(&part.task).chain(&joined) {
            let task = self.task(index);
            task.open -= 1;
            let is_queued = task.issued < task.command.op.bytes();
            if task.open > 0 || (is_queued && task.fault.is_none()) {
                continue;
            }
            if is_queued {
                self.unqueue(index);
            }
            self.moved.push_back(index);
        }
        self.joined[slot as usize] = joined;
        self.joined[slot as usize].clear();
    }

    fn free_part(&mut self, slot: u32, part: &Part) {
        self.parts[slot as usize] = None;
        self.parts_free.push(slot);
        self.bounce_free.extend(part.bounce);
    }

    /// Pages that were moved together and came to grief are moved one by one, so that one bad
    /// sector costs one page.
    fn part_company(&mut self, slot: u32, part: &Part) {
        self.free_part(slot, part);
        let mut pages = std::mem::take(&mut self.joined[slot as usize]);
        let kind = self.task(part.task).kind();
        for &index in pages.iter().rev().chain([&part.task]) {
            let task = self.task(index);
            (task.issued, task.open, task.alone) = (0, 0, true);
            self.queue(kind).push_front(index);
        }
        pages.clear();
        self.joined[slot as usize] = pages;
    }

    /// A task that failed early may still be queued for more pieces.
    fn unqueue(&mut self, index: u32) {
        for queue in [&mut self.urgent, &mut self.reads, &mut self.writes] {
            queue.retain(|&queued| queued != index);
        }
    }
}
