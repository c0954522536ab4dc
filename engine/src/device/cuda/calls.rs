//! The table of the driver's calls, looked up by name in the library.
//!
//! Types come from `cudarc`; the calls answer with plain numbers, because a newer driver may answer
//! with one that the bindings' enumeration does not have.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcEventHandle, CUipcMemHandle,
    CUmemAccessDesc, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemcpyAttributes,
    CUmodule, CUstream, CUuuid,
};

use super::NoDriver;
use crate::device::error::DriverError;

/// Declares the table of calls: a field for each, filled from the library by its name.
macro_rules! calls {
    ($($name:ident($($argument:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the driver's names")]
        pub(super) struct Calls {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            pub(super) cuMemcpyBatchAsync: Option<BatchCall>,
        }

        impl Calls {
            /// Looks all calls up in the library, which is there.
            pub(super) fn load() -> Result<Calls, NoDriver> {
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
pub(super) type BatchCall = unsafe extern "C" fn(
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
    cuMemFree_v2(CUdeviceptr);
    cuMemFreeHost(*mut c_void);
    cuStreamDestroy_v2(CUstream);
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
pub(super) mod number {
    use std::ffi::{c_int, c_uint};

    pub(in crate::device::cuda) const SUCCESS: c_int = 0;
    pub(in crate::device::cuda) const NOT_READY: c_int = 600;
    pub(in crate::device::cuda) const ATTRIBUTE_MULTIPROCESSORS: c_uint = 16;
    pub(in crate::device::cuda) const STREAM_NON_BLOCKING: c_uint = 1;
    pub(in crate::device::cuda) const EVENT_DISABLE_TIMING: c_uint = 2;
    pub(in crate::device::cuda) const HOST_ALLOC_PORTABLE_MAPPED: c_uint = 1 | 2;
    pub(in crate::device::cuda) const HOST_REGISTER_PORTABLE: c_uint = 1;
    pub(in crate::device::cuda) const IPC_LAZY_PEER_ACCESS: c_uint = 1;
    pub(in crate::device::cuda) const POINTER_DEVICE_ORDINAL: c_uint = 9;
    pub(in crate::device::cuda) const HANDLE_POSIX_DESCRIPTOR: c_uint = 1;
}

/// Runs one driver call and names it in the error.
macro_rules! call {
    ($calls:expr, $name:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: see the block that uses it.
        $calls.check(stringify!($name), ($calls.$name)($($argument),*))
    };
}

impl Calls {
    pub(super) fn check(&self, call: &'static str, code: c_int) -> Result<(), DriverError> {
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

pub(super) use call;
