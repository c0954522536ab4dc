//! The pool's bytes, as the shards' threads read and write them.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// The memory that pages lie in. Drives read and write it directly.
#[derive(Clone)]
pub struct PoolMemory {
    base: NonNull<u8>,
    bytes: u64,
    _keep_alive: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is to memory touched only through raw copies and by the kernel; who may touch
// which page when is the owner's business (see `Tier::write` and `Tier::read`), not this handle's.
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
            _keep_alive: keep_alive,
        }
    }

    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of byte 0.
    pub fn base(&self) -> NonNull<u8> {
        self.base
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
