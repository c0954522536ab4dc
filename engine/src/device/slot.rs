//! A stream with what a chunk needs on its way: an event, a staging slot, lists, a bounce buffer.

use std::sync::{Arc, Weak};

use crate::copy::{BoundLayout, ByteCopier, PageCopy, PoolMemory};

use super::driver::{
    BusCopy, Context, DevicePtr, Event, Kernel, KernelArgs, PinnedBuffer, Stream, Way,
};
use super::error::DriverError;
use super::forecast::Awaited;
use super::part::DevicePart;
use super::plan::{Chunk, Staged};

/// Bytes of a bounce buffer: what a core copies in half a millisecond, so that the device's other
/// chunks do not wait long for the thread.
pub(super) const BOUNCE_BYTES: u64 = 4 << 20;
/// Most pages of a staged chunk, whose block ids lie in a list of this length.
pub(super) const MAX_PAGES: usize = 128 << 10;
/// Most parts of a layout: segments of a group.
const MAX_PARTS: usize = pegaflow_shm::control::MAX_SEGMENTS;
/// Threads of a kernel's block.
const BLOCK_THREADS: u32 = 1024;
/// About what one warp of a kernel moves at a time.
const SLICE_BYTES: u64 = 8192;
/// Units of work of a kernel's block: one for each of its warps.
const BLOCK_UNITS: u64 = BLOCK_THREADS as u64 / 32;

/// The kernels, and how many blocks run at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernels {
    pub(super) gather: Kernel,
    pub(super) scatter: Kernel,
    pub(super) most_blocks: u32,
}

/// What a slot's chunk is part of.
#[derive(Clone, Copy)]
pub(super) struct Cargo<'a> {
    pub(super) way: Way,
    pub(super) target: &'a Arc<BoundLayout>,
    pub(super) parts: &'a [DevicePart],
    pub(super) pages: &'a [PageCopy],
}

/// A chunk under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    /// The job it belongs to.
    pub(super) job: usize,
    /// Its copies touch pinned memory of the pool.
    pub(super) pinned: bool,
    pub(super) awaited: Awaited,
}

/// A stream and its memory; one chunk at a time is under way in it.
pub(super) struct Slot {
    stream: Stream,
    event: Event,
    staging: DevicePtr,
    /// Parts in device memory, and whose they are.
    parts: DevicePtr,
    parts_of: Weak<BoundLayout>,
    /// Block ids, then parts on their way to the device.
    lists: PinnedBuffer,
    bounce: PinnedBuffer,
    /// The chunk under way, or the last one.
    pub(super) chunk: Chunk,
    pub(super) flight: Option<Flight>,
    bus: Vec<BusCopy>,
}

/// Device memory of a slot beside its staging: the parts of a layout.
pub(super) const PARTS_BYTES: usize = MAX_PARTS * size_of::<DevicePart>();
const IDS_BYTES: usize = MAX_PAGES * size_of::<u32>();

impl Slot {
    /// A slot in the bound context with `staging_bytes` of device memory for pages.
    pub(super) fn new(context: &dyn Context, staging_bytes: u64) -> Result<Slot, DriverError> {
        let parts = context.allocate(PARTS_BYTES as u64)?;
        Ok(Slot {
            stream: context.create_stream()?,
            event: context.create_event()?,
            staging: match staging_bytes {
                0 => 0,
                bytes => context.allocate(bytes)?,
            },
            parts,
            parts_of: Weak::new(),
            lists: context.allocate_pinned(IDS_BYTES + PARTS_BYTES)?,
            bounce: context.allocate_pinned(BOUNCE_BYTES as usize)?,
            chunk: Chunk::default(),
            flight: None,
            bus: Vec::new(),
        })
    }

    /// Queues `self.chunk`, with the event behind it. Whether all of it could be queued, and
    /// whether the event could, which stands behind whatever was.
    ///
    /// # Safety
    ///
    /// The chunk was planned from the cargo, whose pages lie in `pool` and whose blocks are below
    /// the layout's number; both stay the copy's alone, and the pool and the layout's regions
    /// mapped, until [`Slot::is_done`]. No chunk is under way in the slot. The context is bound.
    pub(super) unsafe fn start(
        &mut self,
        context: &dyn Context,
        kernels: &Kernels,
        cargo: Cargo<'_>,
        pool: &PoolMemory,
        copier: ByteCopier,
    ) -> (Result<(), DriverError>, Result<(), DriverError>) {
        // SAFETY: the caller's promise, for each of these.
        let queued = unsafe {
            match cargo.way {
                Way::ToDevice => self.start_load(context, kernels, cargo, pool, copier),
                Way::ToHost => self.start_save(context, kernels, cargo, pool),
            }
        };
        (queued, context.record(self.event, self.stream))
    }

    unsafe fn start_load(
        &mut self,
        context: &dyn Context,
        kernels: &Kernels,
        cargo: Cargo<'_>,
        pool: &PoolMemory,
        copier: ByteCopier,
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's promise; the stream keeps copies before the kernel that needs them.
        unsafe {
            self.bounce(Way::ToDevice, pool, copier);
            self.copy(context, cargo.way, pool)?;
            match self.chunk.staged {
                Some(staged) => self.launch(context, kernels, kernels.scatter, cargo, staged),
                None => Ok(()),
            }
        }
    }

