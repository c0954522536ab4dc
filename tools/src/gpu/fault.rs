//! An illegal address, as a defect of an engine's kernel has it: for tests of what others feel.

use std::ffi::CString;
use std::ptr::null_mut;

use cudarc::driver::sys;

use super::{GpuError, Stream, cu};

/// Writes to an address that no allocation has.
const KERNEL: &str = "\
.version 7.0
.target sm_70
.address_size 64
.visible .entry illegal_store()
{
    .reg .b64 %address;
    .reg .b32 %value;
    mov.u64 %address, 16;
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
";

/// Breaks the thread's context: everything that is asked of it from now on fails.
///
/// # Errors
/// The error that the context ends with; or the driver refuses the kernel.
pub fn store_to_an_illegal_address(stream: &Stream) -> Result<(), GpuError> {
    let (mut module, mut function) = (null_mut(), null_mut());
    let kernel = CString::new(KERNEL).map_err(|error| GpuError::Library(error.to_string()))?;
    // SAFETY: the places are writable and the text ends with a zero. The kernel takes no argument,
    // and touches no memory that anybody has.
    unsafe {
        cu!(cuModuleLoadData(&mut module, kernel.as_ptr().cast()))?;
        cu!(cuModuleGetFunction(
            &mut function,
            module,
            c"illegal_store".as_ptr()
        ))?;
        let none = null_mut();
        cu!(cuLaunchKernel(
            function,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            stream.raw(),
            none,
            none
        ))?;
    }
    stream.synchronize()
}
