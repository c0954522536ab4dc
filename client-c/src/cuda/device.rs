//! A GPU and the context that the engine uses it with.

#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};

use pegaflow_shm::control::DeviceUuid;

use super::driver::{Context, CudaError, Driver, Entered};
use super::locate::Span;
use crate::Error;

/// One GPU of this process.
#[derive(Debug)]
pub(crate) struct Device {
    pub(super) driver: Driver,
    uuid: DeviceUuid,
    ordinal: i32,
    handle: i32,
    /// The one that the engine's memory belongs to; memory of the VMM API belongs to none, and then
    /// it is the primary one.
    context: Context,
    is_retained: bool,
}

impl Device {
    fn open(driver: Driver, ordinal: i32, context: Option<Context>) -> Result<Device, CudaError> {
        let (handle, uuid) = driver.device(ordinal)?;
        let device = |context, is_retained| Device {
            driver,
            uuid,
            ordinal,
            handle,
            context,
            is_retained,
        };
        // A primary context is made only where the memory names no other.
        if let Some(own) = context
            && !driver.has_primary(handle)?
        {
            return Ok(device(own, false));
        }
        let primary = device(driver.retain_primary(handle)?, true);
        match context {
            Some(own) if own != primary.context => Ok(device(own, false)),
            _ => Ok(primary),
        }
    }

    pub(crate) fn uuid(&self) -> DeviceUuid {
        self.uuid
    }

    pub(super) fn context(&self) -> Context {
        self.context
    }

    /// Its context becomes the thread's, until the result is dropped.
    pub(super) fn enter(&self) -> Result<Entered, CudaError> {
        self.driver.enter(Some(self.context))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_retained {
            // A driver that is shutting down has let go of it already.
            let _ = self.driver.release_primary(self.handle);
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GPU {} ({})", self.ordinal, self.uuid)
    }
}

/// The one device that all spans lie on.
pub(super) fn common(
    driver: Driver,
    spans: &[Span],
    known: &mut Vec<Weak<Device>>,
) -> Result<Arc<Device>, Error> {
    let Some(first) = spans.first() else {
        return Err(Error::Driver("no device memory to share".into()));
    };
    if let Some(other) = spans.iter().find(|span| span.ordinal != first.ordinal) {
        let value = format!("{first} and {other}");
        let way_out =
            "one registration lies on one GPU: register each GPU's memory as its own rank";
        return Err(Error::bad_layout(value, way_out));
    }
    known.retain(|device| device.strong_count() > 0);
    let context = spans.iter().find_map(|span| span.context);
    let mut all = known.iter().filter_map(Weak::upgrade);
    let found = all.find(|device| {
        device.ordinal == first.ordinal && context.is_none_or(|context| context == device.context)
    });
    if let Some(device) = found {
        return Ok(device);
    }
    let device = Arc::new(Device::open(driver, first.ordinal, context)?);
    known.push(Arc::downgrade(&device));
    Ok(device)
}
