//! Loads that come in steps, each told to the engine's GPU by a word of shared memory.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pegaflow_shm::desc::LoadSignal;

use super::region::RegionMapping;

/// The word that one load raises.
#[derive(Debug, Clone)]
pub struct Signal {
    region: Arc<RegionMapping>,
    signal: LoadSignal,
}

impl Signal {
    /// A word of a client's region; it was found to lie inside.
    pub fn new(region: Arc<RegionMapping>, signal: LoadSignal) -> Signal {
        Signal { region, signal }
    }

    /// How many steps there are.
    pub fn steps(&self) -> u16 {
        self.signal.steps
    }

    /// The first `steps` steps are in place in all blocks, or the load has ended.
    pub fn raise(&self, steps: u16) {
        let offset = usize::from(self.signal.word) * size_of::<u32>();
        let value = self.signal.base + u32::from(steps.min(self.signal.steps));
        self.region.raise(offset, value);
    }
}

/// How far a load is whose steps are copied one after the other, each by tasks of its own. Tasks
/// may end in another order than they began in; the word says what is complete from the first step
/// on.
#[derive(Debug)]
pub struct Steps {
    signal: Signal,
    /// Tasks of each step that have not ended.
    open: Box<[AtomicU32]>,
}

impl Steps {
    /// So many tasks for each of the steps.
    pub fn new(signal: Signal, tasks: impl IntoIterator<Item = u32>) -> Arc<Steps> {
        let open = tasks.into_iter().map(AtomicU32::new).collect();
        Arc::new(Steps { open, signal })
    }

    /// A task of a step has copied all of its pages.
    pub fn task_done(&self, step: u16) {
        // One thread ends the tasks of a device, so that nobody raises the word past a step that
        // another thread has still to count.
        self.open[usize::from(step)].fetch_sub(1, Ordering::Relaxed);
        let open = |open: &AtomicU32| open.load(Ordering::Relaxed) > 0;
        let complete = self.open.iter().position(open).unwrap_or(self.open.len());
        if complete > 0 {
            self.signal.raise(complete as u16);
        }
    }
}

/// The task's place among the steps of its load.
#[derive(Debug, Clone)]
pub struct Step {
    /// The load's.
    pub steps: Arc<Steps>,
    /// This one, from 0 on.
    pub step: u16,
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn signal(steps: u16, base: u32) -> (Signal, impl Fn() -> u32) {
        let (fd, seen) = pegaflow_shm::mapping::create_kv_region("signals", 4096).unwrap();
        let region = RegionMapping::map(fd.as_fd(), 4096).unwrap();
        let signal = LoadSignal {
            word: 3,
            steps,
            base,
        };
        let word = move || {
            let mut bytes = [0; 4];
            seen.copy_out(12, &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        (Signal::new(region, signal), word)
    }

    #[test]
    fn the_word_says_what_is_complete_from_the_first_step_on() {
        let (signal, word) = signal(3, 100);
        let steps = Steps::new(signal.clone(), [2, 1, 2]);
        for (step, expected) in [(1, 0), (0, 0), (2, 0), (0, 102), (2, 103)] {
            steps.task_done(step);
            assert_eq!(word(), expected);
        }
        signal.raise(1);
        assert_eq!(word(), 103, "it never falls");
    }

    #[test]
    fn an_end_raises_it_past_all_steps_and_no_further() {
        let (signal, word) = signal(4, u32::MAX - 4);
        signal.raise(u16::MAX);
        assert_eq!(word(), u32::MAX);
    }
}
