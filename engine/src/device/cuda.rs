//! The CUDA driver, loaded when the daemon starts.
//!
//! Types come from `cudarc`; the calls are looked up here and answer with plain numbers, because a
//! newer driver may answer with one that the bindings' enumeration does not have.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcEventHandle, CUipcMemHandle,
    CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemLocation,
    CUmemcpyAttributes, CUmodule, CUstream, CUuuid,
};
use pegaflow_shm::control::DeviceUuid;

use super::driver::{
    BusCopy, ChunkError, Context, DevicePtr, Driver, Event, Kernel, KernelArgs, PinnedBuffer,
    Stream, Way,
};
use super::error::DriverError;
use super::info::{DeviceInfo, numa_node};

/// The oldest driver interface that serves: 12.0, of driver 525.
const OLDEST: u32 = 12_000;
/// Both kernels, compiled from `kernels/copy.cu`.
const KERNELS: &str = concat!(include_str!("kernels/copy.ptx"), "\0");

/// Declares the table of calls: a field for each, filled from the library by its name.
macro_rules! calls {
    ($($name:ident($($argument:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the driver's names")]
        struct Calls {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            cuMemcpyBatchAsync: Option<BatchCall>,
        }

        impl Calls {
            /// Looks all calls up in the library, which is there.
            fn load() -> Result<Calls, NoDriver> {
                // SAFETY: the caller found the library, which stays loaded from here on; each type
                // is that of cuda.h for the name.
                unsafe {
                    let library = sys::culib();
                    Ok(Calls {
                        $($name: *library
                            .get(concat!(stringify!($name), "\0").as_bytes())
                            .map_err(|_| NoDriver::MissingCall(stringify!($name)))?,)*
                        cuMemcpyBatchAsync: library
                            .get(b"cuMemcpyBatchAsync\0")
                            .ok()
                            .map(|symbol| *symbol),
                    })
                }
            }
        }
    };
}

/// `cuMemcpyBatchAsync` as of CUDA 12.8; CUDA 13 keeps it under this name.
type BatchCall = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> c_int;

calls! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(c_int, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, CUdevice);
    cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
    cuDeviceGetPCIBusId(*mut c_char, c_int, CUdevice);
    cuDeviceTotalMem_v2(*mut usize, CUdevice);
    cuDeviceGetAttribute(*mut c_int, c_uint, CUdevice);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuDevicePrimaryCtxRelease_v2(CUdevice);
    cuDevicePrimaryCtxReset_v2(CUdevice);
    cuCtxSetCurrent(CUcontext);
    cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventRecord(CUevent, CUstream);
    cuEventQuery(CUevent);
    cuEventDestroy_v2(CUevent);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut CUdeviceptr, usize);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemHostGetDevicePointer_v2(*mut CUdeviceptr, *mut c_void, c_uint);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuModuleLoadData(*mut CUmodule, *const c_void);
    cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    cuLaunchKernel(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
        *mut *mut c_void, *mut *mut c_void
    );
    cuIpcOpenMemHandle_v2(*mut CUdeviceptr, CUipcMemHandle, c_uint);
    cuIpcCloseMemHandle(CUdeviceptr);
    cuIpcOpenEventHandle(*mut CUevent, CUipcEventHandle);
    cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
    cuPointerGetAttribute(*mut c_void, c_uint, CUdeviceptr);
    cuMemImportFromShareableHandle(*mut CUmemGenericAllocationHandle, *mut c_void, c_uint);
    cuMemGetAllocationPropertiesFromHandle(*mut CUmemAllocationProp, CUmemGenericAllocationHandle);
    cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
    cuMemAddressFree(CUdeviceptr, usize);
    cuMemMap(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
    cuMemUnmap(CUdeviceptr, usize);
    cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
    cuMemRelease(CUmemGenericAllocationHandle);
}

/// Numbers of cuda.h.
mod number {
    use std::ffi::{c_int, c_uint};

    pub(super) const SUCCESS: c_int = 0;
    pub(super) const NOT_READY: c_int = 600;
    pub(super) const ATTRIBUTE_MULTIPROCESSORS: c_uint = 16;
    pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
    pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
    pub(super) const HOST_ALLOC_PORTABLE_MAPPED: c_uint = 1 | 2;
    pub(super) const HOST_REGISTER_PORTABLE: c_uint = 1;
    pub(super) const IPC_LAZY_PEER_ACCESS: c_uint = 1;
    pub(super) const POINTER_DEVICE_ORDINAL: c_uint = 9;
    pub(super) const HANDLE_POSIX_DESCRIPTOR: c_uint = 1;
}

/// Runs one driver call and names it in the error.
macro_rules! call {
    ($calls:expr, $name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: see the block that uses it.
        $calls.check(stringify!($name), ($calls.$name)($($argument),*))
    };
}

/// Why no driver is used.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoDriver {
    #[error(
        "libcuda.so.1 is not there: install the NVIDIA driver, or start the container with its \
         GPUs (--gpus all)"
    )]
    Library,
    #[error("libcuda.so.1 has no {0}: install driver 525 or newer")]
    MissingCall(&'static str),
    #[error("the driver serves CUDA {}: install driver 525 (CUDA 12.0) or newer", version_text(*.0))]
    TooOld(u32),
    #[error("{0}: `nvidia-smi` must work for this user; in a container, see --gpus")]
    Refused(DriverError),
}

