//! How the bytes of a task go over the bus, a chunk at a time.
//!
//! * *Direct*, for pieces that are large, or few: each piece by DMA between GPU memory and pool.
//! * *Staged*, for pieces that are small and many: a kernel gathers pages into a staging slot, or
//!   scatters them from it, whose dense pages go by DMA.
//! * *Bounced*, on top of either, where the pool side is in small pieces or not pinned: DMA between
//!   the GPU and a pinned buffer, and the CPU copies between that and the pool.
//!
//! A chunk is one turn of a stream: copies of one direction in any order, before or behind at most
//! one kernel. Its size bounds how long an urgent load waits, and how far a cancelled task goes on.
//! Nothing here touches memory or the driver, and a chunk's lists are reused.
#![forbid(unsafe_code)]

use crate::copy::PageCopy;

use super::part::DevicePart;
use super::pin_map::PinMap;

/// What a plan may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most bytes of a chunk.
    pub(super) chunk_bytes: u64,
    /// Most bytes of a chunk of few copies that needs neither kernel nor bounce buffer; no less
    /// than those of any other.
    pub(super) long_bytes: u64,
    /// This many copies are few in that sense.
    pub(super) few_copies: usize,
    /// Bytes of a staging slot; 0 where there is none.
    pub(super) staging_bytes: u64,
    /// Bytes of a bounce buffer.
    pub(super) bounce_bytes: u64,
    /// Pieces of this size on average go directly.
    pub(super) crossover_bytes: u64,
    /// Runs of pool memory smaller than this on average go through the bounce buffer.
    pub(super) small_run_bytes: u64,
    /// This many pieces are few: they go directly whatever their size.
    pub(super) few: usize,
    /// Most copies of a chunk.
    pub(super) max_copies: usize,
    /// Most pages of a staged chunk.
    pub(super) max_pages: usize,
    /// Most pages of a chunk that is not staged.
    pub(super) max_direct_pages: usize,
}

/// A place in a task: a page of its list, and a byte of that page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Cursor {
    pub(super) page: usize,
    pub(super) offset: u64,
}

/// What to copy and where it lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// They tile the page in order.
    pub(super) parts: &'a [DevicePart],
    pub(super) page_bytes: u64,
    pub(super) pages: &'a [PageCopy],
    pub(super) pins: &'a PinMap,
}

impl<'a> Source<'a> {
    /// The only part, where its blocks lie as closely as pages do.
    fn dense(&self) -> Option<&'a DevicePart> {
        match self.parts {
            [part] if part.block_stride == u64::from(part.bytes) => Some(part),
            _ => None,
        }
    }

    fn is_pinned_at(&self, at: Cursor) -> bool {
        let pool = self.pages[at.page].pool_offset + at.offset;
        self.pins.at(pool).pinned
    }
}

/// The kernel's share of a chunk: pages, or some parts of one page, densely in the staging slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Staged {
    pub(super) first_page: usize,
    pub(super) pages: usize,
    pub(super) first_part: usize,
    pub(super) part_count: usize,
    /// Bytes from one page to the next in the slot.
    pub(super) page_bytes: u64,
    /// Byte of the page at which the slot begins.
    pub(super) page_offset: u64,
}

/// A copy over the bus. `device` is an address, or counts from the staging slot of a staged chunk;
/// `host` counts from the pool, or from the bounce buffer of a bounced chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkCopy {
    pub(super) device: u64,
    pub(super) host: u64,
    pub(super) bytes: u64,
}

/// A copy by the CPU, of a bounced chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) pool: u64,
    pub(super) bounce: u64,
    pub(super) bytes: u64,
}

/// One turn of a stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Chunk {
    pub(super) from: Cursor,
    /// Where the next chunk begins.
    pub(super) to: Cursor,
    pub(super) bytes: u64,
    pub(super) staged: Option<Staged>,
    pub(super) bounced: bool,
    pub(super) copies: Vec<ChunkCopy>,
    pub(super) moves: Vec<Move>,
}

impl Chunk {
    fn begin(&mut self, from: Cursor) {
        self.from = from;
        self.to = from;
        self.bytes = 0;
        self.staged = None;
        self.bounced = false;
        self.copies.clear();
        self.moves.clear();
    }