    unsafe fn start_save(
        &mut self,
        context: &dyn Context,
        kernels: &Kernels,
        cargo: Cargo<'_>,
        pool: &PoolMemory,
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's promise; the stream keeps the kernel before the copies of its pages.
        unsafe {
            if let Some(staged) = self.chunk.staged {
                self.launch(context, kernels, kernels.gather, cargo, staged)?;
            }
            self.copy(context, cargo.way, pool)
        }
    }

    /// The chunk's copies over the bus.
    unsafe fn copy(
        &mut self,
        context: &dyn Context,
        way: Way,
        pool: &PoolMemory,
    ) -> Result<(), DriverError> {
        let device = if self.chunk.staged.is_some() {
            self.staging
        } else {
            0
        };
        let host = if self.chunk.bounced {
            self.bounce.host.as_ptr() as usize
        } else {
            pool.base().as_ptr() as usize
        };
        self.bus.clear();
        self.bus
            .extend(self.chunk.copies.iter().map(|copy| BusCopy {
                device: device + copy.device,
                host: host + copy.host as usize,
                bytes: copy.bytes as usize,
            }));
        // SAFETY: offsets of the plan, which lie in the slot, the bounce buffer, the pool and the
        // layout's regions; the rest is the caller's promise.
        unsafe { context.copy(way, &self.bus, self.stream) }
    }

    /// The chunk's kernel, with its lists.
    unsafe fn launch(
        &mut self,
        context: &dyn Context,
        kernels: &Kernels,
        kernel: Kernel,
        cargo: Cargo<'_>,
        staged: Staged,
    ) -> Result<(), DriverError> {
        debug_assert!(staged.pages <= MAX_PAGES, "a plan keeps to its limits");
        // SAFETY: the caller's promise.
        unsafe { self.put_parts(context, cargo)? };
        let pages = &cargo.pages[staged.first_page..staged.first_page + staged.pages];
        let ids = self.lists.host.as_ptr().cast::<u32>();
        for (number, page) in pages.iter().enumerate() {
            // SAFETY: the list has MAX_PAGES places, and no kernel reads it now.
            unsafe { ids.add(number).write(page.block) };
        }
        let first = (staged.first_part * size_of::<DevicePart>()) as u64;
        let args = KernelArgs {
            parts: self.parts + first,
            part_count: staged.part_count as u32,
            blocks: self.lists.device,
            pages: staged.pages as u32,
            page_bytes: staged.page_bytes,
            // Parts count from the page's start, the slot from the first part in it.
            staging: self.staging.wrapping_sub(staged.page_offset),
        };
        let pieces = (staged.pages * staged.part_count) as u64;
        let mean_bytes = staged.page_bytes / staged.part_count as u64;
        let units = pieces * (mean_bytes / SLICE_BYTES).max(1);
        let blocks = units
            .div_ceil(BLOCK_UNITS)
            .clamp(1, u64::from(kernels.most_blocks)) as u32;
        // SAFETY: the parts are those of the layout, whose pieces the caller vouches for; the slot
        // has room for the pages by the plan.
        unsafe { context.launch(kernel, (blocks, BLOCK_THREADS), &args, self.stream) }
    }

    /// Brings the layout's parts to the device, unless they are there.
    unsafe fn put_parts(
        &mut self,
        context: &dyn Context,
        cargo: Cargo<'_>,
    ) -> Result<(), DriverError> {
        if std::ptr::eq(self.parts_of.as_ptr(), Arc::as_ptr(cargo.target)) {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(cargo.parts);
        assert!(
            bytes.len() <= PARTS_BYTES,
            "more parts than a group may have segments"
        );
        self.parts_of = Weak::new();
        let copy = BusCopy {
            device: self.parts,
            host: self.lists.host.as_ptr() as usize + IDS_BYTES,
            bytes: bytes.len(),
        };
        // SAFETY: both ends have PARTS_BYTES for this slot alone; nothing is under way in it.
        unsafe {
            let to = self.lists.host.as_ptr().add(IDS_BYTES);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            context.copy(Way::ToDevice, &[copy], self.stream)?;
        }
        self.parts_of = Arc::downgrade(cargo.target);
        Ok(())
    }

    /// The CPU's share of a bounced chunk.
    unsafe fn bounce(&self, way: Way, pool: &PoolMemory, copier: ByteCopier) {
        let (pool, bounce) = (pool.base().as_ptr(), self.bounce.host.as_ptr());
        for part in &self.chunk.moves {
            let (at, in_bounce, bytes) = (
                part.pool as usize,
                part.bounce as usize,
                part.bytes as usize,
            );
            // SAFETY: offsets of the plan, inside the pool and the buffer, which do not overlap;
            // the chunk's part of the pool is this copy's alone (caller of `start`).
            unsafe {
                match way {
                    Way::ToDevice => copier.copy(pool.add(at), bounce.add(in_bounce), bytes),
                    Way::ToHost => copier.copy(bounce.add(in_bounce), pool.add(at), bytes),
                }
            }
        }
    }

    /// Whether the chunk under way is done; then its bytes are where they belong.
    ///
    /// # Safety
    ///
    /// As for [`Slot::start`], which was called for the chunk.
    pub(super) unsafe fn is_done(
        &mut self,
        context: &dyn Context,
        way: Way,
        pool: &PoolMemory,
        copier: ByteCopier,
    ) -> Result<bool, DriverError> {
        if !context.is_done(self.event)? {
            return Ok(false);
        }
        if way == Way::ToHost {
            // SAFETY: the caller's promise.
            unsafe { self.bounce(way, pool, copier) };
        }
        Ok(true)
    }
}
