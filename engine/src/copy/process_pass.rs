//! One task's way through a process's memory: pieces gathered into few system calls.

use std::sync::atomic::Ordering;

use super::bound::ProcessPart;
use super::error::CopyError;
use super::memory::PoolMemory;
use super::process::ProcessMemory;
use super::task::{CopyTask, PageCopy};

/// Most ranges on each side of one system call (the kernel's IOV_MAX).
const MAX_RANGES: usize = 1024;
/// Most bytes moved by one system call: bounds how long a cancelled task goes on.
const MAX_CALL_BYTES: u64 = 1 << 20;

/// Ranges of one system call, kept between calls so that nothing is allocated.
#[derive(Debug)]
pub(super) struct Batch {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: u64,
}

impl Batch {
    pub(super) fn new() -> Self {
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
pub(super) struct ProcessPass<'a> {
    pub(super) pool: &'a PoolMemory,
    pub(super) task: &'a CopyTask,
    /// The first ones of the task's pages.
    pub(super) pages: &'a [PageCopy],
    pub(super) memory: &'a ProcessMemory,
    pub(super) parts: &'a [ProcessPart],
}

impl ProcessPass<'_> {
    pub(super) fn run(&self, batch: &mut Batch, pages_done: &mut u32) -> Result<(), CopyError> {
        let mut cursor = Cursor::default();
        while cursor.page < self.pages.len() {
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
            // Fewer than asked: the kernel stopped at a page it could not reach, or for a signal.
            // The next call starts there and, if nothing can be moved, says so.
            cursor = self.advance(cursor, moved.min(batch.bytes));
            *pages_done = cursor.page as u32;
        }
        Ok(())
    }

    /// Fills `batch` with the pieces from `cursor` on, as many as one call may have.
    fn fill(&self, batch: &mut Batch, mut cursor: Cursor) {
        batch.clear();
        while let Some(page) = self.pages.get(cursor.page) {
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
        let block = self.pages[cursor.page].block;
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
