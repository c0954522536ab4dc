//! A context of the CUDA driver.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUevent, CUfunction, CUipcEventHandle, CUipcMemHandle,
    CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemLocation, CUmodule,
    CUstream,
};

use super::batch::{self, Batch};
use super::calls::{Calls, call, number};
use crate::device::driver::{
    BusCopy, ChunkError, Context, DevicePtr, Event, Kernel, KernelArgs, PinnedBuffer, Stream, Way,
};
use crate::device::error::DriverError;

/// Both kernels, compiled from `kernels/copy.cu`.
const KERNELS: &str = concat!(include_str!("../kernels/copy.ptx"), "\0");

/// The primary context of a device, with the kernels in it.
pub(super) struct CudaContext {
    calls: Arc<Calls>,
    batch: Option<Batch>,
    ordinal: u32,
    device: CUdevice,
    context: CUcontext,
    module: CUmodule,
    ended: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread to which the context is bound.
unsafe impl Send for CudaContext {}
// SAFETY: as above; the driver locks what its calls share.
unsafe impl Sync for CudaContext {}

impl CudaContext {
    /// Opens the primary context, loads the kernels, and tries what may not work.
    pub(super) fn open(calls: Arc<Calls>, ordinal: u32) -> Result<CudaContext, DriverError> {
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: both calls write one handle each.
        unsafe {
            call!(calls, cuDeviceGet(&mut device, ordinal as c_int))?;
            call!(calls, cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let mut opened = CudaContext {
            batch: calls.cuMemcpyBatchAsync.map(Batch::new),
            calls,
            ordinal,
            device,
            context,
            module: null_mut(),
            ended: AtomicBool::new(false),
        };
        opened.bind()?;
        let mut module = null_mut();
        // SAFETY: the text ends with a zero byte; the driver copies what it needs.
        unsafe {
            call!(
                opened.calls,
                cuModuleLoadData(&mut module, KERNELS.as_ptr().cast())
            )?;
        }
        opened.module = module;
        if opened.batch.is_some() && !batch::works(&opened)? {
            tracing::warn!(
                ordinal,
                "batched copies of this driver do not work: copies go one by one, which costs the \
                 daemon more CPU"
            );
            opened.batch = None;
        }
        Ok(opened)
    }

    /// Queues copies by one call.
    ///
    /// # Safety
    ///
    /// As for [`Context::copy`].
    pub(super) unsafe fn copy_batch(
        &self,
        way: Way,
        copies: &[BusCopy],
        stream: Stream,
    ) -> Result<(), DriverError> {
        let Some(batch) = &self.batch else {
            return Ok(());
        };
        // SAFETY: the caller's promise.
        let code = unsafe { batch.copy(way, copies, stream.0 as CUstream) };
        self.calls.check("cuMemcpyBatchAsync", code)
    }

    pub(super) fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
        // SAFETY: the caller allocated it and uses it no more.
        unsafe { call!(self.calls, cuMemFree_v2(at)) }
    }

    pub(super) fn free_pinned(&self, buffer: PinnedBuffer) -> Result<(), DriverError> {
        // SAFETY: the caller allocated it and uses it no more.
        unsafe { call!(self.calls, cuMemFreeHost(buffer.host.as_ptr().cast())) }
    }

    pub(super) fn destroy_stream(&self, stream: Stream) -> Result<(), DriverError> {
        // SAFETY: the caller made it and uses it no more.
        unsafe { call!(self.calls, cuStreamDestroy_v2(stream.0 as CUstream)) }
    }

    unsafe fn copy_one(
        &self,
        way: Way,
        copy: &BusCopy,
        stream: CUstream,
    ) -> Result<(), DriverError> {
        let host = copy.host as *mut c_void;
        // SAFETY: the caller of `copy` vouches for the ranges; the stream is one of this context.
        unsafe {
            match way {
                Way::ToHost => call!(
                    self.calls,
                    cuMemcpyDtoHAsync_v2(host, copy.device, copy.bytes, stream)
                ),
                Way::ToDevice => call!(
                    self.calls,
                    cuMemcpyHtoDAsync_v2(copy.device, host, copy.bytes, stream)
                ),
            }
        }
    }

    /// The location of this device's memory.
    fn location(&self) -> CUmemLocation {
        CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.device,
        }
    }

