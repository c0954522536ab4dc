//! What can go wrong with the catalog.

#![forbid(unsafe_code)]

use std::fmt;

use pegaflow_shm::mapping::MappingError;
use thiserror::Error;

use super::{CATALOG_MAGIC, CATALOG_VERSION, MAX_NAMESPACES};
use crate::pool::{ExtentId, PageAddr};

/// A refused catalog operation. What the next daemon will adopt has not changed.
#[derive(Debug, Error)]
pub enum CatalogError {
    /// The file could not be made, opened, allocated or mapped.
    #[error(transparent)]
    File(#[from] MappingError),
    /// A previous file could not be removed.
    #[error("removing the previous catalog: {0}")]
    Remove(#[source] std::io::Error),
    /// The file could not be read.
    #[error("reading the catalog: {0}")]
    Read(#[source] std::io::Error),
    /// The pool geometry cannot be described.
    #[error("a pool of {pool_bytes} bytes in extents of {extent_bytes} bytes cannot be catalogued")]
    Geometry {
        /// The pool's size, in bytes.
        pool_bytes: u64,
        /// The extent size, in bytes.
        extent_bytes: u64,
    },
    /// The records of an extent found no memory.
    #[error(
        "no memory for the {bytes} bytes of records of extent {extent}: free space where the pool \
         lies, or lower --pool-size ({source})"
    )]
    NoSpace {
        /// The extent.
        extent: ExtentId,
        /// Bytes of its records.
        bytes: u64,
        /// What the system said.
        source: MappingError,
    },
    /// The namespace table is full.
    #[error(
        "all {MAX_NAMESPACES} namespaces of the catalog are in use: drop one that is not needed"
    )]
    NamespacesFull,
    /// A namespace without workers.
    #[error("a namespace of world size 0 holds no shards")]
    WorldSize,
    /// The namespace exists with another number of ranks.
    #[error("the namespace is catalogued with world size {found}, not {wanted}")]
    OtherWorldSize {
        /// Ranks in the catalog.
        found: u32,
        /// Ranks asked for.
        wanted: u32,
    },
    /// No such namespace.
    #[error("namespace {namespace} is not in the catalog")]
    UnknownNamespace {
        /// Row of the namespace table.
        namespace: u32,
    },
    /// The extent's records were not prepared, or for another page size.
    #[error("extent {extent} is catalogued with pages of {found_bytes} bytes, not {wanted_bytes}")]
    PageSize {
        /// The extent.
        extent: ExtentId,
        /// Its page size in the catalog, 0 when it has none, in bytes.
        found_bytes: u32,
        /// The page size of the request, in bytes.
        wanted_bytes: u32,
    },
    /// No page begins there.
    #[error("{addr} is not the address of a catalogued page")]
    NotAPage {
        /// The address.
        addr: PageAddr,
    },
}

/// What of the configuration differs from the previous daemon's: found and wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Name of the node: the folder was another node's, and was renamed or copied.
    pub node: Option<(String, String)>,
    /// The pool's size, in bytes.
    pub pool_bytes: Option<(u64, u64)>,
    /// The extent size, in bytes.
    pub extent_bytes: Option<(u64, u64)>,
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some((found, wanted)) = &self.node {
            parts.push(format!("it is of node `{found}`, not `{wanted}`"));
        }
        if let Some((found, wanted)) = self.pool_bytes {
            parts.push(format!(
                "its pool size is {found} bytes, configured are {wanted}"
            ));
        }
        if let Some((found, wanted)) = self.extent_bytes {
            parts.push(format!(
                "its extent size is {found} bytes, configured are {wanted}"
            ));
        }
        f.write_str(&parts.join("; "))
    }
}

/// Why the catalog of a previous daemon is not used, so that its pages are given up.
#[derive(Debug, Error)]
pub enum DiscardReason {
    /// It is not a file in shared memory that this daemon could have written.
    #[error("{0}")]
    NotACatalog(MappingError),
    /// It is not a catalog, or its creation was cut short.
    #[error("its magic is {found:#018x}, not {CATALOG_MAGIC:#018x}")]
    Magic {
        /// The magic found.
        found: u64,
    },
    /// Another version of the daemon wrote it.
    #[error("its layout version is {found}, this daemon's is {CATALOG_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The header is damaged.
    #[error("the checksum of its header is wrong")]
    HeaderChecksum,
    /// The previous daemon was configured otherwise.
    #[error("{0}")]
    Differs(Differences),
    /// The pool file was replaced.
    #[error("it describes another pool file than the one found")]
    OtherPoolFile,
    /// It was cut off or grown.
    #[error("it has {found_bytes} bytes, its pool needs {wanted_bytes}")]
    FileBytes {
        /// The size found, in bytes.
        found_bytes: u64,
        /// The size that the geometry needs, in bytes.
        wanted_bytes: u64,
    },
}
