//! Streams and events of the GPU that is the thread's.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};

use super::{GpuError, cu};

/// How long a closed [`Gate`] holds a stream at most, so that nothing waits for ever by mistake.
const GATE_PATIENCE: Duration = Duration::from_secs(60);

/// A stream that waits for no other.
#[derive(Debug)]
pub struct Stream(sys::CUstream);

// SAFETY: the driver's calls on a stream may be made by any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// Holds up a stream until it is opened.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// Lets the stream go on.
    pub fn open(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    fn wait(&self) {
        let closed = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self
            .0
            .1
            .wait_timeout_while(closed, GATE_PATIENCE, |open| !*open);
        drop(result);
    }
}

extern "C" fn wait_at_gate(gate: *mut c_void) {
    // SAFETY: the box that `Stream::hold` gave away for exactly this call.
    let gate = unsafe { Box::from_raw(gate.cast::<Gate>()) };
    gate.wait();
}

impl Stream {
    /// A new one.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new() -> Result<Stream, GpuError> {
        let mut stream = null_mut();
        // SAFETY: the place is writable.
        unsafe { cu!(cuStreamCreate(&mut stream, 1))? };
        Ok(Stream(stream))
    }

    /// Its handle, for the library.
    pub fn raw(&self) -> sys::CUstream {
        self.0
    }

    /// Waits until everything in it is done.
    ///
    /// # Errors
    /// Something of it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: the stream lives.
        unsafe { cu!(cuStreamSynchronize(self.0)) }
    }

    /// What comes into it from now on waits until the gate is opened.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn hold(&self) -> Result<Gate, GpuError> {
        let gate = Gate::default();
        let argument = Box::into_raw(Box::new(gate.clone()));
        // SAFETY: the function takes the box back, once.
        let result = unsafe {
            cu!(cuLaunchHostFunc(
                self.0,
                Some(wait_at_gate),
                argument.cast()
            ))
        };
        if let Err(error) = result {
            // SAFETY: the driver has refused, so nobody else will take it.
            drop(unsafe { Box::from_raw(argument) });
            return Err(error);
        }
        Ok(gate)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: nobody has the handle any more; the driver finishes what is in it.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// A place in a stream, with its time.
#[derive(Debug)]
pub struct Event(sys::CUevent);

// SAFETY: the driver's calls on an event may be made by any thread.
unsafe impl Send for Event {}

impl Event {
    /// A new one.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new() -> Result<Event, GpuError> {
        let mut event = null_mut();
        // SAFETY: the place is writable.
        unsafe { cu!(cuEventCreate(&mut event, 0))? };
        Ok(Event(event))
    }

    /// Its handle, for the library.
    pub fn raw(&self) -> sys::CUevent {
        self.0
    }

    /// Marks where the stream is.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<(), GpuError> {
        // SAFETY: both live.
        unsafe { cu!(cuEventRecord(self.0, stream.0)) }
    }

    /// True once the stream has come there.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => super::check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Waits until the stream has come there.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: the event lives.
        unsafe { cu!(cuEventSynchronize(self.0)) }
    }

    /// Nanoseconds from an earlier event to this one; both are done.
    ///
    /// # Errors
    /// They are not.
    pub fn ns_since(&self, earlier: &Event) -> Result<f64, GpuError> {
        let mut ms = 0.0;
        // SAFETY: the place is writable, both events live.
        unsafe { cu!(cuEventElapsedTime(&mut ms, earlier.0, self.0))? };
        Ok(f64::from(ms) * 1e6)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody has the handle any more.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
