//! What the pool holds, for metrics and for people.

#![forbid(unsafe_code)]

/// The whole pool at one moment. All sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStats {
    /// The pool's size.
    pub pool_bytes: u64,
    /// The size of one extent.
    pub extent_bytes: u64,
    /// All extents.
    pub extents: u32,
    /// Extents that serve no page size at present.
    pub extents_free: u32,
    /// Bytes in allocated pages.
    pub used_bytes: u64,
    /// Bytes in free pages and in free extents.
    pub free_bytes: u64,
    /// Bytes at the ends of extents in which no page fits.
    pub unusable_bytes: u64,
    /// One entry per page size in use, smallest first.
    pub classes: Vec<ClassStats>,
}

/// The pages of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassStats {
    /// The page size, in bytes.
    pub page_bytes: u32,
    /// Extents that serve it.
    pub extents: u32,
    /// Of these, extents that are being emptied.
    pub extents_draining: u32,
    /// Allocated pages.
    pub pages_used: u64,
    /// Free pages, those of draining extents included.
    pub pages_free: u64,
    /// Bytes in allocated pages.
    pub used_bytes: u64,
    /// Bytes in free pages.
    pub free_bytes: u64,
}
