//! A valid layout together with the memory it lies in, every bound checked once.

use std::sync::Arc;

use crate::layout::{MemoryName, MemoryRef, Part, ValidLayout};

use super::error::BindError;
use super::memory::ClientMemory;
use super::process::ProcessMemory;
use super::region::RegionMapping;
use crate::device::{Card, DevicePart, DeviceRegion};

/// A part in a region: where block 0's piece lies in the daemon's address space.
///
/// Invariant: for every block below the layout's `num_blocks`, `base + block * block_stride .. +
/// bytes` lies inside a mapping that the owning [`BoundLayout`] keeps alive.
#[derive(Debug, Clone, Copy)]
pub(super) struct RegionPart {
    pub(super) base: *mut u8,
    pub(super) block_stride: usize,
    pub(super) bytes: usize,
    pub(super) page_offset: usize,
}

/// A part in the owner's address space. `part` is its number in the layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProcessPart {
    pub(super) base: u64,
    pub(super) block_stride: u64,
    pub(super) bytes: u64,
    pub(super) page_offset: u64,
    pub(super) part: usize,
}

/// A layout all of whose parts lie on one GPU.
///
/// Invariant: for every block below the layout's `num_blocks`, the piece of every part lies inside
/// one of `regions`, all of which were mapped in the same context.
#[derive(Debug)]
pub(crate) struct DeviceTarget {
    card: Arc<Card>,
    generation: u64,
    parts: Vec<DevicePart>,
    regions: Vec<Arc<DeviceRegion>>,
}

impl DeviceTarget {
    /// The device.
    pub(crate) fn card(&self) -> &Arc<Card> {
        &self.card
    }

    /// The context in which the parts' addresses are good.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The parts, in page order.
    pub(crate) fn parts(&self) -> &[DevicePart] {
        &self.parts
    }
}

/// A [`ValidLayout`] bound to the memory of one session. Holding it keeps the mappings alive.
#[derive(Debug)]
pub struct BoundLayout {
    layout: Arc<ValidLayout>,
    region_parts: Vec<RegionPart>,
    process_parts: Vec<ProcessPart>,
    process: Option<Arc<ProcessMemory>>,
    regions: Vec<Arc<RegionMapping>>,
    device: Option<DeviceTarget>,
}

// SAFETY: the raw pointers in `region_parts` point into mappings that `regions` keeps alive, and
// are used only for raw copies that make no claim about who else touches the bytes.
unsafe impl Send for BoundLayout {}
// SAFETY: as above; nothing in the value changes after `bind`.
unsafe impl Sync for BoundLayout {}

impl BoundLayout {
    /// Binds every part of `layout` to the memory that `resolve` gives for it. `resolve` is asked
    /// once per part and must give the same memory for the same reference each time.
    pub fn bind(
        layout: Arc<ValidLayout>,
        resolve: impl Fn(MemoryRef) -> Option<ClientMemory>,
    ) -> Result<Arc<Self>, BindError> {
        let mut bound = Self {
            layout: Arc::clone(&layout),
            region_parts: Vec::new(),
            process_parts: Vec::new(),
            process: None,
            regions: Vec::new(),
            device: None,
        };
        for (index, part) in layout.parts().iter().enumerate() {
            let memory = part.memory;
            match (memory, resolve(memory)) {
                (_, None) => {
                    return Err(BindError::Missing {
                        part: index,
                        memory: MemoryName(memory),
                    });
                }
                (MemoryRef::Region(_), Some(ClientMemory::Region(region))) => {
                    bound.add_region_part(index, part, region)?;
                }
                (MemoryRef::Region(_), Some(ClientMemory::Device(region))) => {
                    bound.add_device_part(index, part, region)?;
                }
                (MemoryRef::Process, Some(ClientMemory::Process(process))) => {
                    bound.process_parts.push(ProcessPart {
                        base: part.base,
                        block_stride: part.block_stride,
                        bytes: part.bytes,
                        page_offset: part.page_offset,
                        part: index,
                    });
                    bound.process = Some(process);
                }
                _ => {
                    return Err(BindError::WrongKind {
                        part: index,
                        memory: MemoryName(memory),
                    });
                }
            }
            let on_host = bound.process.is_some() || !bound.regions.is_empty();
            if on_host && bound.device.is_some() {
                return Err(BindError::MixedKinds {
                    part: index,
                    memory: MemoryName(memory),
                });
            }
        }
        Ok(Arc::new(bound))
    }

