//! Pinning the pool, so that GPUs copy from and to it at the bus's speed.
//!
//! The pool is pinned once, for all contexts, in ranges: each is a call of the driver of some ten
//! milliseconds, and from then on copies use it. What is not pinned yet, or never will be because
//! the driver refuses, is copied through buffers that are: slower, never wrong. The context that
//! pinned holds the pages; when it ends, [`Pinning::withdraw`] says so.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytesize::ByteSize;

use super::card::Card;
use super::error::DeviceError;
use super::options::PinMode;
use super::pin_map::{PinMap, PinRange};
use crate::copy::PoolMemory;

/// About what one call pins, in bytes: 12 ms of the driver, which meanwhile keeps other calls
/// waiting, and few enough borders for copies to stop at.
pub(super) const RANGE_BYTES: u64 = 256 << 20;
/// Threads that pin. The driver does most of the work one call at a time: four take a tenth off.
const THREADS: usize = 4;
/// Distance of two lines in the log.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// The pool as GPUs see it: which of it is pinned, and by whom.
pub(crate) struct Pinning {
    pool: PoolMemory,
    map: PinMap,
    mode: PinMode,
    work: Mutex<Work>,
}

/// Who pins.
#[derive(Debug, Default)]
struct Work {
    /// Ordinal of the device whose context holds the pinned pages.
    owner: Option<u32>,
    /// Threads are at it.
    running: bool,
    /// The driver refused; trying again in the same context would be refused again.
    refused: bool,
}

/// What came of pinning.
#[derive(Debug)]
struct Outcome {
    bytes: u64,
    error: Option<DeviceError>,
}

impl Pinning {
    /// Nothing is pinned yet; ranges of [`RANGE_BYTES`] outside of tests.
    pub(super) fn new(pool: PoolMemory, range_bytes: u64, mode: PinMode) -> Arc<Pinning> {
        Arc::new(Pinning {
            map: PinMap::new(pool.bytes(), range_bytes),
            pool,
            mode,
            work: Mutex::default(),
        })
    }

    /// Which of the pool is pinned.
    pub(crate) fn map(&self) -> &PinMap {
        &self.map
    }

    /// A context was opened on `card`: pins behind the caller's back what is not, unless that is
    /// switched off or under way.
    pub(super) fn context_opened(self: &Arc<Self>, card: &Arc<Card>) {
        if self.mode == PinMode::Off || !self.begin(card.info().ordinal) {
            return;
        }
        let (pinning, for_card) = (self.clone(), card.clone());
        let started = thread::Builder::new()
            .name("pin".into())
            .spawn(move || pinning.pin_all(&for_card));
        if let Err(error) = started {
            self.work().running = false;
            tracing::warn!(%error, "no thread pins the pool: GPU copies are slower");
        }
    }

    /// Pins everything before it returns, or as much as the driver permits. False if that is
    /// nothing: another device may do.
    pub(super) fn pin_now(&self, card: &Arc<Card>) -> bool {
        let ordinal = card.info().ordinal;
        if !self.begin(ordinal) {
            return true;
        }
        self.pin_all(card);
        let any = self.map.pinned_bytes() > 0;
        if !any {
            self.forget(ordinal);
        }
        any
    }

    /// Forgets what the context of the device with this ordinal has pinned, because it ends. Called
    /// while nobody makes calls in that context. When it returns, no copy that asks finds those
    /// ranges pinned; those that other devices have under way must end before the context does
    /// (`Flights`). True when there was anything.
    pub(super) fn withdraw(&self, ordinal: u32) -> bool {
        let pinned_bytes = self.map.pinned_bytes();
        self.forget(ordinal) && pinned_bytes > 0
    }

    /// True if it was this device that had pinned.
    fn forget(&self, ordinal: u32) -> bool {
        let mut work = self.work();
        if work.owner != Some(ordinal) {
            return false;
        }
        for number in 0..self.map.ranges() {
            self.map.set(number, false);
        }
        work.owner = None;
        work.refused = false;
        true
    }

    /// True when the caller is the one to pin, with the context of this device.
    fn begin(&self, ordinal: u32) -> bool {
        let mut work = self.work();
        let other = work.owner.is_some_and(|owner| owner != ordinal);
        let complete = self.map.pinned_bytes() == self.pool.bytes();
        if work.running || work.refused || other || complete {
            return false;
        }
        work.owner = Some(ordinal);
        work.running = true;
        true
    }

    fn pin_all(&self, card: &Arc<Card>) {
        let device = card.info().uuid;
        let started = Instant::now();
        let outcome = self.in_ranges(&|number, range| {
            let bytes = (range.end - range.start) as usize;
            card.with_context(|context| {
                // SAFETY: the range lies in the pool's mapping, which `self.pool` keeps; the daemon
                // keeps `self` beside its devices, until the process ends.
                let pinned = unsafe {
                    let address = self.pool.base().add(range.start as usize);
                    context.pin(address, bytes)
                };
                pinned.map_err(|source| DeviceError::Driver {
                    device,
                    what: "pinning the pool",
                    source,
                    way_out: "raise `ulimit -l` (LimitMEMLOCK=infinity in the unit, --ulimit \
                              memlock=-1 for a container), or say --pin off",
                })?;
                // Inside, so that it never comes after a `withdraw` for this context.
                self.map.set(number, true);
                Ok(())
            })
        });
        let mut work = self.work();
        work.running = false;
        let (pool, pinned) = (ByteSize(self.pool.bytes()), ByteSize(outcome.bytes));
        let took = started.elapsed();
        match outcome.error {
            None => tracing::info!(%device, %pool, %pinned, ?took, "the pool is pinned"),
            Some(error) => {
                work.refused = true;
                tracing::warn!(
                    %device, %pool, %pinned, %error,
                    "the pool cannot be pinned: GPU copies go through small buffers, slower"
                );
            }
        }
    }

