//! Questions to the kernel and the dynamic linker that no safe wrapper asks.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Bytes of `struct io_uring_params` (120), with room for what later kernels may add.
const IO_URING_PARAMS_BYTES: usize = 256;

/// Sets up a small io_uring and gives it back.
pub fn io_uring_setup() -> io::Result<()> {
    let mut params = [0_u64; IO_URING_PARAMS_BYTES / 8];
    // SAFETY: the kernel reads and writes `struct io_uring_params` of 120 bytes at the pointer,
    // which leads to 256 zeroed, 8-byte aligned bytes of our own.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4 as c_uint, params.as_mut_ptr()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded and gave this descriptor to nobody else.
    drop(unsafe { OwnedFd::from_raw_fd(fd as c_int) });
    Ok(())
}

/// What the CUDA driver says.
pub enum Cuda {
    /// There is no driver library.
    NoDriver,
    /// The library lacks a function or one failed; the number is a `CUresult`, 0 for a missing
    /// function.
    Broken(&'static str, i32),
    /// It works.
    Devices {
        /// Devices this process can see.
        count: i32,
        /// Version of the driver interface, such as 13000.
        version: i32,
    },
}

/// Loads `libcuda.so.1` and counts devices. The library stays loaded: it does not survive being
/// unloaded.
pub fn cuda() -> Cuda {
    // SAFETY: the name is NUL-terminated. Loading runs the library's constructors, which is what a
    // process that uses CUDA does as well.
    let library =
        unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Cuda::NoDriver;
    }
    let (mut count, mut version) = (0, 0);
    let init = symbol(library, c"cuInit");
    let get_version = symbol(library, c"cuDriverGetVersion");
    let get_count = symbol(library, c"cuDeviceGetCount");
    let (Some(init), Some(get_version), Some(get_count)) = (init, get_version, get_count) else {
        return Cuda::Broken("a function is missing", 0);
    };
    // SAFETY: the three functions have had these signatures since CUDA 1: `CUresult cuInit(unsigned
    // int)` and `CUresult cuDriverGetVersion(int *)`, `CUresult cuDeviceGetCount(int *)`; the
    // pointers lead to our integers.
    let (init, get_version, get_count) = unsafe {
        (
            std::mem::transmute::<*mut c_void, extern "C" fn(c_uint) -> c_int>(init),
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_int) -> c_int>(get_version),
            std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_int) -> c_int>(get_count),
        )
    };
    let calls = [
        ("cuInit", init(0)),
        ("cuDriverGetVersion", get_version(&raw mut version)),
    ];
    for (name, result) in calls {
        if result != 0 {
            return Cuda::Broken(name, result);
        }
    }
    match get_count(&raw mut count) {
        0 => Cuda::Devices { count, version },
        result => Cuda::Broken("cuDeviceGetCount", result),
    }
}

fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `library` is a live handle of `dlopen` and the name is NUL-terminated.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}
