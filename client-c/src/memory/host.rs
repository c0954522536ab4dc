//! Host memory that the daemon maps too: copies to and from it need no system call.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use pegaflow_shm::mapping::{Mapping, create_kv_region};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use crate::Error;
use crate::client::Shared;

/// A shared region; it lives until both its [`HostMemory`] and every registration that uses it are
/// gone, since the daemon copies into it until then.
#[derive(Debug)]
pub(crate) struct HostRegion {
    pub(crate) id: u32,
    pub(crate) fd: OwnedFd,
    pub(crate) mapping: Mapping,
    owner: Weak<Shared>,
}

impl HostRegion {
    pub(crate) fn create(id: u32, bytes: usize, owner: Weak<Shared>) -> Result<HostRegion, Error> {
        let (fd, mapping) = create_kv_region("pegaflow-kv", bytes as u64)?;
        populate(&mapping)?;
        Ok(HostRegion {
            id,
            fd,
            mapping,
            owner,
        })
    }

    /// First address.
    pub(crate) fn base(&self) -> usize {
        self.address().addr()
    }

    fn address(&self) -> *mut u8 {
        // Offset 0 lies in every mapping.
        self.mapping.ptr_at(0, 0).unwrap_or(std::ptr::null_mut())
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.mapping.len()
    }
}

impl Drop for HostRegion {
    fn drop(&mut self) {
        if let Some(owner) = self.owner.upgrade() {
            owner.forget_region(self.id);
        }
    }
}

/// Makes the page tables now, so that the engine's first touches cost no faults.
fn populate(mapping: &Mapping) -> Result<(), Error> {
    let base = mapping.ptr_at(0, mapping.len())?;
    // SAFETY: the range is this mapping, all of it; populating changes no byte.
    let done = unsafe { madvise(base.cast(), mapping.len(), Advice::LinuxPopulateWrite) };
    match done {
        // Kernels before 5.14 do not know it: then the first touches cost faults.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::system("madvise(MADV_POPULATE_WRITE)", errno)),
    }
}

/// KV memory allocated by [`Client::alloc_host`](crate::Client::alloc_host). The daemon writes it
/// while a load runs and reads it while a save runs, so it is reached by address or by copies,
/// never as a slice.
#[derive(Clone, Debug)]
pub struct HostMemory {
    pub(crate) region: Arc<HostRegion>,
}

impl HostMemory {
    /// First address; page-aligned. Valid until the last clone of this and the last registration
    /// over it are gone.
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.address()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.region.bytes()
    }

    /// Never true: there is no region of 0 bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies `out.len()` bytes from byte `offset` on.
    ///
    /// # Errors
    /// The range lies outside the region.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        Ok(self.region.mapping.copy_out(offset, out)?)
    }

    /// Copies `bytes` to byte `offset` on.
    ///
    /// # Errors
    /// The range lies outside the region.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.region.mapping.copy_in(offset, bytes)?)
    }
}
