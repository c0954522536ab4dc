//! The two ends of a copy: the pool and the engine's memory.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use super::process::ProcessMemory;
use super::region::RegionMapping;
use crate::device::DeviceRegion;

/// Memory of an engine that the daemon can copy from and to.
#[derive(Debug, Clone)]
pub enum ClientMemory {
    /// A memfd that the daemon has mapped as well.
    Region(Arc<RegionMapping>),
    /// The engine's own address space, reached by system calls.
    Process(Arc<ProcessMemory>),
    /// An allocation in a GPU's memory.
    Device(Arc<DeviceRegion>),
}

/// The pool's bytes as the copy threads see them.
#[derive(Clone)]
pub struct PoolMemory {
    base: NonNull<u8>,
    bytes: u64,
    lock: Option<Arc<File>>,
    /// It was asked for in huge pages.
    wants_huge_pages: bool,
    _keep_alive: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is to memory shared between processes, touched only through raw copies; who
// may touch which page when is the lane's business and not this handle's.
unsafe impl Send for PoolMemory {}
// SAFETY: as above; the handle itself never changes.
unsafe impl Sync for PoolMemory {}

impl PoolMemory {
    /// Names `bytes` bytes at `base` as the pool.
    ///
    /// # Safety
    ///
    /// `base .. base + bytes` is mapped readable and writable, cannot be truncated, and stays so as
    /// long as `keep_alive` lives. No Rust reference points into it.
    pub unsafe fn new(
        base: NonNull<u8>,
        bytes: u64,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            base,
            bytes,
            lock: None,
            wants_huge_pages: false,
            _keep_alive: keep_alive,
        }
    }

    /// Says that the memory was asked for in huge pages, or not.
    #[must_use]
    pub fn in_huge_pages(mut self, wanted: bool) -> PoolMemory {
        self.wants_huge_pages = wanted;
        self
    }

    /// Names the file whose lock says that the memory is in use, for those who may still use it
    /// when this process is gone.
    #[must_use]
    pub fn locked_by(mut self, file: Arc<File>) -> Self {
        self.lock = Some(file);
        self
    }

    /// The pool's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of byte 0.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The same memory for the SSD tier.
    pub fn for_ssd(&self) -> pegaflow_ssd::PoolMemory {
        let keep_alive = Arc::new(self.clone());
        // SAFETY: `new` demands of this handle what is demanded here, and the handle itself is
        // what is kept alive.
        let memory = unsafe { pegaflow_ssd::PoolMemory::new(self.base, self.bytes, keep_alive) };
        let memory = memory.mostly_in_huge_pages(self.wants_huge_pages);
        match &self.lock {
            Some(lock) => memory.locked_by(lock.clone()),
            None => memory,
        }
    }
}

impl fmt::Debug for PoolMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolMemory")
            .field("base", &self.base)
            .field("bytes", &self.bytes)
            .finish()
    }
}