    /// Adds a copy, or lengthens the last one where both sides go on and no range of pinned memory
    /// begins.
    fn add_copy(&mut self, device: u64, host: u64, bytes: u64, range_start: u64) {
        match self.copies.last_mut() {
            Some(last)
                if last.device + last.bytes == device
                    && last.host + last.bytes == host
                    && host != range_start =>
            {
                last.bytes += bytes;
            }
            _ => self.copies.push(ChunkCopy {
                device,
                host,
                bytes,
            }),
        }
    }

    fn add_move(&mut self, pool: u64, bounce: u64, bytes: u64) {
        match self.moves.last_mut() {
            Some(last) if last.pool + last.bytes == pool && last.bounce + last.bytes == bounce => {
                last.bytes += bytes;
            }
            _ => self.moves.push(Move {
                pool,
                bounce,
                bytes,
            }),
        }
    }
}

/// How the pieces of a layout go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Direct,
    Staged,
}

impl Limits {
    /// Plans the chunk at `from`, which is not the end of the task. Every chunk goes on, whatever
    /// the limits are.
    pub(super) fn plan(&self, source: &Source<'_>, from: Cursor, chunk: &mut Chunk) {
        debug_assert!(from.page < source.pages.len(), "a chunk begins at a page");
        chunk.begin(from);
        match self.style(source, from) {
            Style::Direct => match source.dense() {
                Some(piece) if source.is_pinned_at(from) => self.plan_runs(source, piece, chunk),
                _ => self.plan_direct(source, None, chunk),
            },
            Style::Staged if from.offset == 0 && source.page_bytes <= self.slot_bytes() => {
                self.plan_pages(source, chunk);
            }
            Style::Staged => self.plan_parts(source, chunk),
        }
    }

    /// Bytes that a staged chunk may have.
    fn slot_bytes(&self) -> u64 {
        self.staging_bytes.min(self.chunk_bytes)
    }

    fn style(&self, source: &Source<'_>, from: Cursor) -> Style {
        let parts = source.parts;
        let pieces_left = (source.pages.len() - from.page).saturating_mul(parts.len());
        let mean_bytes = source.page_bytes / parts.len() as u64;
        if self.staging_bytes == 0 || mean_bytes >= self.crossover_bytes || pieces_left <= self.few
        {
            return Style::Direct;
        }
        if source.dense().is_some() && self.runs_are_long(source, from) {
            Style::Direct
        } else {
            Style::Staged
        }
    }

    /// Whether the next pages of a dense layout make long runs on both sides.
    fn runs_are_long(&self, source: &Source<'_>, from: Cursor) -> bool {
        let most = (self.chunk_bytes / source.page_bytes).max(1) as usize;
        let pages = &source.pages[from.page..];
        let pages = &pages[..most.min(pages.len())];
        let breaks = pages.windows(2).filter(|pair| {
            pair[1].pool_offset != pair[0].pool_offset + source.page_bytes
                || u64::from(pair[1].block) != u64::from(pair[0].block) + 1
        });
        let runs = 1 + breaks.count();
        let bytes = pages.len() as u64 * source.page_bytes;
        runs <= self.few || bytes / runs as u64 >= self.crossover_bytes
    }

    /// Pages whose blocks lie as closely as they do: by runs that go on on both sides, until the
    /// chunk is full or memory is not pinned.
    fn plan_runs(&self, source: &Source<'_>, piece: &DevicePart, chunk: &mut Chunk) {
        let page_bytes = source.page_bytes;
        let Cursor { page, mut offset } = chunk.from;
        let mut first = page;
        let last_page = page.saturating_add(self.max_direct_pages);
        let pages = &source.pages[..last_page.min(source.pages.len())];
        while first < pages.len() {
            let limit_bytes = if chunk.copies.len() < self.few_copies {
                self.long_bytes
            } else {
                self.chunk_bytes
            };
            if chunk.bytes >= limit_bytes || chunk.copies.len() == self.max_copies {
                return;
            }
            let most_bytes = limit_bytes - chunk.bytes;
            let run = run_of(&pages[first..], page_bytes, offset + most_bytes);
            let pool = pages[first].pool_offset + offset;
            let range = source.pins.at(pool);
            if !range.pinned {
                return;
            }
            let bytes = (run as u64 * page_bytes - offset)
                .min(range.end - pool)
                .min(most_bytes);
            let device = piece.base + u64::from(pages[first].block) * piece.block_stride + offset;
            chunk.add_copy(device, pool, bytes, range.start);
            chunk.bytes += bytes;
            offset += bytes;
            first += (offset / page_bytes) as usize;
            offset %= page_bytes;
            chunk.to = Cursor {
                page: first,
                offset,
            };
        }
    }

