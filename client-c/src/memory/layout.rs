//! What a rank registers: its KV memory by address, turned into what the daemon can reach.

use std::sync::Arc;

use pegaflow_shm::control::{
    GroupLayout, MAX_GROUPS, MAX_NAME_BYTES, MAX_SEGMENTS, MAX_WORLD_SIZE, MemoryRef, Mode,
    RegisterSpec, SegmentLayout,
};
use pegaflow_shm::namespace::NamespaceSpec;

use super::{HostMemory, HostRegion};
use crate::Error;
use crate::cuda::{DeviceRegion, DeviceUse, Location, Place, Span};

/// A rank of an instance with its KV memory, or a scheduler without.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Name of the engine replica; its processes find each other by it.
    pub instance: String,
    /// What makes the blocks' bytes comparable.
    pub namespace: NamespaceSpec,
    /// Worker ranks of the instance.
    pub world_size: u32,
    /// This worker's rank, or `None` for a scheduler.
    pub rank: Option<u32>,
    /// Save only, or also query and load.
    pub mode: Mode,
    /// KV memory, one entry per cache group; empty for a scheduler.
    pub groups: Vec<GroupMemory>,
}

/// KV memory of one cache group.
#[derive(Clone, Debug)]
pub struct GroupMemory {
    /// Cache group, 0 for full attention.
    pub group: u16,
    /// Block ids are `0..num_blocks`.
    pub num_blocks: u32,
    /// Parts of a block in layer order.
    pub segments: Vec<SegmentMemory>,
    /// All ranks hold the same bytes (MLA): they are stored once, and each rank loads them.
    pub replicated: bool,
}

/// What kind of memory a segment lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryKind {
    /// Found out by the address: a [`HostMemory`], device memory of CUDA, or memory of the process.
    #[default]
    Auto,
    /// Not device memory; the CUDA driver is not asked.
    Host,
    /// Device memory; anything else is refused.
    Cuda,
}

/// One strided array: block `b` has `bytes` bytes at `address + b * block_stride`.
#[derive(Clone, Debug)]
pub struct SegmentMemory {
    address: usize,
    block_stride: u64,
    bytes: u64,
    region: Option<Arc<HostRegion>>,
    kind: MemoryKind,
}

impl SegmentMemory {
    /// An array that starts at byte `offset` of shared host memory.
    pub fn in_host(memory: &HostMemory, offset: usize, block_stride: u64, bytes: u64) -> Self {
        let address = memory.region.base().saturating_add(offset);
        SegmentMemory {
            address,
            block_stride,
            bytes,
            region: Some(memory.region.clone()),
            kind: MemoryKind::Host,
        }
    }

    /// An array anywhere in this process. Where it lies in a [`HostMemory`] of the same client, the
    /// daemon reaches it through that; where it lies in device memory of CUDA, by sharing its
    /// allocation; else through `process_vm_readv` and `process_vm_writev`.
    ///
    /// # Safety
    /// While the registration lasts, every block of the array must be memory that the daemon may
    /// read and write at any time: mapped, owned by the caller, and not reached through Rust
    /// references while a request that names the block is unfinished.
    pub unsafe fn at(address: *mut u8, block_stride: u64, bytes: u64) -> Self {
        SegmentMemory {
            address: address.addr(),
            block_stride,
            bytes,
            region: None,
            kind: MemoryKind::Auto,
        }
    }

    /// The same array in memory of a kind that the caller knows.
    pub fn of_kind(self, kind: MemoryKind) -> Self {
        SegmentMemory { kind, ..self }
    }
}

/// A registration as the daemon gets it, and the regions that must outlive it.
#[derive(Debug)]
pub(crate) struct ResolvedRegistration {
    pub(crate) spec: RegisterSpec,
    pub(crate) regions: Vec<Arc<HostRegion>>,
    pub(crate) uses_process_memory: bool,
    pub(crate) device: Option<DeviceUse>,
}

/// Where memory of a registration is looked for.
pub(crate) trait Places {
    /// Host memory that the client shares.
    fn host_regions(&self) -> &[Arc<HostRegion>];

