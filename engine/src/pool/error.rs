//! What can go wrong with pool bookkeeping and pool memory.

#![forbid(unsafe_code)]

use std::io;

use thiserror::Error;

use super::{EXTENT_GRANULE_BYTES, ExtentId, MAX_EXTENT_BYTES, PageAddr};

/// A refused pool operation. Nothing has changed when one is returned.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PoolError {
    /// The extent size cannot be used.
    #[error(
        "extent size {extent_bytes} bytes: must be a multiple of {EXTENT_GRANULE_BYTES} and at \
         most {MAX_EXTENT_BYTES} (set --extent-size)"
    )]
    ExtentSize {
        /// The size asked for, in bytes.
        extent_bytes: u64,
    },
    /// The pool size cannot be used.
    #[error(
        "pool size {pool_bytes} bytes: must be a nonzero multiple of the extent size \
         {extent_bytes}, at most 2^32 - 1 extents (set --pool-size or --extent-size)"
    )]
    PoolSize {
        /// The pool size asked for, in bytes.
        pool_bytes: u64,
        /// The extent size, in bytes.
        extent_bytes: u64,
    },
    /// A page of no bytes.
    #[error("a page of 0 bytes cannot be stored: the layout of the block is empty")]
    PageEmpty,
    /// The page does not fit in an extent.
    #[error(
        "a page of {page_bytes} bytes does not fit in an extent of {extent_bytes} bytes: raise \
         --extent-size to at least the page size (at most {MAX_EXTENT_BYTES})"
    )]
    PageTooLarge {
        /// The size of one page, in bytes.
        page_bytes: u64,
        /// The extent size, in bytes.
        extent_bytes: u64,
    },
    /// The address lies outside the pool.
    #[error("page address {addr} lies outside the pool of {pool_bytes} bytes")]
    OutsidePool {
        /// The address.
        addr: PageAddr,
        /// The pool size, in bytes.
        pool_bytes: u64,
    },
    /// The address is not where a page of its extent begins.
    #[error("page address {addr} is not the start of a page of {page_bytes} bytes")]
    NotAPage {
        /// The address.
        addr: PageAddr,
        /// The page size of its extent, in bytes.
        page_bytes: u32,
    },
    /// The page is not allocated: never, or freed already.
    #[error("the page at {addr} is not allocated (freed twice, or never handed out)")]
    NotAllocated {
        /// The address.
        addr: PageAddr,
    },
    /// The page is allocated already.
    #[error("the page at {addr} is allocated already")]
    AlreadyAllocated {
        /// The address.
        addr: PageAddr,
    },
    /// The extent serves another page size.
    #[error("extent {extent} serves pages of {page_bytes} bytes, not of {wanted_bytes}")]
    OtherClass {
        /// The extent.
        extent: ExtentId,
        /// The page size that it serves, in bytes.
        page_bytes: u32,
        /// The page size asked for, in bytes.
        wanted_bytes: u32,
    },
    /// The extent is not in use, or does not exist.
    #[error("extent {extent} is not in use")]
    ExtentNotInUse {
        /// The extent.
        extent: ExtentId,
    },
}

/// Why the pool's memory could not be had.
#[derive(Debug, Error)]
pub enum PoolFileError {
    /// The file system has too little room.
    #[error(
        "the pool wants {wanted_bytes} bytes, but {place} has {free_bytes} free of {total_bytes}: \
         lower --pool-size, remove other files there, or enlarge it (mount -o remount,size=...)"
    )]
    NoSpace {
        /// The pool size, in bytes.
        wanted_bytes: u64,
        /// The directory.
        place: String,
        /// Free bytes of its file system.
        free_bytes: u64,
        /// All bytes of its file system.
        total_bytes: u64,
    },
    /// The machine has too little memory, whatever the file system promises.
    #[error(
        "the pool wants {wanted_bytes} bytes, but the machine has {available_bytes} bytes of \
         memory available: lower --pool-size or stop what uses the memory"
    )]
    NoMemory {
        /// The pool size, in bytes.
        wanted_bytes: u64,
        /// `MemAvailable` of the machine, in bytes.
        available_bytes: u64,
    },
    /// A range could not be allocated.
    #[error(
        "allocating {len_bytes} bytes of the pool at {offset}: {source} (the file system filled up \
         or a memory limit was hit: lower --pool-size)"
    )]
    Populate {
        /// Where the range begins, in bytes from the pool's start.
        offset: u64,
        /// The length of the range, in bytes.
        len_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A range that is not inside the pool was asked for.
    #[error("{len_bytes} bytes at {offset} are not inside the pool of {pool_bytes} bytes")]
    OutOfRange {
        /// Where the range begins, in bytes.
        offset: u64,
        /// The length of the range, in bytes.
        len_bytes: u64,
        /// The pool size, in bytes.
        pool_bytes: u64,
    },
    /// Another process has the file open as its pool.
    #[error(
        "the pool file {name} is in use by another pegaflowd (its folder or lock file was moved or \
         removed under it: stop that one first), or a drive of the SSD tier has not ended yet what \
         a killed one asked of it (wait for the drive, or start with --pool fresh)"
    )]
    InUse {
        /// The file.
        name: String,
    },
    /// A system call failed.
    #[error("{action} the pool file {name}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file's name in its directory.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Why an existing pool file is not used again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PoolUnusable {
    /// Its size differs from the configured one.
    #[error("its pool size is {found_bytes} bytes, configured are {wanted_bytes}")]
    Size {
        /// The file's size, in bytes.
        found_bytes: u64,
        /// The configured size, in bytes.
        wanted_bytes: u64,
    },
    /// It has holes: its creation was cut short.
    #[error(
        "only {allocated_bytes} of its {wanted_bytes} bytes are allocated: its creation was cut short"
    )]
    Holes {
        /// The bytes that have memory behind them.
        allocated_bytes: u64,
        /// The configured size, in bytes.
        wanted_bytes: u64,
    },
    /// It is a link, a directory or another user's file.
    #[error("the pool is not a regular file of this user")]
    NotOurFile,
}
