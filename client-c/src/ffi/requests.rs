//! Probes and submissions.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use super::guard::exports;
use super::pointers::{array, array_mut, handle, null, put, read_sized};
use super::types::*;
use crate::requests::Draft;
use crate::{BlockHash, Error, Fetch, Order, RegistrationId, RequestId};

exports! {
    /// Length of the cached prefix, by reading memory.
    try fn pega_probe(
        client: *mut pega_client, registration: u32, group: u16,
        hashes: *const pega_hash, count: usize, hits: *mut u32,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes, a place for the
        // answer.
        unsafe {
            let (client, hashes) = (&handle(client)?.client, read_hashes(hashes, count)?);
            put(hits, client.probe(RegistrationId(registration), group, hashes)?, "hits")?;
        }
        Ok(0)
    }

    /// Which blocks are cached, by reading memory.
    try fn pega_probe_membership(
        client: *mut pega_client, registration: u32, group: u16,
        hashes: *const pega_hash, count: usize,
        bitmap: *mut u64, bitmap_words: usize, hits: *mut u32,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes, `bitmap_words` words,
        // a place for the answer.
        unsafe {
            let (client, hashes) = (&handle(client)?.client, read_hashes(hashes, count)?);
            let bitmap = array_mut(bitmap, bitmap_words, "bitmap")?;
            let id = RegistrationId(registration);
            put(hits, client.probe_membership(id, group, hashes, bitmap)?, "hits")?;
        }
        Ok(0)
    }

    /// Pins cached blocks.
    try fn pega_query(
        client: *mut pega_client, registration: u32, group: u16, key: u64,
        hashes: *const pega_hash, count: usize, ttl_ms: u64,
        bitmap: *mut u64, bitmap_words: usize, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes; `bitmap` is only
        // remembered here.
        let hashes = unsafe { read_hashes(hashes, count)? };
        check_bitmap(group, count, bitmap, bitmap_words)?;
        let draft = Draft::query(RegistrationId(registration), group, key, hashes, ttl_ms);
        let cookie = bitmap.expose_provenance() as u64;
        // SAFETY: as above, and a place for the answer.
        unsafe { submit(client, draft.with_cookie(cookie), request) }
    }

    /// Pins cached blocks, those below the pool as the options say.
    try fn pega_query_with(
        client: *mut pega_client, registration: u32, group: u16, key: u64,
        hashes: *const pega_hash, count: usize, options: *const pega_query_options,
        bitmap: *mut u64, bitmap_words: usize, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes, NULL or options, a
        // place for the answer; `bitmap` is only remembered here.
        unsafe {
            let hashes = read_hashes(hashes, count)?;
            let (ttl_ms, fetch) = read_query_options(options)?;
            check_bitmap(group, count, bitmap, bitmap_words)?;
            let draft = Draft::query(RegistrationId(registration), group, key, hashes, ttl_ms);
            let cookie = bitmap.expose_provenance() as u64;
            submit(client, draft.with_fetch(fetch).with_cookie(cookie), request)
        }
    }

    /// Copies a lease's pages into the engine's blocks.
    try fn pega_load(
        client: *mut pega_client, registration: u32, group: u16, lease: u64, first: u32,
        blocks: *const u32, count: usize, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` ids, a place for the answer.
        unsafe {
            let blocks = array(blocks, count, "blocks")?;
            let draft = Draft::load(RegistrationId(registration), group, lease, first, blocks);
            submit(client, draft, request)
        }
    }

    /// Copies blocks into the pool.
    try fn pega_save(
        client: *mut pega_client, registration: u32, group: u16,
        hashes: *const pega_hash, blocks: *const u32, count: usize, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes and ids, a place for
        // the answer.
        unsafe {
            let (hashes, blocks) = (read_hashes(hashes, count)?, array(blocks, count, "blocks")?);
            let draft = Draft::save(RegistrationId(registration), group, hashes, blocks);
            submit(client, draft, request)
        }
    }

    /// Copies a lease's pages into the engine's blocks once something is through with them.
    try fn pega_load_after(
        client: *mut pega_client, registration: u32, group: u16, lease: u64, first: u32,
        blocks: *const u32, count: usize, after: *const pega_order, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` ids, NULL or an order whose
        // stream or event lives, a place for the answer.
        unsafe {
            let (blocks, after) = (array(blocks, count, "blocks")?, read_order(after)?);
            let draft = Draft::load(RegistrationId(registration), group, lease, first, blocks);
            submit_after(client, draft, after, request)
        }
    }

    /// As `pega_load_after`, in steps for which streams can wait.
    try fn pega_load_in_steps(
        client: *mut pega_client, registration: u32, group: u16, lease: u64, first: u32,
        blocks: *const u32, count: usize, after: *const pega_order, steps: u32,
        request: *mut u64,
    ) -> c_int {
        let in_range = u16::try_from(steps).ok().filter(|steps| *steps > 0);
        let Some(steps) = in_range else {
            let way_out = "give 1 up to the number of the group's segments, at most 256";
            return Err(Error::argument("steps", steps.to_string(), way_out));
        };
        // SAFETY: by the header: a handle of `pega_connect`, `count` ids, NULL or an order whose
        // stream or event lives, a place for the answer.
        unsafe {
            let (blocks, after) = (array(blocks, count, "blocks")?, read_order(after)?);
            let draft = Draft::load(RegistrationId(registration), group, lease, first, blocks);
            submit_after(client, draft.in_steps(steps), after, request)
        }
    }

    /// Makes a stream wait for the first steps of a load.
    try fn pega_stream_wait(
        client: *mut pega_client, request: u64, steps: u32, stream: *mut c_void,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, a stream that lives.
        unsafe {
            let client = &handle(client)?.client;
            client.stream_wait(RequestId(request), steps, Order::stream(stream))?;
        }
        Ok(0)
    }

    /// Copies blocks into the pool once something has written them.
    try fn pega_save_after(
        client: *mut pega_client, registration: u32, group: u16,
        hashes: *const pega_hash, blocks: *const u32, count: usize,
        after: *const pega_order, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, `count` hashes and ids, NULL or an
        // order whose stream or event lives, a place for the answer.
        unsafe {
            let (hashes, blocks) = (read_hashes(hashes, count)?, array(blocks, count, "blocks")?);
            let draft = Draft::save(RegistrationId(registration), group, hashes, blocks);
            submit_after(client, draft, read_order(after)?, request)
        }
    }

    /// Gives a lease back.
    try fn pega_release(
        client: *mut pega_client, registration: u32, lease: u64, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, a place for the answer.
        unsafe { submit(client, Draft::release(RegistrationId(registration), lease), request) }
    }

    /// Extends a lease.
    try fn pega_renew(
        client: *mut pega_client, registration: u32, lease: u64, ttl_ms: u64, request: *mut u64,
    ) -> c_int {
        let draft = Draft::renew(RegistrationId(registration), lease, ttl_ms);
        // SAFETY: by the header: a handle of `pega_connect`, a place for the answer.
        unsafe { submit(client, draft, request) }
    }

    /// Asks to cancel a request.
    try fn pega_cancel(
        client: *mut pega_client, cancelled: u64, request: *mut u64,
    ) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, a place for the answer.
        unsafe { submit(client, Draft::cancel(RequestId(cancelled)), request) }
    }

    /// Does nothing, there and back.
    try fn pega_nop(client: *mut pega_client, request: *mut u64) -> c_int {
        // SAFETY: by the header: a handle of `pega_connect`, a place for the answer.
        unsafe { submit(client, Draft::nop(), request) }
    }
}

