//! The catalog: which block lies in which page, kept where a crash of the daemon cannot reach it.
//!
//! The crash rule: after a `kill -9` at any instruction, the next daemon adopts a page only if its
//! bytes and its record were complete. It holds because
//!
//! * a record is written after its page, and its checksum and state word last, in one store;
//! * a record is cleared before its page is written again ([`Catalog::clear`]);
//! * an extent's row names its page size only while its record area is allocated, and a row is
//!   emptied before the area is given back;
//! * a record counts only under the namespace that it was written for: the checksum covers the
//!   namespace's digest, its domain and the page's address.
//!
//! The process that dies loses nothing that it has stored: the file is shared memory. So ordering
//! matters between the compiler and the stores only, and release stores settle it. A record can be
//! torn by a crash, never by a concurrent reader: nobody else reads while a daemon writes.
//!
//! No access faults: the tables are allocated when the file is made, a record area before its
//! extent's first record, and what a previous daemon left is read by `pread`, not through memory.

#![forbid(unsafe_code)]

mod adopt;
mod error;
mod file;
mod layout;
mod lookup;
mod record;

#[cfg(test)]
pub(crate) mod steps;
#[cfg(test)]
mod tests;

pub use adopt::{AdoptReport, AdoptedPage, Discarded};
pub use error::{CatalogError, Differences, DiscardReason};
pub use file::OpenedCatalog;
pub use layout::MAX_NAMESPACES;
pub use record::{CATALOG_MAGIC, CATALOG_VERSION, NodeName, PageRecord};

use std::sync::atomic::{Ordering, fence};

use pegaflow_shm::mapping::{Mapping, NamedFile};
use pegaflow_shm::namespace::tier_scope;

use crate::fault::{self, CrashPoint};
use crate::pool::{ExtentId, PageAddr, PoolIdentity};
use layout::Layout;
use record::{EMPTY, NamespaceRow, Record, WORDS};

/// The pool that a catalog describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The pool's size, in bytes.
    pub pool_bytes: u64,
    /// The extent size, in bytes.
    pub extent_bytes: u64,
    /// The pool file.
    pub pool: PoolIdentity,
    /// The node's name, filled up with zeros.
    pub node: NodeName,
}

/// A namespace as the catalog knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Row of the namespace table: what page records name.
    pub slot: u32,
    /// The isolation domain: a user's number, zero-extended.
    pub domain_key: u64,
    /// Ranks that each hold a shard of a block, of all of its groups or of some.
    pub world_size: u32,
    /// What makes the namespace this one.
    pub digest: [u8; 32],
}

/// A row of the namespace table, with what follows from it: both are asked for at each block.
#[derive(Clone)]
struct NamespaceInUse {
    row: NamespaceRow,
    /// Where the checksums of its records begin.
    seed: u32,
    /// What the tier below the pool calls it.
    tier_scope: [u8; 32],
}

impl From<NamespaceRow> for NamespaceInUse {
    fn from(row: NamespaceRow) -> NamespaceInUse {
        NamespaceInUse {
            row,
            seed: row.seed(),
            tier_scope: tier_scope(row.domain_key, &row.digest),
        }
    }
}

/// The catalog file, mapped. One thread of one daemon writes it.
pub struct Catalog {
    file: NamedFile,
    mapping: Mapping,
    layout: Layout,
    /// Page size of each extent in bytes, 0 for none: the extent table as far as it is valid.
    extents: Vec<u32>,
    /// The namespace table as far as it is valid.
    namespaces: Vec<Option<NamespaceInUse>>,
    /// What changed the file, in order.
    #[cfg(test)]
    steps: std::sync::Arc<steps::Steps>,
}

impl Catalog {
    /// The row of a namespace, made if there is none.
    pub fn add_namespace(
        &mut self,
        domain_key: u64,
        world_size: u32,
        digest: [u8; 32],
    ) -> Result<u32, CatalogError> {
        if world_size == 0 {
            return Err(CatalogError::WorldSize);
        }
        let known = self
            .namespaces()
            .find(|row| row.domain_key == domain_key && row.digest == digest);
        if let Some(Namespace {
            slot,
            world_size: found,
            ..
        }) = known
        {
            let same = found == world_size;
            let other = CatalogError::OtherWorldSize {
                found,
                wanted: world_size,
            };
            return same.then_some(slot).ok_or(other);
        }
        let free = self.namespaces.iter().position(Option::is_none);
        let slot = free.ok_or(CatalogError::NamespacesFull)?;
        let row = NamespaceRow::new(domain_key, world_size, digest);
        let half_written = CrashPoint::RowHalfWritten;
        self.publish(
            Layout::namespace(slot as u32),
            bytemuck::cast(row),
            half_written,
        )?;
        fault::point(CrashPoint::NamespaceAdded);
        self.namespaces[slot] = Some(row.into());
        Ok(slot as u32)
    }

    /// Gives up a namespace. No page of it may be in the catalog any more; should one be, it is
    /// not adopted.
    pub fn remove_namespace(&mut self, slot: u32) -> Result<(), CatalogError> {
        self.namespace(slot)?;
        self.withdraw(Layout::namespace(slot))?;
        fault::point(CrashPoint::NamespaceRemoved);
        self.namespaces[slot as usize] = None;
        Ok(())
    }

