//! What changed the catalog file, one step after the other, for tests that cut the sequence.
//!
//! A process that is killed leaves exactly the stores that it has executed, in program order (the
//! fences keep the compiler from another one). So the file after `n` steps is what a kill after
//! them leaves, and a test that looks at the file after every step has looked at every crash.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use super::Catalog;

/// One change that a crash can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A word of the file.
    Store { at: u64, word: u64 },
    /// Bytes of the file that read as zeros from now on.
    Release { at: u64, bytes: u64 },
    /// A change elsewhere, which the test itself noted under this number.
    Elsewhere(usize),
}

impl Step {
    /// Makes the change in an image of the file.
    pub(crate) fn apply(&self, image: &mut [u8]) {
        match *self {
            Step::Store { at, word } => {
                image[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
            }
            Step::Release { at, bytes } => image[at as usize..(at + bytes) as usize].fill(0),
            Step::Elsewhere(_) => {}
        }
    }
}

/// The steps since recording began; none before.
#[derive(Debug, Default)]
pub(crate) struct Steps(Mutex<Option<Vec<Step>>>);

impl Steps {
    pub(crate) fn note(&self, step: Step) {
        if let Some(steps) = self.0.lock().expect("no test panics in here").as_mut() {
            steps.push(step);
        }
    }

    /// Begins to record, from nothing.
    pub(crate) fn record(&self) {
        *self.0.lock().expect("no test panics in here") = Some(Vec::new());
    }

    /// What was recorded, which ends the recording.
    pub(crate) fn take(&self) -> Vec<Step> {
        let mut steps = self.0.lock().expect("no test panics in here");
        steps.take().unwrap_or_default()
    }
}

impl Catalog {
    /// The steps of this catalog.
    pub(crate) fn steps(&self) -> Arc<Steps> {
        self.steps.clone()
    }
}
