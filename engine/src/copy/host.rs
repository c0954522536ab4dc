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
        Self { pool, copier: ByteCopier::new(), batch: Batch::new() }
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
            let counted = if process.is_none() { &mut *pages_done } else { &mut region_done };
            copy_regions(&self.pool, self.copier, task, parts, counted)?;
        }
        if let Some((memory, parts)) = process {
            let mut pass = ProcessPass { pool: &self.pool, task, memory, parts };
            pass.run(&mut self.batch, pages_done)?;
        }
        Ok(u64::from(*pages_done) * layout.page_bytes())
    }
}

/// Refuses a list that names a page outside the pool or a block the group does not have.
fn check_pages(pool: &PoolMemory, task: &CopyTask) -> Result<(), CopyError> {
    let (pool_bytes, layout) = (pool.bytes(), task.target.layout());
    let num_blocks = layout.num_blocks();
    for (page, &PageCopy { pool_offset: offset, block }) in task.pages.iter().enumerate() {
        if block >= num_blocks {
            return Err(CopyError::BlockRange { block, num_blocks });
        }
        if offset > pool_bytes || pool_bytes - offset < layout.page_bytes() {
            return Err(CopyError::PoolRange { page, offset, pool_bytes });
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
    let pool = pool.base().as_ptr();
    for page in &task.pages {
        if task.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        // SAFETY: `check_pages` found the page inside the pool and the block below `num_blocks`, so
        // (invariant of RegionPart) both ranges are mapped, and the task keeps both mappings alive.
        // They are different mappings of different files, so they do not overlap.
        unsafe {
            let pool_page = pool.add(page.pool_offset as usize);
            for part in parts {
                let piece = part.base.add(page.block as usize * part.block_stride);
                let packed = pool_page.add(part.page_offset);
                match task.direction {
                    Direction::Save => copier.copy(piece, packed, part.bytes),
                    Direction::Load => copier.copy(packed, piece, part.bytes),
                }
            }
        }
        *pages_done += 1;
    }
    Ok(())
}
