//! The CUDA driver, loaded when the daemon starts.

mod batch;
mod calls;
mod context;

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice, CUuuid};
use pegaflow_shm::control::DeviceUuid;

use self::calls::{Calls, call};
use self::context::CudaContext;
use super::driver::{Context, Driver};
use super::error::DriverError;
use super::info::{DeviceInfo, numa_node};

/// The oldest driver interface that serves: 12.0, of driver 525.
const OLDEST: u32 = 12_000;
/// Why no driver is used.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoDriver {
    #[error(
        "libcuda.so.1 is not there: install the NVIDIA driver, or start the container with its \
         GPUs (--gpus all)"
    )]
    Library,
    #[error("libcuda.so.1 has no {0}: install driver 525 or newer")]
    MissingCall(&'static str),
    #[error("the driver serves CUDA {}: install driver 525 (CUDA 12.0) or newer", version_text(*.0))]
    TooOld(u32),
    #[error("{0}: `nvidia-smi` must work for this user; in a container, see --gpus")]
    Refused(DriverError),
}

/// The loaded library.
pub(super) struct Cuda {
    calls: Arc<Calls>,
    version: u32,
}

impl Cuda {
    /// Loads and initialises the driver; the reason and the way out where that fails.
    pub(super) fn load() -> Result<Cuda, NoDriver> {
        // SAFETY: loading the library runs its initialisers, which is what was asked for.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDriver::Library);
        }
        let calls = Calls::load()?;
        let mut version: c_int = 0;
        // SAFETY: writes one number; needs no initialisation.
        unsafe { call!(calls, cuDriverGetVersion(&mut version)) }.map_err(NoDriver::Refused)?;
        let version = version.unsigned_abs();
        if version < OLDEST {
            return Err(NoDriver::TooOld(version));
        }
        // SAFETY: takes no argument but flags, which are zero.
        unsafe { call!(calls, cuInit(0)) }.map_err(NoDriver::Refused)?;
        let calls = Arc::new(calls);
        Ok(Cuda { calls, version })
    }

    fn device_info(&self, ordinal: u32) -> Result<DeviceInfo, DriverError> {
        let calls = &self.calls;
        let mut device: CUdevice = 0;
        let (mut name, mut bus) = ([0 as c_char; 256], [0 as c_char; 32]);
        let mut uuid = CUuuid { bytes: [0; 16] };
        let mut memory = 0usize;
        // SAFETY: every pointer is to a local of the size that is given along or that cuda.h says.
        unsafe {
            call!(calls, cuDeviceGet(&mut device, ordinal as c_int))?;
            call!(calls, cuDeviceGetName(name.as_mut_ptr(), 255, device))?;
            call!(calls, cuDeviceGetUuid_v2(&mut uuid, device))?;
            call!(calls, cuDeviceGetPCIBusId(bus.as_mut_ptr(), 31, device))?;
            call!(calls, cuDeviceTotalMem_v2(&mut memory, device))?;
        }
        let pci_bus_id = text(&bus).to_ascii_lowercase();
        Ok(DeviceInfo {
            uuid: DeviceUuid(uuid.bytes.map(|byte| byte as u8)),
            name: text(&name),
            ordinal,
            numa_node: numa_node(Path::new("/sys"), &pci_bus_id),
            pci_bus_id,
            memory_bytes: memory as u64,
        })
    }
}

/// CUDA's number for a version in words.
pub(super) fn version_text(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}

impl Driver for Cuda {
    fn version(&self) -> u32 {
        self.version
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>, DriverError> {
        let mut count: c_int = 0;
        // SAFETY: writes one number.
        unsafe { call!(self.calls, cuDeviceGetCount(&mut count)) }?;
        (0..count.unsigned_abs())
            .map(|ordinal| self.device_info(ordinal))
            .collect()
    }

    fn open(&self, ordinal: u32) -> Result<Arc<dyn Context>, DriverError> {
        let context = CudaContext::open(self.calls.clone(), ordinal)?;
        Ok(Arc::new(context))
    }
}