    /// What kind of memory an address outside of it is.
    fn locate(&self, address: u64) -> Result<Location, Error>;

    /// The regions of spans of device memory, one for each, and what copies of it use.
    fn share(&self, spans: &[Span]) -> Result<DeviceUse, Error>;
}

/// Checks what needs no daemon and turns addresses into references.
pub(crate) fn resolve(
    registration: &Registration,
    places: &impl Places,
) -> Result<ResolvedRegistration, Error> {
    check(registration)?;
    let mut found = Found::default();
    let mut groups = Vec::with_capacity(registration.groups.len());
    for group in &registration.groups {
        if group.segments.is_empty() || group.segments.len() > MAX_SEGMENTS {
            let way_out = format!("a group has 1 to {MAX_SEGMENTS} segments");
            return Err(Error::argument(
                "segments",
                group.segments.len().to_string(),
                way_out,
            ));
        }
        let placed = group.segments.iter().map(|segment| {
            let placed = place(segment, group.num_blocks, places)?;
            found.add(segment, group.num_blocks, placed)
        });
        groups.push(GroupLayout {
            group: group.group,
            num_blocks: group.num_blocks,
            segments: placed.collect::<Result<_, _>>()?,
            replicated: group.replicated,
        });
    }
    let device = found.share_devices(&mut groups, places)?;
    let Registration {
        instance,
        namespace,
        world_size,
        rank,
        mode,
        ..
    } = registration.clone();
    let spec = RegisterSpec {
        instance,
        namespace,
        world_size,
        rank,
        mode,
        groups,
    };
    Ok(ResolvedRegistration {
        spec,
        regions: found.regions,
        uses_process_memory: found.uses_process_memory,
        device,
    })
}

/// What the segments so far lie in.
#[derive(Debug, Default)]
struct Found {
    regions: Vec<Arc<HostRegion>>,
    /// The first segment of device memory and the first of any other, in words.
    on_device: Option<String>,
    in_host: Option<String>,
    uses_process_memory: bool,
    /// Segments of device memory, in order.
    spans: Vec<Span>,
}

impl Found {
    /// Enters a segment's place; that of device memory still counts from address 0.
    fn add(
        &mut self,
        segment: &SegmentMemory,
        num_blocks: u32,
        placed: Placed,
    ) -> Result<SegmentLayout, Error> {
        let &SegmentMemory {
            address,
            block_stride,
            bytes,
            ..
        } = segment;
        let address = address as u64;
        let end = end_of(segment, num_blocks).unwrap_or(u64::MAX);
        let words = || Some(format!("{address:#x}..{end:#x}"));
        let (memory, base) = match placed {
            Placed::Device(place) => {
                self.on_device = self.on_device.take().or_else(words);
                self.spans.push(Span::new(place, address, end));
                (MemoryRef::Process, address)
            }
            Placed::Process => {
                self.in_host = self.in_host.take().or_else(words);
                self.uses_process_memory = true;
                (MemoryRef::Process, address)
            }
            Placed::Region(region) => {
                self.in_host = self.in_host.take().or_else(words);
                let base = address - region.base() as u64;
                let memory = MemoryRef::Region(region.id);
                if self.regions.iter().all(|known| known.id != region.id) {
                    self.regions.push(region);
                }
                (memory, base)
            }
        };
        if let (Some(device), Some(host)) = (&self.on_device, &self.in_host) {
            let value = format!("{device} is device memory, {host} is host memory");
            let way_out = "a registration's segments are all of one kind: register two instances";
            return Err(Error::bad_layout(value, way_out));
        }
        Ok(SegmentLayout {
            memory,
            base,
            block_stride,
            bytes,
        })
    }

