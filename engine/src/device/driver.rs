//! What the daemon asks of a GPU driver: a narrow trait, so that everything above it runs on a
//! machine without a GPU in tests. `cuda` is the one implementation that a user ever gets.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use super::error::DriverError;
use super::info::DeviceInfo;

/// An address in a GPU's memory (or in host memory that it can reach).
pub(super) type DevicePtr = u64;

/// A stream of a context, as the driver names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stream(pub(super) usize);

/// An event of a context, or one of another process that was opened in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Event(pub(super) usize);

/// A kernel of the loaded module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(pub(super) usize);

/// Pinned host memory that the GPU can also read and write in place.
#[derive(Debug, Clone, Copy)]
pub(super) struct PinnedBuffer {
    /// For this process.
    pub(super) host: NonNull<u8>,
    /// For kernels.
    pub(super) device: DevicePtr,
}

// SAFETY: a name of memory that no thread owns; all access goes through raw copies.
unsafe impl Send for PinnedBuffer {}

/// Arguments of both kernels, in their order (`kernels/copy.cu`).
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelArgs {
    /// Parts in device memory.
    pub(super) parts: DevicePtr,
    pub(super) part_count: u32,
    /// Block ids, where the GPU can read them.
    pub(super) blocks: DevicePtr,
    pub(super) pages: u32,
    pub(super) page_bytes: u64,
    /// Where page 0 lies densely.
    pub(super) staging: DevicePtr,
}

/// Which way a copy goes over the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ToHost,
    ToDevice,
}

/// One copy between the GPU and host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BusCopy {
    pub(super) device: DevicePtr,
    pub(super) host: usize,
    pub(super) bytes: usize,
}

/// A driver library.
pub(super) trait Driver: Send + Sync {
    /// Its version, 1000 * major + 10 * minor as CUDA counts.
    fn version(&self) -> u32;

    /// The devices it shows to this process.
    fn devices(&self) -> Result<Vec<DeviceInfo>, DriverError>;

    /// A context on a device, the process's primary one.
    fn open(&self, ordinal: u32) -> Result<Arc<dyn Context>, DriverError>;
}

/// A context on one device. All calls but [`Context::bind`] act on the context that is bound to the
/// calling thread, which must be this one.
pub(super) trait Context: Send + Sync {
    /// Makes it the calling thread's context.
    fn bind(&self) -> Result<(), DriverError>;

    /// Ends the context with all that was made and opened in it, and waits until nothing of it
    /// touches any memory any more. Every handle of it is void from then on, whatever the result.
    fn reset(&self) -> Result<(), DriverError>;

    /// Free bytes of the device's memory, and all of them.
    fn memory(&self) -> Result<(u64, u64), DriverError>;

    /// Multiprocessors of the device.
    fn multiprocessors(&self) -> Result<u32, DriverError>;

    /// A stream that waits for no other.
    fn create_stream(&self) -> Result<Stream, DriverError>;

    /// An event without timing.
    fn create_event(&self) -> Result<Event, DriverError>;

    /// Marks the place in `stream` up to which `is_done` asks.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError>;

    /// Whether all before the event's last record is done; true for one never recorded.
    fn is_done(&self, event: Event) -> Result<bool, DriverError>;

    /// Lets go of an event, its own or another process's.
    fn destroy_event(&self, event: Event) -> Result<(), DriverError>;

    /// Device memory.
    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DriverError>;

    /// Pinned host memory, mapped for kernels.
    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError>;

    /// Pins memory of this process for all contexts, so that copies from and to it run at the bus's
    /// speed and behind the caller's back.
    ///
    /// # Safety
    ///
    /// The range is mapped and stays so until it is unpinned or the context is reset.
    unsafe fn pin(&self, host: NonNull<u8>, bytes: usize) -> Result<(), DriverError>;

    /// Undoes [`Context::pin`] for the range that begins at `host`.
    fn unpin(&self, host: NonNull<u8>) -> Result<(), DriverError>;

    /// Queues the copies, in no particular order among each other.
    ///
    /// # Safety
    ///
    /// Until an event recorded behind them is done, every device range is the caller's to copy,
    /// every host range is mapped in this process, and none is used otherwise in a way that
    /// conflicts.
    unsafe fn copy(&self, way: Way, copies: &[BusCopy], stream: Stream) -> Result<(), DriverError>;

    /// The kernel with this name.
    fn kernel(&self, name: &'static std::ffi::CStr) -> Result<Kernel, DriverError>;

    /// Queues a kernel over `size`: blocks, and threads of each.
    ///
    /// # Safety
    ///
    /// As for [`Context::copy`], with what the kernel reads and writes according to its arguments.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        size: (u32, u32),
        args: &KernelArgs,
        stream: Stream,
    ) -> Result<(), DriverError>;

    /// Maps another process's allocation; opening the same one twice counts.
    fn open_memory(&self, handle: &[u8; 64]) -> Result<DevicePtr, DriverError>;

    /// Undoes [`Context::open_memory`].
    fn close_memory(&self, base: DevicePtr) -> Result<(), DriverError>;

    /// Bytes of the allocation that begins at `base`.
    fn allocation_bytes(&self, base: DevicePtr) -> Result<u64, DriverError>;

    /// Ordinal of the device on which the memory at `base` lies.
    fn device_of(&self, base: DevicePtr) -> Result<u32, DriverError>;

    /// Maps physical allocations of another process one after the other.
    fn map_chunks(&self, chunks: &[(OwnedFd, u64)]) -> Result<DevicePtr, ChunkError>;

    /// Undoes [`Context::map_chunks`]; `chunks` are their sizes.
    fn unmap_chunks(&self, base: DevicePtr, chunks: &[u64]) -> Result<(), DriverError>;

    /// Opens another process's event.
    fn open_event(&self, handle: &[u8; 64]) -> Result<Event, DriverError>;
}

/// Why physical allocations could not be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkError {
    Driver(DriverError),
    /// One of them lies on the device with this ordinal.
    OtherDevice(u32),
}

impl From<DriverError> for ChunkError {
    fn from(error: DriverError) -> ChunkError {
        ChunkError::Driver(error)
    }
}
