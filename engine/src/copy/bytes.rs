//! Copying bytes that another process may be writing.

use std::hint::black_box;

/// The C library's `memcpy`, called through a pointer.
type Memcpy =
    unsafe extern "C" fn(*mut libc::c_void, *const libc::c_void, libc::size_t) -> *mut libc::c_void;

/// Copies between mappings whose bytes other processes may change at any moment.
#[derive(Debug, Clone, Copy)]
pub struct ByteCopier {
    memcpy: Memcpy,
}

impl ByteCopier {
    /// Picks the fastest copy for this machine.
    pub fn new() -> Self {
        Self {
            memcpy: black_box(libc::memcpy as Memcpy),
        }
    }

    /// Copies `bytes` bytes.
    ///
    /// # Safety
    ///
    /// Both ranges are mapped for as long as the call runs, `to` writable, and do not overlap.
    #[inline]
    pub unsafe fn copy(&self, from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise is memcpy's.
        unsafe { (self.memcpy)(to.cast(), from.cast(), bytes) };
    }
}

impl Default for ByteCopier {
    fn default() -> Self {
        Self::new()
    }
}
