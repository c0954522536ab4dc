//! A session's GPU memory: what it may share, and how it gets into the daemon.
//!
//! A region by CUDA IPC handle comes in one message. One of the VMM API comes in several, each with
//! up to 64 descriptors of physical allocations; the daemon holds them until all are there. Mapping
//! takes the driver up to a third of a second, so it runs on a thread of its own while the session
//! waits.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytesize::ByteSize;
use pegaflow_shm::control::{
    DeviceHandle, DeviceUuid, IpcHandle, MAX_DEVICE_EVENTS, MAX_MESSAGE_CHUNKS, MAX_REGION_CHUNKS,
    MemoryRef, RegisterSpec,
};
use pegaflow_shm::status::Status;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;

use super::peer::Peer;
use super::regions::{Memory, Region};
use crate::device::{DeviceError, DeviceEvents, DeviceRegion, Devices, ShareHandle};
use crate::lane::api::Refusal;

/// Most regions of device memory of one session.
pub const MAX_DEVICE_REGIONS: usize = 1024;
/// Most bytes of one session's device memory; more than any GPU has.
pub const MAX_DEVICE_BYTES: u64 = 1 << 40;
/// Most physical allocations behind one session's regions.
pub const MAX_SESSION_CHUNKS: usize = 16384;
/// Most descriptors of physical allocations that the daemon holds at a time, of all sessions
/// together, for regions of which more have to come.
pub const MAX_AWAITED_CHUNKS: usize = MAX_REGION_CHUNKS;

/// The devices' side of one session's memory.
#[derive(Default)]
pub(crate) struct Gpu {
    /// Bytes and physical allocations of each region.
    sizes: HashMap<u32, (u64, usize)>,
    awaited: Option<Awaited>,
    events: HashMap<DeviceUuid, Arc<DeviceEvents>>,
    /// Devices of which the session has been told, or has found out, that they are down.
    down: BTreeSet<DeviceUuid>,
}

/// A region of which descriptors have still to come.
struct Awaited {
    region: u32,
    bytes: u64,
    device: DeviceUuid,
    /// Length of each physical allocation.
    lengths: Vec<u64>,
    fds: Vec<OwnedFd>,
    permit: OwnedSemaphorePermit,
}

/// A region that can be mapped now.
pub(crate) struct Import {
    region: u32,
    bytes: u64,
    chunks: usize,
    device: DeviceUuid,
    handle: ShareHandle,
    _permit: Option<OwnedSemaphorePermit>,
}

fn invalid(text: String) -> Refusal {
    Refusal::new(Status::InvalidArgument, text)
}

fn limit(text: String) -> Refusal {
    Refusal::new(Status::Limit, text)
}

impl Gpu {
    /// Regions of device memory.
    pub(super) fn regions(&self) -> usize {
        self.sizes.len()
    }

    /// Whether descriptors of a region have still to come.
    pub(super) fn awaits(&self, region: u32) -> bool {
        self.awaited
            .as_ref()
            .is_some_and(|awaited| awaited.region == region)
    }

    /// Lets go of a region of which not all has come; false if there is no such.
    pub(super) fn stop_awaiting(&mut self, region: u32) -> bool {
        self.awaited
            .take_if(|awaited| awaited.region == region)
            .is_some()
    }

    pub(super) fn forget(&mut self, region: u32) {
        self.sizes.remove(&region);
    }

    fn check_room(&self, region: u32, bytes: u64, chunks: usize) -> Result<(), Refusal> {
        if self.sizes.len() >= MAX_DEVICE_REGIONS {
            return Err(limit(format!(
                "the session has {MAX_DEVICE_REGIONS} regions of GPU memory, no more fit: \
                 allocate KV memory in fewer pieces"
            )));
        }
        let held: u64 = self.sizes.values().map(|(bytes, _)| bytes).sum();
        if bytes > MAX_DEVICE_BYTES - held {
            return Err(limit(format!(
                "region {region} of {bytes} bytes on top of {held} exceeds the {} of GPU memory of \
                 one session",
                ByteSize(MAX_DEVICE_BYTES)
            )));
        }
        let held: usize = self.sizes.values().map(|(_, chunks)| chunks).sum();
        if chunks > MAX_REGION_CHUNKS || chunks > MAX_SESSION_CHUNKS - held {
            return Err(limit(format!(
                "region {region} of {chunks} physical allocations on top of {held}: a region has at \
                 most {MAX_REGION_CHUNKS}, a session {MAX_SESSION_CHUNKS}: map larger ones"
            )));
        }
        Ok(())
    }
}