/// # Safety
/// `client` is a handle of `pega_connect`, `request` NULL or writable.
unsafe fn submit(
    client: *mut pega_client,
    draft: Draft<'_>,
    request: *mut u64,
) -> Result<c_int, Error> {
    // SAFETY: the caller's promise.
    unsafe { submit_after(client, draft, Order::NONE, request) }
}

/// # Safety
/// As for [`submit`].
unsafe fn submit_after(
    client: *mut pega_client,
    draft: Draft<'_>,
    after: Order,
    request: *mut u64,
) -> Result<c_int, Error> {
    if request.is_null() {
        return Err(null("request"));
    }
    // SAFETY: the caller's promise.
    unsafe {
        let id = handle(client)?
            .client
            .shared()
            .submit_after(&draft, after)?;
        put(request, id.0, "request")?;
    }
    Ok(0)
}

/// # Safety
/// `order` is NULL or as `pegaflow.h` says, and the stream or event that it names lives.
unsafe fn read_order(order: *const pega_order) -> Result<Order, Error> {
    if order.is_null() {
        return Ok(Order::NONE);
    }
    // SAFETY: the caller's promise.
    unsafe {
        let pega_order { kind, handle, .. } = read_sized(order)?;
        match kind {
            PEGA_ORDER_NONE => Ok(Order::NONE),
            PEGA_ORDER_STREAM => Ok(Order::stream(handle)),
            PEGA_ORDER_EVENT if handle.is_null() => Err(null("order.handle")),
            PEGA_ORDER_EVENT => Ok(Order::event(handle)),
            other => {
                let way_out = "PEGA_ORDER_NONE, PEGA_ORDER_STREAM or PEGA_ORDER_EVENT";
                Err(Error::argument("order.kind", other.to_string(), way_out))
            }
        }
    }
}

