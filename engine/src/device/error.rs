//! What can go wrong with a GPU.
#![forbid(unsafe_code)]

use pegaflow_shm::control::DeviceUuid;

/// A driver call that failed: which, and the driver's own name and number for the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code})")]
pub struct DriverError {
    /// The call.
    pub call: &'static str,
    /// The driver's number (`CUresult`), or [`DriverError::MISSING`].
    pub code: i32,
    /// The driver's name for it.
    pub name: &'static str,
}

impl DriverError {
    /// In [`DriverError::code`]: this driver has no such call.
    pub const MISSING: i32 = -1;

    /// True when the context answers every further call with an error: an illegal address, an
    /// uncorrectable memory error, a launch that failed, a GPU that is lost. It takes a new context
    /// to use the device again.
    pub fn is_sticky(&self) -> bool {
        // Numbers of cuda.h, with their names: newer drivers add some that older headers lack.
        const STICKY: [i32; 24] = [
            4,   // DEINITIALIZED
            46,  // DEVICE_UNAVAILABLE
            201, // INVALID_CONTEXT
            214, // ECC_UNCORRECTABLE
            216, // CONTEXT_ALREADY_IN_USE: the context was taken away
            220, // NVLINK_UNCORRECTABLE
            226, // CONTAINED
            700, // ILLEGAL_ADDRESS
            702, // LAUNCH_TIMEOUT
            708, // PRIMARY_CONTEXT_ACTIVE
            709, // CONTEXT_IS_DESTROYED
            710, // ASSERT
            714, // HARDWARE_STACK_ERROR
            715, // ILLEGAL_INSTRUCTION
            716, // MISALIGNED_ADDRESS
            717, // INVALID_ADDRESS_SPACE
            718, // INVALID_PC
            719, // LAUNCH_FAILED
            721, // TENSOR_MEMORY_LEAK
            802, // SYSTEM_NOT_READY
            805, // MPS_CONNECTION_FAILED
            806, // MPS_RPC_FAILURE
            809, // MPS_CLIENT_TERMINATED
            999, // UNKNOWN
        ];
        STICKY.contains(&self.code)
    }
}

/// A GPU, or GPU memory, that the daemon cannot use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum DeviceError {
    #[error("the daemon uses no GPU: {reason}")]
    Absent { reason: String },
    #[error(
        "the daemon has no GPU {device}; it sees {known}: give its container the same GPUs, and do \
         not set CUDA_VISIBLE_DEVICES for it"
    )]
    UnknownDevice { device: DeviceUuid, known: String },
    #[error("GPU {device} is down: {reason}; the daemon tells when it can be used again")]
    Down { device: DeviceUuid, reason: String },
    #[error("{what} on GPU {device} failed: {source}; {way_out}")]
    Driver {
        device: DeviceUuid,
        what: &'static str,
        source: DriverError,
        way_out: &'static str,
    },
    #[error(
        "the region of {asked_bytes} bytes is larger than its allocation on GPU {device}, which \
         has {bytes}: register an allocation whole, from its first byte on"
    )]
    TooLarge {
        device: DeviceUuid,
        asked_bytes: u64,
        bytes: u64,
    },
    #[error(
        "the region was said to lie on GPU {device} but lies on {actual}: name the device that the \
         memory was allocated on"
    )]
    WrongDevice { device: DeviceUuid, actual: String },
    #[error("a region of zero bytes on GPU {device}: give the size of the allocation")]
    Empty { device: DeviceUuid },
    #[error(
        "the chunks of a region on GPU {device} have {chunk_bytes} bytes, the region {asked_bytes}: \
         the sizes must add up"
    )]
    ChunkSizes {
        device: DeviceUuid,
        chunk_bytes: u64,
        asked_bytes: u64,
    },
    #[error("no thread for GPU {device}: {reason}; raise the daemon's limit of threads")]
    Thread { device: DeviceUuid, reason: String },
}
