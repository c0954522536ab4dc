//! The C ABI: `pegaflow.h` in Rust. A thin layer that checks pointers and keeps panics in.
//!
//! Each function turns its arguments into safe values, calls the [`Client`](crate::Client), and
//! returns 0 or a negative [`Status`](crate::Status) with a text for `pega_last_error`. What
//! callers have to know is in the header; [`SIGNATURES`] is compared with it by a test.

#![allow(non_camel_case_types)]

mod connect;
mod guard;
mod info;
mod memory;
mod pointers;
mod requests;
mod take;
mod types;

pub use connect::*;
pub use info::*;
pub use memory::*;
pub use requests::*;
pub use take::*;
pub use types::*;

pub(crate) use info::library_path;

/// One exported function, as declared here.
#[derive(Clone, Copy, Debug)]
pub struct Signature {
    /// Name of the symbol.
    pub name: &'static str,
    /// Return type, as written in Rust.
    pub returns: &'static str,
    /// Arguments: name and type, as written in Rust.
    pub arguments: &'static [(&'static str, &'static str)],
}

/// Every exported function.
pub const SIGNATURES: [&[Signature]; 5] = [
    connect::SIGNATURES,
    info::SIGNATURES,
    memory::SIGNATURES,
    requests::SIGNATURES,
    take::SIGNATURES,
];
