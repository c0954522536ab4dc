//! The parts that pages and tables are moved in.
//!
//! A page is one part, or several if it is large or odd. Small pages that follow one another in the
//! file, which is the order in which they are written and mostly that in which they are read, share
//! one: a request to a drive costs more than their bytes.

use std::collections::VecDeque;
use std::time::Instant;

use super::{BOUNCE_BYTES, Command, Mover, Op, PIECE_BYTES};
use crate::format::align_up;
use crate::io::{Engine, Kind, Piece};
use crate::stats::ShardFault;

/// Pages up to that size share a part with their neighbours.
const SMALL_BYTES: u32 = 32 << 10;
/// So many of a queue are looked through for the page that follows.
const NEAR: usize = 32;

/// A command that has not ended.
pub(super) struct Task {
    pub command: Command,
    /// Bytes for which parts exist or existed.
    pub issued: u32,
    /// Parts that wait or are at the engine.
    pub open: u32,
    pub fault: Option<ShardFault>,
    /// It does not share parts any more: one that it shared failed.
    pub alone: bool,
}

impl Task {
    pub fn new(command: Command) -> Self {
        Self {
            command,
            issued: 0,
            open: 0,
            fault: None,
            alone: false,
        }
    }

    /// What the engine is to do for it.
    pub fn kind(&self) -> Kind {
        match self.command.op {
            Op::Write { .. } | Op::Table(_) => Kind::Write,
            Op::Read { .. } => Kind::Read,
            Op::Sync => Kind::Sync,
        }
    }

    /// Whether it may share a part: a small page of which nothing is under way.
    fn is_sociable(&self) -> bool {
        let is_page = self.command.op.page().is_some();
        is_page && self.command.op.bytes() <= SMALL_BYTES && self.issued == 0 && !self.alone
    }

    /// Where in the file its page ends, and where the next one begins.
    fn ends_at(&self) -> (u64, u64) {
        let bytes = self.command.op.bytes();
        let offset = self.command.offset;
        (
            offset + u64::from(bytes),
            offset + u64::from(align_up(bytes)),
        )
    }
}

/// What the engine has, or gets next, as one piece: some of a task, or all of several.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// The task, or the first one.
    pub task: u32,
    /// Where in its page or table.
    pub start: u32,
    /// How much is wanted, from there to the end of the last page.
    pub bytes: u32,
    /// How much is moved: more than wanted where the end is padded.
    pub padded: u32,
    /// How much of `padded` has been moved.
    pub moved: u32,
    pub bounce: Option<u32>,
    /// When the engine was given it, or the rest of it.
    pub given: Option<Instant>,
}

impl<E: Engine> Mover<E> {
    /// Takes a part from the front of a queue. None if no bounce buffer is free.
    pub(super) fn next_part(&mut self, kind: Kind) -> Option<u32> {
        let index = self.queue(kind)[0];
        let slot = *self.parts_free.last().expect("the caller looked");
        let part = self.share(kind, index, slot).or_else(|| self.cut(index))?;
        self.parts_free.pop();
        if let Some(bounce) = part.bounce {
            self.fill(slot, &part, bounce);
        }
        self.parts[slot as usize] = Some(part);
        let task = self.task(index);
        if task.issued == task.command.op.bytes() {
            self.queue(kind).pop_front();
        }
        Some(slot)
    }

    /// A part of small pages that follow one another, beginning with that task's. None if the next
    /// one is not queued, or no bounce buffer is free.
    fn share(&mut self, kind: Kind, index: u32, slot: u32) -> Option<Part> {
        let bounce = *self.bounce_free.last()?;
        let first = self.task(index);
        if !first.is_sociable() {
            return None;
        }
        let start = first.command.offset;
        let (mut end, mut next) = first.ends_at();
        let mut queue = std::mem::take(self.queue(kind));
        let mut joined = std::mem::take(&mut self.joined[slot as usize]);
        let mut from = 1;
        while let Some(at) = self.find(&queue, from, next) {
            let ends = self.task(queue[at]).ends_at();
            if ends.0 - start > u64::from(BOUNCE_BYTES) {
                break;
            }
            joined.extend(queue.remove(at));
            (end, next) = ends;
            // What follows it is most likely behind it.
            from = at;
        }
        *self.queue(kind) = queue;
        let shares = !joined.is_empty();
        if shares {
            self.bounce_free.pop();
            for &index in std::iter::once(&index).chain(&joined) {
                let task = self.task(index);
                (task.issued, task.open) = (task.command.op.bytes(), 1);
            }
        }
        self.joined[slot as usize] = joined;
        let bytes = (end - start) as u32;
        shares.then(|| Part {
            task: index,
            start: 0,
            bytes,
            padded: bytes.next_multiple_of(self.alignment.offset),
            moved: 0,
            bounce: Some(bounce),
            given: None,
        })
    }

    /// Where in the queue, near `from`, the small page is that begins at `offset`.
    fn find(&self, queue: &VecDeque<u32>, from: usize, offset: u64) -> Option<usize> {
        let near = queue.iter().skip(from).take(NEAR);
        let follows = |index: &u32| {
            let task = self.tasks[*index as usize].as_ref();
            task.is_some_and(|task| task.command.offset == offset && task.is_sociable())
        };
        near.clone().position(follows).map(|at| from + at)
    }