impl Memory {
    /// Takes a region of device memory in; `None` while descriptors of it have still to come.
    pub(crate) fn begin_device_region(
        &mut self,
        (region, bytes, device): (u32, u64, DeviceUuid),
        handle: DeviceHandle,
        fds: Vec<OwnedFd>,
        places: &Arc<Semaphore>,
    ) -> Result<Option<Import>, Refusal> {
        self.check_new(region)?;
        let lengths = match handle {
            DeviceHandle::Ipc { handle } => {
                if !fds.is_empty() {
                    return Err(invalid(format!(
                        "{} descriptors came with region {region}, which a handle names",
                        fds.len()
                    )));
                }
                self.gpu.check_room(region, bytes, 0)?;
                return Ok(Some(Import {
                    region,
                    bytes,
                    chunks: 0,
                    device,
                    handle: ShareHandle::Ipc(handle.0),
                    _permit: None,
                }));
            }
            DeviceHandle::Vmm { chunks } => chunks,
        };
        self.gpu.check_room(region, bytes, lengths.len())?;
        let sum = lengths
            .iter()
            .try_fold(0u64, |sum, length| sum.checked_add(*length));
        if sum != Some(bytes) || lengths.contains(&0) {
            return Err(invalid(format!(
                "the {} physical allocations of region {region} do not add up to its {bytes} bytes",
                lengths.len()
            )));
        }
        if let Some(other) = &self.gpu.awaited {
            return Err(invalid(format!(
                "region {} has still {} descriptors to come: send them first, or remove it",
                other.region,
                other.lengths.len() - other.fds.len()
            )));
        }
        // At most `MAX_REGION_CHUNKS`, as was checked.
        let permit = places.clone().try_acquire_many_owned(lengths.len() as u32);
        let permit = permit.map_err(|_| {
            limit(format!(
                "regions of other sessions are on their way in, and the daemon holds at most \
                 {MAX_AWAITED_CHUNKS} descriptors of physical allocations at a time: try again"
            ))
        })?;
        self.gpu.awaited = Some(Awaited {
            region,
            bytes,
            device,
            lengths,
            fds: Vec::new(),
            permit,
        });
        self.add_device_chunks(region, fds)
    }