    /// All namespaces, by row.
    pub fn namespaces(&self) -> impl Iterator<Item = Namespace> + '_ {
        self.namespaces.iter().zip(0..).filter_map(|(row, slot)| {
            let found = row.as_ref()?;
            Some(found.row.namespace(slot))
        })
    }

    /// Makes room for the records of an extent, all empty. Called before the first page of an
    /// extent that the pool just opened is sealed.
    pub fn prepare_extent(
        &mut self,
        extent: ExtentId,
        page_bytes: u32,
    ) -> Result<(), CatalogError> {
        let found_bytes = self.page_bytes(extent);
        if found_bytes != Some(0) || !self.layout.fits(page_bytes) {
            let found_bytes = found_bytes.unwrap_or(0);
            return Err(CatalogError::PageSize {
                extent,
                found_bytes,
                wanted_bytes: page_bytes,
            });
        }
        let bytes = self.layout.used_area_bytes(page_bytes);
        let area = self.layout.area(extent);
        // A daemon that died while it gave the area back may have left records in it.
        self.release_bytes(area, self.layout.area_bytes)?;
        self.file
            .reserve(area, bytes)
            .map_err(|source| CatalogError::NoSpace {
                extent,
                bytes,
                source,
            })?;
        fault::point(CrashPoint::ExtentReserved);
        self.store(Layout::extent_row(extent), file::extent_word(page_bytes))?;
        fault::point(CrashPoint::ExtentOpened);
        self.extents[extent as usize] = page_bytes;
        Ok(())
    }

    /// Gives the memory of an extent's records back. Called when the pool's extent is empty.
    pub fn release_extent(&mut self, extent: ExtentId) -> Result<(), CatalogError> {
        if self.page_bytes(extent).is_none_or(|bytes| bytes == 0) {
            return Ok(());
        }
        self.store(Layout::extent_row(extent), 0)?;
        fault::point(CrashPoint::ExtentRowEmptied);
        self.extents[extent as usize] = 0;
        self.release_bytes(self.layout.area(extent), self.layout.area_bytes)
    }

    /// Records a page whose bytes are complete, as part of a block whose every shard is complete.
    pub fn write_sealed(&self, addr: PageAddr, page: &PageRecord) -> Result<(), CatalogError> {
        let seed = self.namespace(page.namespace)?.seed;
        let extent = self.layout.extent_of(addr)?;
        let found_bytes = self.extents[extent as usize];
        if found_bytes == 0 || found_bytes != page.page_bytes {
            let wanted_bytes = page.page_bytes;
            return Err(CatalogError::PageSize {
                extent,
                found_bytes,
                wanted_bytes,
            });
        }
        let at = self.layout.record(addr, found_bytes)?;
        let record = Record::new(seed, addr, page);
        self.publish(at, bytemuck::cast(record), CrashPoint::RecordHalfWritten)
    }

    /// Forgets a page. Called before anything writes to the page again.
    pub fn clear(&self, addr: PageAddr) -> Result<(), CatalogError> {
        let extent = self.layout.extent_of(addr)?;
        match self.extents[extent as usize] {
            0 => Ok(()),
            page_bytes => self.withdraw(self.layout.record(addr, page_bytes)?),
        }
    }

    /// The page size of an extent, 0 for none; `None` if there is no such extent.
    fn page_bytes(&self, extent: ExtentId) -> Option<u32> {
        self.extents.get(extent as usize).copied()
    }

    fn namespace(&self, slot: u32) -> Result<&NamespaceInUse, CatalogError> {
        let row = self.namespaces.get(slot as usize).and_then(Option::as_ref);
        row.ok_or(CatalogError::UnknownNamespace { namespace: slot })
    }

    /// Writes a record or row in `WORDS + 1` stores, of which the first makes it invalid and the
    /// last makes it valid.
    fn publish(
        &self,
        at: u64,
        words: [u64; WORDS],
        half_written: CrashPoint,
    ) -> Result<(), CatalogError> {
        let last = at + (WORDS as u64 - 1) * 8;
        self.put(last, u64::from(EMPTY), Ordering::Relaxed)?;
        // SYNC: catalog-seal. The fields change only after the record is invalid.
        fence(Ordering::Release);
        for (at, word) in (at..last).step_by(8).zip(words) {
            self.put(at, word, Ordering::Relaxed)?;
        }
        fault::point(half_written);
        // SYNC: catalog-seal. Valid only after the fields, and they after the page.
        self.put(last, words[WORDS - 1], Ordering::Release)
    }

    /// Makes a record or row invalid.
    fn withdraw(&self, at: u64) -> Result<(), CatalogError> {
        self.store(at + (WORDS as u64 - 1) * 8, u64::from(EMPTY))
    }

    /// Stores one word after all stores before it and before all stores after it.
    fn store(&self, at: u64, word: u64) -> Result<(), CatalogError> {
        self.put(at, word, Ordering::Release)?;
        // SYNC: catalog-seal. The page is written again only after its record is gone.
        fence(Ordering::Release);
        Ok(())
    }

    /// The one way in which a word behind the header changes.
    fn put(&self, at: u64, word: u64, order: Ordering) -> Result<(), CatalogError> {
        self.mapping.atomic_u64(at as usize)?.store(word, order);
        #[cfg(test)]
        self.steps.note(steps::Step::Store { at, word });
        Ok(())
    }

    /// The one way in which records lose their memory: they read as zeros afterwards.
    fn release_bytes(&self, at: u64, bytes: u64) -> Result<(), CatalogError> {
        self.file.release(at, bytes)?;
        #[cfg(test)]
        self.steps.note(steps::Step::Release { at, bytes });
        Ok(())
    }
}
