//! What of a layout decides whether two pages mean the same bytes.
#![forbid(unsafe_code)]

use super::valid::ValidLayout;

/// Feeds the meaning of `layout`'s page into `hasher`: the segments' byte sizes in page order, as
/// registered.
///
/// Addresses, strides and the number of blocks stay out: a page saved by one engine may be loaded
/// by another that keeps its blocks elsewhere. Merging stays out too: it follows from addresses,
/// and two neighbours of 512 bytes do not mean what one piece of 1,024 bytes means.
pub fn write_layout_fingerprint(layout: &ValidLayout, hasher: &mut blake3::Hasher) {
    hasher.update(b"pegaflow layout 1\0");
    hasher.update(&(layout.segment_bytes().len() as u64).to_le_bytes());
    for bytes in layout.segment_bytes() {
        hasher.update(&bytes.to_le_bytes());
    }
}
