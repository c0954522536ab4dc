//! A part of a layout that lies in a GPU's memory, as the kernels read it.
#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

/// Block `b`'s piece is `bytes` bytes at `base + b * block_stride` and lies at `page_offset` in the
/// page. `struct Part` of `kernels/copy.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct DevicePart {
    /// Address of block 0's piece in the daemon's context.
    pub(crate) base: u64,
    pub(crate) block_stride: u64,
    pub(crate) bytes: u32,
    pub(crate) page_offset: u32,
}

const _: () = {
    assert!(size_of::<DevicePart>() == 24 && align_of::<DevicePart>() == 8);
    assert!(std::mem::offset_of!(DevicePart, block_stride) == 8);
    assert!(std::mem::offset_of!(DevicePart, bytes) == 16);
    assert!(std::mem::offset_of!(DevicePart, page_offset) == 20);
};