    /// Each piece on its own, until the chunk is full or memory that is pinned meets memory that is
    /// not; to the end of a page's part at most, when one is named.
    fn plan_direct(&self, source: &Source<'_>, until_part: Option<usize>, chunk: &mut Chunk) {
        let Cursor { page, mut offset } = chunk.from;
        let mut range = source.pins.at(source.pages[page].pool_offset + offset);
        let pinned = range.pinned;
        chunk.bounced = !pinned;
        let short_bytes = if pinned {
            self.chunk_bytes
        } else {
            self.chunk_bytes.min(self.bounce_bytes)
        };
        let long_bytes = if pinned { self.long_bytes } else { short_bytes };
        // The bus begins with the first pages while the next ones are planned.
        let last_page = until_part.map_or(source.pages.len(), |_| page + 1);
        let last_page = last_page.min(page.saturating_add(self.max_direct_pages));
        for (number, page) in source.pages[..last_page].iter().enumerate().skip(page) {
            let mut part = match offset {
                0 => 0,
                _ => source
                    .parts
                    .partition_point(|part| part_end(part) <= offset),
            };
            while let Some(piece) = source.parts.get(part) {
                let skip = offset - u64::from(piece.page_offset);
                let pool = page.pool_offset + offset;
                if !(range.start..range.end).contains(&pool) {
                    range = source.pins.at(pool);
                }
                let limit_bytes = if chunk.copies.len() < self.few_copies {
                    long_bytes
                } else {
                    short_bytes
                };
                let full = chunk.bytes >= limit_bytes || chunk.copies.len() == self.max_copies;
                if full || range.pinned != pinned || until_part.is_some_and(|last| part > last) {
                    return;
                }
                let bytes = (u64::from(piece.bytes) - skip)
                    .min(range.end - pool)
                    .min(limit_bytes - chunk.bytes);
                let device = piece.base + u64::from(page.block) * piece.block_stride + skip;
                if pinned {
                    chunk.add_copy(device, pool, bytes, range.start);
                } else {
                    chunk.add_copy(device, chunk.bytes, bytes, u64::MAX);
                    chunk.add_move(pool, chunk.bytes, bytes);
                }
                chunk.bytes += bytes;
                offset += bytes;
                part += usize::from(offset == part_end(piece));
                chunk.to = Cursor {
                    page: number,
                    offset,
                };
            }
            offset = 0;
            chunk.to = Cursor {
                page: number + 1,
                offset,
            };
        }
    }

    /// Whole pages through the staging slot.
    fn plan_pages(&self, source: &Source<'_>, chunk: &mut Chunk) {
        let (first, page_bytes) = (chunk.from.page, source.page_bytes);
        let pages = &source.pages[first..];
        let is_pinned = |page: &PageCopy| is_pinned(source.pins, page.pool_offset, page_bytes);
        let pinned = is_pinned(&pages[0]);
        let in_bounce = (self.bounce_bytes / page_bytes) as usize;
        if !pinned && in_bounce == 0 {
            return self.plan_parts(source, chunk);
        }
        let in_slot = (self.slot_bytes() / page_bytes) as usize;
        let most = if pinned {
            in_slot
        } else {
            in_slot.min(in_bounce)
        };
        let most = most.min(self.max_pages).min(pages.len());
        let alike = pages[..most].iter().take_while(|p| is_pinned(p) == pinned);
        let mut count = alike.count();
        chunk.bounced = !pinned;
        if pinned {
            count = self.add_dense_copies(source, (first, count), chunk);
            let runs = chunk.copies.len();
            let mean_bytes = count as u64 * page_bytes / runs as u64;
            chunk.bounced = runs > self.few && mean_bytes < self.small_run_bytes && in_bounce > 0;
        }
        if chunk.bounced {
            count = count.min(in_bounce);
            chunk.copies.clear();
            chunk.add_copy(0, 0, count as u64 * page_bytes, u64::MAX);
            for (number, page) in pages[..count].iter().enumerate() {
                chunk.add_move(page.pool_offset, number as u64 * page_bytes, page_bytes);
            }
        }
        chunk.staged = Some(Staged {
            first_page: first,
            pages: count,
            first_part: 0,
            part_count: source.parts.len(),
            page_bytes,
            page_offset: 0,
        });
        chunk.bytes = count as u64 * page_bytes;
        chunk.to = Cursor {
            page: first + count,
            offset: 0,
        };
    }

