//! From C pointers to safe values: the only place that reads what a caller points at.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use super::types::pega_client;
use crate::Error;

/// A struct that starts with its size.
///
/// # Safety
/// All bytes zero must be a value of the type, as must any bytes that a caller may put into its
/// fields.
pub(super) unsafe trait Sized0: Copy {
    /// Name in errors.
    const NAME: &'static str;
}

macro_rules! sized {
    ($($name:ident),*) => { $(
        // SAFETY: integers, raw pointers, and at most a function pointer that may be null.
        // By the header, a caller puts a function of its type there.
        unsafe impl Sized0 for super::types::$name {
            const NAME: &'static str = stringify!($name);
        }
    )* };
}

sized!(
    pega_options,
    pega_namespace,
    pega_segment,
    pega_group,
    pega_order,
    pega_query_options,
    pega_registration,
    pega_stats,
    pega_limits
);

/// Smallest struct that can be told from garbage: its size and one more field.
const SMALLEST: usize = 8;

pub(super) fn null(name: &'static str) -> Error {
    Error::argument(name, "NULL", "give a valid pointer")
}

/// The client behind a handle.
///
/// # Safety
/// `client` is NULL or came from `pega_connect`, and `pega_disconnect` does not run meanwhile.
pub(super) unsafe fn handle<'a>(client: *const pega_client) -> Result<&'a pega_client, Error> {
    // SAFETY: the caller's promise.
    unsafe { client.as_ref() }.ok_or_else(|| null("client"))
}

/// The bytes of a sized struct, as many as both sides know; the rest is zero.
///
/// # Safety
/// `pointer` is NULL or leads to as many readable bytes as its first four say.
pub(super) unsafe fn read_sized<T: Sized0>(pointer: *const T) -> Result<T, Error> {
    if pointer.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: a caller's struct has its size first; it may be misaligned.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() } as usize;
    check_size::<T>(size)?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the caller vouches for `size` bytes; `known` are no more than that and fit the value.
    // All zero bytes are a value of the type, and so is what the caller wrote over them.
    let value = unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        value.assume_init()
    };
    for at in known..size {
        // SAFETY: below the size that the caller vouches for.
        if unsafe { pointer.cast::<u8>().add(at).read() } != 0 {
            let way_out = "it sets a field that this library does not know: use a newer library";
            return Err(Error::argument(T::NAME, format!("size {size}"), way_out));
        }
    }
    Ok(value)
}

fn check_size<T: Sized0>(size: usize) -> Result<(), Error> {
    if (SMALLEST..=4096).contains(&size) && size.is_multiple_of(4) {
        return Ok(());
    }
    let way_out = "set its `size` to sizeof the struct";
    Err(Error::argument(T::NAME, format!("size {size}"), way_out))
}

/// Element `index` of an array of sized structs whose elements all have the first one's size.
///
/// # Safety
/// The array has more than `index` elements, each as for [`read_sized`].
pub(super) unsafe fn read_element<T: Sized0>(first: *const T, index: usize) -> Result<T, Error> {
    if first.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: as for `read_sized`.
    let stride = unsafe { first.cast::<u32>().read_unaligned() } as usize;
    check_size::<T>(stride)?;
    let element = first.cast::<u8>().wrapping_add(index * stride).cast::<T>();
    // SAFETY: the caller vouches for the element.
    unsafe {
        if element.cast::<u32>().read_unaligned() as usize != stride {
            let way_out = "all elements of an array have one size";
            return Err(Error::argument(
                T::NAME,
                format!("element {index}"),
                way_out,
            ));
        }
        read_sized(element)
    }
}

/// Writes a sized struct: as many bytes as the caller has room for. The caller's `size` stays.
///
/// # Safety
/// `pointer` is NULL or leads to as many writable bytes as its first four say.
pub(super) unsafe fn write_sized<T: Sized0>(pointer: *mut T, value: &T) -> Result<(), Error> {
    if pointer.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: the caller's struct has its size first.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() } as usize;
    check_size::<T>(size)?;
    let known = size.min(size_of::<T>());
    // SAFETY: the caller vouches for `size` bytes, of which the first four are left as they are.
    unsafe {
        let (from, to) = (std::ptr::from_ref(value).cast::<u8>(), pointer.cast::<u8>());
        std::ptr::copy_nonoverlapping(from.add(4), to.add(4), known - 4);
        std::ptr::write_bytes(to.add(known), 0, size - known);
    }
    Ok(())
}

/// Writes a sized struct and its size, which the caller gives beside it.
///
/// # Safety
/// `pointer` is NULL or leads to `size` writable bytes.
pub(super) unsafe fn init_sized<T: Sized0>(
    pointer: *mut T,
    size: u32,
    value: &T,
) -> Result<(), Error> {
    if pointer.is_null() {
        return Err(null(T::NAME));
    }
    // Before anything is written: there may be no room even for the size.
    check_size::<T>(size as usize)?;
    // SAFETY: the caller vouches for `size` bytes, which are no less than the smallest struct.
    unsafe {
        pointer.cast::<u32>().write_unaligned(size);
        write_sized(pointer, value)
    }
}

/// A caller's array.
///
/// # Safety
/// `pointer` leads to `count` readable elements that nobody writes during the call, or `count` is
/// 0.
pub(super) unsafe fn array<'a, T>(
    pointer: *const T,
    count: usize,
    name: &'static str,
) -> Result<&'a [T], Error> {
    if count == 0 {
        return Ok(&[]);
    }
    check_array(pointer, count, name)?;
    // SAFETY: not NULL, aligned, of possible size, and the caller vouches for the rest.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// A caller's array to write.
///
/// # Safety
/// `pointer` leads to `count` writable elements that nobody else touches during the call, or
/// `count` is 0.
pub(super) unsafe fn array_mut<'a, T>(
    pointer: *mut T,
    count: usize,
    name: &'static str,
) -> Result<&'a mut [T], Error> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_array(pointer, count, name)?;
    // SAFETY: not NULL, aligned, of possible size, and the caller vouches for the rest.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

fn check_array<T>(pointer: *const T, count: usize, name: &'static str) -> Result<(), Error> {
    if pointer.is_null() {
        return Err(null(name));
    }
    if !pointer.is_aligned() {
        let way_out = format!("align it to {} bytes", align_of::<T>());
        return Err(Error::argument(name, format!("{pointer:p}"), way_out));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Error::argument(
            name,
            format!("{count} elements"),
            "no memory is that large",
        ));
    }
    Ok(())
}

/// Writes an answer.
///
/// # Safety
/// `pointer` is NULL or leads to a writable `T`.
pub(super) unsafe fn put<T>(pointer: *mut T, value: T, name: &'static str) -> Result<(), Error> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: the caller vouches for the place; it may be misaligned.
    unsafe { pointer.write_unaligned(value) };
    Ok(())
}

/// A caller's text, `None` for NULL.
///
/// # Safety
/// `pointer` is NULL or leads to a text that ends in a zero byte.
pub(super) unsafe fn text(
    pointer: *const c_char,
    name: &'static str,
) -> Result<Option<String>, Error> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller vouches for the text.
    match unsafe { CStr::from_ptr(pointer) }.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(Error::argument(name, "text", "must be UTF-8")),
    }
}
