//! Start, version, errors.

use std::ffi::c_char;

use super::exported;
use super::pointers::Out;
use crate::code::Code;
use crate::driver;

exported! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        driver::init()
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        let known = driver::driver().map(|driver| driver.machine().driver_version);
        version.set(known.unwrap_or(12_090))
    }

    fn cuGetErrorName(code: u32, name: Out<*const c_char>) {
        let Some(text) = Code(code).name() else {
            name.set(std::ptr::null())?;
            return Err(Code::INVALID_VALUE);
        };
        name.set(text.as_ptr())
    }

    fn cuGetErrorString(code: u32, words: Out<*const c_char>) {
        let Some(text) = Code(code).text() else {
            words.set(std::ptr::null())?;
            return Err(Code::INVALID_VALUE);
        };
        words.set(text.as_ptr())
    }
}