    /// Copies between the dense pages of a slot and the pool; returns the pages that fit into a
    /// chunk's most copies, at least one.
    fn add_dense_copies(
        &self,
        source: &Source<'_>,
        (first, count): (usize, usize),
        chunk: &mut Chunk,
    ) -> usize {
        for number in 0..count {
            if number > 0 && chunk.copies.len() >= self.max_copies {
                return number;
            }
            let pool = source.pages[first + number].pool_offset;
            let slot = number as u64 * source.page_bytes;
            add_pinned(source.pins, chunk, (slot, pool), source.page_bytes);
        }
        count
    }

    /// As many parts of one page as fit the staging slot; a part that does not fit goes directly.
    fn plan_parts(&self, source: &Source<'_>, chunk: &mut Chunk) {
        let Cursor { page, offset } = chunk.from;
        let parts = source.parts;
        let first = parts.partition_point(|part| part_end(part) <= offset);
        let begins = u64::from(parts[first].page_offset) == offset;
        let pool = source.pages[page].pool_offset + offset;
        let mut part_count = fitting(&parts[first..], self.slot_bytes());
        let bytes_of = |count: usize| part_end(&parts[first + count - 1]) - offset;
        let mut pinned = true;
        if begins && part_count > 0 && !is_pinned(source.pins, pool, bytes_of(part_count)) {
            pinned = false;
            let room = self.slot_bytes().min(self.bounce_bytes);
            part_count = fitting(&parts[first..], room);
        }
        if !begins || part_count == 0 {
            return self.plan_direct(source, Some(first), chunk);
        }
        chunk.bytes = bytes_of(part_count);
        chunk.bounced = !pinned;
        if pinned {
            add_pinned(source.pins, chunk, (0, pool), chunk.bytes);
        } else {
            chunk.add_copy(0, 0, chunk.bytes, u64::MAX);
            chunk.add_move(pool, 0, chunk.bytes);
        }
        chunk.staged = Some(Staged {
            first_page: page,
            pages: 1,
            first_part: first,
            part_count,
            page_bytes: chunk.bytes,
            page_offset: offset,
        });
        let end = offset + chunk.bytes;
        chunk.to = if end == source.page_bytes {
            Cursor {
                page: page + 1,
                offset: 0,
            }
        } else {
            Cursor { page, offset: end }
        };
    }
}

fn part_end(part: &DevicePart) -> u64 {
    u64::from(part.page_offset) + u64::from(part.bytes)
}

/// How many pages from the first on follow each other in the pool and by their blocks; no more than
/// `most_bytes` need.
fn run_of(pages: &[PageCopy], page_bytes: u64, most_bytes: u64) -> usize {
    let most = most_bytes.div_ceil(page_bytes) as usize;
    let pages = &pages[..pages.len().min(most.max(1))];
    let follows = |pair: &[PageCopy]| {
        pair[1].pool_offset == pair[0].pool_offset + page_bytes
            && u64::from(pair[1].block) == u64::from(pair[0].block) + 1
    };
    1 + pages.windows(2).take_while(|pair| follows(pair)).count()
}

/// How many parts from the first on have at most `bytes` together.
fn fitting(parts: &[DevicePart], bytes: u64) -> usize {
    let start = u64::from(parts[0].page_offset);
    parts.partition_point(|part| part_end(part) - start <= bytes)
}

/// Whether all of a range of the pool is pinned.
fn is_pinned(pins: &PinMap, offset: u64, bytes: u64) -> bool {
    let mut at = offset;
    while at < offset + bytes {
        let range = pins.at(at);
        if !range.pinned {
            return false;
        }
        at = range.end;
    }
    true
}

/// Adds the copies between a staging slot and a pinned stretch of the pool.
fn add_pinned(pins: &PinMap, chunk: &mut Chunk, (mut slot, mut pool): (u64, u64), bytes: u64) {
    let end = pool + bytes;
    while pool < end {
        let range = pins.at(pool);
        let bytes = range.end.min(end) - pool;
        chunk.add_copy(slot, pool, bytes, range.start);
        (slot, pool) = (slot + bytes, pool + bytes);
    }
}