    /// Calls `pin`, which marks the range, for each range that is not pinned, from several threads,
    /// until one fails.
    fn in_ranges(
        &self,
        pin: &(dyn Fn(usize, PinRange) -> Result<(), DeviceError> + Sync),
    ) -> Outcome {
        let next = AtomicUsize::new(0);
        let error = Mutex::new(None);
        let told = Mutex::new(Instant::now());
        let worker = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.map.ranges() {
                    return;
                }
                let range = self.map.range(number);
                if range.pinned {
                    continue;
                }
                if let Err(failed) = pin(number, range) {
                    next.store(self.map.ranges(), Ordering::Relaxed);
                    lock(&error).get_or_insert(failed);
                    return;
                }
                self.tell_progress(&told);
            }
        };
        thread::scope(|scope| {
            for _ in 1..THREADS.min(self.map.ranges()) {
                // Fewer threads than asked for only take longer.
                if thread::Builder::new()
                    .name("pin".into())
                    .spawn_scoped(scope, worker)
                    .is_err()
                {
                    break;
                }
            }
            worker();
        });
        Outcome {
            bytes: self.map.pinned_bytes(),
            error: error.into_inner().unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn tell_progress(&self, told: &Mutex<Instant>) {
        let mut told = lock(told);
        if told.elapsed() >= LOG_EVERY {
            *told = Instant::now();
            let done_bytes = self.map.pinned_bytes();
            let percent = 100 * done_bytes / self.pool.bytes().max(1);
            tracing::info!(percent, done_bytes, "the pool is being pinned");
        }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::ptr::NonNull;

    use super::*;
    use crate::device::DriverError;

    /// A pool of ranges that are only counted: its memory is never touched.
    fn pinning(ranges: u64) -> Arc<Pinning> {
        let keep: Arc<dyn Any + Send + Sync> = Arc::new(());
        let bytes = ranges * RANGE_BYTES - (64 << 20);
        // SAFETY: nothing of these tests reads or writes through the address.
        let pool = unsafe { PoolMemory::new(NonNull::dangling(), bytes, keep) };
        Pinning::new(pool, RANGE_BYTES, PinMode::Background)
    }

    fn refusal() -> DeviceError {
        let source = DriverError {
            call: "cuMemHostRegister",
            code: 2,
            name: "CUDA_ERROR_OUT_OF_MEMORY",
        };
        DeviceError::Driver {
            device: pegaflow_shm::control::DeviceUuid([7; 16]),
            what: "pinning the pool",
            source,
            way_out: "",
        }
    }

    #[test]
    fn every_byte_is_pinned_once() {
        let pinning = pinning(5);
        let seen = Mutex::new(Vec::new());
        let outcome = pinning.in_ranges(&|number, range| {
            lock(&seen).push((range.start, range.end));
            pinning.map.set(number, true);
            Ok(())
        });
        assert!(outcome.error.is_none());
        assert_eq!(outcome.bytes, pinning.pool.bytes());
        let mut seen = seen.into_inner().expect("no thread panics");
        seen.sort_unstable();
        let end = seen.iter().fold(0, |end, (start, next)| {
            assert_eq!(*start, end);
            *next
        });
        assert_eq!(end, pinning.pool.bytes());
    }

    #[test]
    fn a_refused_range_ends_it_and_what_was_pinned_stays_so() {
        let pinning = pinning(64);
        let outcome = pinning.in_ranges(&|number, _| match number {
            2 => Err(refusal()),
            _ => {
                pinning.map.set(number, true);
                Ok(())
            }
        });
        assert_eq!(outcome.error, Some(refusal()));
        assert!(!pinning.map.range(2).pinned);
        assert!(outcome.bytes > 0 && outcome.bytes < pinning.pool.bytes());
    }

    #[test]
    fn one_device_pins_for_all_and_another_does_when_its_context_ends() {
        let pinning = pinning(3);
        assert!(pinning.begin(0));
        assert!(!pinning.begin(1), "the first is at it");
        pinning.map.set(0, true);
        pinning.work().running = false;
        assert!(
            !pinning.begin(1),
            "what the first has pinned is the first's"
        );
        assert!(!pinning.forget(1));
        assert!(pinning.map.range(0).pinned, "device 1 pinned nothing");
        assert!(pinning.forget(0));
        assert_eq!(pinning.map.pinned_bytes(), 0);
        assert!(pinning.begin(1));
    }

    #[test]
    fn a_refusal_is_final_until_there_is_another_context() {
        let pinning = pinning(1);
        assert!(pinning.begin(0));
        *pinning.work() = Work {
            owner: Some(0),
            running: false,
            refused: true,
        };
        assert!(!pinning.begin(0));
        assert!(pinning.forget(0));
        assert!(pinning.begin(0));
    }
}
