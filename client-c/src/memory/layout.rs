//! What a rank registers: its KV memory by address, turned into what the daemon can reach.

use std::sync::Arc;

use pegaflow_shm::control::{
    GroupLayout, MAX_GROUPS, MAX_NAME_BYTES, MAX_SEGMENTS, MAX_WORLD_SIZE, MemoryRef, Mode,
    RegisterSpec, SegmentLayout,
};
use pegaflow_shm::namespace::NamespaceSpec;

use super::{HostMemory, HostRegion};
use crate::Error;

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
}

/// One strided array: block `b` has `bytes` bytes at `address + b * block_stride`.
#[derive(Clone, Debug)]
pub struct SegmentMemory {
    address: usize,
    block_stride: u64,
    bytes: u64,
    region: Option<Arc<HostRegion>>,
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
        }
    }

    /// An array anywhere in this process. Where it lies in a [`HostMemory`] of the same client, the
    /// daemon reaches it through that; else through `process_vm_readv` and `process_vm_writev`.
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
        }
    }
}

/// A registration as the daemon gets it, and the regions that must outlive it.
#[derive(Debug)]
pub(crate) struct ResolvedRegistration {
    pub(crate) spec: RegisterSpec,
    pub(crate) regions: Vec<Arc<HostRegion>>,
    pub(crate) uses_process_memory: bool,
}

/// Checks what needs no daemon and turns addresses into references.
pub(crate) fn resolve(
    registration: &Registration,
    regions: &[Arc<HostRegion>],
) -> Result<ResolvedRegistration, Error> {
    check(registration)?;
    let mut used: Vec<Arc<HostRegion>> = Vec::new();
    let mut uses_process_memory = false;
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
        let mut segments = Vec::with_capacity(group.segments.len());
        for segment in &group.segments {
            let (layout, region) = place(segment, group.num_blocks, regions)?;
            match region {
                None => uses_process_memory = true,
                Some(region) if used.iter().all(|known| known.id != region.id) => {
                    used.push(region);
                }
                Some(_) => {}
            }
            segments.push(layout);
        }
        groups.push(GroupLayout {
            group: group.group,
            num_blocks: group.num_blocks,
            segments,
            replicated: false,
        });
    }
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
        regions: used,
        uses_process_memory,
    })
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

fn place(
    segment: &SegmentMemory,
    num_blocks: u32,
    regions: &[Arc<HostRegion>],
) -> Result<(SegmentLayout, Option<Arc<HostRegion>>), Error> {
    let &SegmentMemory {
        address,
        block_stride,
        bytes,
        ..
    } = segment;
    let blocks = u64::from(num_blocks);
    let span = blocks
        .checked_sub(1)
        .and_then(|last| last.checked_mul(block_stride))
        .and_then(|start| start.checked_add(bytes));
    let end = span.and_then(|span| (address as u64).checked_add(span));
    let Some(end) = end.filter(|_| address != 0 && bytes != 0) else {
        let value = format!("{num_blocks} x {bytes} bytes at {address:#x} every {block_stride}");
        let way_out = "give an address, at least one block, and a span that does not wrap";
        return Err(Error::argument("segment", value, way_out));
    };
    if let Some(named) = &segment.region
        && !regions.iter().any(|region| Arc::ptr_eq(region, named))
    {
        let way_out = "lies in host memory of another client: allocate it from this one";
        return Err(Error::argument(
            "segment",
            format!("{address:#x}..{end:#x}"),
            way_out,
        ));
    }
    let layout = |memory, base| SegmentLayout {
        memory,
        base,
        block_stride,
        bytes,
    };
    let known = regions.iter().find(|region| {
        let base = region.base() as u64;
        (address as u64) < base + region.bytes() as u64 && end > base
    });
    let Some(region) = known else {
        return Ok((layout(MemoryRef::Process, address as u64), None));
    };
    let base = region.base() as u64;
    let limit = base + region.bytes() as u64;
    if (address as u64) < base || end > limit {
        let value = format!("{address:#x}..{end:#x}");
        let way_out = format!("lies only partly in the host memory {base:#x}..{limit:#x}");
        return Err(Error::argument("segment", value, way_out));
    }
    let placed = layout(MemoryRef::Region(region.id), address as u64 - base);
    Ok((placed, Some(region.clone())))
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

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
