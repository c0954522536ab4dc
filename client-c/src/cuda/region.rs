//! Allocations of device memory as the daemon gets them.
//!
//! A region is a whole allocation (or, for memory of the VMM API, a run of physical allocations
//! mapped one after the other), whatever part of it the segments take up, and all registrations of
//! a client share it.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use pegaflow_shm::control::{DeviceHandle, IpcHandle, MAX_REGION_CHUNKS};

use super::device::Device;
use super::driver::{CudaError, Driver};
use super::locate::{Sharing, Span};
use crate::Error;
use crate::client::Shared;

/// What tells regions apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    base: u64,
    bytes: u64,
    /// Number of the allocation at the base: an address may be used again.
    buffer: u64,
    backing: Backing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Backing {
    Ipc(IpcHandle),
    /// Length of each physical allocation.
    Vmm(Vec<u64>),
}

impl Shape {
    fn end(&self) -> u64 {
        self.base + self.bytes
    }

    fn covers(&self, span: &Span) -> bool {
        self.base <= span.start && span.end <= self.end()
    }
}

/// Device memory that the daemon maps, or will; it lives until no registration uses it.
#[derive(Debug)]
pub(crate) struct DeviceRegion {
    id: u32,
    device: Arc<Device>,
    shape: Shape,
    /// Number of the session that has been told of it.
    told: AtomicU64,
    owner: Weak<Shared>,
}

