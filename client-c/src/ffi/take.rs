//! Completions: polling, waiting, the descriptor.

use std::cell::RefCell;
use std::ffi::c_int;
use std::os::fd::AsRawFd;

use super::connect::bounded_millis;
use super::guard::exports;
use super::pointers::{array_mut, handle, null, put};
use super::types::*;
use crate::{Completion, RequestId};

thread_local! {
    /// Completions on their way out; keeps its room from call to call.
    static TAKEN: RefCell<Vec<Completion>> = const { RefCell::new(Vec::new()) };
}

exports! {
    /// Takes finished requests.
    try fn pega_poll(
        client: *mut pega_client, completions: *mut pega_completion, capacity: usize,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, room for `capacity` completions.
        let (handle, out) =
            unsafe { (handle(client)?, array_mut(completions, capacity, "completions")?) };
        handle.client.check_process()?;
        let limit = out.len().min(c_int::MAX as usize);
        let count = TAKEN.with_borrow_mut(|taken| {
            taken.clear();
            handle.client.shared().poll_list(limit, taken);
            for (place, completion) in out.iter_mut().zip(taken.iter()) {
                *place = hand_out(completion);
            }
            let count = taken.len();
            taken.clear();
            count
        });
        Ok(count as c_int)
    }

    /// Waits for one request.
    try fn pega_wait(
        client: *mut pega_client, request: u64, timeout_ms: u64,
        completion: *mut pega_completion,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, a place for the answer, checked before
        // the completion is consumed.
        unsafe {
            let place = array_mut(completion, 1, "completion")?;
            let handle = handle(client)?;
            let done = handle.client.wait(RequestId(request), bounded_millis(timeout_ms))?;
            put(place.as_mut_ptr(), hand_out(&done), "completion")?;
        }
        Ok(0)
    }

    /// The blocks of a load that failed.
    try fn pega_unloaded_blocks(
        client: *mut pega_client, request: u64, blocks: *mut u32, capacity: usize,
        count: *mut usize,
    ) -> c_int {
        if count.is_null() {
            return Err(null("count"));
        }
        // SAFETY: by the header: a handle of `pega_connect`, room for `capacity` ids and for the
        // count.
        unsafe {
            let out = array_mut(blocks, capacity, "blocks")?;
            let client = &handle(client)?.client;
            let all = client.shared().unloaded_blocks(RequestId(request), |blocks| {
                let known = blocks.len().min(out.len());
                out[..known].copy_from_slice(&blocks[..known]);
                blocks.len()
            })?;
            put(count, all, "count")?;
        }
        Ok(0)
    }

    /// The descriptor for an event loop.
    try fn pega_completion_fd(client: *mut pega_client) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`.
        let handle = unsafe { handle(client)? };
        handle.client.check_process()?;
        Ok(handle.client.completion_fd().as_raw_fd())
    }
}

/// Turns a completion into the caller's struct, and puts its bitmap where the query said.
fn hand_out(completion: &Completion) -> pega_completion {
    if let Some(bitmap) = &completion.bitmap {
        let target = std::ptr::with_exposed_provenance_mut::<u64>(completion.cookie as usize);
        // SAFETY: `pega_query` checked that it got a bitmap of so many words, and by the header the
        // caller leaves it alone until the completion is consumed, which is now. It was aligned by
        // its type, or is copied byte by byte all the same.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bitmap.as_ptr().cast::<u8>(),
                target.cast::<u8>(),
                size_of_val(&**bitmap),
            );
        }
    }
    pega_completion {
        size: size_of::<pega_completion>() as u32,
        op: completion.op as u32,
        status: completion.status as u32,
        reason: completion.reason as u32,
        request: completion.request.0,
        lease: completion.lease,
        count: completion.count,
        skipped: completion.skipped,
        dropped: completion.dropped,
        bytes: completion.bytes,
        value: completion.arg0,
        daemon_ns: completion.daemon_ns,
        ..pega_completion::default()
    }
}