/// The loaded library.
pub(super) struct Cuda {
    calls: Arc<Calls>,
    version: u32,
}

impl Cuda {
    /// Loads and initialises the driver; the reason and the way out where that fails.
    pub(super) fn load() -> Result<Cuda, NoDriver> {
        // SAFETY: loading the library runs its initialisers, which is what was asked for.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDriver::Library);
        }
        let calls = Calls::load()?;
        let mut version: c_int = 0;
        // SAFETY: writes one number; needs no initialisation.
        unsafe { call!(calls, cuDriverGetVersion(&mut version)) }.map_err(NoDriver::Refused)?;
        let version = version.unsigned_abs();
        if version < OLDEST {
            return Err(NoDriver::TooOld(version));
        }
        // SAFETY: takes no argument but flags, which are zero.
        unsafe { call!(calls, cuInit(0)) }.map_err(NoDriver::Refused)?;
        let calls = Arc::new(calls);
        Ok(Cuda { calls, version })
    }

    fn device_info(&self, ordinal: u32) -> Result<DeviceInfo, DriverError> {
        let calls = &self.calls;
        let mut device: CUdevice = 0;
        let (mut name, mut bus) = ([0 as c_char; 256], [0 as c_char; 32]);
        let mut uuid = CUuuid { bytes: [0; 16] };
        let mut memory = 0usize;
        // SAFETY: every pointer is to a local of the size that is given along or that cuda.h says.
        unsafe {
            call!(calls, cuDeviceGet(&mut device, ordinal as c_int))?;
            call!(calls, cuDeviceGetName(name.as_mut_ptr(), 255, device))?;
            call!(calls, cuDeviceGetUuid_v2(&mut uuid, device))?;
            call!(calls, cuDeviceGetPCIBusId(bus.as_mut_ptr(), 31, device))?;
            call!(calls, cuDeviceTotalMem_v2(&mut memory, device))?;
        }
        let pci_bus_id = text(&bus).to_ascii_lowercase();
        Ok(DeviceInfo {
            uuid: DeviceUuid(uuid.bytes.map(|byte| byte as u8)),
            name: text(&name),
            ordinal,
            numa_node: numa_node(Path::new("/sys"), &pci_bus_id),
            pci_bus_id,
            memory_bytes: memory as u64,
        })
    }
}

/// CUDA's number for a version in words.
pub(super) fn version_text(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}

impl Calls {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
        if code == number::SUCCESS {
            return Ok(());
        }
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: writes a pointer to a text of the library's own, which stays loaded.
        let named = unsafe { (self.cuGetErrorName)(code, &mut name) };
        let name = if named == number::SUCCESS && !name.is_null() {
            // SAFETY: as above; the text ends with a zero byte and never changes.
            unsafe { CStr::from_ptr::<'static>(name) }
                .to_str()
                .unwrap_or("an error")
        } else {
            "an error without name"
        };
        Err(DriverError { call, code, name })
    }
}

impl Driver for Cuda {
    fn version(&self) -> u32 {
        self.version
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>, DriverError> {
        let mut count: c_int = 0;
        // SAFETY: writes one number.
        unsafe { call!(self.calls, cuDeviceGetCount(&mut count)) }?;
        (0..count.unsigned_abs())
            .map(|ordinal| self.device_info(ordinal))
            .collect()
    }

    fn open(&self, ordinal: u32) -> Result<Arc<dyn Context>, DriverError> {
        let calls = self.calls.clone();
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: both calls write one handle each.
        unsafe {
            call!(calls, cuDeviceGet(&mut device, ordinal as c_int))?;
            call!(calls, cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let mut opened = CudaContext {
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
            )
        }?;
        opened.module = module;
        Ok(Arc::new(opened))
    }
}

/// The primary context of a device, with the kernels in it.
struct CudaContext {
    calls: Arc<Calls>,
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
