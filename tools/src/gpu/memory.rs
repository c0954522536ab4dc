//! Memory of a GPU, allocated whole or mapped from chunks, and pinned memory of the host.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

use cudarc::driver::sys;

use super::{GpuError, Stream, cu};

/// Chunks of mapped memory, as PyTorch's expandable segments have them.
const CHUNK: usize = 2 << 20;

/// Memory of the GPU that was the thread's; given back when dropped.
#[derive(Debug)]
pub struct DeviceMemory {
    address: u64,
    bytes: usize,
    chunks: Option<Vec<sys::CUmemGenericAllocationHandle>>,
}

impl DeviceMemory {
    /// One allocation.
    ///
    /// # Errors
    /// The GPU has not as much.
    pub fn allocate(bytes: usize) -> Result<DeviceMemory, GpuError> {
        let mut address = 0;
        // SAFETY: the place is writable.
        unsafe { cu!(cuMemAlloc_v2(&mut address, bytes))? };
        Ok(DeviceMemory {
            address,
            bytes,
            chunks: None,
        })
    }

    /// Chunks of 2 MiB, shareable, mapped one after the other on GPU `ordinal`.
    ///
    /// # Errors
    /// The GPU has not as much, or has no virtual memory management.
    pub fn map(ordinal: u32, bytes: usize) -> Result<DeviceMemory, GpuError> {
        let bytes = bytes.next_multiple_of(CHUNK);
        let mut address = 0;
        // SAFETY: the place is writable.
        unsafe { cu!(cuMemAddressReserve(&mut address, bytes, CHUNK, 0, 0))? };
        let mut memory = DeviceMemory {
            address,
            bytes,
            chunks: Some(Vec::new()),
        };
        // SAFETY: numbers and a null pointer, for which zeros are valid; the enumerations of which
        // zero is none are set below.
        let (mut wanted, mut access): (sys::CUmemAllocationProp, sys::CUmemAccessDesc) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        wanted.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        wanted.requestedHandleTypes =
            sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        wanted.location.id = ordinal as i32;
        access.location = wanted.location;
        access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        for at in (0..bytes).step_by(CHUNK) {
            let mut handle = 0;
            // SAFETY: the addresses were reserved above and nothing is mapped there yet.
            unsafe {
                cu!(cuMemCreate(&mut handle, CHUNK, &wanted, 0))?;
                memory.chunks.get_or_insert_default().push(handle);
                cu!(cuMemMap(address + at as u64, CHUNK, 0, handle, 0))?;
            }
        }
        // SAFETY: all of it is mapped.
        unsafe { cu!(cuMemSetAccess(address, bytes, &access, 1))? };
        Ok(memory)
    }

    /// Its address on the GPU.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn at(&self, offset: usize, bytes: usize) -> u64 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "inside the memory"
        );
        self.address + offset as u64
    }

    /// Copies in, and waits.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// The range does not lie inside.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), GpuError> {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range; the bytes are borrowed until the call returns.
        unsafe {
            cu!(cuMemcpyHtoD_v2(to, bytes.as_ptr().cast(), bytes.len()))?;
            // The driver returns once pageable bytes are in its own buffers. The way from there
            // ends in the order of the default stream, for which neither other streams that do not
            // block nor the copies of other processes wait.
            cu!(cuStreamSynchronize(null_mut()))
        }
    }

    /// Copies out, and waits.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// The range does not lie inside.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), GpuError> {
        let from = self.at(offset, out.len());
        // SAFETY: as above.
        unsafe { cu!(cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), from, out.len())) }
    }

    /// Fills all of it with one byte, and waits.
    ///
    /// # Errors
    /// The context is broken.
    pub fn fill(&self, byte: u8) -> Result<(), GpuError> {
        // SAFETY: exactly this memory.
        unsafe {
            cu!(cuMemsetD8_v2(self.address, byte, self.bytes))?;
            cu!(cuCtxSynchronize())
        }
    }

    /// Copies in from pinned memory, in the order of the stream.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// A range does not lie inside.
    pub fn write_from(
        &self,
        offset: usize,
        (from, from_offset): (&PinnedMemory, usize),
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        let (to, from) = (self.at(offset, bytes), from.at(from_offset, bytes));
        // SAFETY: both ranges were checked; dropping either memory waits for the GPU.
        unsafe { cu!(cuMemcpyHtoDAsync_v2(to, from, bytes, stream.raw())) }
    }

    /// Copies out to pinned memory, in the order of the stream.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// A range does not lie inside.
    pub fn read_to(
        &self,
        offset: usize,
        (to, to_offset): (&PinnedMemory, usize),
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        let (from, to) = (self.at(offset, bytes), to.at(to_offset, bytes));
        // SAFETY: as above.
        unsafe { cu!(cuMemcpyDtoHAsync_v2(to, from, bytes, stream.raw())) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what was allocated or mapped; errors are those of a broken context, with
        // which the memory goes.
        unsafe {
            let Some(chunks) = self.chunks.take() else {
                let _ = sys::cuMemFree_v2(self.address);
                return;
            };
            let _ = sys::cuCtxSynchronize();
            let mapped = chunks.len() * CHUNK;
            if mapped > 0 {
                let _ = sys::cuMemUnmap(self.address, mapped);
            }
            for handle in chunks {
                let _ = sys::cuMemRelease(handle);
            }
            let _ = sys::cuMemAddressFree(self.address, self.bytes);
        }
    }
}

/// Pinned memory of the host.
#[derive(Debug)]
pub struct PinnedMemory {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the process's memory, which any thread may use and give back.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Allocates it.
    ///
    /// # Errors
    /// The host has not as much.
    pub fn allocate(bytes: usize) -> Result<PinnedMemory, GpuError> {
        let mut start = null_mut();
        // SAFETY: the place is writable.
        unsafe { cu!(cuMemHostAlloc(&mut start, bytes, 0))? };
        match NonNull::new(start) {
            Some(start) => Ok(PinnedMemory { start, bytes }),
            None => Err(GpuError::Library("cuMemHostAlloc gave no memory".into())),
        }
    }

    pub(super) fn at(&self, offset: usize, bytes: usize) -> *mut c_void {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "inside the memory"
        );
        self.start.as_ptr().wrapping_byte_add(offset)
    }

    /// Copies in. Nothing may be copying from there.
    ///
    /// # Panics
    /// The range does not lie inside.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len()).cast::<u8>();
        // SAFETY: `at` has checked the range, which is no part of what is borrowed.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copies out. Nothing may be copying to there.
    ///
    /// # Panics
    /// The range does not lie inside.
    pub fn get(&self, offset: usize, out: &mut [u8]) {
        let from = self.at(offset, out.len()).cast::<u8>();
        // SAFETY: as above.
        unsafe { out.as_mut_ptr().copy_from_nonoverlapping(from, out.len()) };
    }

    /// Fills it with one byte. Nothing may be copying from it.
    pub fn fill(&mut self, byte: u8) {
        // SAFETY: exactly this memory, which `self` owns.
        unsafe { self.start.cast::<u8>().write_bytes(byte, self.bytes) };
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what was allocated; copies are waited for before.
        unsafe {
            let _ = sys::cuCtxSynchronize();
            let _ = sys::cuMemFreeHost(self.start.as_ptr());
        }
    }
}
