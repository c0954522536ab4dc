//! How GPUs are used.
#![forbid(unsafe_code)]

/// Settings of the GPU side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// False: GPUs are left alone, whatever is there.
    pub enabled: bool,
    /// Bytes of one staging slot in GPU memory; each device has two for saves and two for loads,
    /// made when first needed. 0: none, every piece is copied on its own.
    pub staging_bytes: u64,
    /// Most bytes a second that saves read from one device; `None` for no limit.
    pub d2h_limit: Option<u64>,
    /// Pieces of this many bytes on average are copied each on their own, smaller ones through
    /// staging.
    pub crossover_bytes: u64,
    /// Most blocks of a kernel; `None` for one on each multiprocessor.
    pub kernel_blocks: Option<u32>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            staging_bytes: 32 << 20,
            d2h_limit: None,
            crossover_bytes: 256 << 10,
            kernel_blocks: None,
        }
    }
}
