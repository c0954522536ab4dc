//! Moves pages and tables of one shard: cuts them into pieces for the engine, takes checksums, and
//! bounces what direct I/O does not take as it lies.
//!
//! A mover belongs to the shard's thread. It knows nothing of segments and blocks.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::{NO_CHECKSUM, page_checksum};
use crate::format::Record;
use crate::io::{Ended, Engine, Kind, Piece};
use crate::memory::{Area, aligned};
use crate::oldest::Oldest;
use crate::stats::ShardFault;

/// The largest piece. Larger pages are moved in several at a time.
const PIECE_BYTES: u32 = 4 << 20;
/// The size of a bounce buffer.
pub(crate) const BOUNCE_BYTES: u32 = 128 << 10;
/// After so many bytes of checksums the drive gets what it can take.
const STEP_BYTES: u64 = 1 << 20;
/// After so many the results go out.
const TURN_BYTES: u64 = 8 << 20;

/// What a shard's thread is asked to do.
#[derive(Debug)]
pub(crate) struct Command {
    /// Comes back with the result.
    pub id: u32,
    /// When it was asked for.
    pub at: Instant,
    /// Where in the file.
    pub offset: u64,
    /// What.
    pub op: Op,
}

/// What is to be moved.
#[derive(Debug)]
pub(crate) enum Op {
    /// A page from the pool, at `page` and of `bytes` bytes, to be compared with `plain` unless
    /// that is [`NO_CHECKSUM`]. Its checksum is the result.
    Write {
        page: u64,
        bytes: u32,
        seed: u64,
        plain: u64,
    },
    /// A page to the pool, to be compared with `checksum`. If `plain` is not [`NO_CHECKSUM`], what
    /// [`page_checksum`] says of it is the result.
    Read {
        page: u64,
        bytes: u32,
        seed: u64,
        checksum: u64,
        plain: u64,
    },
    /// Bytes of the shard itself, at most [`BOUNCE_BYTES`].
    Table(Box<[u8]>),
    /// Makes durable what ended before.
    Sync,
}

/// The end of a command.
#[derive(Debug)]
pub(crate) struct Done {
    /// The command's id.
    pub id: u32,
    /// How it ended.
    pub result: Result<Moved, ShardFault>,
    /// How long it took since it was asked for.
    pub took: Duration,
    /// How much of that were checksums.
    pub checksums: Duration,
}

/// What a command that did not fail found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// It was done; for a page, with the checksum that was asked for.
    Fine { checksum: u64 },
    /// A page has another checksum.
    Different,
}

/// What direct I/O asks of addresses, and of offsets and lengths. Ones for buffered I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub memory: u32,
    pub offset: u32,
}

struct Task {
    command: Command,
    /// Bytes for which pieces exist or existed.
    issued: u32,
    /// Pieces that wait or are at the engine.
    open: u32,
    fault: Option<ShardFault>,
}

