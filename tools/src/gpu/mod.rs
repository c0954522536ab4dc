//! GPUs of this process, as an engine uses them: memory, streams, events. Only the CUDA driver is
//! needed, and it is loaded when the first GPU is opened.

mod blas;
mod copies;
mod fault;
mod memory;
mod stream;

use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUresult};

pub use blas::{Blas, Matrix};
pub use copies::{Direction, Pair, Rows};
pub use fault::store_to_an_illegal_address;
pub use memory::{DeviceMemory, PinnedMemory};
pub use stream::{Event, Gate, Stream};

/// What keeps a GPU from being used.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// There is no driver library.
    #[error(
        "no GPU here: libcuda.so.1 is not found. It comes with NVIDIA's driver; in a container, \
         start it with GPUs (docker run --gpus all)"
    )]
    NoDriver,
    /// There is a driver, and fewer GPUs than wanted.
    #[error(
        "GPU {ordinal} is wanted and the driver shows {count}: see nvidia-smi, and \
         CUDA_VISIBLE_DEVICES of this process"
    )]
    NoDevice {
        /// The one that is wanted.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// A library for the computing part of a bench.
    #[error("{0}")]
    Library(String),
    /// A call of the driver.
    #[error("{call}: {name}")]
    Call {
        /// The function.
        call: &'static str,
        /// The driver's name for what went wrong.
        name: String,
    },
}

/// Calls the driver, and turns what it answers into a `Result`.
macro_rules! cu {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::gpu::check(stringify!($function), sys::$function($($argument),*))
    };
}
use cu;

fn check(call: &'static str, result: CUresult) -> Result<(), GpuError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the place is writable; the driver answers with text of its own or null.
    let name = unsafe {
        if sys::cuGetErrorName(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            format!("error {}", result as u32)
        }
    };
    Err(GpuError::Call { call, name })
}

/// A GPU with its primary context, which is given back when this is dropped.
#[derive(Debug)]
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a context may be made current in any thread, which `bind` does.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver's calls may be made by several threads.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// How many GPUs this process sees.
    ///
    /// # Errors
    /// There is no driver, or it does not start.
    pub fn count() -> Result<u32, GpuError> {
        // SAFETY: loads a library by its name; its initialisers are the driver's.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        let mut count = 0;
        // SAFETY: the place is writable.
        unsafe {
            match sys::cuInit(0) {
                CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
                result => check("cuInit", result)?,
            }
            cu!(cuDeviceGetCount(&mut count))?;
        }
        Ok(count.unsigned_abs())
    }

    /// Opens the GPU with this number in this process, and makes it the thread's.
    ///
    /// # Errors
    /// There is none, or the driver refuses.
    pub fn open(ordinal: u32) -> Result<Gpu, GpuError> {
        let count = Gpu::count()?;
        if ordinal >= count {
            return Err(GpuError::NoDevice { ordinal, count });
        }
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: both places are writable; the ordinal is one of the driver's.
        unsafe {
            cu!(cuDeviceGet(&mut device, ordinal as i32))?;
            cu!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let gpu = Gpu { device, context };
        gpu.bind()?;
        Ok(gpu)
    }

    /// Makes it the calling thread's.
    ///
    /// # Errors
    /// The context is gone.
    pub fn bind(&self) -> Result<(), GpuError> {
        // SAFETY: the context is retained as long as `self`.
        unsafe { cu!(cuCtxSetCurrent(self.context)) }
    }

    /// What the driver calls it.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn name(&self) -> Result<String, GpuError> {
        let mut name = [0 as c_char; 128];
        // SAFETY: room as said; the driver ends the text with a zero.
        unsafe {
            cu!(cuDeviceGetName(name.as_mut_ptr(), 128, self.device))?;
            Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
        }
    }

    /// Its UUID in 32 hexadecimal digits.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn uuid(&self) -> Result<String, GpuError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the place is writable.
        unsafe { cu!(cuDeviceGetUuid_v2(&mut uuid, self.device))? };
        let hex = |byte: &c_char| format!("{:02x}", byte.cast_unsigned_byte());
        Ok(uuid.bytes.iter().map(hex).collect())
    }

    /// Free and total bytes of its memory.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both places are writable.
        unsafe { cu!(cuMemGetInfo_v2(&mut free, &mut total))? };
        Ok((free, total))
    }

    /// Waits until everything that was submitted is done.
    ///
    /// # Errors
    /// Something of it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: no arguments.
        unsafe { cu!(cuCtxSynchronize()) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: gives back the one hold that `open` took. A broken context cannot be given back
        // any more, and ends with the process.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// `c_char` is signed on some machines and not on others.
trait CharByte {
    fn cast_unsigned_byte(&self) -> u8;
}

impl CharByte for c_char {
    #[allow(clippy::unnecessary_cast, reason = "unsigned on aarch64")]
    fn cast_unsigned_byte(&self) -> u8 {
        *self as u8
    }
}
