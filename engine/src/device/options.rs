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
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            staging_bytes: 32 << 20,
            d2h_limit: None,
        }
    }
}
