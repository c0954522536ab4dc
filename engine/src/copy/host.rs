//! The host backend: copies by the CPU, between mappings or through system calls.

use std::sync::atomic::Ordering;

use super::backend::CopyBackend;
use super::bound::{ProcessPart, RegionPart};
use super::bytes::ByteCopier;
use super::error::CopyError;
use super::memory::PoolMemory;
use super::process::ProcessMemory;
use super::task::{CopyTask, Direction, PageCopy};

/// Most ranges on each side of one system call (the kernel's IOV_MAX).
const MAX_RANGES: usize = 1024;
/// Most bytes moved by one system call: bounds how long a cancelled task goes on.
const MAX_CALL_BYTES: u64 = 4 << 20;
/// Most bytes of neighbouring pages copied at once, for the same reason.
const MAX_RUN_BYTES: u64 = 1 << 20;

/// Copies with the CPU. One value per thread.
#[derive(Debug)]
pub struct HostBackend {
    pool: PoolMemory,
    copier: ByteCopier,
    batch: Batch,
}

impl HostBackend {
    /// A backend for copies from and to `pool`.
    pub fn new(pool: PoolMemory) -> Self {
        Self {
            pool,
            copier: ByteCopier::new(),
            batch: Batch::new(),
        }
    }
}

impl CopyBackend for HostBackend {
    fn name(&self) -> &'static str {
        "host"
    }

    fn copy(&mut self, task: &CopyTask, pages_done: &mut u32) -> Result<u64, CopyError> {
        *pages_done = 0;
        let layout = task.target.layout();
        check_pages(&self.pool, task)?;
        let parts = task.target.region_parts();
        let process = task.target.process_parts();
        if !parts.is_empty() {
            // With parts of both kinds a page is done only after the second pass.
            let mut region_done = 0;
            let counted = if process.is_none() {
                &mut *pages_done
            } else {
                &mut region_done
            };
            copy_regions(&self.pool, self.copier, task, parts, counted)?;
        }
        if let Some((memory, parts)) = process {
            let mut pass = ProcessPass {
                pool: &self.pool,
                task,
                memory,
                parts,
            };
            pass.run(&mut self.batch, pages_done)?;
        }
        Ok(u64::from(*pages_done) * layout.page_bytes())
    }
}

/// Refuses a list that names a page outside the pool or a block the group does not have.
fn check_pages(pool: &PoolMemory, task: &CopyTask) -> Result<(), CopyError> {
    let (pool_bytes, layout) = (pool.bytes(), task.target.layout());
    let num_blocks = layout.num_blocks();
    for (
        page,
        &PageCopy {
            pool_offset: offset,
            block,
        },
    ) in task.pages.iter().enumerate()
    {
        if block >= num_blocks {
            return Err(CopyError::BlockRange { block, num_blocks });
        }
        if offset > pool_bytes || pool_bytes - offset < layout.page_bytes() {
            return Err(CopyError::PoolRange {
                page,
                offset,
                pool_bytes,
            });
        }
    }
    Ok(())
}

/// Copies the region parts of every page. The pages were checked.
fn copy_regions(
    pool: &PoolMemory,
    copier: ByteCopier,
    task: &CopyTask,
    parts: &[RegionPart],
    pages_done: &mut u32,
) -> Result<(), CopyError> {
    let (pool, layout) = (pool.base().as_ptr(), task.target.layout());
    let mut first = 0;
    while let Some(page) = task.pages.get(first) {
        if task.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        let run = if layout.is_dense() {
            run_length(&task.pages[first..], layout.page_bytes())
        } else {
            1
        };
        // SAFETY: `check_pages` found the pages inside the pool and the blocks below `num_blocks`, so
        // (invariant of RegionPart) both ranges are mapped, and the task keeps both mappings alive.
        // With `run > 1` the layout is dense, so its one part's pieces follow each other like the
        // pages do. Pool and region are mappings of different files, so they do not overlap.
        unsafe {
            let pool_page = pool.add(page.pool_offset as usize);
            for part in parts {
                let piece = part.base.add(page.block as usize * part.block_stride);
                let packed = pool_page.add(part.page_offset);
                match task.direction {
                    Direction::Save => copier.copy(piece, packed, part.bytes * run),
                    Direction::Load => copier.copy(packed, piece, part.bytes * run),
                }
            }
        }
        first += run;
        *pages_done = first as u32;
    }
    Ok(())
}

/// How many pages from the first on follow each other both in the pool and in block ids.
fn run_length(pages: &[PageCopy], page_bytes: u64) -> usize {
    let most = (MAX_RUN_BYTES / page_bytes).max(1) as usize;
    let follows = |pair: &[PageCopy]| {
        pair[1].pool_offset == pair[0].pool_offset + page_bytes
            && u64::from(pair[1].block) == u64::from(pair[0].block) + 1
    };
    1 + pages
        .windows(2)
        .take(most - 1)
        .take_while(|pair| follows(pair))
        .count()
}

