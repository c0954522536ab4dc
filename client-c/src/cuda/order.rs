//! What a save or load comes after.

use std::ffi::c_void;

use super::driver::{Event, Stream};

/// What the engine has to be through with before the daemon copies: its stream, or an event of it.
///
/// A save then reads what that work has written, and a load overwrites only what it has read. The
/// engine's thread waits for neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order(pub(super) Kind);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing is pending.
    #[default]
    None,
    Stream(Stream),
    Event(Event),
}

impl Order {
    /// Nothing is pending: the memory is as it should be.
    pub const NONE: Order = Order(Kind::None);

    /// After all that the stream (a `CUstream` or `cudaStream_t`) has at the moment. Null is the
    /// default stream of the calling thread's current context.
    ///
    /// # Safety
    /// The stream lives until the call that gets this has returned, and its device is one of those
    /// that this process uses.
    pub unsafe fn stream(stream: *mut c_void) -> Order {
        Order(Kind::Stream(Stream(stream)))
    }

    /// After the event (a `CUevent` or `cudaEvent_t`), as it was recorded last.
    ///
    /// # Safety
    /// As for [`Self::stream`].
    pub unsafe fn event(event: *mut c_void) -> Order {
        Order(Kind::Event(Event(event)))
    }

    /// True if there is something to come after.
    pub fn is_some(&self) -> bool {
        self.0 != Kind::None
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An order after a stream or event of the fake driver, which live for ever.
    pub(in super::super) fn order(handle: *mut c_void, is_event: bool) -> Order {
        Order(if is_event {
            Kind::Event(Event(handle))
        } else {
            Kind::Stream(Stream(handle))
        })
    }
}
