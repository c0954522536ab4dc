//! Asking the catalog whose page lies at an address.

#![forbid(unsafe_code)]

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use super::record::{RECORD_BYTES, RECORD_SEALED, Record};
use super::{Catalog, Namespace, PageRecord};
use crate::pool::PageAddr;

impl Catalog {
    /// The record of a sealed page; `None` when the page has none.
    pub fn record(&self, addr: PageAddr) -> Option<PageRecord> {
        let extent = self.layout.extent_of(addr).ok()?;
        let page_bytes = self.page_bytes(extent).filter(|bytes| *bytes != 0)?;
        let at = self.layout.record(addr, page_bytes).ok()?;
        let mut bytes = [0; RECORD_BYTES as usize];
        self.read(at, &mut bytes).ok()?;
        let record: Record = bytemuck::pod_read_unaligned(&bytes);
        (record.state == RECORD_SEALED).then(|| record.page())
    }

    /// The checksum in the record of a sealed page; 0 says that none was taken. Two loads: it is
    /// asked for at each page of a load.
    #[inline]
    pub fn checksum(&self, addr: PageAddr) -> Option<u64> {
        const CHECKSUM_AT: usize = offset_of!(Record, checksum);
        const LAST_WORD_AT: usize = offset_of!(Record, crc);
        let extent = self.layout.extent_of(addr).ok()?;
        let page_bytes = self.page_bytes(extent).filter(|bytes| *bytes != 0)?;
        let at = self.layout.record(addr, page_bytes).ok()? as usize;
        let word = |at| Some(self.mapping.atomic_u64(at).ok()?.load(Ordering::Relaxed));
        let sealed = word(at + LAST_WORD_AT)? >> 32 == u64::from(RECORD_SEALED);
        sealed.then_some(word(at + CHECKSUM_AT)?)
    }

    /// The namespace in a row of the table.
    pub fn namespace_in(&self, slot: u32) -> Option<Namespace> {
        let found = self.namespaces.get(slot as usize)?.as_ref()?;
        Some(found.row.namespace(slot))
    }

    /// What the tier below the pool calls the namespace with this row.
    pub fn tier_scope(&self, slot: u32) -> Option<[u8; 32]> {
        let found = self.namespaces.get(slot as usize)?.as_ref()?;
        Some(found.tier_scope)
    }
}
