//! The machine that a test pretends to have.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::storage::Storage;

/// Names the folder of the emulated machine; without it there is no device.
pub const FOLDER_VARIABLE: &str = "EMULATED_CUDA_DIR";
/// Names, in microseconds, how long after the call that copies them pageable bytes are on their way
/// to a device, in this process. The driver promises no more than that it has read them by then.
pub const LATE_VARIABLE: &str = "EMULATED_CUDA_LATE_US";
/// File of a [`Machine`] in its folder.
const DESCRIPTION: &str = "machine.json";

/// One emulated GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its memory.
    pub memory_bytes: u64,
}

/// What all processes of a test see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The GPUs in the order of their PCI addresses.
    pub devices: Vec<DeviceSpec>,
    /// What a context takes of its GPU's memory.
    pub context_bytes: u64,
    /// How long a copy between GPU and host takes at least, for each MiB.
    pub us_per_mib: u64,
    /// As `cuDriverGetVersion`.
    pub driver_version: i32,
}

impl Machine {
    /// GPUs of 1 GiB, contexts of 64 MiB, no delay.
    pub fn with_devices(count: u8) -> Machine {
        let device = |at: u8| {
            let mut uuid = *b"emulated GPU no.";
            uuid[0] = at;
            DeviceSpec {
                uuid,
                memory_bytes: 1 << 30,
            }
        };
        Machine {
            devices: (0..count).map(device).collect(),
            context_bytes: 64 << 20,
            us_per_mib: 0,
            driver_version: 12_090,
        }
    }

    /// Writes the machine into an empty folder, where processes find it.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(&self, folder: &Path) -> io::Result<()> {
        Storage::create_folders(folder, self.devices.len())?;
        Control::create(folder)?;
        fs::write(folder.join(DESCRIPTION), serde_json::to_vec(self)?)
    }

    /// Reads what [`Machine::create`] wrote.
    ///
    /// # Errors
    /// There is nothing to read.
    pub fn open(folder: &Path) -> io::Result<Machine> {
        Ok(serde_json::from_slice(&fs::read(
            folder.join(DESCRIPTION),
        )?)?)
    }

    /// Memory of a device that any living process holds, in bytes.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn used_bytes(folder: &Path, device: usize) -> io::Result<u64> {
        Storage::new(folder).used_bytes(device)
    }

    /// Puts the library under the names by which programs load it into a folder, which becomes
    /// part of their `LD_LIBRARY_PATH`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn install(library: &Path, folder: &Path) -> io::Result<()> {
        for name in ["libcuda.so.1", "libcuda.so"] {
            std::os::unix::fs::symlink(library, folder.join(name))?;
        }
        Ok(())
    }

    /// The folder that the environment names.
    pub(crate) fn folder() -> Option<PathBuf> {
        std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from)
    }

    /// Devices that this process may see, by `CUDA_VISIBLE_DEVICES`: numbers or `GPU-` and the
    /// UUID or its beginning; the first unknown one ends the list.
    pub(crate) fn visible(&self) -> Vec<usize> {
        let Ok(wanted) = std::env::var("CUDA_VISIBLE_DEVICES") else {
            return (0..self.devices.len()).collect();
        };
        let find = |name: &str| match name.trim().strip_prefix("GPU-") {
            Some(start) => self
                .devices
                .iter()
                .position(|device| uuid_text(&device.uuid).starts_with(start)),
            None => name
                .trim()
                .parse()
                .ok()
                .filter(|at| *at < self.devices.len()),
        };
        wanted.split(',').map_while(find).collect()
    }
}

/// The library as cargo builds it beside the running program, if it is there.
///
/// # Errors
/// The path of the running program cannot be read.
pub fn built_library() -> io::Result<Option<PathBuf>> {
    const NAME: &str = "libemulated_cuda.so";
    let program = std::env::current_exe()?;
    let places = program.ancestors().skip(1).take(2);
    let mut candidates = places.flat_map(|place| [place.join("deps").join(NAME), place.join(NAME)]);
    Ok(candidates.find(|candidate| candidate.exists()))
}

/// A UUID in the groups in which NVIDIA's tools write it, without `GPU-`.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    groups.join("-")
}