    /// Takes descriptors of a region in; `None` while more have to come. After a refusal the region
    /// has to be shared from the start.
    pub(crate) fn add_device_chunks(
        &mut self,
        region: u32,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Import>, Refusal> {
        let awaited = self.gpu.awaited.take_if(|awaited| awaited.region == region);
        let Some(mut awaited) = awaited else {
            return Err(invalid(format!(
                "no descriptors are awaited for region {region}"
            )));
        };
        let missing = awaited.lengths.len() - awaited.fds.len();
        let due = missing.min(MAX_MESSAGE_CHUNKS);
        if fds.len() != due {
            return Err(invalid(format!(
                "{} descriptors came for region {region}, {due} were due: of {missing} that are \
                 missing, {MAX_MESSAGE_CHUNKS} come with each message",
                fds.len()
            )));
        }
        awaited.fds.extend(fds);
        if awaited.fds.len() < awaited.lengths.len() {
            self.gpu.awaited = Some(awaited);
            return Ok(None);
        }
        let Awaited {
            bytes,
            device,
            lengths,
            fds,
            permit,
            ..
        } = awaited;
        let chunks = lengths.len();
        let handle = ShareHandle::Vmm(fds.into_iter().zip(lengths).collect());
        Ok(Some(Import {
            region,
            bytes,
            chunks,
            device,
            handle,
            _permit: Some(permit),
        }))
    }

    /// Maps a region.
    pub(super) async fn import(
        &mut self,
        import: Import,
        devices: &Devices,
        peer: &Peer,
    ) -> Result<(), Refusal> {
        let Import {
            region,
            bytes,
            chunks,
            device,
            handle,
            ..
        } = import;
        let mapping = devices.clone();
        let mapped = blocking(move || mapping.import(device, bytes, handle)).await?;
        let mapped: Arc<DeviceRegion> = mapped.map_err(|error| self.refuse_device(&error, peer))?;
        self.gpu.sizes.insert(region, (bytes, chunks));
        self.regions
            .insert(region, Region::on_device(mapped, bytes));
        Ok(())
    }

    /// Opens the client's events of a device, behind those that it has shared before.
    pub(super) async fn add_events(
        &mut self,
        device: DeviceUuid,
        handles: Vec<IpcHandle>,
        devices: &Devices,
        peer: &Peer,
    ) -> Result<(), Refusal> {
        let known = self.gpu.events.get(&device).cloned();
        check_events(
            device,
            known.as_deref().map_or(0, DeviceEvents::len),
            handles.len(),
        )?;
        let handles: Vec<[u8; 64]> = handles.into_iter().map(|handle| handle.0).collect();
        let opening = devices.clone();
        let opened = blocking(move || match known {
            Some(known) => opening.append_events(&known, &handles).map(|()| known),
            None => opening.import_events(device, &handles),
        });
        let opened = opened
            .await?
            .map_err(|error| self.refuse_device(&error, peer))?;
        self.gpu.events.insert(device, opened);
        Ok(())
    }

    /// The client's events on the device that a registration lies on.
    ///
    /// # Errors
    /// `BadLayout` when it lies on several devices, or on one and in host memory.
    pub(crate) fn device_events(
        &self,
        spec: &RegisterSpec,
    ) -> Result<Option<Arc<DeviceEvents>>, Refusal> {
        let mut first: Option<(MemoryRef, Option<DeviceUuid>)> = None;
        let segments = spec.groups.iter().flat_map(|group| &group.segments);
        for memory in segments.map(|segment| segment.memory) {
            let device = match memory {
                MemoryRef::Region(region) => self.regions.get(&region).and_then(Region::device),
                MemoryRef::Process => None,
            };
            let (known, known_device) = *first.get_or_insert((memory, device));
            if device != known_device {
                let name = |memory, device| {
                    let place = match memory {
                        MemoryRef::Region(region) => format!("region {region}"),
                        MemoryRef::Process => "the process's memory".into(),
                    };
                    match device {
                        Some(device) => format!("{place} on GPU {device}"),
                        None => format!("{place} in host memory"),
                    }
                };
                let text = format!(
                    "one registration names {} and {}: its segments lie all on one GPU, or all in \
                     host memory",
                    name(known, known_device),
                    name(memory, device)
                );
                return Err(Refusal::new(Status::BadLayout, text));
            }
        }
        let device = first.and_then(|(_, device)| device);
        Ok(device.and_then(|device| self.gpu.events.get(&device).cloned()))
    }

    /// The regions of a device, which has failed: none of them can be used any more.
    pub(super) fn regions_on(&self, device: DeviceUuid) -> Vec<u32> {
        let all = self.regions.iter();
        let lost = all.filter(|(_, region)| region.device() == Some(device));
        lost.map(|(id, _)| *id).collect()
    }

    /// Forgets all that lies on a device that has failed; true if the session had anything there,
    /// or has asked for it.
    pub(super) fn lose_device(&mut self, device: DeviceUuid) -> bool {
        let lost = self.regions_on(device);
        for region in &lost {
            self.regions.remove(region);
            self.gpu.forget(*region);
        }
        let had_events = self.gpu.events.remove(&device).is_some();
        let awaited = self.gpu.awaited.take_if(|awaited| awaited.device == device);
        let had_any = !lost.is_empty() || had_events || awaited.is_some();
        if had_any {
            self.gpu.down.insert(device);
        }
        had_any
    }

    /// A device can be used again; true if the session waits for that.
    pub(super) fn regain_device(&mut self, device: DeviceUuid) -> bool {
        self.gpu.down.remove(&device)
    }

    fn refuse_device(&mut self, error: &DeviceError, peer: &Peer) -> Refusal {
        if let DeviceError::Down { device, .. } = error {
            self.gpu.down.insert(*device);
        }
        let mut text = error.to_string();
        let foreign = peer.foreign_namespaces();
        if matches!(error, DeviceError::Driver { .. }) && !foreign.is_empty() {
            let names = foreign.join(", ");
            text.push_str(&format!(
                "; the client runs in another namespace than the daemon ({names}): run both with \
                 --ipc=host --pid=host, or in one pod with shared namespaces"
            ));
        }
        let status = match error {
            DeviceError::TooLarge { .. }
            | DeviceError::WrongDevice { .. }
            | DeviceError::Empty { .. }
            | DeviceError::ChunkSizes { .. } => Status::InvalidArgument,
            _ => Status::DeviceUnavailable,
        };
        Refusal::new(status, text)
    }
}

fn check_events(device: DeviceUuid, known: usize, more: usize) -> Result<(), Refusal> {
    if more == 0 {
        return Err(invalid(format!(
            "no events came for GPU {device}: send some, or no message"
        )));
    }
    if more > MAX_DEVICE_EVENTS - known.min(MAX_DEVICE_EVENTS) {
        return Err(limit(format!(
            "{more} events on top of {known} for GPU {device}: a session shares at most \
             {MAX_DEVICE_EVENTS} of one device"
        )));
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    spawn_blocking(work).await.map_err(|error| {
        let text = format!("a thread for the GPU driver ended: {error}");
        Refusal::new(Status::Internal, text)
    })
}
