//! Every call of the library against the bound that its documentation names, and the watchdog that
//! names the call that goes beyond.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::message::{LongestCall, fault};

/// Kinds of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Call {
    /// `Client::connect`: `connect_timeout`.
    Connect,
    /// `Client::alloc_host` and `Client::register`: `control_timeout` each.
    Register,
    /// `Client::wait_ready`: the caller's bound.
    WaitReady,
    /// `Client::probe`: does not block.
    Probe,
    /// `Client::query`, `load`, `save`, `release`, `renew`, `cancel`: do not block.
    Submit,
    /// `Client::wait`: the caller's bound.
    Wait,
    /// `Client::state`, `session_info`, `stats`: do not block.
    Info,
    /// Dropping a `Client`: half a second for the daemon to take notice.
    Disconnect,
}

const CALLS: [Call; 8] = [
    Call::Connect,
    Call::Register,
    Call::WaitReady,
    Call::Probe,
    Call::Submit,
    Call::Wait,
    Call::Info,
    Call::Disconnect,
];

/// How often the watchdog looks.
const LOOK: Duration = Duration::from_millis(50);

/// A thread's present call; `started_ns` is 0 between calls and written last.
#[derive(Debug, Default)]
struct Slot {
    started_ns: AtomicU64,
    call: AtomicUsize,
    bound_ns: AtomicU64,
}

#[derive(Debug, Default)]
struct Kind {
    count: AtomicU64,
    longest_ns: AtomicU64,
    over_ns: AtomicU64,
}

/// All calls of a process.
#[derive(Debug)]
pub struct Watchdog {
    origin: Instant,
    slack: Duration,
    slots: Mutex<Vec<Arc<Slot>>>,
    kinds: [Kind; CALLS.len()],
}

impl Watchdog {
    /// Looks after the calls of this process until its end.
    pub fn start(slack: Duration) -> Arc<Watchdog> {
        let watchdog = Arc::new(Watchdog {
            origin: Instant::now(),
            slack,
            slots: Mutex::default(),
            kinds: Default::default(),
        });
        let watched = watchdog.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOOK);
                watched.look();
            }
        });
        watchdog
    }

    /// A handle for one thread.
    pub fn caller(self: &Arc<Watchdog>) -> Caller {
        let slot = Arc::new(Slot::default());
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.push(slot.clone());
        Caller {
            watchdog: self.clone(),
            slot,
        }
    }

    /// Longest call of each kind.
    pub fn calls(&self) -> BTreeMap<String, LongestCall> {
        let of = |nanos: &AtomicU64| nanos.load(Ordering::Relaxed) / 1000;
        CALLS
            .iter()
            .map(|call| {
                let kind = &self.kinds[*call as usize];
                let longest = LongestCall {
                    count: kind.count.load(Ordering::Relaxed),
                    us: of(&kind.longest_ns),
                    over_us: of(&kind.over_ns),
                };
                (format!("{call:?}"), longest)
            })
            .collect()
    }

    fn now_ns(&self) -> u64 {
        // Never 0, which says that no call is under way.
        self.origin.elapsed().as_nanos() as u64 + 1
    }

    fn look(&self) {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.iter() {
            let started = slot.started_ns.load(Ordering::Acquire);
            let call = CALLS[slot.call.load(Ordering::Acquire)];
            let bound = slot.bound_ns.load(Ordering::Acquire);
            let same = slot.started_ns.load(Ordering::Relaxed) == started;
            if started == 0 || !same {
                continue;
            }
            let taken = self.now_ns().saturating_sub(started);
            if taken > bound + self.slack.as_nanos() as u64 {
                let (taken, bound) = (Duration::from_nanos(taken), Duration::from_nanos(bound));
                fault(format!(
                    "hang: {call:?} has taken {taken:?}, its bound is {bound:?}"
                ));
            }
        }
    }
}

/// One thread's calls.
#[derive(Debug)]
pub struct Caller {
    watchdog: Arc<Watchdog>,
    slot: Arc<Slot>,
}

impl Caller {
    /// Makes a call that must return within `bound`.
    pub fn call<T>(&mut self, call: Call, bound: Duration, work: impl FnOnce() -> T) -> T {
        let started = self.watchdog.now_ns();
        let bound_ns = bound.as_nanos() as u64;
        self.slot.call.store(call as usize, Ordering::Release);
        self.slot.bound_ns.store(bound_ns, Ordering::Release);
        self.slot.started_ns.store(started, Ordering::Release);
        let result = work();
        self.slot.started_ns.store(0, Ordering::Release);
        let taken = self.watchdog.now_ns() - started;
        let kind = &self.watchdog.kinds[call as usize];
        kind.count.fetch_add(1, Ordering::Relaxed);
        kind.longest_ns.fetch_max(taken, Ordering::Relaxed);
        let over = taken.saturating_sub(bound_ns);
        kind.over_ns.fetch_max(over, Ordering::Relaxed);
        result
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let slots = &self.watchdog.slots;
        let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_call_and_its_excess_are_told() {
        let watchdog = Watchdog::start(Duration::from_secs(60));
        let mut caller = watchdog.caller();
        let pause = Duration::from_millis(5);
        caller.call(Call::Wait, Duration::from_millis(1), || {
            std::thread::sleep(pause);
        });
        caller.call(Call::Submit, Duration::ZERO, || ());
        let calls = watchdog.calls();
        assert!(calls["Wait"].us >= 5000 && calls["Wait"].over_us >= 4000);
        assert_eq!((calls["Wait"].count, calls["Probe"].count), (1, 0));
    }
}