fn check_bitmap(group: u16, count: usize, bitmap: *mut u64, words: usize) -> Result<(), Error> {
    if group != 0 && (bitmap.is_null() || words < count.div_ceil(64)) {
        let value = format!("{bitmap:p} of {words} words for {count} positions");
        let way_out = "a query of another group than 0 needs a bit for each hash";
        return Err(Error::argument("bitmap", value, way_out));
    }
    Ok(())
}

/// # Safety
/// `options` is NULL or as `pegaflow.h` says.
unsafe fn read_query_options(options: *const pega_query_options) -> Result<(u64, Fetch), Error> {
    if options.is_null() {
        return Ok((0, Fetch::Poll));
    }
    // SAFETY: the caller's promise.
    let pega_query_options {
        fetch,
        ttl_ms,
        limit_ms,
        ..
    } = unsafe { read_sized(options)? };
    let fetch = match (fetch, limit_ms) {
        (PEGA_FETCH_POLL, 0) => Fetch::Poll,
        (PEGA_FETCH_NEVER, 0) => Fetch::Never,
        (PEGA_FETCH_WAIT, 0) => Fetch::Wait(None),
        (PEGA_FETCH_WAIT, limit) => Fetch::Wait(Some(Duration::from_millis(limit))),
        (PEGA_FETCH_POLL | PEGA_FETCH_NEVER, limit) => {
            let way_out = "only PEGA_FETCH_WAIT has a limit";
            return Err(Error::argument(
                "options.limit_ms",
                limit.to_string(),
                way_out,
            ));
        }
        (other, _) => {
            let way_out = "PEGA_FETCH_POLL, PEGA_FETCH_NEVER or PEGA_FETCH_WAIT";
            return Err(Error::argument("options.fetch", other.to_string(), way_out));
        }
    };
    Ok((ttl_ms, fetch))
}

/// # Safety
/// As for [`fn@array`].
unsafe fn read_hashes<'a>(
    hashes: *const pega_hash,
    count: usize,
) -> Result<&'a [BlockHash], Error> {
    // SAFETY: the caller's promise; a `pega_hash` is 32 bytes and nothing else.
    unsafe { array(hashes.cast::<BlockHash>(), count, "hashes") }
}
