//! The pool's bytes as the copy threads get them.

use std::sync::Arc;

use super::PoolFile;
use crate::copy::PoolMemory;

/// Hands a pool file's mapping to the copy threads, which keep it mapped as long as they need it.
pub fn pool_memory(file: Arc<PoolFile>) -> PoolMemory {
    let (base, bytes, lock) = (file.base(), file.bytes(), file.lock_file());
    // SAFETY: `base .. base + bytes` is the file's writable mapping, which lives as long as the
    // `PoolFile` in the `Arc`; the daemon never truncates the file, and nothing makes references
    // into it.
    unsafe { PoolMemory::new(base, bytes, file) }.locked_by(lock)
}