    /// The bytes of the page from `start` to `end`, bound to the same memory of a device; `None`
    /// where the group lies elsewhere.
    ///
    /// # Panics
    /// As [`ValidLayout::slice`].
    pub fn slice(&self, start: u64, end: u64) -> Option<Arc<BoundLayout>> {
        let whole = self.device.as_ref()?;
        let layout = self.layout.slice(start, end);
        // Both lists have the page's parts in its order.
        let device_parts = whole.parts.iter().filter_map(|part| {
            let first = u64::from(part.page_offset);
            let from = first.max(start);
            let to = (first + u64::from(part.bytes)).min(end);
            (from < to).then(|| DevicePart {
                base: part.base + (from - first),
                block_stride: part.block_stride,
                bytes: (to - from) as u32,
                page_offset: (from - start) as u32,
            })
        });
        let device = DeviceTarget {
            card: Arc::clone(&whole.card),
            generation: whole.generation,
            parts: device_parts.collect(),
            regions: whole.regions.clone(),
        };
        Some(Arc::new(BoundLayout {
            layout: Arc::new(layout),
            region_parts: Vec::new(),
            process_parts: Vec::new(),
            process: None,
            regions: Vec::new(),
            device: Some(device),
        }))
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<ValidLayout> {
        &self.layout
    }

    /// Whether any part lies in the owner's address space, so that a copy may take as long as the
    /// owner likes.
    #[inline]
    pub fn is_in_process(&self) -> bool {
        self.process.is_some()
    }

    /// The device and the parts there, when the group lies in a GPU's memory.
    #[inline]
    pub(crate) fn device(&self) -> Option<&DeviceTarget> {
        self.device.as_ref()
    }

    /// The memory node near its device, where it is known.
    pub fn memory_node(&self) -> Option<u32> {
        self.device.as_ref()?.card.info().numa_node
    }

    /// Whether copies wait in a queue of their session or device, apart from all others.
    #[inline]
    pub fn has_own_queue(&self) -> bool {
        self.is_in_process() || self.device.is_some()
    }

    pub(super) fn region_parts(&self) -> &[RegionPart] {
        &self.region_parts
    }

    /// The parts in process memory and their owner; `None` when all parts lie in regions.
    pub(super) fn process_parts(&self) -> Option<(&ProcessMemory, &[ProcessPart])> {
        self.process
            .as_deref()
            .map(|process| (process, &self.process_parts[..]))
    }

    fn add_device_part(
        &mut self,
        index: usize,
        part: &Part,
        region: Arc<DeviceRegion>,
    ) -> Result<(), BindError> {
        let memory = MemoryName(part.memory);
        let end = self.part_end(part);
        if end > region.bytes() {
            return Err(BindError::OutOfRange {
                part: index,
                memory,
                end,
                region_bytes: region.bytes(),
            });
        }
        let target = self.device.get_or_insert_with(|| DeviceTarget {
            card: Arc::clone(region.card()),
            generation: region.generation(),
            parts: Vec::new(),
            regions: Vec::new(),
        });
        let (device, earlier) = (region.device(), target.card.info().uuid);
        if device != earlier {
            return Err(BindError::OtherDevice {
                part: index,
                memory,
                device,
                earlier,
            });
        }
        if region.generation() != target.generation {
            return Err(BindError::DeviceReset {
                part: index,
                memory,
                device,
            });
        }
        target.parts.push(DevicePart {
            base: region.base() + part.base,
            block_stride: part.block_stride,
            // Both below MAX_PAGE_BYTES, as ValidLayout keeps.
            bytes: part.bytes as u32,
            page_offset: part.page_offset as u32,
        });
        let known = &mut target.regions;
        if !known.iter().any(|known| Arc::ptr_eq(known, &region)) {
            known.push(region);
        }
        Ok(())
    }

    /// Where the last block's piece ends, counted like `part.base`.
    fn part_end(&self, part: &Part) -> u64 {
        let last_block = u64::from(self.layout.num_blocks()) - 1;
        part.base + last_block * part.block_stride + part.bytes
    }

    fn add_region_part(
        &mut self,
        index: usize,
        part: &Part,
        region: Arc<RegionMapping>,
    ) -> Result<(), BindError> {
        let end = self.part_end(part);
        if end > region.bytes() {
            let (memory, region_bytes) = (MemoryName(part.memory), region.bytes());
            return Err(BindError::OutOfRange {
                part: index,
                memory,
                end,
                region_bytes,
            });
        }
        // SAFETY: `part.base < end <= region.bytes()`, so the pointer stays inside the mapping.
        let base = unsafe { region.base().as_ptr().add(part.base as usize) };
        self.region_parts.push(RegionPart {
            base,
            block_stride: part.block_stride as usize,
            bytes: part.bytes as usize,
            page_offset: part.page_offset as usize,
        });
        if !self.regions.iter().any(|known| Arc::ptr_eq(known, &region)) {
            self.regions.push(region);
        }
        Ok(())
    }
}