    /// The next part of one task. None if it needs a bounce buffer and none is free.
    fn cut(&mut self, index: u32) -> Option<Part> {
        let alignment = self.alignment;
        let op = &self.task(index).command.op;
        let (total, page) = (op.bytes(), op.page());
        let start = self.task(index).issued;
        let left = total - start;
        let (mut bytes, mut bounced) = (left.min(PIECE_BYTES), false);
        if left > 0 {
            let fits = page.is_some_and(|page| {
                let address = self.pool.at(page, u64::from(total)).as_ptr() as usize;
                address.is_multiple_of(alignment.memory as usize)
            });
            let even = bytes - bytes % alignment.offset;
            // A small page is copied whole rather than moved in two pieces.
            let odd = even < bytes && left <= SMALL_BYTES;
            bounced = !fits || even == 0 || odd;
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
        let task = self.task(index);
        task.issued += bytes;
        task.open += 1;
        Some(Part {
            task: index,
            start,
            bytes,
            padded: bytes.next_multiple_of(alignment.offset),
            moved: 0,
            bounce,
            given: None,
        })
    }

    /// The tasks of a part, each with where its bytes begin in the part, where they begin in its
    /// page or table, and how many they are.
    fn shares(&self, slot: u32, part: &Part) -> impl Iterator<Item = (&Task, u32, u32, u32)> {
        let of = |index: u32| {
            let task = self.tasks[index as usize].as_ref();
            task.expect("it has an open part")
        };
        let first = of(part.task);
        let joined = &self.joined[slot as usize];
        let bytes = match joined.is_empty() {
            true => part.bytes,
            false => first.command.op.bytes(),
        };
        let behind = joined.iter().map(move |&index| {
            let task = of(index);
            let at = (task.command.offset - first.command.offset) as u32;
            (task, at, 0, task.command.op.bytes())
        });
        std::iter::once((first, 0, part.start, bytes)).chain(behind)
    }

    /// Copies what is to be written into the part's bounce buffer, padded with zeroes.
    fn fill(&self, slot: u32, part: &Part, bounce: u32) {
        let buffer = u64::from(bounce) * u64::from(BOUNCE_BYTES);
        let mut shares = self.shares(slot, part).peekable();
        while let Some((task, at, start, bytes)) = shares.next() {
            let source = match &task.command.op {
                Op::Write { page, .. } => {
                    let from = page + u64::from(start);
                    self.pool.at(from, u64::from(bytes)).as_ptr().cast_const()
                }
                Op::Table(content) => content[start as usize..][..bytes as usize].as_ptr(),
                Op::Read { .. } | Op::Sync => return,
            };
            let end = shares.peek().map_or(part.padded, |&(_, next, ..)| next);
            let target = self.bounce.at(buffer + u64::from(at), u64::from(end - at));
            // SAFETY: `source` has so many bytes, which nobody writes meanwhile. The target is in
            // this part's own buffer and ends where the next page's begins, which is behind those
            // bytes; pool and buffers are apart.
            unsafe {
                let target = target.as_ptr();
                target.copy_from_nonoverlapping(source, bytes as usize);
                target
                    .add(bytes as usize)
                    .write_bytes(0, (end - at - bytes) as usize);
            }
        }
    }

    /// Copies what was read from the part's bounce buffer to where it belongs.
    pub(super) fn take_out(&self, slot: u32, part: &Part) {
        let Some(bounce) = part.bounce else { return };
        let buffer = u64::from(bounce) * u64::from(BOUNCE_BYTES);
        for (task, at, start, bytes) in self.shares(slot, part) {
            let (Op::Read { page, .. }, None) = (&task.command.op, &task.fault) else {
                continue;
            };
            let source = self.bounce.at(buffer + u64::from(at), u64::from(bytes));
            let target = self.pool.at(page + u64::from(start), u64::from(bytes));
            // SAFETY: the buffer is this part's alone and its piece has ended; the page is nobody
            // else's until the command has ended; pool and buffers are apart.
            unsafe {
                target
                    .as_ptr()
                    .copy_from_nonoverlapping(source.as_ptr(), bytes as usize);
            }
        }
    }

    /// The piece for what is left of a part.
    pub(super) fn piece(&self, slot: u32, part: &Part) -> Piece {
        let task = self.tasks[part.task as usize].as_ref();
        let task = task.expect("it has an open part");
        let (left, skip) = (part.padded - part.moved, u64::from(part.moved));
        let address = match part.bounce {
            Some(bounce) => {
                let at = u64::from(bounce) * u64::from(BOUNCE_BYTES) + skip;
                self.bounce.at(at, u64::from(left))
            }
            None => {
                let page = task.command.op.page().unwrap_or(0);
                self.pool
                    .at(page + u64::from(part.start) + skip, u64::from(left))
            }
        };
        Piece {
            id: u64::from(slot),
            kind: task.kind(),
            offset: task.command.offset + u64::from(part.start) + skip,
            address,
            bytes: left,
        }
    }
}
