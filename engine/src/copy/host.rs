//! The host backend: copies by the CPU, between mappings or through system calls.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::backend::CopyBackend;
use super::bound::RegionPart;
use super::bytes::ByteCopier;
use super::checksum;
use super::error::CopyError;
use super::memory::PoolMemory;
use super::process_pass::{Batch, ProcessPass};
use super::task::{CopyTask, Direction, PageCopy};

/// Most bytes of neighbouring pages copied at once: bounds how long a cancelled task goes on.
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

    fn copy(&mut self, task: &mut CopyTask, pages_done: &mut u32) -> Result<u64, CopyError> {
        *pages_done = 0;
        if task.target.device().is_some() {
            let message = "a task of GPU memory came to a thread for host memory".into();
            return Err(CopyError::Panicked { message });
        }
        check_pages(&self.pool, task, 0..task.pages.len())?;
        let page_bytes = task.target.layout().page_bytes();
        let (mut sound, mut corrupt) = (task.pages.len(), None);
        if task.direction == Direction::Load {
            // All of them first: a task is short enough to be copied from the cache afterwards.
            // SAFETY: `check_pages` found the pages inside the pool. A load's pages belong to
            // sealed blocks that a lease holds: nobody writes to them.
            (sound, corrupt) = unsafe { checksum::verify(&self.pool, page_bytes, &task.pages) };
        }
        let copied = self.copy_pages(task, &task.pages[..sound], pages_done);
        if task.direction == Direction::Save {
            let done = &mut task.pages[..*pages_done as usize];
            // SAFETY: as above; a save's page is written by this thread alone, which is done.
            unsafe { checksum::take(&self.pool, page_bytes, done) };
        }
        copied?;
        corrupt.map_or(Ok(u64::from(*pages_done) * page_bytes), Err)
    }
}

impl HostBackend {
    /// Copies `pages`, the first ones of the task.
    fn copy_pages(
        &mut self,
        task: &CopyTask,
        pages: &[PageCopy],
        pages_done: &mut u32,
    ) -> Result<(), CopyError> {
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
            copy_regions(&self.pool, self.copier, (task, pages), parts, counted)?;
        }
        if let Some((memory, parts)) = process {
            let pass = ProcessPass {
                pool: &self.pool,
                task,
                pages,
                memory,
                parts,
            };
            pass.run(&mut self.batch, pages_done)?;
        }
        Ok(())
    }
}

/// Refuses the first place of `which` that names a page outside the pool or a block the group does
/// not have.
pub(crate) fn check_pages(
    pool: &PoolMemory,
    task: &CopyTask,
    which: Range<usize>,
) -> Result<(), CopyError> {
    let (pool_bytes, layout) = (pool.bytes(), task.target.layout());
    let num_blocks = layout.num_blocks();
    let (page_bytes, first) = (layout.page_bytes(), which.start);
    for (at, page) in task.pages[which].iter().enumerate() {
        let (offset, block) = (page.pool_offset, page.block);
        if block >= num_blocks {
            return Err(CopyError::BlockRange { block, num_blocks });
        }
        if offset > pool_bytes || pool_bytes - offset < page_bytes {
            let page = first + at;
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
    (task, pages): (&CopyTask, &[PageCopy]),
    parts: &[RegionPart],
    pages_done: &mut u32,
) -> Result<(), CopyError> {
    let (pool, layout) = (pool.base().as_ptr(), task.target.layout());
    let mut first = 0;
    while let Some(page) = pages.get(first) {
        if task.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Cancelled);
        }
        let run = if layout.is_dense() {
            run_length(&pages[first..], layout.page_bytes())
        } else {
            1
        };
        // SAFETY: `check_pages` found the pages inside the pool and the blocks below `num_blocks`,
        // so (invariant of RegionPart) both ranges are mapped, and the task keeps both mappings
        // alive. With `run > 1` the layout is dense, so its one part's pieces follow each other
        // like the pages do. Pool and region are mappings of different files, so they do not
        // overlap.
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