    /// Maps one imported allocation at `at`.
    fn map_chunk(&self, fd: &OwnedFd, at: DevicePtr, bytes: u64) -> Result<(), ChunkError> {
        let calls = &self.calls;
        let mut handle = 0;
        // SAFETY: the driver duplicates the descriptor, which lives through the call.
        unsafe {
            call!(
                calls,
                cuMemImportFromShareableHandle(
                    &mut handle,
                    fd.as_raw_fd() as usize as *mut c_void,
                    number::HANDLE_POSIX_DESCRIPTOR
                )
            )?;
        }
        let mapped = self.map_imported(handle, at, bytes);
        // SAFETY: the handle came from the import; a mapping keeps the memory without it.
        let released = unsafe { call!(calls, cuMemRelease(handle)) };
        mapped?;
        Ok(released?)
    }

    fn map_imported(
        &self,
        handle: CUmemGenericAllocationHandle,
        at: DevicePtr,
        bytes: u64,
    ) -> Result<(), ChunkError> {
        // Never made a value: its enumerations may hold numbers that the bindings do not know.
        let mut property = MaybeUninit::<CUmemAllocationProp>::zeroed();
        // SAFETY: writes one structure about a live handle, of which one plain number is read.
        let owner = unsafe {
            call!(
                self.calls,
                cuMemGetAllocationPropertiesFromHandle(property.as_mut_ptr(), handle)
            )?;
            (&raw const (*property.as_ptr()).location.id).read()
        };
        if owner != self.device {
            return Err(ChunkError::OtherDevice(owner.unsigned_abs()));
        }
        // SAFETY: `at..at + bytes` lies in a range reserved for it; the driver refuses sizes that
        // the allocation does not have.
        unsafe { call!(self.calls, cuMemMap(at, bytes as usize, 0, handle, 0))? };
        Ok(())
    }
}

impl Context for CudaContext {
    fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context was retained and not yet released.
        unsafe { call!(self.calls, cuCtxSetCurrent(self.context)) }
    }

    fn reset(&self) -> Result<(), DriverError> {
        self.ended.store(true, Ordering::Relaxed);
        // SAFETY: the caller lets go of every handle of the context.
        unsafe { call!(self.calls, cuDevicePrimaryCtxReset_v2(self.device)) }
    }

