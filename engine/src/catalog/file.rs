//! Making the catalog file, and opening that of a previous daemon.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::mem::{offset_of, size_of};
use std::path::Path;

use bytemuck::Zeroable;
use pegaflow_shm::BootId;
use pegaflow_shm::mapping::{Access, MappingError, NamedFile};
use pegaflow_shm::node::field_text;

use super::layout::Layout;
use super::record::{
    CATALOG_MAGIC, CATALOG_VERSION, HEADER_CRC_BYTES, Header, NamespaceRow, RECORD_BYTES,
};
use super::{Catalog, CatalogError, Differences, DiscardReason, Geometry, MAX_NAMESPACES};
use crate::fault::{self, CrashPoint};
use crate::pool::ExtentId;

const PURPOSE: &str = "catalog";

/// What was found under the catalog's name.
pub enum OpenedCatalog {
    /// Nothing.
    Missing,
    /// A file whose pages must be given up, and why.
    Discarded(DiscardReason),
    /// The catalog of a previous daemon, to be adopted.
    Ready(Catalog),
}

impl Catalog {
    /// Makes an empty catalog in place of whatever lies there.
    pub fn create(path: &Path, geometry: &Geometry, boot_id: BootId) -> Result<Self, CatalogError> {
        let layout = layout_of(geometry)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CatalogError::Remove(error));
            }
            _ => {}
        }
        let file = NamedFile::create(path, PURPOSE, layout.file_bytes)?;
        let made = Self::make(file, layout, geometry, boot_id);
        if made.is_err() {
            // The error that led here matters more than one of the removal.
            let _ = fs::remove_file(path);
        }
        made
    }

    /// Opens the catalog of a previous daemon, to be followed by [`adopt`](Self::adopt).
    pub fn open(
        path: &Path,
        geometry: &Geometry,
        boot_id: BootId,
    ) -> Result<OpenedCatalog, CatalogError> {
        let layout = layout_of(geometry)?;
        let file = match NamedFile::open(path, PURPOSE, Access::ReadWrite) {
            Ok(file) => file,
            Err(error) => return not_opened(error),
        };
        if let Some(reason) = refusal(&file, &layout, geometry)? {
            return Ok(OpenedCatalog::Discarded(reason));
        }
        // Allocated already unless someone punched a hole: then it reads as empty.
        file.reserve(0, layout.records_at)?;
        let mut catalog = Self::map(file, layout)?;
        catalog.load_tables()?;
        catalog.write_boot_id(boot_id)?;
        Ok(OpenedCatalog::Ready(catalog))
    }

    /// What the previous daemon was told otherwise than this one, as far as its catalog can tell:
    /// for a pool that is given up without it.
    pub fn differences(
        path: &Path,
        geometry: &Geometry,
    ) -> Result<Option<Differences>, CatalogError> {
        match NamedFile::open(path, PURPOSE, Access::ReadOnly) {
            Ok(file) => {
                let header = header_of(&file)?.ok();
                Ok(header.and_then(|header| differences(&header, geometry)))
            }
            Err(error) => not_opened(error).map(|_| None),
        }
    }

    fn make(
        file: NamedFile,
        layout: Layout,
        geometry: &Geometry,
        boot_id: BootId,
    ) -> Result<Self, CatalogError> {
        file.reserve(0, layout.records_at)?;
        let catalog = Self::map(file, layout)?;
        let header = Header {
            magic: CATALOG_MAGIC,
            version: CATALOG_VERSION,
            record_bytes: RECORD_BYTES as u32,
            pool_bytes: geometry.pool_bytes,
            extent_bytes: geometry.extent_bytes,
            pool: geometry.pool,
            node: geometry.node,
            ..Header::zeroed()
        };
        let header = Header {
            crc: header.computed_crc(),
            ..header
        };
        catalog.write_boot_id(boot_id)?;
        catalog
            .mapping
            .copy_in(8, &bytemuck::bytes_of(&header)[8..HEADER_CRC_BYTES + 8])?;
        fault::point(CrashPoint::CatalogHeaderless);
        catalog.store(0, header.magic)?;
        Ok(catalog)
    }

    fn map(file: NamedFile, layout: Layout) -> Result<Self, CatalogError> {
        let mapping = file.map_exact(Access::ReadWrite, layout.file_bytes)?;
        Ok(Self {
            file,
            mapping,
            layout,
            extents: vec![0; layout.extents as usize],
            namespaces: vec![None; MAX_NAMESPACES as usize],
            #[cfg(test)]
            steps: Default::default(),
        })
    }

    /// Nobody decides anything by the catalog's boot id, so it may be torn by a crash.
    fn write_boot_id(&self, boot_id: BootId) -> Result<(), CatalogError> {
        self.mapping
            .copy_in(offset_of!(Header, boot_id), &boot_id)?;
        Ok(())
    }

    fn load_tables(&mut self) -> Result<(), CatalogError> {
        for slot in 0..MAX_NAMESPACES {
            let mut bytes = [0; size_of::<NamespaceRow>()];
            self.mapping
                .copy_out(Layout::namespace(slot) as usize, &mut bytes)?;
            let row: NamespaceRow = bytemuck::cast(bytes);
            self.namespaces[slot as usize] = row.is_valid().then(|| row.into());
        }
        for extent in 0..self.layout.extents {
            let page_bytes = self.extent_row(extent)?.unwrap_or(0);
            self.extents[extent as usize] = page_bytes;
        }
        Ok(())
    }

    /// The page size in an extent's row: 0 for an empty row, `None` for a damaged one.
    pub(super) fn extent_row(&self, extent: ExtentId) -> Result<Option<u32>, CatalogError> {
        let word = self.load(Layout::extent_row(extent))?;
        let page_bytes = word as u32;
        let valid = word == extent_word(page_bytes) && self.layout.fits(page_bytes);
        Ok((valid || word == 0).then_some(page_bytes))
    }

    fn load(&self, at: u64) -> Result<u64, CatalogError> {
        let mut bytes = [0; 8];
        self.mapping.copy_out(at as usize, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// An extent's row: the page size and its complement, so that no stray value passes for one.
pub(super) fn extent_word(page_bytes: u32) -> u64 {
    u64::from(!page_bytes) << 32 | u64::from(page_bytes)
}

fn layout_of(geometry: &Geometry) -> Result<Layout, CatalogError> {
    let Geometry {
        pool_bytes,
        extent_bytes,
        ..
    } = *geometry;
    Layout::new(geometry).ok_or(CatalogError::Geometry {
        pool_bytes,
        extent_bytes,
    })
}

/// A file that is not there or not ours is no error; a system that does not answer is.
fn not_opened(error: MappingError) -> Result<OpenedCatalog, CatalogError> {
    match error {
        MappingError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Ok(OpenedCatalog::Missing)
        }
        MappingError::Io { ref source, .. }
            if !matches!(source.raw_os_error(), Some(libc::ELOOP | libc::EISDIR)) =>
        {
            Err(CatalogError::File(error))
        }
        error => Ok(OpenedCatalog::Discarded(DiscardReason::NotACatalog(error))),
    }
}

/// Why the file cannot be the catalog of this pool, if so.
fn refusal(
    file: &NamedFile,
    layout: &Layout,
    geometry: &Geometry,
) -> Result<Option<DiscardReason>, CatalogError> {
    let header = match header_of(file)? {
        Ok(header) => header,
        Err(reason) => return Ok(Some(reason)),
    };
    if let Some(differences) = differences(&header, geometry) {
        return Ok(Some(DiscardReason::Differs(differences)));
    }
    let (found_bytes, wanted_bytes) = (file.bytes(), layout.file_bytes);
    Ok(if header.pool != geometry.pool {
        Some(DiscardReason::OtherPoolFile)
    } else if found_bytes != wanted_bytes {
        Some(DiscardReason::FileBytes {
            found_bytes,
            wanted_bytes,
        })
    } else {
        None
    })
}

/// The header, if it is one of this version and whole.
fn header_of(file: &NamedFile) -> Result<Result<Header, DiscardReason>, CatalogError> {
    let mut bytes = [0; size_of::<Header>()];
    let read = rustix::io::pread(file.as_fd(), &mut bytes, 0)
        .map_err(|errno| CatalogError::Read(errno.into()))?;
    let header: Header = if read == bytes.len() {
        bytemuck::cast(bytes)
    } else {
        Header::zeroed()
    };
    Ok(if header.magic != CATALOG_MAGIC {
        Err(DiscardReason::Magic {
            found: header.magic,
        })
    } else if header.version != CATALOG_VERSION || u64::from(header.record_bytes) != RECORD_BYTES {
        Err(DiscardReason::Version {
            found: header.version,
        })
    } else if header.crc != header.computed_crc() {
        Err(DiscardReason::HeaderChecksum)
    } else {
        Ok(header)
    })
}

/// What of a configuration is not the previous daemon's.
fn differences(header: &Header, geometry: &Geometry) -> Option<Differences> {
    let differing = |found: u64, wanted: u64| (found != wanted).then_some((found, wanted));
    let nodes = (header.node != geometry.node)
        .then(|| (field_text(&header.node), field_text(&geometry.node)));
    let differences = Differences {
        node: nodes,
        pool_bytes: differing(header.pool_bytes, geometry.pool_bytes),
        extent_bytes: differing(header.extent_bytes, geometry.extent_bytes),
    };
    (differences != Differences::default()).then_some(differences)
}
