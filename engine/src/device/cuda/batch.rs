//! Many copies by one call, `cuMemcpyBatchAsync`, where the driver has it and it works.
//!
//! Some drivers had it wrong. So it is tried once per context, on a few bytes that are compared,
//! and given up for good with the first error; copies one by one are always there.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{
    CUdeviceptr, CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder,
    CUstream,
};

use super::calls::BatchCall;
use super::context::CudaContext;
use crate::device::driver::{BusCopy, Context, DevicePtr, Event, PinnedBuffer, Way};
use crate::device::error::DriverError;

/// Bytes that the trial copies there and back.
const TRIAL_BYTES: usize = 8192;
/// How long it may take.
const TRIAL_LIMIT: Duration = Duration::from_secs(2);
/// Hint that the copies are to leave the multiprocessors alone.
const PREFER_OVERLAP_WITH_COMPUTE: u32 = 1;

/// The call, while it is good, and its lists.
pub(super) struct Batch {
    call: BatchCall,
    good: AtomicBool,
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    to: Vec<CUdeviceptr>,
    from: Vec<CUdeviceptr>,
    bytes: Vec<usize>,
}

impl Batch {
    pub(super) fn new(call: BatchCall) -> Batch {
        Batch {
            call,
            good: AtomicBool::new(true),
            lists: Mutex::default(),
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.good.load(Ordering::Relaxed)
    }

    pub(super) fn give_up(&self) {
        self.good.store(false, Ordering::Relaxed);
    }

    /// Queues the copies, or a part of them when the answer is an error.
    ///
    /// # Safety
    ///
    /// As for [`Context::copy`].
    pub(super) unsafe fn copy(&self, way: Way, copies: &[BusCopy], stream: CUstream) -> c_int {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        let Lists { to, from, bytes } = &mut *lists;
        to.clear();
        from.clear();
        bytes.clear();
        for copy in copies {
            let (host, device) = (copy.host as CUdeviceptr, copy.device);
            let ends = match way {
                Way::ToHost => (host, device),
                Way::ToDevice => (device, host),
            };
            to.push(ends.0);
            from.push(ends.1);
            bytes.push(copy.bytes);
        }
        let anywhere = CUmemLocation {
            type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: anywhere,
            dstLocHint: anywhere,
            flags: PREFER_OVERLAP_WITH_COMPUTE,
        };
        let (mut first, mut failed) = (0usize, 0usize);
        // SAFETY: three lists of one length, and one set of attributes that is for all from the
        // first on; the driver has read them when the call returns. The ranges are the caller's
        // promise.
        unsafe {
            (self.call)(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                bytes.as_mut_ptr(),
                copies.len(),
                &mut attributes,
                &mut first,
                1,
                &mut failed,
                stream,
            )
        }
    }
}

/// Copies bytes to the device and back by the call; whether they came back right.
pub(super) fn works(context: &CudaContext) -> Result<bool, DriverError> {
    let stream = context.create_stream()?;
    let event = context.create_event()?;
    let device = context.allocate(TRIAL_BYTES as u64)?;
    let pinned = context.allocate_pinned(2 * TRIAL_BYTES)?;
    let came_back = there_and_back((device, pinned), |way, copies| {
        // SAFETY: ranges of the two buffers, which are the trial's until it is over.
        unsafe { context.copy_batch(way, copies, stream) }?;
        context.record(event, stream)?;
        wait(context, event)
    });
    context.destroy_event(event)?;
    context.destroy_stream(stream)?;
    if !matches!(came_back, Err(Trial::NeverDone)) {
        // Otherwise the driver may still be at it: the buffers go with the context.
        context.free(device)?;
        context.free_pinned(pinned)?;
    }
    match came_back {
        Ok(same) => Ok(same),
        Err(Trial::NeverDone) => Ok(false),
        Err(Trial::Driver(error)) if error.is_sticky() => Err(error),
        Err(Trial::Driver(error)) => {
            tracing::debug!(%error, "the trial of batched copies");
            Ok(false)
        }
    }
}

/// Why the trial came to no comparison.
enum Trial {
    Driver(DriverError),
    NeverDone,
}

impl From<DriverError> for Trial {
    fn from(error: DriverError) -> Trial {
        Trial::Driver(error)
    }
}

fn wait(context: &CudaContext, event: Event) -> Result<(), Trial> {
    let deadline = Instant::now() + TRIAL_LIMIT;
    while !context.is_done(event)? {
        if Instant::now() > deadline {
            return Err(Trial::NeverDone);
        }
        std::hint::spin_loop();
    }
    Ok(())
}

fn there_and_back(
    (device, pinned): (DevicePtr, PinnedBuffer),
    run: impl Fn(Way, &[BusCopy]) -> Result<(), Trial>,
) -> Result<bool, Trial> {
    let host = pinned.host.as_ptr();
    let sent: Vec<u8> = (0..TRIAL_BYTES).map(|i| (i * 7 + i / 256) as u8).collect();
    let back = host.wrapping_add(TRIAL_BYTES);
    // SAFETY: the buffer has twice TRIAL_BYTES, and no copy is under way.
    unsafe {
        std::ptr::copy_nonoverlapping(sent.as_ptr(), host, TRIAL_BYTES);
        std::ptr::write_bytes(back, 0, TRIAL_BYTES);
    }
    let pieces = |host: *mut u8| {
        [(0, 1000), (1000, 3096), (4096, 4096)].map(|(at, bytes)| BusCopy {
            device: device + at as u64,
            host: host as usize + at,
            bytes,
        })
    };
    run(Way::ToDevice, &pieces(host))?;
    run(Way::ToHost, &pieces(back))?;
    let mut received = vec![0u8; TRIAL_BYTES];
    // SAFETY: as above; both copies are done.
    unsafe { std::ptr::copy_nonoverlapping(back, received.as_mut_ptr(), TRIAL_BYTES) };
    Ok(received == sent)
}
