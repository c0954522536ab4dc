//! Where everything lies in the catalog file.
//!
//! ```text
//! 0        header
//! 4 KiB    namespace table: 1,024 rows of 64 bytes
//! 68 KiB   extent table: 8 bytes per extent, rounded up to 4 KiB
//! ...      one record area per extent: 64 bytes for each 512 bytes of the extent, rounded up
//! ```
//!
//! Record areas are holes until their extent is used, so the file's real size grows with use.

#![forbid(unsafe_code)]

use super::record::{Header, RECORD_BYTES};
use super::{CatalogError, Geometry};
use crate::pool::{ExtentId, MIN_PAGE_BYTES, PageAddr};

/// Rows of the namespace table.
pub const MAX_NAMESPACES: u32 = 1024;

const PAGE_BYTES: u64 = 4096;
const NAMESPACES_AT: u64 = PAGE_BYTES;
const EXTENT_TABLE_AT: u64 = NAMESPACES_AT + MAX_NAMESPACES as u64 * RECORD_BYTES;

const _: () = assert!(size_of::<Header>() as u64 <= NAMESPACES_AT);
const _: () = assert!(EXTENT_TABLE_AT.is_multiple_of(PAGE_BYTES));

/// Byte offsets for one pool geometry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    extent_bytes: u64,
    pub(super) extents: ExtentId,
    /// Where the record areas begin: the bytes before are always allocated.
    pub(super) records_at: u64,
    /// Bytes of one record area.
    pub(super) area_bytes: u64,
    pub(super) file_bytes: u64,
}

impl Layout {
    /// `None` if the geometry is not one that a pool can have.
    pub(super) fn new(geometry: &Geometry) -> Option<Self> {
        let Geometry {
            pool_bytes,
            extent_bytes,
            ..
        } = *geometry;
        if extent_bytes < u64::from(MIN_PAGE_BYTES) || !pool_bytes.is_multiple_of(extent_bytes) {
            return None;
        }
        let extents = ExtentId::try_from(pool_bytes / extent_bytes).ok()?;
        let records_at = (EXTENT_TABLE_AT + u64::from(extents) * 8).next_multiple_of(PAGE_BYTES);
        let slots = extent_bytes / u64::from(MIN_PAGE_BYTES);
        let area_bytes = (slots * RECORD_BYTES).next_multiple_of(PAGE_BYTES);
        let file_bytes = area_bytes
            .checked_mul(u64::from(extents))?
            .checked_add(records_at)?;
        Some(Self {
            extent_bytes,
            extents,
            records_at,
            area_bytes,
            file_bytes,
        })
    }

    pub(super) fn namespace(slot: u32) -> u64 {
        NAMESPACES_AT + u64::from(slot) * RECORD_BYTES
    }

    pub(super) fn extent_row(extent: ExtentId) -> u64 {
        EXTENT_TABLE_AT + u64::from(extent) * 8
    }

    pub(super) fn area(&self, extent: ExtentId) -> u64 {
        self.records_at + u64::from(extent) * self.area_bytes
    }

    /// Pages of `page_bytes` in an extent.
    pub(super) fn slots(&self, page_bytes: u32) -> u64 {
        self.extent_bytes / u64::from(page_bytes)
    }

    /// Bytes of the records that an extent with pages of `page_bytes` has, rounded up to 4 KiB.
    pub(super) fn used_area_bytes(&self, page_bytes: u32) -> u64 {
        (self.slots(page_bytes) * RECORD_BYTES).next_multiple_of(PAGE_BYTES)
    }

    /// Whether an extent can serve pages of `page_bytes`.
    pub(super) fn fits(&self, page_bytes: u32) -> bool {
        page_bytes >= MIN_PAGE_BYTES && u64::from(page_bytes) <= self.extent_bytes
    }

    pub(super) fn page(&self, extent: ExtentId, slot: u64, page_bytes: u32) -> PageAddr {
        let within = slot * u64::from(page_bytes);
        PageAddr::from_offset(u64::from(extent) * self.extent_bytes + within)
    }

    pub(super) fn extent_of(&self, addr: PageAddr) -> Result<ExtentId, CatalogError> {
        let extent = addr.offset() / self.extent_bytes;
        if extent >= u64::from(self.extents) {
            return Err(CatalogError::NotAPage { addr });
        }
        Ok(extent as ExtentId)
    }

    /// Where the record of a page lies, given the page size of its extent.
    pub(super) fn record(&self, addr: PageAddr, page_bytes: u32) -> Result<u64, CatalogError> {
        let extent = self.extent_of(addr)?;
        let within = addr.offset() % self.extent_bytes;
        let slot = within / u64::from(page_bytes);
        if !within.is_multiple_of(u64::from(page_bytes)) || slot >= self.slots(page_bytes) {
            return Err(CatalogError::NotAPage { addr });
        }
        Ok(self.area(extent) + slot * RECORD_BYTES)
    }
}
