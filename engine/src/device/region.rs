//! An allocation of another process in a GPU's memory.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use pegaflow_shm::control::DeviceUuid;

use super::card::{Card, Leftover};
use super::driver::DevicePtr;

/// How a process shares an allocation.
#[derive(Debug)]
pub enum ShareHandle {
    /// A `CUipcMemHandle`: the whole allocation of `cuMemAlloc`.
    Ipc([u8; 64]),
    /// Descriptors of physical allocations of `cuMemCreate` with their sizes in bytes, in the
    /// order in which they are mapped one after the other.
    Vmm(Vec<(OwnedFd, u64)>),
}

/// What has to be undone when the region goes.
#[derive(Debug)]
pub(super) enum Mapping {
    Ipc,
    /// Sizes of the chunks in bytes.
    Vmm(Vec<u64>),
}

/// A client's allocation, mapped into the daemon's context of its device until the last handle is
/// dropped.
#[derive(Debug)]
pub struct DeviceRegion {
    card: Arc<Card>,
    /// The context in which it is mapped: it is void with that.
    generation: u64,
    base: DevicePtr,
    bytes: u64,
    mapping: Mapping,
}

impl DeviceRegion {
    pub(super) fn new(
        card: Arc<Card>,
        generation: u64,
        (base, bytes): (DevicePtr, u64),
        mapping: Mapping,
    ) -> Self {
        card.count_region(true);
        Self {
            card,
            generation,
            base,
            bytes,
            mapping,
        }
    }

    /// The device on which it lies.
    pub fn device(&self) -> DeviceUuid {
        self.card.info().uuid
    }

    /// Bytes of the allocation.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn card(&self) -> &Arc<Card> {
        &self.card
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Address of byte 0 in the daemon's context.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for DeviceRegion {
    fn drop(&mut self) {
        self.card.count_region(false);
        let mapping = std::mem::replace(&mut self.mapping, Mapping::Ipc);
        self.card.leave(
            self.generation,
            Leftover::Memory {
                base: self.base,
                mapping,
            },
        );
    }
}
