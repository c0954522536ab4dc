//! Words of host memory that the daemon raises as the steps of a load come in, and for which the
//! engine's streams wait without a thread of the engine.
//!
//! A load takes a word from its submission to its completion. A word's value never falls, each load
//! adds its steps to it, and whatever ends a load raises the word past all of them. So a stream
//! that still waits for an earlier load goes on, and none waits for ever: not for a load that
//! failed, nor for a daemon that is gone.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pegaflow_shm::desc::LoadSignal;

use super::device::Device;
use super::driver::{CudaError, Stream};
use super::order::{Kind, Order};
use crate::Error;
use crate::memory::HostMemory;

/// Words of a client.
const WORDS: u16 = 256;

/// Longest that a stream waits for a load of a daemon that lives and does not go on.
pub(crate) const LOAD_WAIT_BOUND: Duration = Duration::from_secs(30);

/// The words of a client, pinned for its GPUs.
#[derive(Debug)]
pub(crate) struct Signals {
    memory: HostMemory,
    /// In whose context they were pinned.
    device: Arc<Device>,
    words: Mutex<Words>,
}

#[derive(Debug)]
struct Words {
    free: Vec<u16>,
    /// What each word is raised to by the loads so far.
    last: Box<[u32]>,
    /// Since when a load has it.
    since: Box<[Option<Instant>]>,
}

/// A load's word; free again when this is dropped, after all streams that wait for it were let go.
#[derive(Debug)]
pub(crate) struct SignalSlot {
    signals: Arc<Signals>,
    signal: LoadSignal,
}

impl Signals {
    /// Bytes of the words.
    pub(crate) const BYTES: usize = WORDS as usize * size_of::<u32>();

    /// Words in this memory, all of which are 0.
    pub(super) fn new(memory: HostMemory, device: Arc<Device>) -> Result<Signals, CudaError> {
        let entered = device.enter()?;
        // SAFETY: the memory is mapped as long as `self` lives, whose drop unpins it.
        unsafe { device.driver.pin(memory.as_ptr(), memory.len()) }?;
        drop(entered);
        Ok(Signals {
            memory,
            device,
            words: Mutex::new(Words {
                free: (0..WORDS).rev().collect(),
                last: vec![0; usize::from(WORDS)].into(),
                since: vec![None; usize::from(WORDS)].into(),
            }),
        })
    }

    /// The region that they lie in.
    pub(crate) fn region(&self) -> u32 {
        self.memory.region.id
    }

    fn words(&self) -> MutexGuard<'_, Words> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a word for a load of so many steps.
    ///
    /// # Errors
    /// [`Error::Again`] when all are in use.
    pub(crate) fn take(self: &Arc<Self>, steps: u16) -> Result<SignalSlot, Error> {
        let mut words = self.words();
        let room = |word: &u16| {
            let last = words.last[usize::from(*word)];
            last.checked_add(u32::from(steps)).is_some()
        };
        // A word that has counted to its end is never taken again.
        let place = words.free.iter().rposition(room);
        let place = place.ok_or(Error::Again("list of signals"))?;
        let word = words.free.remove(place);
        let at = usize::from(word);
        let base = words.last[at];
        words.last[at] += u32::from(steps);
        words.since[at] = Some(Instant::now());
        drop(words);
        Ok(SignalSlot {
            signals: self.clone(),
            signal: LoadSignal { word, steps, base },
        })
    }

    fn place(&self, word: u16) -> *mut u8 {
        let offset = usize::from(word) * size_of::<u32>();
        self.memory.as_ptr().wrapping_add(offset)
    }

    fn raise(&self, word: u16, value: u32) {
        // SAFETY: an aligned word of the memory, which starts at a page and is mapped as long as
        // `self` lives. Others reach it by atomic operations, too.
        let word = unsafe { AtomicU32::from_ptr(self.place(word).cast()) };
        // SYNC: load-signal. Pairs with the GPU's wait.
        word.fetch_max(value, Ordering::Release);
    }

    /// Lets streams go that have waited too long; how many loads they waited for.
    pub(crate) fn end_stale(&self, now: Instant, bound: Duration) -> usize {
        let mut words = self.words();
        let mut ended = 0;
        for word in 0..WORDS {
            let at = usize::from(word);
            if words.since[at].is_some_and(|since| now.saturating_duration_since(since) > bound) {
                words.since[at] = None;
                self.raise(word, words.last[at]);
                ended += 1;
            }
        }
        ended
    }

    /// Makes a stream wait for the first `steps` steps of a load.
    ///
    /// # Errors
    /// More steps than there are, a stream under capture, or a failure of the driver.
    pub(crate) fn make_wait(
        &self,
        signal: LoadSignal,
        steps: u32,
        stream: Order,
    ) -> Result<(), Error> {
        let Kind::Stream(stream) = stream.0 else {
            let way_out = "a stream waits for a load: give one";
            return Err(Error::argument("stream", format!("{stream:?}"), way_out));
        };
        if steps == 0 || steps > u32::from(signal.steps) {
            let way_out = "give 1 up to the number of steps that the load was submitted with";
            return Err(Error::argument("steps", steps.to_string(), way_out));
        }
        let driver = self.device.driver;
        let context = driver.context_for(stream)?.unwrap_or(self.device.context());
        let _entered = driver.enter(Some(context))?;
        if driver.is_capturing(stream)? {
            let way_out = "the stream is being captured into a graph: wait outside of it";
            return Err(Error::argument("stream", describe(stream), way_out));
        }
        let value = signal.base + steps;
        Ok(driver.wait_for_word(stream, self.place(signal.word), value)?)
    }
}

fn describe(stream: Stream) -> String {
    format!("{:p}", stream.0)
}

impl Drop for Signals {
    fn drop(&mut self) {
        // No load has a word any more, so no stream waits. A driver that is shutting down has let
        // go of the memory already.
        if let Ok(_entered) = self.device.enter() {
            let _ = self.device.driver.unpin(self.memory.as_ptr());
        }
    }
}

impl SignalSlot {
    /// What the submission says.
    pub(crate) fn signal(&self) -> LoadSignal {
        self.signal
    }

    /// The words that it is one of.
    pub(crate) fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }
}

impl Drop for SignalSlot {
    fn drop(&mut self) {
        let LoadSignal { word, steps, base } = self.signal;
        self.signals.raise(word, base + u32::from(steps));
        let mut words = self.signals.words();
        words.since[usize::from(word)] = None;
        words.free.push(word);
    }
}
