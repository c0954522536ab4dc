//! A device's thread: its turns, its sleeps, and its new beginnings after a fault.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::thread::set_current_timer_slack;

use crate::copy::{CopyError, finished};

use super::card::{Card, Workplace};
use super::driver::Context;
use super::worker::{Wait, Worker};

/// How long the thread looks for work before it sleeps: what a wake-up costs, and a query of the
/// engine that has a load behind it.
const SPIN: Duration = Duration::from_micros(80);
/// How punctual its sleeps are, in nanoseconds.
const TIMER_SLACK_NS: u64 = 1000;
/// The first pause before a device that went down is tried again, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How often the waits for events are looked through.
const STUCK_INTERVAL: Duration = Duration::from_millis(500);
/// An event that has been waited for this long holds its session up.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Runs a device's copies until its inbox is stopped.
pub(super) fn run(card: &Arc<Card>, place: &Arc<Workplace>, opened: (Arc<dyn Context>, u64)) {
    let ran = catch_unwind(AssertUnwindSafe(|| serve(card, place, opened)));
    if ran.is_err() {
        // What runs on the device is known to nobody any more: its pages must not be used again.
        tracing::error!("a GPU's thread panicked: the daemon aborts, its pool stays for the next");
        std::process::abort();
    }
}

fn serve(card: &Arc<Card>, place: &Arc<Workplace>, opened: (Arc<dyn Context>, u64)) {
    if let Err(error) = set_current_timer_slack(NonZeroU64::new(TIMER_SLACK_NS)) {
        tracing::debug!(%error, "sleeps of a GPU's thread are less punctual");
    }
    let mut opened = Some(opened);
    loop {
        let Some(context) = opened.take().or_else(|| reopen(card, place)) else {
            return;
        };
        let (current, generation) = (context.0.clone(), context.1);
        match Worker::new(card.clone(), place.clone(), context, Instant::now()) {
            Ok(worker) => {
                card.come_up(generation);
                if serve_context(card, worker) {
                    return;
                }
            }
            Err(error) => card.go_down(&*current, error),
        }
    }
}

/// Serves until the daemon stops, which is true, or the device fails.
fn serve_context(card: &Card, mut worker: Worker) -> bool {
    let inbox = card.inbox();
    let mut looked = Instant::now();
    loop {
        let now = Instant::now();
        let wait = match worker.turn(now) {
            Ok(wait) => wait,
            Err(error) => {
                worker.give_up(error);
                return false;
            }
        };
        if now.duration_since(looked) >= STUCK_INTERVAL {
            looked = now;
            card.note_stuck(worker.stuck(now, STUCK_AFTER));
        }
        if inbox.is_stopping() {
            if worker.is_idle() {
                return true;
            }
            worker.cancel_waiting();
        }
        match wait {
            Wait::No => std::hint::spin_loop(),
            // While it stops the inbox does not sleep.
            Wait::For(time) if inbox.is_stopping() => std::thread::sleep(time),
            Wait::For(time) => inbox.wait(Some(time)),
            Wait::ForTask => {
                if !(worker.is_in_haste() && inbox.look(SPIN)) {
                    card.note_stuck(Vec::new());
                    inbox.wait(None);
                }
            }
        }
    }
}

/// Tries for a new context until there is one; `None` when the daemon stops first. Tasks that come
/// meanwhile name memory that is gone.
fn reopen(card: &Arc<Card>, place: &Workplace) -> Option<(Arc<dyn Context>, u64)> {
    let (mut pause, longest) = RETRY;
    let mut tasks = VecDeque::new();
    let mut at = Instant::now() + pause;
    loop {
        card.inbox().take(&mut tasks);
        for task in tasks.drain(..) {
            let device = card.info().uuid;
            let outcome = (Err(CopyError::DeviceReset { device }), 0);
            card.counters().task_out();
            place.results.put(finished(task, outcome, Duration::ZERO));
        }
        if card.inbox().is_stopping() {
            return None;
        }
        let now = Instant::now();
        if now < at {
            card.inbox().wait(Some(at - now));
            continue;
        }
        match card.reopen() {
            Ok(opened) => return Some(opened),
            Err(error) => {
                pause = (pause * 2).min(longest);
                at = now + pause;
                let device = card.info().uuid;
                tracing::warn!(%device, %error, again_in = ?pause, "a GPU stays down");
            }
        }
    }
}
