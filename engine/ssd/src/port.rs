//! Between the lane thread, which decides, and a shard's thread, which moves bytes.

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use crate::io::{Bell, Engine};
use crate::mover::{Command, Done, Mover};
use crate::oldest::Oldest;
use crate::stats::ShardFault;

/// Takes commands to a mover.
pub(crate) trait Port: Send {
    /// Hands a command over. Whoever sends keeps to the agreed number of commands, and rings behind
    /// the last one.
    fn send(&mut self, command: Command);

    /// Wakes the other side, if it waits, for what was sent: once for many, so that it is not woken
    /// for each and finds together what can be moved together.
    fn ring(&mut self) {}

    /// What has ended next.
    fn receive(&mut self) -> Option<Done>;

    /// Since when the drive has had what it has had longest; none if it has nothing. What waits for
    /// its turn does not count.
    fn oldest(&self) -> Option<Instant>;

    /// Lets the other side end once nothing is under way.
    fn stop(&mut self);

    /// Whether the other side has ended.
    fn has_stopped(&self) -> bool;

    /// Whether the other side has ended without having ended its commands: what is not received
    /// after this never comes, and no memory of any command is touched any more.
    fn is_broken(&self) -> bool {
        false
    }
}

/// The longest that a shard's thread waits before it looks around.
const WAIT: Duration = Duration::from_secs(1);

struct Shared {
    commands: ArrayQueue<Command>,
    done: ArrayQueue<Done>,
    /// The thread is about to wait: whoever sends rings.
    waits: AtomicBool,
    stop: AtomicBool,
    /// The thread has panicked, and its engine is gone.
    broken: AtomicBool,
}

/// A port to a thread of its own.
pub(crate) struct ThreadPort {
    shared: Arc<Shared>,
    bell: Arc<dyn Bell>,
    oldest: Arc<Oldest>,
    thread: JoinHandle<()>,
    /// Something was sent since the bell was last looked after.
    sent: bool,
}

impl ThreadPort {
    /// Starts the thread. At most `commands` commands are under way at any time; `wake` is called
    /// behind each batch of ends. The thread keeps `lock` as long as it may touch the shard.
    pub fn start<E: Engine + 'static>(
        name: String,
        mover: Mover<E>,
        lock: Arc<File>,
        commands: usize,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            commands: ArrayQueue::new(commands),
            done: ArrayQueue::new(commands),
            waits: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        });
        let bell = mover.engine().bell();
        let oldest = mover.oldest();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let ran = catch_unwind(AssertUnwindSafe(|| run(&theirs, mover, &*wake)));
            if ran.is_err() {
                // The mover went with the panic, its engine first, which is dropped only when no
                // piece touches memory any more (`Engine`): pages may be used again. If the kernel
                // keeps one, this is not reached, and they stay the drive's. A panic in the drop
                // itself aborts.
                // SYNC: ssd-broken. Behind whatever was handed over.
                theirs.broken.store(true, Ordering::Release);
                wake();
            }
            drop(lock);
        })?;
        Ok(Self {
            shared,
            bell,
            oldest,
            thread,
            sent: false,
        })
    }
}

impl Port for ThreadPort {
    fn send(&mut self, command: Command) {
        if self.is_broken() {
            // Nobody takes it: whoever asks for its end is told so.
            return;
        }
        let sent = self.shared.commands.push(command);
        assert!(sent.is_ok(), "more commands than agreed");
        self.sent = true;
    }

    fn ring(&mut self) {
        if !std::mem::take(&mut self.sent) {
            return;
        }
        // SYNC: ssd-wait. Either the thread sees the command before it waits, or we see that it
        // waits.
        fence(Ordering::SeqCst);
        if self.shared.waits.swap(false, Ordering::Relaxed) {
            // Once is enough, however many commands follow.
            self.bell.ring();
        }
    }

    fn receive(&mut self) -> Option<Done> {
        self.shared.done.pop()
    }

    fn oldest(&self) -> Option<Instant> {
        self.oldest.get()
    }

    fn stop(&mut self) {
        // SYNC: ssd-stop.
        self.shared.stop.store(true, Ordering::Release);
        self.bell.ring();
    }

    fn has_stopped(&self) -> bool {
        self.thread.is_finished()
    }

    fn is_broken(&self) -> bool {
        // SYNC: ssd-broken.
        self.shared.broken.load(Ordering::Acquire)
    }
}

impl Drop for ThreadPort {
    fn drop(&mut self) {
        // The thread keeps what it works on alive, and ends by itself: a drive that hangs must not
        // hang whoever drops the tier.
        self.stop();
    }
}

fn run<E: Engine>(shared: &Shared, mut mover: Mover<E>, wake: &dyn Fn()) {
    let mut done = Vec::new();
    loop {
        let mut any = false;
        while let Some(command) = shared.commands.pop() {
            mover.take(command);
            any = true;
        }
        // SYNC: ssd-stop.
        if !any && mover.is_idle() && shared.stop.load(Ordering::Acquire) {
            return;
        }
        // SYNC: ssd-wait.
        shared.waits.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let wait = shared.commands.is_empty().then_some(WAIT);
        let turned = mover.turn(wait, &mut done);
        shared.waits.store(false, Ordering::Relaxed);
        hand_over(shared, &mut done, wake);
        if turned.is_err() {
            // Its memory is not touched any more once the engine is gone.
            mover.abandon(&mut done);
            hand_over(shared, &mut done, wake);
            refuse(shared, wake);
            return;
        }
    }
}

fn hand_over(shared: &Shared, done: &mut Vec<Done>, wake: &dyn Fn()) {
    if done.is_empty() {
        return;
    }
    for done in done.drain(..) {
        let sent = shared.done.push(done);
        assert!(sent.is_ok(), "more ends than commands");
    }
    wake();
}

/// Without an engine every command fails.
fn refuse(shared: &Shared, wake: &dyn Fn()) {
    loop {
        let mut done = Vec::new();
        while let Some(command) = shared.commands.pop() {
            done.push(Done {
                id: command.id,
                result: Err(ShardFault::Stopped),
                took: command.at.elapsed(),
                checksums: Duration::ZERO,
            });
        }
        hand_over(shared, &mut done, wake);
        // SYNC: ssd-stop.
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