/// Ranges of one system call, kept between calls so that nothing is allocated.
#[derive(Debug)]
struct Batch {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: u64,
}

impl Batch {
    fn new() -> Self {
        let room = || Vec::with_capacity(MAX_RANGES);
        Self {
            local: room(),
            remote: room(),
            bytes: 0,
        }
    }

    fn clear(&mut self) {
        self.local.clear();
        self.remote.clear();
        self.bytes = 0;
    }

    /// How many bytes may still be added; 0 when a side has no free range.
    fn room(&self) -> u64 {
        let full = self.local.len() == MAX_RANGES || self.remote.len() == MAX_RANGES;
        if full { 0 } else { MAX_CALL_BYTES - self.bytes }
    }

    /// Adds one piece; on either side it lengthens the last range if it continues it.
    fn add(&mut self, local: *mut u8, remote: u64, bytes: u64) {
        debug_assert!(bytes <= self.room(), "the caller asks for room first");
        push_range(&mut self.local, local.cast(), bytes);
        // An address of the other process: never dereferenced here, so without provenance.
        push_range(
            &mut self.remote,
            std::ptr::without_provenance_mut(remote as usize),
            bytes,
        );
        self.bytes += bytes;
    }
}

fn push_range(ranges: &mut Vec<libc::iovec>, base: *mut libc::c_void, bytes: u64) {
    let bytes = bytes as usize;
    match ranges.last_mut() {
        Some(last) if last.iov_base.addr() + last.iov_len == base.addr() => last.iov_len += bytes,
        _ => ranges.push(libc::iovec {
            iov_base: base,
            iov_len: bytes,
        }),
    }
}

/// The next byte to move: byte `offset` of part `part` of page `page`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cursor {
    page: usize,
    part: usize,
    offset: u64,
}

/// One task's copies between the pool and a process. The pages were checked.
struct ProcessPass<'a> {
    pool: &'a PoolMemory,
    task: &'a CopyTask,
    memory: &'a ProcessMemory,
    parts: &'a [ProcessPart],
}

impl ProcessPass<'_> {
    fn run(&mut self, batch: &mut Batch, pages_done: &mut u32) -> Result<(), CopyError> {
        let mut cursor = Cursor::default();
        while cursor.page < self.task.pages.len() {
            if self.task.cancelled.load(Ordering::Relaxed) {
                return Err(CopyError::Cancelled);
            }
            self.fill(batch, cursor);
            // SAFETY: `fill` adds only ranges of checked pages, inside the pool's mapping, which
            // `self.pool` keeps alive.
            let moved = unsafe {
                self.memory
                    .transfer(self.task.direction, &batch.local, &batch.remote)?
            };
            if moved == 0 {
                return Err(self.bad_address(cursor));
            }
            // Fewer than asked: the kernel stopped at a page it could not reach, or for a signal. The
            // next call starts there and, if nothing can be moved, says so.
            cursor = self.advance(cursor, moved.min(batch.bytes));
            *pages_done = cursor.page as u32;
        }
        Ok(())
    }

    /// Fills `batch` with the pieces from `cursor` on, as many as one call may have.
    fn fill(&self, batch: &mut Batch, mut cursor: Cursor) {
        batch.clear();
        while let Some(page) = self.task.pages.get(cursor.page) {
            let room = batch.room();
            if room == 0 {
                break;
            }
            let part = &self.parts[cursor.part];
            let bytes = (part.bytes - cursor.offset).min(room);
            let in_pool = page.pool_offset + part.page_offset + cursor.offset;
            // SAFETY: `check_pages` found the whole page inside the pool.
            let local = unsafe { self.pool.base().as_ptr().add(in_pool as usize) };
            let remote = part.base + u64::from(page.block) * part.block_stride + cursor.offset;
            batch.add(local, remote, bytes);
            cursor = self.advance(cursor, bytes);
        }
    }

    /// `cursor` after `bytes` more bytes.
    fn advance(&self, mut cursor: Cursor, mut bytes: u64) -> Cursor {
        while bytes > 0 {
            let left = self.parts[cursor.part].bytes - cursor.offset;
            if bytes < left {
                cursor.offset += bytes;
                break;
            }
            bytes -= left;
            cursor.offset = 0;
            cursor.part += 1;
            if cursor.part == self.parts.len() {
                cursor.part = 0;
                cursor.page += 1;
            }
        }
        cursor
    }

    fn bad_address(&self, cursor: Cursor) -> CopyError {
        let part = &self.parts[cursor.part];
        let block = self.task.pages[cursor.page].block;
        CopyError::BadAddress {
            pid: self.memory.pid(),
            direction: self.task.direction,
            block,
            part: part.part,
            segment: self
                .task
                .target
                .layout()
                .segment_at(part.page_offset + cursor.offset),
            address: part.base + u64::from(block) * part.block_stride + cursor.offset,
        }
    }
}
