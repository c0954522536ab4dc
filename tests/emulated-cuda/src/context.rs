//! Contexts: which device, which streams, which sticky error.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::code::{Code, Outcome};
use crate::storage::Object;
use crate::stream::Stream;

thread_local! {
    /// The contexts of this thread; the last is current.
    static STACK: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// The current context of this thread; 0 for none.
pub fn current() -> u64 {
    STACK.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// Replaces it.
pub fn set_current(context: u64) {
    STACK.with_borrow_mut(|stack| {
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
    });
}

/// Puts another one above it.
pub fn push(context: u64) {
    STACK.with_borrow_mut(|stack| stack.push(context));
}

/// Takes it away.
pub fn pop() -> Outcome<u64> {
    STACK.with_borrow_mut(|stack| stack.pop().ok_or(Code::INVALID_CONTEXT))
}

/// A context.
pub struct Context {
    /// Its handle.
    pub id: u64,
    /// Index of its device in the machine.
    pub device: usize,
    /// Its sticky error; 0 for none.
    error: AtomicU32,
    destroyed: AtomicBool,
    streams: Mutex<Vec<Weak<Stream>>>,
    default_stream: Mutex<Option<Arc<Stream>>>,
    /// What it takes of the device's memory.
    memory: Mutex<Option<Object>>,
}

impl Context {
    /// A new one, whose share of the device's memory is `memory`.
    pub fn new(id: u64, device: usize, memory: Object) -> Context {
        Context {
            id,
            device,
            error: AtomicU32::new(0),
            destroyed: AtomicBool::new(false),
            streams: Mutex::default(),
            default_stream: Mutex::default(),
            memory: Mutex::new(Some(memory)),
        }
    }

    /// Its error, if it can do nothing any more.
    pub fn state(&self) -> Outcome {
        if self.destroyed.load(Ordering::SeqCst) {
            return Err(Code::CONTEXT_IS_DESTROYED);
        }
        match self.error.load(Ordering::SeqCst) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// From now on everything in it ends with this error; the first one stays.
    pub fn fail(&self, code: Code) {
        let _ = self
            .error
            .compare_exchange(0, code.0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// From now on it does not exist.
    pub fn destroy(&self) {
        self.destroyed.store(true, Ordering::SeqCst);
        drop(lock(&self.default_stream).take());
        drop(lock(&self.memory).take());
    }

    /// The stream with the handle 0.
    pub fn default_stream(self: &Arc<Context>) -> Arc<Stream> {
        if let Some(stream) = self.used_default_stream() {
            return stream;
        }
        let stream = Stream::start(0, self, true);
        lock(&self.default_stream).get_or_insert(stream).clone()
    }

    /// The default stream, if anything was ever done on it.
    pub fn used_default_stream(&self) -> Option<Arc<Stream>> {
        lock(&self.default_stream).clone()
    }

    /// Streams are told to it when they start.
    pub fn remember(&self, stream: &Arc<Stream>) {
        let mut streams = lock(&self.streams);
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(stream));
    }

    /// All its streams.
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        let streams = lock(&self.streams);
        streams.iter().filter_map(Weak::upgrade).collect()
    }

    /// Waits until everything that was submitted is done.
    pub fn synchronize(&self) -> Outcome {
        for stream in self.streams() {
            stream.last().wait();
        }
        self.state()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while locked")
}
