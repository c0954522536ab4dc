//! A registration as a client words it becomes one that the lane can take: names, numbers and
//! layouts checked, memory found.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;

use pegaflow_shm::control::{
    GroupLayout, MAX_GROUPS, MAX_NAME_BYTES, MAX_WORLD_SIZE, MemoryRef, RegisterSpec,
};
use pegaflow_shm::status::Status;

use super::regions::Memory;
use crate::copy::{BoundLayout, ClientMemory, RegionMapping};
use crate::isolation::IsolationDomain;
use crate::lane::api::{NewRegistration, Refusal, RegisteredGroup};
use crate::layout::ValidLayout;

/// A checked registration and the regions it uses.
pub(crate) struct Checked {
    pub(crate) registration: NewRegistration,
    pub(crate) regions: Vec<u32>,
}

/// Whether a registration names memory of the process itself.
pub(crate) fn names_process(spec: &RegisterSpec) -> bool {
    let mut segments = spec.groups.iter().flat_map(|group| &group.segments);
    segments.any(|segment| segment.memory == MemoryRef::Process)
}

/// Checks a registration and finds its memory; that of the process, if named, was opened before.
pub(crate) fn check(
    spec: RegisterSpec,
    signals: Option<u32>,
    memory: &Memory,
    domain: &IsolationDomain,
) -> Result<Checked, Refusal> {
    check_name("instance", &spec.instance)?;
    spec.namespace
        .check()
        .map_err(|fault| invalid(fault.to_string()))?;
    domain.check_model(&spec.namespace.model)?;
    check_rank(&spec)?;
    check_group_numbers(&spec)?;
    let mut groups = Vec::with_capacity(spec.groups.len());
    let mut regions = BTreeSet::new();
    for group in &spec.groups {
        groups.push(check_group(group, memory)?);
        let used = group
            .segments
            .iter()
            .filter_map(|segment| match segment.memory {
                MemoryRef::Region(region) => Some(region),
                MemoryRef::Process => None,
            });
        regions.extend(used);
    }
    let events = memory.device_events(&spec)?;
    let signals = signals
        .map(|region| check_signals(region, memory))
        .transpose()?;
    regions.extend(signals.as_ref().map(|(region, _)| *region));
    let registration = NewRegistration {
        spec,
        groups,
        events,
        signals: signals.map(|(_, mapping)| mapping),
    };
    Ok(Checked {
        registration,
        regions: regions.into_iter().collect(),
    })
}

/// Checks a name that goes into tables and logs.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(invalid(format!(
            "{field} has {} bytes: give 1 to {MAX_NAME_BYTES}",
            name.len()
        )));
    }
    if name.chars().any(char::is_control) {
        return Err(invalid(format!(
            "{field} {name:?} has control characters: leave them out"
        )));
    }
    Ok(())
}

fn invalid(message: String) -> Refusal {
    Refusal::new(Status::InvalidArgument, message)
}

fn check_rank(spec: &RegisterSpec) -> Result<(), Refusal> {
    let world_size = spec.world_size;
    if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
        return Err(invalid(format!(
            "world_size {world_size}: give 1 to {MAX_WORLD_SIZE}"
        )));
    }
    match spec.rank {
        Some(rank) if rank >= world_size => Err(invalid(format!(
            "rank {rank} is not below world_size {world_size}: ranks count from 0"
        ))),
        Some(_) if spec.groups.is_empty() => Err(invalid(
            "a worker (rank given) has no cache groups: describe its KV memory, or leave rank out \
             for a scheduler"
                .into(),
        )),
        None if !spec.groups.is_empty() => Err(invalid(format!(
            "a scheduler (no rank) has {} cache groups: leave them out, or give a rank",
            spec.groups.len()
        ))),
        _ => Ok(()),
    }
}

fn check_group_numbers(spec: &RegisterSpec) -> Result<(), Refusal> {
    if spec.groups.len() > MAX_GROUPS {
        let text = format!(
            "{} cache groups: at most {MAX_GROUPS} are allowed",
            spec.groups.len()
        );
        return Err(Refusal::new(Status::TooMany, text));
    }
    let mut seen = BTreeSet::new();
    for group in spec.groups.iter().map(|layout| layout.group) {
        if !seen.insert(group) {
            return Err(invalid(format!(
                "cache group {group} is given twice: number them apart"
            )));
        }
    }
    Ok(())
}

/// The words that the registration's loads raise: a memfd's.
fn check_signals(region: u32, memory: &Memory) -> Result<(u32, Arc<RegionMapping>), Refusal> {
    match memory.resolve(MemoryRef::Region(region)) {
        Some(ClientMemory::Region(mapping)) => Ok((region, mapping)),
        _ => Err(invalid(format!(
            "signals in region {region}, which is no memfd that the session has shared: share it \
             first"
        ))),
    }
}

fn check_group(group: &GroupLayout, memory: &Memory) -> Result<RegisteredGroup, Refusal> {
    let bad = |text: String| Refusal::new(Status::BadLayout, text);
    let layout = ValidLayout::new(group, |region| memory.region_bytes(region))
        .map_err(|error| bad(error.to_string()))?;
    let target = BoundLayout::bind(Arc::new(layout), |place| memory.resolve(place))
        .map_err(|error| bad(format!("group {}: {error}", group.group)))?;
    Ok(RegisteredGroup {
        group: group.group,
        target,
    })
}
