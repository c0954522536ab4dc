//! What can go wrong with the catalog.

#![forbid(unsafe_code)]

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
    /// The folder was another node's, which was renamed or copied.
    #[error("it is of node `{found}`, not `{wanted}`")]
    Node {
        /// The node found.
        found: String,
        /// This daemon's node.
        wanted: String,
    },
    /// It describes a pool of another size.
    #[error("it describes a pool of {found_bytes} bytes, the pool has {wanted_bytes}")]
    PoolBytes {
        /// The size found, in bytes.
        found_bytes: u64,
        /// The pool's size, in bytes.
        wanted_bytes: u64,
    },
    /// It describes extents of another size.
    #[error("it describes extents of {found_bytes} bytes, configured are {wanted_bytes}")]
    ExtentBytes {
        /// The size found, in bytes.
        found_bytes: u64,
        /// The configured size, in bytes.
        wanted_bytes: u64,
    },
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
