//! What the daemon knows of each GPU.
#![forbid(unsafe_code)]

use std::path::Path;

use pegaflow_shm::control::DeviceUuid;

/// A GPU, or a MIG instance of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The same in every process.
    pub uuid: DeviceUuid,
    /// The driver's name for it.
    pub name: String,
    /// Its number in this process.
    pub ordinal: u32,
    /// Where it sits, such as `0000:3b:00.0`.
    pub pci_bus_id: String,
    /// Memory node of the host that is nearest to it, when the system tells.
    pub numa_node: Option<u32>,
    /// Its memory in bytes.
    pub memory_bytes: u64,
}

impl DeviceInfo {
    /// True for the driver of the tests, which never serves a user unnoticed.
    pub fn is_emulated(&self) -> bool {
        self.name.contains("emulated")
    }
}

/// What was found when the daemon started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceState {
    /// No GPU can be used; the daemon serves host memory.
    Absent {
        /// Why, and the way out.
        reason: String,
    },
    /// GPUs are there.
    Present {
        /// Version of the driver interface, such as `12.8`.
        driver: String,
        /// The GPUs.
        devices: Vec<DeviceInfo>,
    },
}

/// The memory node of a PCI device as `/sys` tells it; `None` on machines with one node.
pub(super) fn numa_node(sys: &Path, pci_bus_id: &str) -> Option<u32> {
    let file = sys
        .join("bus/pci/devices")
        .join(pci_bus_id.to_ascii_lowercase())
        .join("numa_node");
    // The kernel writes -1 where it does not know.
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_node_is_read_from_sys_and_minus_one_is_none() {
        let sys = tempfile::tempdir().expect("a folder");
        let device = sys.path().join("bus/pci/devices/0000:3b:00.0");
        std::fs::create_dir_all(&device).expect("folders");
        for (text, node) in [("1\n", Some(1)), ("-1\n", None), ("", None)] {
            std::fs::write(device.join("numa_node"), text).expect("a file");
            assert_eq!(numa_node(sys.path(), "0000:3B:00.0"), node, "{text:?}");
        }
        assert_eq!(numa_node(sys.path(), "0000:3c:00.0"), None);
    }
}
