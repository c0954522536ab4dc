//! GPUs of a test's own: an emulated machine that daemon and engines see through their environment.
//!
//! A process sees emulated GPUs only if it was started with [`Gpus::environment`]: the test itself
//! does not, so engines with GPU memory are always processes of their own.

//!
//! | module | what it holds |
//! | --- | --- |
//! | [`shape`] | random layouts of every kind |
//! | [`rank`] | a client with GPU memory, and what every byte of it should be |
//! | [`engine`] | that in a process of its own, driven by commands |
//! | [`conductor`] | the soak run: engines that come and go, and are killed |
//! | [`soak`] | what an engine does at random until it is stopped or killed |

#![deny(unsafe_code)]

pub mod conductor;
pub mod engine;
#[allow(unsafe_code)]
pub mod rank;
pub mod shape;
pub mod soak;

use std::path::Path;
use std::process::Command;

use emulated_cuda::code::Code;
use emulated_cuda::control::{Control, Count};
use emulated_cuda::machine::{self, Machine};

use crate::eventually;

/// An emulated machine; its files go when it is dropped.
pub struct Gpus {
    folder: tempfile::TempDir,
    machine: Machine,
    control: Control,
}

impl Gpus {
    /// So many GPUs of 1 GiB each.
    pub fn emulated(count: u8) -> Gpus {
        Gpus::with(Machine::with_devices(count))
    }

    /// The machine that is described.
    ///
    /// # Panics
    /// There is no room for its files, or no library was built.
    pub fn with(machine: Machine) -> Gpus {
        let folder = tempfile::Builder::new()
            .prefix("pegaflow-test-gpus-")
            .tempdir_in("/dev/shm")
            .expect("a folder");
        machine.create(folder.path()).expect("an emulated machine");
        let library = machine::built_library()
            .expect("the path of this program")
            .expect("cargo builds the emulated libcuda with the tests");
        Machine::install(&library, folder.path()).expect("links to the library");
        let control = Control::open(folder.path()).expect("the machine's control words");
        Gpus {
            folder,
            machine,
            control,
        }
    }

    /// Where the driver library is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What a process needs to see these GPUs.
    pub fn environment(&self) -> Vec<(String, String)> {
        let folder = self.folder.path().to_str().expect("a plain path");
        vec![
            (machine::FOLDER_VARIABLE.into(), folder.into()),
            ("LD_LIBRARY_PATH".into(), folder.into()),
        ]
    }

    /// A command that runs `program` where these GPUs are.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.envs(self.environment());
        command
    }

    /// UUID of a GPU as 32 hexadecimal digits.
    pub fn uuid(&self, device: usize) -> String {
        let uuid = &self.machine.devices[device].uuid;
        uuid.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What a context takes of a GPU's memory.
    pub fn context_bytes(&self) -> u64 {
        self.machine.context_bytes
    }

    /// Memory of a GPU that any living process holds.
    ///
    /// # Panics
    /// The machine's folder is gone.
    pub fn used_bytes(&self, device: usize) -> u64 {
        Machine::used_bytes(self.folder.path(), device).expect("the machine is there")
    }

    /// Waits until no more than so many bytes of a GPU are in use.
    pub fn used_falls_to(&self, device: usize, bytes: u64) -> bool {
        eventually(|| self.used_bytes(device) <= bytes)
    }

    /// A counter of a GPU, over all processes.
    pub fn count(&self, device: usize, count: Count) -> u64 {
        self.control.count(device, count)
    }

    /// The copy or kernel of process `pid` that comes after `after` more ends with a sticky error.
    pub fn inject(&self, device: usize, pid: u32, after: u64, code: Code) {
        self.control.inject(device, pid, after, code);
    }

    /// From now on everything on a GPU fails, in all processes, until [`Code::SUCCESS`] is given.
    pub fn lose(&self, device: usize, code: Code) {
        self.control.lose(device, code);
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        let closed: u64 = (0..self.machine.devices.len())
            .map(|device| self.control.count(device, Count::ClosedInUse))
            .sum();
        // Whoever closed it has had an error, which a test can miss.
        assert!(
            closed == 0 || std::thread::panicking(),
            "memory was closed {closed} times while a copy still used it"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_that_is_installed_is_there() {
        let gpus = Gpus::emulated(2);
        assert_ne!(gpus.uuid(0), gpus.uuid(1));
        assert_eq!(gpus.used_bytes(1), 0);
        for name in ["libcuda.so", "libcuda.so.1"] {
            assert!(gpus.folder.path().join(name).exists(), "{name}");
        }
    }
}