/// A part of a task.
#[derive(Clone, Copy)]
struct Part {
    task: u32,
    /// Where in the page or table.
    start: u32,
    /// How much of it is wanted.
    bytes: u32,
    /// How much is moved: more than wanted where the end is padded.
    padded: u32,
    /// How much of `padded` has been moved.
    moved: u32,
    bounce: Option<u32>,
    /// When the engine was given it, or the rest of it.
    given: Option<Instant>,
}

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
        let task = Task {
            command,
            issued: 0,
            open: 0,
            fault: None,
        };
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
            let Some((part, last)) = self.cut(index) else {
                break;
            };
            if last {
                self.queue(kind).pop_front();
            }
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

    /// The next part of a task, and whether it is the last one. None if no bounce buffer is free.
    fn cut(&mut self, index: u32) -> Option<(u32, bool)> {
        let alignment = self.alignment;
        let task = self.tasks[index as usize]
            .as_ref()
            .expect("queued tasks exist");
        let (total, page) = match &task.command.op {
            Op::Write { bytes, page, .. } | Op::Read { bytes, page, .. } => (*bytes, Some(*page)),
            Op::Table(content) => (content.len() as u32, None),
            Op::Sync => (0, None),
        };
        let (start, left) = (task.issued, total - task.issued);
        let (mut bytes, mut bounced) = (left.min(PIECE_BYTES), false);
        if left > 0 {
            let fits = page.is_some_and(|page| {
                let address = self.pool.at(page, u64::from(total)).as_ptr() as usize;
                address.is_multiple_of(alignment.memory as usize)
            });
            let even = bytes - bytes % alignment.offset;
            bounced = !fits || even == 0;
            bytes = if bounced {
                left.min(BOUNCE_BYTES)
            } else {
                even
            };
        }
        let bounce = if bounced {
            Some(self.bounce_free.pop()?)
        } else {
            None
        };
        let part = Part {
            task: index,
            start,
            bytes,
            padded: bytes.next_multiple_of(alignment.offset),
            moved: 0,
            bounce,
            given: None,
        };
        if let Some(bounce) = bounce {
            self.fill(index, &part, bounce);
        }
        let task = self.task(index);
        task.issued += bytes;
        task.open += 1;
        let slot = self.parts_free.pop().expect("the caller looked");
        self.parts[slot as usize] = Some(part);
        Some((slot, start + bytes == total))
    }

    /// Copies what is to be written into a bounce buffer, padded with zeroes.
    fn fill(&mut self, index: u32, part: &Part, bounce: u32) {
        let at = u64::from(bounce) * u64::from(BOUNCE_BYTES);
        let target = self.bounce.at(at, u64::from(BOUNCE_BYTES)).as_ptr();
        let task = self.tasks[index as usize]
            .as_ref()
            .expect("it is being issued");
        let source = match &task.command.op {
            Op::Write { page, .. } => {
                let from = page + u64::from(part.start);
                self.pool
                    .at(from, u64::from(part.bytes))
                    .as_ptr()
                    .cast_const()
            }
            Op::Table(content) => content[part.start as usize..][..part.bytes as usize].as_ptr(),
            Op::Read { .. } | Op::Sync => return,
        };
        // SAFETY: `source` has `part.bytes` bytes that nobody writes meanwhile. The buffer is this
        // part's alone and as large as the padded part; pool and buffers are apart.
        unsafe {
            target.copy_from_nonoverlapping(source, part.bytes as usize);
            target
                .add(part.bytes as usize)
                .write_bytes(0, (part.padded - part.bytes) as usize);
        }
    }

    /// Gives a part, or the rest of one, to the engine.
    fn give(&mut self, slot: u32) {
        let now = Instant::now();
        let open = self.parts[slot as usize].as_mut();
        let part = open.expect("it is open");
        part.given = Some(now);
        let part = *part;
        self.order.push_back((slot, now));
        let task = self.tasks[part.task as usize]
            .as_ref()
            .expect("it has an open part");
        let (kind, page) = match task.command.op {
            Op::Write { page, .. } => (Kind::Write, page),
            Op::Read { page, .. } => (Kind::Read, page),
            Op::Table(_) => (Kind::Write, 0),
            Op::Sync => (Kind::Sync, 0),
        };
        let (left, skip) = (part.padded - part.moved, u64::from(part.moved));
        let address = match part.bounce {
            Some(bounce) => {
                let at = u64::from(bounce) * u64::from(BOUNCE_BYTES) + skip;
                self.bounce.at(at, u64::from(left))
            }
            None => self
                .pool
                .at(page + u64::from(part.start) + skip, u64::from(left)),
        };
        let piece = Piece {
            id: u64::from(slot),
            kind,
            offset: task.command.offset + u64::from(part.start) + skip,
            address,
            bytes: left,
        };
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
        let task = self.tasks[part.task as usize]
            .as_mut()
            .expect("it has an open part");
        let (is_write, is_sync) = match task.command.op {
            Op::Write { .. } | Op::Table(_) => (true, false),
            Op::Read { .. } => (false, false),
            Op::Sync => (false, true),
        };
        self.running -= 1;
        self.running_writes -= u32::from(is_write);
        let left = part.padded - part.moved;
        match end.result {
            Err(errno) => task.fault = Some(ShardFault::from_errno(errno)),
            Ok(_) if is_sync => {}
            Ok(moved) if moved >= left => {}
            // A read that stops short of padding at the file's end has what was wanted.
            Ok(moved) if !is_write && part.moved + moved >= part.bytes => {}
            Ok(0) if !is_write => task.fault = Some(ShardFault::Truncated),
            Ok(moved) => {
                let even = moved - moved % alignment;
                if even == 0 {
                    task.fault = Some(ShardFault::Io(libc::EIO));
                } else {
                    part.moved += even;
                    part.given = None;
                    self.parts[slot as usize] = Some(part);
                    self.again.push(slot);
                    return;
                }
            }
        }
        self.finish_part(slot, part);
    }

    fn finish_part(&mut self, slot: u32, part: Part) {
        self.parts[slot as usize] = None;
        self.parts_free.push(slot);
        if let Some(bounce) = part.bounce {
            let task = self.tasks[part.task as usize]
                .as_ref()
                .expect("it has an open part");
            if let (Op::Read { page, .. }, None) = (&task.command.op, &task.fault) {
                let at = u64::from(bounce) * u64::from(BOUNCE_BYTES);
                let source = self.bounce.at(at, u64::from(part.bytes));
                let target = self
                    .pool
                    .at(page + u64::from(part.start), u64::from(part.bytes));
                // SAFETY: the buffer is this part's alone and its piece has ended; the page is
                // nobody else's until the command has ended; pool and buffers are apart.
                unsafe {
                    target
                        .as_ptr()
                        .copy_from_nonoverlapping(source.as_ptr(), part.bytes as usize);
                }
            }
            self.bounce_free.push(bounce);
        }
        let task = self.task(part.task);
        task.open -= 1;
        let total = match &task.command.op {
            Op::Write { bytes, .. } | Op::Read { bytes, .. } => *bytes,
            Op::Table(content) => content.len() as u32,
            Op::Sync => 0,
        };
        if task.open == 0 && (task.issued == total || task.fault.is_some()) {
            self.unqueue(part.task);
            self.moved.push_back(part.task);
        }
    }

    /// A task that failed early may still be queued for more pieces.
    fn unqueue(&mut self, index: u32) {
        for queue in [&mut self.urgent, &mut self.reads, &mut self.writes] {
            if queue.front() == Some(&index) {
                queue.pop_front();
            }
        }
    }

    /// Takes or compares the checksum of what was moved. Says how many bytes that were.
    fn finish(&mut self, index: u32, out: &mut Vec<Done>) -> u64 {
        let task = self.tasks[index as usize]
            .take()
            .expect("all of it is moved");
        self.tasks_free.push(index);
        let started = Instant::now();
        let result = match (task.fault, &task.command.op) {
            (Some(fault), _) => Err(fault),
            (
                None,
                &Op::Read {
                    page,
                    bytes,
                    seed,
                    checksum,
                    plain,
                },
            ) => {
                // SAFETY: until the command has ended the page is nobody else's.
                let content = unsafe { self.pool.bytes_at(page, bytes) };
                // The plain one first: what changes before it is found by the one below, and what
                // changes after it is found by whoever compares it.
                let plain = match plain {
                    NO_CHECKSUM => NO_CHECKSUM,
                    _ => page_checksum(content),
                };
                if Record::checksum_of(seed, content) == checksum {
                    Ok(Moved::Fine { checksum: plain })
                } else {
                    Ok(Moved::Different)
                }
            }
            (
                None,
                &Op::Write {
                    page,
                    bytes,
                    seed,
                    plain,
                },
            ) => {
                // SAFETY: until the command has ended nobody writes to the page
                // (`PoolMemory::new`), so these are the bytes that were written.
                let content = unsafe { self.pool.bytes_at(page, bytes) };
                // In this order: what changes in between is wrong for the drive's checksum.
                if plain == NO_CHECKSUM || page_checksum(content) == plain {
                    let checksum = Record::checksum_of(seed, content);
                    Ok(Moved::Fine { checksum })
                } else {
                    Ok(Moved::Different)
                }
            }
            (None, Op::Table(_) | Op::Sync) => Ok(Moved::Fine { checksum: 0 }),
        };
        let ended = Instant::now();
        out.push(Done {
            id: task.command.id,
            result,
            took: ended.saturating_duration_since(task.command.at),
            checksums: ended.saturating_duration_since(started),
        });
        match task.command.op {
            Op::Write { bytes, .. } | Op::Read { bytes, .. } => u64::from(bytes),
            Op::Table(_) | Op::Sync => 0,
        }
    }
}
