//! What kind of memory an address is.

use std::fmt;

use super::driver::{
    Context, CudaError, DEINITIALIZED, Driver, HANDLE_POSIX_FD, INVALID_CONTEXT, NOT_INITIALIZED,
};
use crate::Error;

const CONTEXT: u32 = 1;
const MEMORY_TYPE: u32 = 2;
const BUFFER_ID: u32 = 7;
const IS_MANAGED: u32 = 8;
const DEVICE_ORDINAL: u32 = 9;
const IS_LEGACY_IPC_CAPABLE: u32 = 10;
const ALLOWED_HANDLE_TYPES: u32 = 14;
const MEMPOOL_HANDLE: u32 = 17;

/// `CU_MEMORYTYPE_HOST`.
const TYPE_HOST: u64 = 1;
/// `CU_MEMORYTYPE_DEVICE`.
const TYPE_DEVICE: u64 = 2;
/// `CU_MEMORYTYPE_UNIFIED`.
const TYPE_UNIFIED: u64 = 4;

/// Where an address lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// Memory of the process, as far as CUDA knows.
    Process,
    /// Device memory that can be shared.
    Device(Place),
}

/// What is to be known of one address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) ordinal: i32,
    pub(super) context: Option<Context>,
    pub(super) sharing: Sharing,
    /// Number of the allocation, never used twice in a process.
    pub(super) buffer: u64,
}

/// How another process can get at device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// By the handle of its allocation.
    Ipc,
    /// By descriptors of its physical allocations.
    Vmm,
}

/// A range of device memory that a segment takes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) ordinal: i32,
    pub(super) context: Option<Context>,
    pub(super) sharing: Sharing,
    pub(super) buffer: u64,
}

impl Span {
    pub(crate) fn new(place: Place, start: u64, end: u64) -> Span {
        let Place {
            ordinal,
            context,
            sharing,
            buffer,
        } = place;
        Span {
            start,
            end,
            ordinal,
            context,
            sharing,
            buffer,
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}..{:#x} on GPU {}",
            self.start, self.end, self.ordinal
        )
    }
}

/// What is asked about an address, in this order.
const NAMES: [u32; 8] = [
    MEMORY_TYPE,
    IS_MANAGED,
    DEVICE_ORDINAL,
    IS_LEGACY_IPC_CAPABLE,
    ALLOWED_HANDLE_TYPES,
    MEMPOOL_HANDLE,
    CONTEXT,
    BUFFER_ID,
];

/// Attributes of an address, asked in the calling thread's context. Drivers that want one get,
/// where the thread has none, the first primary context that exists: all of them see the same
/// memory.
fn attributes(driver: Driver, address: u64) -> Result<[u64; 8], CudaError> {
    let outcome = driver
        .enter(None)
        .and_then(|_entered| driver.attributes(NAMES, address));
    match outcome {
        Err(ref error) if error.code == INVALID_CONTEXT => {}
        other => return other,
    }
    for ordinal in 0.. {
        // Beyond the last device.
        let Ok((device, _)) = driver.device(ordinal) else {
            break;
        };
        if !driver.has_primary(device)? {
            continue;
        }
        let context = driver.retain_primary(device)?;
        let entered = driver.enter(Some(context));
        let outcome = entered.and_then(|_entered| driver.attributes(NAMES, address));
        driver.release_primary(device)?;
        return outcome;
    }
    outcome
}

pub(super) fn locate(driver: Driver, address: u64) -> Result<Location, Error> {
    let values = match attributes(driver, address) {
        Ok(values) => values,
        // Nothing was allocated through a driver that nobody has started, or without a context.
        Err(error)
            if matches!(
                error.code,
                NOT_INITIALIZED | DEINITIALIZED | INVALID_CONTEXT
            ) =>
        {
            return Ok(Location::Process);
        }
        Err(error) => return Err(error.into()),
    };
    let [
        kind,
        managed,
        ordinal,
        legacy_ipc,
        handle_types,
        pool,
        context,
        buffer,
    ] = values;
    let refuse = |what: &str| {
        let value = format!("{address:#x}");
        Err(Error::argument("segment", value, what.to_owned()))
    };
    if managed != 0 || kind == TYPE_UNIFIED {
        return refuse(
            "lies in managed (unified) memory, which no other process can map: allocate KV memory \
             with cudaMalloc",
        );
    }
    match kind {
        TYPE_DEVICE => {}
        TYPE_HOST if !is_readable_from_outside(address) => {
            return refuse(
                "lies in host memory that the CUDA driver maps and no other process can read: \
                 allocate it with pega_alloc_host and pin it with cudaHostRegister",
            );
        }
        _ => return Ok(Location::Process),
    }
    let sharing = if legacy_ipc != 0 {
        Sharing::Ipc
    } else if pool != 0 {
        return refuse(
            "lies in stream-ordered memory (cudaMallocAsync), which cannot be shared by allocation: \
             allocate KV memory with cudaMalloc",
        );
    } else if handle_types & HANDLE_POSIX_FD != 0 {
        Sharing::Vmm
    } else {
        return refuse(
            "lies in memory of the VMM API (cuMemCreate) without an exportable handle: create it \
             with requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
        );
    };
    // The driver fills in as many bytes as the attribute has; an ordinal is an `int`.
    let ordinal = ordinal as u32 as i32;
    let context = Context::new(std::ptr::with_exposed_provenance_mut(context as usize));
    Ok(Location::Device(Place {
        ordinal,
        context,
        sharing,
        buffer,
    }))
}

/// Whether the daemon could read a byte as it reads memory of a process: some of the mappings that
/// the driver makes are closed to all but the processor's own accesses.
fn is_readable_from_outside(address: u64) -> bool {
    let mut byte = 0u8;
    let ours = libc::iovec {
        iov_base: std::ptr::from_mut(&mut byte).cast(),
        iov_len: 1,
    };
    let theirs = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address as usize),
        iov_len: 1,
    };
    // SAFETY: one byte is written to a place of this function; the other address is only looked at
    // by the kernel, which answers EFAULT where it is not readable.
    unsafe { libc::process_vm_readv(libc::getpid(), &ours, 1, &theirs, 1, 0) == 1 }
}