    /// Shares the allocations of device memory, and makes the segments count from their starts.
    fn share_devices(
        &self,
        groups: &mut [GroupLayout],
        places: &impl Places,
    ) -> Result<Option<DeviceUse>, Error> {
        if self.spans.is_empty() {
            return Ok(None);
        }
        let shared = places.share(&self.spans)?;
        let segments = groups.iter_mut().flat_map(|group| &mut group.segments);
        let mut regions: Vec<Arc<DeviceRegion>> = Vec::new();
        for (segment, region) in segments.zip(shared.regions) {
            segment.memory = MemoryRef::Region(region.id());
            segment.base -= region.base();
            if regions.iter().all(|known| known.id() != region.id()) {
                regions.push(region);
            }
        }
        Ok(Some(DeviceUse { regions, ..shared }))
    }
}

fn check(registration: &Registration) -> Result<(), Error> {
    let Registration {
        instance,
        namespace,
        world_size,
        rank,
        groups,
        ..
    } = registration;
    if instance.is_empty() || instance.len() > MAX_NAME_BYTES {
        let way_out = format!("a name of 1 to {MAX_NAME_BYTES} bytes");
        return Err(Error::argument("instance", instance.clone(), way_out));
    }
    namespace
        .check()
        .map_err(|fault| Error::argument("namespace", namespace.summary(), fault.to_string()))?;
    if !(1..=MAX_WORLD_SIZE).contains(world_size) {
        let way_out = format!("1 to {MAX_WORLD_SIZE} ranks");
        return Err(Error::argument(
            "world_size",
            world_size.to_string(),
            way_out,
        ));
    }
    match rank {
        Some(rank) if rank >= world_size => {
            let way_out = format!("ranks are below the world size {world_size}");
            Err(Error::argument("rank", rank.to_string(), way_out))
        }
        Some(rank) if groups.is_empty() => {
            let way_out = "a worker rank registers at least one group; a scheduler has no rank";
            Err(Error::argument("rank", rank.to_string(), way_out))
        }
        None if !groups.is_empty() => {
            let way_out = "a scheduler has no KV memory: give no groups, or a rank";
            Err(Error::argument("groups", groups.len().to_string(), way_out))
        }
        _ if groups.len() > MAX_GROUPS => {
            let way_out = format!("at most {MAX_GROUPS} groups");
            Err(Error::argument("groups", groups.len().to_string(), way_out))
        }
        _ => Ok(()),
    }
}

/// What a segment lies in.
enum Placed {
    Region(Arc<HostRegion>),
    Process,
    Device(Place),
}

/// The address behind a segment's last byte, unless it wraps.
fn end_of(segment: &SegmentMemory, num_blocks: u32) -> Option<u64> {
    let last = u64::from(num_blocks).checked_sub(1)?;
    let start = last.checked_mul(segment.block_stride)?;
    let span = start.checked_add(segment.bytes)?;
    (segment.address as u64).checked_add(span)
}

fn place(segment: &SegmentMemory, num_blocks: u32, places: &impl Places) -> Result<Placed, Error> {
    let &SegmentMemory {
        address,
        block_stride,
        bytes,
        ..
    } = segment;
    let regions = places.host_regions();
    let end = end_of(segment, num_blocks);
    let Some(end) = end.filter(|_| address != 0 && bytes != 0) else {
        let value = format!("{num_blocks} x {bytes} bytes at {address:#x} every {block_stride}");
        let way_out = "give an address, at least one block, and a span that does not wrap";
        return Err(Error::argument("segment", value, way_out));
    };
    let value = || format!("{address:#x}..{end:#x}");
    if let Some(named) = &segment.region
        && !regions.iter().any(|region| Arc::ptr_eq(region, named))
    {
        let way_out = "lies in host memory of another client: allocate it from this one";
        return Err(Error::argument("segment", value(), way_out));
    }
    let known = regions.iter().find(|region| {
        let base = region.base() as u64;
        (address as u64) < base + region.bytes() as u64 && end > base
    });
    if let Some(region) = known {
        let base = region.base() as u64;
        let limit = base + region.bytes() as u64;
        if (address as u64) < base || end > limit {
            let way_out = format!("lies only partly in the host memory {base:#x}..{limit:#x}");
            return Err(Error::argument("segment", value(), way_out));
        }
        if segment.kind == MemoryKind::Cuda {
            return Err(not_device(value()));
        }
        return Ok(Placed::Region(region.clone()));
    }
    if segment.kind == MemoryKind::Host {
        return Ok(Placed::Process);
    }
    match places.locate(address as u64)? {
        Location::Device(place) => Ok(Placed::Device(place)),
        Location::Process if segment.kind == MemoryKind::Cuda => Err(not_device(value())),
        Location::Process => Ok(Placed::Process),
    }
}

