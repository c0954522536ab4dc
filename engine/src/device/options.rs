//! How GPUs are used.
#![forbid(unsafe_code)]

use clap::ValueEnum;
use pegaflow_shm::control::DeviceUuid;

/// When the pool's memory is pinned for GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum PinMode {
    /// Before the daemon is ready, if a GPU is there.
    Start,
    /// When the first engine shares GPU memory; copies are slower until it is done.
    #[default]
    Background,
    /// Never.
    Off,
}

/// Which GPUs are used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// All that the driver shows.
    #[default]
    Auto,
    /// None: the driver is not even loaded.
    Off,
    /// These, of those that the driver shows.
    Only(Vec<DeviceUuid>),
}

/// Settings of the GPU side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Which GPUs are used.
    pub choice: DeviceChoice,
    /// When the pool is pinned.
    pub pin: PinMode,
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

/// Staging slots of a device.
pub const STAGING_SLOTS: u64 = 4;

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            choice: DeviceChoice::Auto,
            pin: PinMode::default(),
            staging_bytes: 32 << 20,
            d2h_limit: None,
            // Measured, see docs/gpu.md: from 64 KiB on a batch of copies does 88 to 99 % of the
            // link and takes no time slices of the engine; 32 blocks are as fast as all of them.
            crossover_bytes: 64 << 10,
            kernel_blocks: Some(32),
        }
    }
}
