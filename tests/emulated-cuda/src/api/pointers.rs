//! What callers pass by address.

use crate::code::{Code, Outcome};

/// Where a result goes.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes the result.
    pub fn set(&self, value: T) -> Outcome {
        self.set_at(0, value)
    }

    /// Writes one of several results.
    pub fn set_at(&self, at: usize, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the driver API asks its callers for an address with room for the result.
        unsafe { self.0.add(at).write(value) };
        Ok(())
    }

    /// The address itself.
    pub fn into_raw(self) -> *mut T {
        self.0
    }

    /// True if the caller wants no result.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

/// Where `count` arguments lie.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// The first.
    pub fn get(&self) -> Outcome<T> {
        self.get_at(0)
    }

    /// One of several.
    pub fn get_at(&self, at: usize) -> Outcome<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the driver API asks its callers for the address of as many arguments as they
        // say.
        Ok(unsafe { self.0.add(at).read_unaligned() })
    }

    /// All of them.
    pub fn list(&self, count: usize) -> Outcome<Vec<T>> {
        (0..count).map(|at| self.get_at(at)).collect()
    }

    /// The same address, for a result.
    pub fn into_out(self) -> Out<T> {
        Out(self.0.cast_mut())
    }

    /// The address itself.
    pub fn address(&self) -> u64 {
        self.0.expose_provenance() as u64
    }
}

/// The address of something typed, as an argument of another call.
pub fn at<T>(address: u64) -> In<T> {
    In(std::ptr::with_exposed_provenance(address as usize))
}

/// Text that ends with a zero.
pub fn text(start: In<u8>) -> Outcome<String> {
    let mut bytes = Vec::new();
    loop {
        match start.get_at(bytes.len())? {
            0 => return String::from_utf8(bytes).map_err(|_| Code::INVALID_VALUE),
            byte => bytes.push(byte),
        }
    }
}

/// Writes text with a zero behind it into `room` bytes, cut off where they end.
pub fn set_text(out: &Out<u8>, room: i32, text: &str) -> Outcome {
    let room = usize::try_from(room).map_err(|_| Code::INVALID_VALUE)?;
    let bytes = text.as_bytes();
    let length = bytes
        .len()
        .min(room.checked_sub(1).ok_or(Code::INVALID_VALUE)?);
    for (at, byte) in bytes[..length].iter().enumerate() {
        out.set_at(at, *byte)?;
    }
    out.set_at(length, 0)
}

/// The value behind `out` is an attribute's, whose size the attribute tells.
pub fn set_attribute<T>(out: &Out<u8>, value: T) -> Outcome {
    Out(out.0.cast::<T>()).set(value)
}

/// A function of the caller with its argument.
pub type HostFunction = extern "C" fn(*mut std::ffi::c_void);

/// A pointer that only the caller's function follows, on another thread.
pub struct Sent(pub *mut std::ffi::c_void);

// SAFETY: the driver API says that a host function is called on a thread of the driver; its
// argument is passed on and never followed here.
unsafe impl Send for Sent {}
