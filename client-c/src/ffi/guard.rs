//! The boundary: no panic crosses it, every failure leaves a text.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Status};

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Defines exported functions and the list of their signatures.
///
/// The body of a `try fn` answers `Result<c_int, Error>`; that of a `plain fn` cannot fail, and
/// `or` names what the function returns should it panic all the same.
macro_rules! exports {
    ($($(#[$meta:meta])* $kind:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
        $(, or $fallback:expr,)? $body:block)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            /// The pointers must be as `pegaflow.h` says.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
                $crate::ffi::guard::call!($kind $body $(, $fallback)?)
            }
        )*

        /// The functions of this module.
        pub(super) const SIGNATURES: &[$crate::ffi::Signature] = &[$(
            $crate::ffi::Signature {
                name: stringify!($name),
                returns: stringify!($ret),
                arguments: &[$((stringify!($arg), stringify!($ty))),*],
            }
        ),*];
    };
}

/// One guarded body.
macro_rules! call {
    (try $body:block) => {
        $crate::ffi::guard::fallible(|| $body)
    };
    (plain $body:block, $fallback:expr) => {
        $crate::ffi::guard::infallible($fallback, || $body)
    };
}

pub(super) use {call, exports};

/// Runs a body that can fail.
pub(super) fn fallible(body: impl FnOnce() -> Result<c_int, Error>) -> c_int {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => {
            set_last_error(&error);
            negative(error.status())
        }
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            set_text(&format!(
                "panic: {}",
                text.as_deref().unwrap_or("without a text")
            ));
            negative(Status::Internal)
        }
    }
}

/// Runs a body that cannot fail.
pub(super) fn infallible<T>(fallback: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(fallback)
}

fn negative(status: Status) -> c_int {
    -(status as c_int)
}

fn set_last_error(error: &Error) {
    set_text(&error.to_string());
}

fn set_text(text: &str) {
    let clean: Vec<u8> = text.bytes().filter(|byte| *byte != 0).collect();
    let text = CString::new(clean).unwrap_or_default();
    // A thread that is being torn down has no place for it any more.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = Some(text));
}

/// The text of this thread's last failure; valid until its next one.
pub(super) fn last_error() -> *const c_char {
    let text = LAST_ERROR.try_with(|last| last.borrow().as_ref().map(|text| text.as_ptr()));
    text.ok().flatten().unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn text() -> String {
        LAST_ERROR.with(|last| {
            let last = last.borrow();
            let text: &CStr = last.as_deref().unwrap_or_default();
            text.to_str().unwrap().to_owned()
        })
    }

    #[test]
    fn a_panic_stays_inside_and_is_told() {
        assert_eq!(
            fallible(|| panic!("boom {}", 1)),
            -(Status::Internal as c_int)
        );
        assert_eq!(text(), "panic: boom 1");
        assert_eq!(infallible(5, || panic!("quiet")), 5);
    }

    #[test]
    fn a_failure_is_its_negative_status_with_a_text() {
        assert_eq!(fallible(|| Ok(3)), 3);
        let code = fallible(|| Err(Error::UnknownRegistration(9)));
        assert_eq!(code, -(Status::UnknownRegistration as c_int));
        assert!(text().contains("no registration 9"));
        fallible(|| Err(Error::argument("name", "a\0b", "no zero bytes")));
        assert!(text().starts_with("name = `ab`"));
    }
}