fn not_device(value: String) -> Error {
    let way_out = "is no memory of the CUDA driver that this process has loaded, if any: leave its \
                   kind to the library, or allocate it with cudaMalloc";
    Error::argument("segment", value, way_out)
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

    /// A process without GPU.
    impl<const N: usize> Places for [Arc<HostRegion>; N] {
        fn host_regions(&self) -> &[Arc<HostRegion>] {
            self
        }

        fn locate(&self, _: u64) -> Result<Location, Error> {
            Ok(Location::Process)
        }

        fn share(&self, _: &[Span]) -> Result<DeviceUse, Error> {
            unreachable!("there is no device memory")
        }
    }

    fn region(id: u32, bytes: usize) -> Arc<HostRegion> {
        Arc::new(HostRegion::create(id, bytes, Weak::new()).unwrap())
    }

    fn registration(segments: Vec<SegmentMemory>) -> Registration {
        Registration {
            instance: "i".into(),
            namespace: NamespaceSpec {
                model: "m".into(),
                dtype: "bf16".into(),
                hash_algorithm: "sha256".into(),
                block_tokens: 16,
                ..NamespaceSpec::default()
            },
            world_size: 1,
            rank: Some(0),
            mode: Mode::ReadWrite,
            groups: vec![GroupMemory {
                group: 0,
                num_blocks: 4,
                segments,
                replicated: false,
            }],
        }
    }

    fn at(address: usize) -> SegmentMemory {
        // SAFETY: nothing is copied in these tests.
        unsafe { SegmentMemory::at(std::ptr::without_provenance_mut(address), 1024, 1024) }
    }

    #[test]
    fn addresses_in_a_region_become_offsets_and_others_process_memory() {
        let regions = [region(3, 8192), region(4, 8192)];
        let inside = at(regions[1].base() + 4096);
        let resolved = resolve(&registration(vec![inside, at(4096)]), &regions).unwrap();
        let segments = &resolved.spec.groups[0].segments;
        assert_eq!(
            (segments[0].memory, segments[0].base),
            (MemoryRef::Region(4), 4096)
        );
        assert_eq!(
            (segments[1].memory, segments[1].base),
            (MemoryRef::Process, 4096)
        );
        assert!(resolved.uses_process_memory && resolved.regions.len() == 1);
    }

    #[test]
    fn a_segment_partly_in_a_region_is_refused() {
        let regions = [region(1, 8192)];
        let base = regions[0].base();
        for address in [base + 4097, base - 1] {
            assert!(resolve(&registration(vec![at(address)]), &regions).is_err());
        }
        assert!(resolve(&registration(vec![at(base + 4096)]), &regions).is_ok());
    }

    #[test]
    fn impossible_registrations_are_refused_by_name() {
        let good = registration(vec![at(4096)]);
        assert!(resolve(&good, &[]).is_ok());
        let bad = [
            Registration {
                instance: String::new(),
                ..good.clone()
            },
            Registration {
                world_size: 0,
                ..good.clone()
            },
            Registration {
                rank: Some(1),
                ..good.clone()
            },
            Registration {
                rank: None,
                ..good.clone()
            },
            Registration {
                groups: Vec::new(),
                ..good.clone()
            },
            Registration {
                namespace: NamespaceSpec::default(),
                ..good.clone()
            },
            registration(Vec::new()),
            registration(vec![at(0)]),
            registration(vec![at(usize::MAX - 100)]),
        ];
        for registration in bad {
            assert!(matches!(
                resolve(&registration, &[]),
                Err(Error::Argument { .. })
            ));
        }
    }
}