    fn memory(&self) -> Result<(u64, u64), DriverError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: writes two numbers.
        unsafe { call!(self.calls, cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free as u64, total as u64))
    }

    fn multiprocessors(&self) -> Result<u32, DriverError> {
        let mut count: c_int = 0;
        // SAFETY: writes one number.
        unsafe {
            call!(
                self.calls,
                cuDeviceGetAttribute(&mut count, number::ATTRIBUTE_MULTIPROCESSORS, self.device)
            )?;
        }
        Ok(count.unsigned_abs())
    }

    fn create_stream(&self) -> Result<Stream, DriverError> {
        let mut stream = null_mut();
        // SAFETY: writes one handle. Priorities out of range are clamped by the driver.
        unsafe {
            call!(
                self.calls,
                cuStreamCreateWithPriority(&mut stream, number::STREAM_NON_BLOCKING, -5)
            )?;
        }
        Ok(Stream(stream as usize))
    }

    fn create_event(&self) -> Result<Event, DriverError> {
        let mut event = null_mut();
        // SAFETY: writes one handle.
        unsafe {
            call!(
                self.calls,
                cuEventCreate(&mut event, number::EVENT_DISABLE_TIMING)
            )
        }?;
        Ok(Event(event as usize))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError> {
        // SAFETY: both handles are of this context.
        unsafe {
            call!(
                self.calls,
                cuEventRecord(event.0 as CUevent, stream.0 as CUstream)
            )
        }
    }

    fn is_done(&self, event: Event) -> Result<bool, DriverError> {
        // SAFETY: the handle is of this context.
        let code = unsafe { (self.calls.cuEventQuery)(event.0 as CUevent) };
        if code == number::NOT_READY {
            return Ok(false);
        }
        self.calls.check("cuEventQuery", code).map(|()| true)
    }

    fn destroy_event(&self, event: Event) -> Result<(), DriverError> {
        // SAFETY: the caller owns the handle and forgets it.
        unsafe { call!(self.calls, cuEventDestroy_v2(event.0 as CUevent)) }
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DriverError> {
        let mut at = 0;
        // SAFETY: writes one address.
        unsafe { call!(self.calls, cuMemAlloc_v2(&mut at, bytes as usize)) }?;
        Ok(at)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError> {
        let (mut host, mut device) = (null_mut(), 0);
        // SAFETY: both calls write one address; the second asks about what the first allocated.
        unsafe {
            let flags = number::HOST_ALLOC_PORTABLE_MAPPED;
            call!(self.calls, cuMemHostAlloc(&mut host, bytes, flags))?;
            call!(
                self.calls,
                cuMemHostGetDevicePointer_v2(&mut device, host, 0)
            )?;
        }
        let Some(host) = NonNull::new(host.cast()) else {
            return self
                .calls
                .check("cuMemHostAlloc", 2)
                .map(|()| unreachable!("2 is out of memory"));
        };
        Ok(PinnedBuffer { host, device })
    }

    unsafe fn pin(&self, host: NonNull<u8>, bytes: usize) -> Result<(), DriverError> {
        let host = host.as_ptr().cast();
        // SAFETY: the caller's promise.
        unsafe {
            let flags = number::HOST_REGISTER_PORTABLE;
            call!(self.calls, cuMemHostRegister_v2(host, bytes, flags))
        }
    }

    fn unpin(&self, host: NonNull<u8>) -> Result<(), DriverError> {
        // SAFETY: the driver refuses an address that was not registered.
        unsafe { call!(self.calls, cuMemHostUnregister(host.as_ptr().cast())) }
    }

    unsafe fn copy(&self, way: Way, copies: &[BusCopy], stream: Stream) -> Result<(), DriverError> {
        if copies.len() > 1
            && let Some(batch) = self.batch.as_ref().filter(|batch| batch.is_good())
        {
            // SAFETY: the caller's promise.
            match unsafe { self.copy_batch(way, copies, stream) } {
                Err(error) if !error.is_sticky() => {
                    // Copied again one by one: the same bytes to the same places.
                    batch.give_up();
                    let ordinal = self.ordinal;
                    tracing::warn!(ordinal, %error, "batched copies are given up on this GPU");
                }
                queued => return queued,
            }
        }
        let stream = stream.0 as CUstream;
        for copy in copies {
            // SAFETY: the caller's promise.
            unsafe { self.copy_one(way, copy, stream) }?;
        }
        Ok(())
    }

    fn kernel(&self, name: &'static CStr) -> Result<Kernel, DriverError> {
        let mut function = null_mut();
        // SAFETY: the module is loaded; writes one handle.
        unsafe {
            call!(
                self.calls,
                cuModuleGetFunction(&mut function, self.module, name.as_ptr())
            )?;
        }
        Ok(Kernel(function as usize))
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        (grid, block): (u32, u32),
        args: &KernelArgs,
        stream: Stream,
    ) -> Result<(), DriverError> {
        let mut args = *args;
        let mut pointers: [*mut c_void; 6] = [
            (&raw mut args.parts).cast(),
            (&raw mut args.part_count).cast(),
            (&raw mut args.blocks).cast(),
            (&raw mut args.pages).cast(),
            (&raw mut args.page_bytes).cast(),
            (&raw mut args.staging).cast(),
        ];
        // SAFETY: six arguments of the kernel's types in its order, copied by the driver before
        // the call returns; what the kernel touches is the caller's promise.
        unsafe {
            call!(
                self.calls,
                cuLaunchKernel(
                    kernel.0 as CUfunction,
                    grid,
                    1,
                    1,
                    block,
                    1,
                    1,
                    0,
                    stream.0 as CUstream,
                    pointers.as_mut_ptr(),
                    null_mut(),
                )
            )
        }
    }

    fn open_memory(&self, handle: &[u8; 64]) -> Result<DevicePtr, DriverError> {
        let handle = CUipcMemHandle {
            reserved: handle.map(|byte| byte as c_char),
        };
        let mut base = 0;
        // SAFETY: writes one address; the driver checks the handle.
        unsafe {
            call!(
                self.calls,
                cuIpcOpenMemHandle_v2(&mut base, handle, number::IPC_LAZY_PEER_ACCESS)
            )?;
        }
        Ok(base)
    }

    fn close_memory(&self, base: DevicePtr) -> Result<(), DriverError> {
        // SAFETY: the caller opened it and uses it no more.
        unsafe { call!(self.calls, cuIpcCloseMemHandle(base)) }
    }

    fn allocation_bytes(&self, base: DevicePtr) -> Result<u64, DriverError> {
        let (mut start, mut bytes) = (0, 0usize);
        // SAFETY: writes two numbers.
        unsafe {
            call!(
                self.calls,
                cuMemGetAddressRange_v2(&mut start, &mut bytes, base)
            )
        }?;
        Ok((start + bytes as u64).saturating_sub(base))
    }

    fn device_of(&self, base: DevicePtr) -> Result<u32, DriverError> {
        let mut ordinal: c_int = 0;
        // SAFETY: this attribute is one number.
        unsafe {
            call!(
                self.calls,
                cuPointerGetAttribute(
                    (&raw mut ordinal).cast(),
                    number::POINTER_DEVICE_ORDINAL,
                    base
                )
            )?;
        }
        Ok(ordinal.unsigned_abs())
    }

    fn map_chunks(&self, chunks: &[(OwnedFd, u64)]) -> Result<DevicePtr, ChunkError> {
        let total: u64 = chunks.iter().map(|(_, bytes)| bytes).sum();
        let mut base = 0;
        // SAFETY: writes one address of a range that is this mapping's alone.
        unsafe {
            call!(
                self.calls,
                cuMemAddressReserve(&mut base, total as usize, 0, 0, 0)
            )?;
        }
        let mut sizes = Vec::with_capacity(chunks.len());
        let mapped = (|| {
            let mut at = base;
            for (fd, bytes) in chunks {
                self.map_chunk(fd, at, *bytes)?;
                sizes.push(*bytes);
                at += bytes;
            }
            let access = CUmemAccessDesc {
                location: self.location(),
                flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            };
            // SAFETY: all of the range is mapped; the description lives through the call.
            unsafe { call!(self.calls, cuMemSetAccess(base, total as usize, &access, 1))? };
            Ok(base)
        })();
        if mapped.is_err() {
            // What was mapped is let go of; the first error is the one to tell.
            let undone = self.unmap_range(base, &sizes, total);
            if let Err(error) = undone {
                tracing::warn!(%error, "a range of GPU addresses is lost");
            }
        }
        mapped
    }

    fn unmap_chunks(&self, base: DevicePtr, chunks: &[u64]) -> Result<(), DriverError> {
        self.unmap_range(base, chunks, chunks.iter().sum())
    }

    fn open_event(&self, handle: &[u8; 64]) -> Result<Event, DriverError> {
        let handle = CUipcEventHandle {
            reserved: handle.map(|byte| byte as c_char),
        };
        let mut event = null_mut();
        // SAFETY: writes one handle; the driver checks the one it is given.
        unsafe { call!(self.calls, cuIpcOpenEventHandle(&mut event, handle)) }?;
        Ok(Event(event as usize))
    }
}

impl CudaContext {
    /// Unmaps the first chunks of a reserved range and gives the range back.
    fn unmap_range(&self, base: DevicePtr, chunks: &[u64], total: u64) -> Result<(), DriverError> {
        let mut at = base;
        let mut first = Ok(());
        for bytes in chunks {
            // SAFETY: exactly what `map_chunk` mapped; nothing uses it any more.
            let unmapped = unsafe { call!(self.calls, cuMemUnmap(at, *bytes as usize)) };
            first = first.and(unmapped);
            at += bytes;
        }
        // SAFETY: the range that `map_chunks` reserved, with nothing mapped in it.
        first.and(unsafe { call!(self.calls, cuMemAddressFree(base, total as usize)) })
    }
}

impl Drop for CudaContext {
    fn drop(&mut self) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: retained once by `open`.
        let released = unsafe { call!(self.calls, cuDevicePrimaryCtxRelease_v2(self.device)) };
        if let Err(error) = released {
            tracing::debug!(ordinal = self.ordinal, %error, "a context was not released");
        }
    }
}
