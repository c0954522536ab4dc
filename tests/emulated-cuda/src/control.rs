//! Words that all processes of an emulated machine share: faults to inject, and counters.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::code::Code;
use crate::mapping::Mapping;

const FILE: &str = "control";
const MOST_DEVICES: usize = 16;
const WORDS_PER_DEVICE: usize = 16;
const BYTES: usize = MOST_DEVICES * WORDS_PER_DEVICE * 8;

/// What is counted per device, over all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Copies from the device to the host; each piece of a batch is one.
    CopiesOut = 4,
    /// Their bytes.
    BytesOut,
    /// Copies from the host to the device.
    CopiesIn,
    /// Their bytes.
    BytesIn,
    /// Copies inside the device, or between devices.
    CopiesInside,
    /// Kernels.
    Kernels,
    /// Batches of copies.
    Batches,
    /// Faults that were injected.
    Faults,
    /// Memory that was closed while a copy or kernel still used it.
    ClosedInUse,
}

/// Which process a fault is for.
const FAULT_PID: usize = 0;
/// Copies and kernels until then.
const FAULT_AFTER: usize = 1;
/// The sticky error.
const FAULT_CODE: usize = 2;
/// The error of everything, until it is 0.
const LOST_CODE: usize = 3;

/// The shared words.
pub struct Control {
    mapping: Mapping,
}

impl Control {
    /// Makes the words of a new machine.
    pub(crate) fn create(folder: &Path) -> io::Result<()> {
        File::create_new(folder.join(FILE))?.set_len(BYTES as u64)
    }

    /// The words of the machine in `folder`.
    ///
    /// # Errors
    /// There is no machine.
    pub fn open(folder: &Path) -> io::Result<Control> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(folder.join(FILE))?;
        let mapping = Mapping::shared(&file, BYTES)?;
        Ok(Control { mapping })
    }

    fn word(&self, device: usize, word: usize) -> &AtomicU64 {
        &self.mapping.words()[device * WORDS_PER_DEVICE + word]
    }

    /// The copy or kernel of process `pid` on `device` that comes after `after` more ends with the
    /// sticky error `code`. One fault at a time per device.
    pub fn inject(&self, device: usize, pid: u32, after: u64, code: Code) {
        self.word(device, FAULT_PID).store(0, Ordering::SeqCst);
        self.word(device, FAULT_AFTER)
            .store(after, Ordering::SeqCst);
        self.word(device, FAULT_CODE)
            .store(u64::from(code.0), Ordering::SeqCst);
        self.word(device, FAULT_PID)
            .store(u64::from(pid), Ordering::SeqCst);
    }

    /// From now on everything on `device` ends with `code`, in all processes, new contexts
    /// included; [`Code::SUCCESS`] ends it.
    pub fn lose(&self, device: usize, code: Code) {
        self.word(device, LOST_CODE)
            .store(u64::from(code.0), Ordering::SeqCst);
    }

    /// The error of a device that is lost.
    pub(crate) fn lost(&self, device: usize) -> Option<Code> {
        match self.word(device, LOST_CODE).load(Ordering::SeqCst) {
            0 => None,
            code => Some(Code(code as u32)),
        }
    }

    /// Asked before each copy and kernel of this process: the error with which it ends.
    pub(crate) fn fault(&self, device: usize) -> Option<Code> {
        if let Some(code) = self.lost(device) {
            return Some(code);
        }
        let pid = self.word(device, FAULT_PID);
        let own = u64::from(std::process::id());
        if pid.load(Ordering::SeqCst) != own {
            return None;
        }
        let step = |after: u64| after.checked_sub(1);
        let after = self.word(device, FAULT_AFTER);
        if after
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, step)
            .is_ok()
        {
            return None;
        }
        // Of several threads that are due, one has the fault.
        pid.compare_exchange(own, 0, Ordering::SeqCst, Ordering::SeqCst)
            .ok()?;
        self.add(device, Count::Faults, 1);
        Some(Code(
            self.word(device, FAULT_CODE).load(Ordering::SeqCst) as u32
        ))
    }

    pub(crate) fn add(&self, device: usize, count: Count, value: u64) {
        self.word(device, count as usize)
            .fetch_add(value, Ordering::SeqCst);
    }

    /// A counter, since the machine was made.
    pub fn count(&self, device: usize, count: Count) -> u64 {
        self.word(device, count as usize).load(Ordering::SeqCst)
    }
}
