//! The KV memory of one session: shared regions and the process's own address space.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bytesize::ByteSize;
use pegaflow_shm::control::{DeviceUuid, MemoryRef};
use pegaflow_shm::status::Status;
use tokio::task::spawn_blocking;

use super::gpu::Gpu;
use super::peer::Peer;
use crate::copy::{ClientMemory, MemoryError, ProcessMemory, RegionMapping};
use crate::device::DeviceRegion;
use crate::lane::api::Refusal;

/// Most regions of one session.
pub const MAX_REGIONS: usize = 256;
/// Most bytes of one session's regions; all sessions together then fit the address space.
pub const MAX_REGION_BYTES: u64 = 256 << 30;

/// What a session calls by one number.
pub(super) struct Region {
    mapping: Backing,
    bytes: u64,
    /// Registrations that use it.
    pub(super) users: usize,
}

enum Backing {
    Memfd(Arc<RegionMapping>),
    Device(Arc<DeviceRegion>),
}

impl Region {
    pub(super) fn on_device(region: Arc<DeviceRegion>, bytes: u64) -> Region {
        let mapping = Backing::Device(region);
        Region {
            mapping,
            bytes,
            users: 0,
        }
    }

    /// The GPU that it lies on, if on any.
    pub(super) fn device(&self) -> Option<DeviceUuid> {
        match &self.mapping {
            Backing::Memfd(_) => None,
            Backing::Device(region) => Some(region.device()),
        }
    }
}

/// What a session may copy from and to.
#[derive(Default)]
pub(crate) struct Memory {
    pub(super) regions: HashMap<u32, Region>,
    /// Bytes of the memfds.
    bytes: u64,
    process: Option<Arc<ProcessMemory>>,
    /// Regions of device memory, and the events on devices.
    pub(super) gpu: Gpu,
}

impl Memory {
    /// Maps a region.
    pub(crate) fn add(&mut self, region: u32, bytes: u64, fds: &[OwnedFd]) -> Result<(), Refusal> {
        let [fd] = fds else {
            let text = format!(
                "{} descriptors came with region {region}: send its memfd",
                fds.len()
            );
            return Err(Refusal::new(Status::InvalidArgument, text));
        };
        self.check_new(region)?;
        if self.regions.len() - self.gpu.regions() >= MAX_REGIONS {
            let text = format!("the session has {MAX_REGIONS} regions, no more fit: remove some");
            return Err(Refusal::new(Status::Limit, text));
        }
        if bytes > MAX_REGION_BYTES - self.bytes {
            let text = format!(
                "region {region} of {bytes} bytes on top of {} exceeds the {} of one session: use \
                 fewer, or plain process memory",
                self.bytes,
                ByteSize(MAX_REGION_BYTES)
            );
            return Err(Refusal::new(Status::Limit, text));
        }
        let mapping = RegionMapping::map(fd.as_fd(), bytes).map_err(refuse_memory)?;
        self.bytes += bytes;
        let added = Region {
            mapping: Backing::Memfd(mapping),
            bytes,
            users: 0,
        };
        self.regions.insert(region, added);
        Ok(())
    }

    /// Refuses a number that is taken.
    pub(super) fn check_new(&self, region: u32) -> Result<(), Refusal> {
        if self.regions.contains_key(&region) || self.gpu.awaits(region) {
            let text =
                format!("region {region} exists already: remove it first, or choose another id");
            return Err(Refusal::new(Status::InvalidArgument, text));
        }
        Ok(())
    }

    /// Takes a region back.
    pub(crate) fn remove(&mut self, region: u32) -> Result<(), Refusal> {
        if self.gpu.stop_awaiting(region) {
            return Ok(());
        }
        let Some(found) = self.regions.get(&region) else {
            let text = format!("there is no region {region} in this session");
            return Err(Refusal::new(Status::InvalidArgument, text));
        };
        if found.users > 0 {
            let text = format!(
                "region {region} is used by {} registrations: unregister them first",
                found.users
            );
            return Err(Refusal::new(Status::InvalidArgument, text));
        }
        match found.mapping {
            Backing::Memfd(_) => self.bytes -= found.bytes,
            Backing::Device(_) => self.gpu.forget(region),
        }
        self.regions.remove(&region);
        Ok(())
    }

    /// Size of a region in bytes.
    pub(crate) fn region_bytes(&self, region: u32) -> Option<u64> {
        self.regions.get(&region).map(|found| found.bytes)
    }

    /// Counts a registration that uses these regions in (or out).
    pub(crate) fn count_user(&mut self, regions: &[u32], joins: bool) {
        for region in regions {
            if let Some(found) = self.regions.get_mut(region) {
                found.users = if joins {
                    found.users + 1
                } else {
                    found.users.saturating_sub(1)
                };
            }
        }
    }

    /// The memory that a layout names, if the session has it.
    pub(crate) fn resolve(&self, memory: MemoryRef) -> Option<ClientMemory> {
        match memory {
            MemoryRef::Region(region) => {
                let found = self.regions.get(&region)?;
                Some(match &found.mapping {
                    Backing::Memfd(mapping) => ClientMemory::Region(mapping.clone()),
                    Backing::Device(region) => ClientMemory::Device(region.clone()),
                })
            }
            MemoryRef::Process => self.process.clone().map(ClientMemory::Process),
        }
    }

    /// Takes hold of the process's own memory, once. On a thread of its own: the kernel takes locks
    /// for it that the process may be holding for as long as it likes.
    pub(super) async fn open_process(&mut self, peer: &Peer) -> Result<(), Refusal> {
        if self.process.is_some() {
            return Ok(());
        }
        let pidfd = peer.pidfd.try_clone().map_err(|error| {
            let text = format!("the daemon has no descriptor left: {error}");
            Refusal::new(Status::SystemError, text)
        })?;
        let (pid, uid) = (peer.pid, peer.uid);
        let opened = spawn_blocking(move || ProcessMemory::open(pid, pidfd, uid)).await;
        let opened = opened.map_err(|error| {
            let text = format!("opening the memory of process {pid}: {error}");
            Refusal::new(Status::Internal, text)
        })?;
        self.hold_process(opened.map_err(refuse_memory)?);
        Ok(())
    }

    /// Takes an opened process's memory in.
    pub(crate) fn hold_process(&mut self, process: ProcessMemory) {
        self.process = Some(Arc::new(process));
    }
}

fn refuse_memory(error: MemoryError) -> Refusal {
    let status = match error {
        MemoryError::NotPermitted { .. } | MemoryError::OtherOwner { .. } => {
            Status::PermissionDenied
        }
        MemoryError::Region { .. } | MemoryError::Process { .. } => Status::SystemError,
        MemoryError::OwnerGone { .. } => Status::Disconnected,
        _ => Status::InvalidArgument,
    };
    Refusal::new(status, error.to_string())
}
