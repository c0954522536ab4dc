//! Versions, texts, the last error.

use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::LazyLock;

use super::guard::{exports, last_error};
use super::types::PEGA_ABI_VERSION;
use crate::{MissReason, Op, Status};

static VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
static LABELS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    Status::ALL
        .iter()
        .map(|status| owned(status.label()))
        .collect()
});
static TEXTS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    Status::ALL
        .iter()
        .map(|status| owned(status.text()))
        .collect()
});
static REASONS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    MissReason::ALL
        .iter()
        .map(|reason| owned(reason.label()))
        .collect()
});
static OPS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    let label = |code| Op::from_code(code).map_or("unknown", Op::label);
    (0..=Op::Cancel as u8)
        .map(|code| owned(label(code)))
        .collect()
});

exports! {
    /// Version of the library.
    plain fn pega_version() -> *const c_char, or c"".as_ptr(), {
        VERSION.as_ptr()
    }

    /// Version of the ABI.
    plain fn pega_abi_version() -> u32, or 0, {
        PEGA_ABI_VERSION
    }

    /// Why this thread's last call failed.
    plain fn pega_last_error() -> *const c_char, or c"".as_ptr(), {
        last_error()
    }

    /// Short name of a status.
    plain fn pega_status_label(status: c_int) -> *const c_char, or c"unknown".as_ptr(), {
        pick(&LABELS, status.unsigned_abs())
    }

    /// Sentence on a status.
    plain fn pega_status_text(status: c_int) -> *const c_char, or c"unknown".as_ptr(), {
        pick(&TEXTS, status.unsigned_abs())
    }

    /// Short name of a miss reason.
    plain fn pega_reason_label(reason: u32) -> *const c_char, or c"unknown".as_ptr(), {
        pick(&REASONS, reason)
    }

    /// Short name of an operation.
    plain fn pega_op_label(op: u32) -> *const c_char, or c"unknown".as_ptr(), {
        pick(&OPS, op)
    }
}

fn owned(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

fn pick(texts: &'static [CString], number: u32) -> *const c_char {
    texts
        .get(number as usize)
        .map_or(c"unknown".as_ptr(), |text| text.as_ptr())
}

/// Path of the file this library was loaded from.
pub(crate) fn library_path() -> Option<PathBuf> {
    let address = pega_version as *const () as *const libc::c_void;
    // SAFETY: the answer is plain data that the call fills; its text belongs to the loader and
    // stays as long as this library is loaded.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(address, &mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        let name = CStr::from_ptr(info.dli_fname).to_bytes();
        Some(PathBuf::from(OsStr::from_bytes(name)))
    }
}