impl DeviceRegion {
    pub(super) fn new(id: u32, device: Arc<Device>, shape: Shape, owner: Weak<Shared>) -> Self {
        DeviceRegion {
            id,
            device,
            shape,
            told: AtomicU64::new(0),
            owner,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// First address.
    pub(crate) fn base(&self) -> u64 {
        self.shape.base
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.bytes
    }

    /// How the daemon gets at it.
    pub(crate) fn handle(&self) -> DeviceHandle {
        match &self.shape.backing {
            Backing::Ipc(handle) => DeviceHandle::Ipc { handle: *handle },
            Backing::Vmm(chunks) => DeviceHandle::Vmm {
                chunks: chunks.clone(),
            },
        }
    }

    /// Physical allocations whose descriptors have to be sent.
    pub(crate) fn chunks(&self) -> usize {
        match &self.shape.backing {
            Backing::Ipc(_) => 0,
            Backing::Vmm(chunks) => chunks.len(),
        }
    }

    /// Descriptors of `count` physical allocations from `first` on, made anew: thousands of them
    /// would not be kept.
    pub(crate) fn export(&self, first: usize, count: usize) -> Result<Vec<OwnedFd>, Error> {
        let Backing::Vmm(chunks) = &self.shape.backing else {
            return Ok(Vec::new());
        };
        let _entered = self.device.enter()?;
        let driver = self.device.driver;
        let mut address = self.shape.base + chunks[..first].iter().sum::<u64>();
        let mut fds = Vec::with_capacity(count);
        for bytes in &chunks[first..first + count] {
            fds.push(driver.physical(address)?.export()?);
            address += bytes;
        }
        Ok(fds)
    }

    /// Whether this session's daemon has it.
    pub(crate) fn is_told(&self, session: u64) -> bool {
        self.told.load(Ordering::Relaxed) == session
    }

    /// This session's daemon has it; session 0 is none.
    pub(crate) fn set_told(&self, session: u64) {
        self.told.store(session, Ordering::Relaxed);
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        let told = self.told.load(Ordering::Relaxed);
        if let Some(owner) = self.owner.upgrade() {
            owner.forget_device_region(self.id, told);
        }
    }
}

/// The region of each span, found among those that are held or made.
pub(super) fn share(
    device: &Device,
    spans: &[Span],
    held: Vec<Arc<DeviceRegion>>,
    mut make: impl FnMut(Shape) -> DeviceRegion,
) -> Result<Vec<Arc<DeviceRegion>>, Error> {
    let _entered = device.enter()?;
    let mut regions: Vec<Arc<DeviceRegion>> = Vec::new();
    let mut sorted: Vec<&Span> = spans.iter().collect();
    sorted.sort_by_key(|span| (span.start, span.end));
    let mut at = 0;
    while let Some(&span) = sorted.get(at) {
        if regions.iter().any(|region| region.shape.covers(span)) {
            at += 1;
            continue;
        }
        let shape = match span.sharing {
            Sharing::Ipc => allocation(device.driver, span)?,
            Sharing::Vmm => run(device.driver, span, &sorted[at..])?,
        };
        let known = held.iter().find(|region| region.shape == shape);
        let region = known.cloned().unwrap_or_else(|| Arc::new(make(shape)));
        regions.push(region);
        at += 1;
    }
    let region_of = |span: &Span| {
        let mut all = regions.iter();
        let found = all.find(|region| region.shape.covers(span));
        found.cloned().ok_or_else(|| {
            let way_out = "lies in no allocation that was found";
            Error::argument("segment", span.to_string(), way_out)
        })
    };
    spans.iter().map(region_of).collect()
}

/// The allocation of `cuMemAlloc` that a span lies in.
fn allocation(driver: Driver, span: &Span) -> Result<Shape, Error> {
    let (base, bytes) = driver.range(span.start)?;
    if base.checked_add(bytes).is_none_or(|end| end < span.end) {
        let way_out = format!(
            "reaches beyond its allocation of {bytes} bytes at {base:#x}: a segment lies in one"
        );
        return Err(Error::argument("segment", span.to_string(), way_out));
    }
    let handle = driver.memory_handle(base)?;
    Ok(Shape {
        base,
        bytes,
        buffer: span.buffer,
        backing: Backing::Ipc(handle),
    })
}

/// The run of physical allocations that a span lies in, and the spans after it as far as they
/// follow without a gap.
fn run(driver: Driver, span: &Span, following: &[&Span]) -> Result<Shape, Error> {
    let mut chunks = Vec::new();
    let (base, bytes) = chunk(driver, span.start)?;
    chunks.push(bytes);
    let mut end = base + bytes;
    let mut wanted = span.end;
    for next in following {
        if next.sharing != Sharing::Vmm || next.start > end.max(wanted) {
            break;
        }
        wanted = wanted.max(next.end);
        while end < wanted && chunks.len() < MAX_REGION_CHUNKS {
            let (next, bytes) = chunk(driver, end)?;
            if next != end {
                let way_out = format!("its memory is not mapped without a gap up to {end:#x}");
                return Err(Error::argument("segment", span.to_string(), way_out));
            }
            chunks.push(bytes);
            end += bytes;
        }
        if end < wanted {
            break;
        }
    }
    if end < span.end {
        let way_out = format!(
            "takes more than {MAX_REGION_CHUNKS} physical allocations: map larger ones, or split \
             the segment"
        );
        return Err(Error::argument("segment", span.to_string(), way_out));
    }
    Ok(Shape {
        base,
        bytes: end - base,
        buffer: span.buffer,
        backing: Backing::Vmm(chunks),
    })
}

/// First byte and length of the physical allocation that is mapped at an address.
fn chunk(driver: Driver, address: u64) -> Result<(u64, u64), Error> {
    let (base, bytes) = driver.range(address)?;
    let last = base.checked_add(bytes).and_then(|end| end.checked_sub(1));
    let Some(last) = last.filter(|last| *last >= address) else {
        let way_out = format!("the driver says that it lies in {bytes} bytes at {base:#x}");
        return Err(Error::argument("segment", format!("{address:#x}"), way_out));
    };
    // The range is that of one mapping; a driver that names a larger one would have us share the
    // first allocation as if it were all.
    let is_one = |one: u64, other: u64| -> Result<bool, CudaError> {
        Ok(driver.physical(one)?.number() == driver.physical(other)?.number())
    };
    if !is_one(base, last)? {
        let way_out = "its driver does not tell physical allocations apart: update it";
        return Err(Error::argument("segment", format!("{address:#x}"), way_out));
    }
    Ok((base, bytes))
}
