//! Connecting, disconnecting, state.

use std::collections::BTreeMap;
use std::ffi::{CString, c_int, c_void};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use super::guard::exports;
use super::pointers::{handle, init_sized, null, put, read_sized, text, write_sized};
use super::types::*;
use crate::{Client, Error, Log, LogLevel, Options};

exports! {
    /// Fills options with the defaults.
    try fn pega_options_init(options: *mut pega_options, size: u32) -> c_int {
        // SAFETY: by the header, `options` has room for `size` bytes.
        unsafe {
            init_sized(options, size, &defaults())?;
        }
        Ok(0)
    }

    /// Connects to the node's daemon.
    try fn pega_connect(options: *const pega_options, client: *mut *mut pega_client) -> c_int {
        if client.is_null() {
            return Err(null("client"));
        }
        // SAFETY: by the header, `client` is writable and `options` NULL or a sized struct.
        unsafe {
            client.write_unaligned(std::ptr::null_mut());
            let connected = Client::connect(read_options(options)?)?;
            let hosts = Mutex::new(BTreeMap::new());
            let boxed = Box::new(pega_client { client: connected, hosts });
            put(client, Box::into_raw(boxed), "client")?;
        }
        Ok(0)
    }

    /// Ends a client.
    try fn pega_disconnect(client: *mut pega_client) -> c_int {
        if !client.is_null() {
            // SAFETY: by the header, the handle came from `pega_connect`, and nobody uses it now
            // or later.
            drop(unsafe { Box::from_raw(client) });
        }
        Ok(0)
    }

    /// Whether the daemon can be reached.
    try fn pega_state(client: *const pega_client) -> c_int {
        // SAFETY: by the header, the handle came from `pega_connect`.
        let handle = unsafe { handle(client)? };
        handle.client.check_process()?;
        Ok(handle.client.state() as c_int)
    }

    /// Counters.
    try fn pega_get_stats(client: *const pega_client, stats: *mut pega_stats) -> c_int {
        // SAFETY: by the header, the handle came from `pega_connect` and `stats` is a sized struct.
        unsafe {
            let client = &handle(client)?.client;
            client.check_process()?;
            write_sized(stats, &stats_of(client))?;
        }
        Ok(0)
    }

    /// The largest lists.
    try fn pega_get_limits(client: *const pega_client, limits: *mut pega_limits) -> c_int {
        // SAFETY: by the header, the handle came from `pega_connect` and `limits` is a sized
        // struct.
        unsafe {
            let client = &handle(client)?.client;
            client.check_process()?;
            write_sized(limits, &limits_of(client))?;
        }
        Ok(0)
    }
}

fn defaults() -> pega_options {
    let options = Options::default();
    pega_options {
        size: size_of::<pega_options>() as u32,
        ring_slots: options.ring_slots,
        node: std::ptr::null(),
        socket: std::ptr::null(),
        client_name: std::ptr::null(),
        daemon: std::ptr::null(),
        arena_bytes: options.arena_bytes as u64,
        connect_timeout_ms: options.connect_timeout.as_millis() as u64,
        control_timeout_ms: options.control_timeout.as_millis() as u64,
        spin_ns: options.spin.as_nanos() as u64,
        completion_slots: options.completion_slots,
        autostart: PEGA_DEFAULT,
        reconnect: PEGA_DEFAULT,
        no_spin: PEGA_DEFAULT,
        start_without_daemon: PEGA_DEFAULT,
        log_level: PEGA_DEFAULT,
        log: None,
        log_user: std::ptr::null_mut(),
    }
}

/// # Safety
/// As for [`read_sized`], and the texts end in zero bytes.
unsafe fn read_options(options: *const pega_options) -> Result<Options, Error> {
    let mut result = Options::default();
    if options.is_null() {
        return Ok(result);
    }
    // SAFETY: the caller's promise.
    let given = unsafe { read_sized(options)? };
    // SAFETY: the caller's promise.
    unsafe {
        result.node = text(given.node, "node")?;
        result.socket = text(given.socket, "socket")?.map(PathBuf::from);
        result.client_name = text(given.client_name, "client_name")?.unwrap_or_default();
        result.daemon = text(given.daemon, "daemon")?.map(PathBuf::from);
    }
    let pick = |value: u64, default: Duration, unit: fn(u64) -> Duration| {
        if value == 0 { default } else { unit(value) }
    };
    result.connect_timeout = pick(
        given.connect_timeout_ms,
        result.connect_timeout,
        bounded_millis,
    );
    result.control_timeout = pick(
        given.control_timeout_ms,
        result.control_timeout,
        bounded_millis,
    );
    result.spin = pick(given.spin_ns, result.spin, Duration::from_nanos);
    if switch("no_spin", given.no_spin)? == Some(true) {
        result.spin = Duration::ZERO;
    }
    if given.arena_bytes != 0 {
        result.arena_bytes = usize::try_from(given.arena_bytes).unwrap_or(usize::MAX);
    }
    if given.ring_slots != 0 {
        result.ring_slots = given.ring_slots;
    }
    if given.completion_slots != 0 {
        result.completion_slots = given.completion_slots;
    }
    result.autostart = switch("autostart", given.autostart)?;
    result.reconnect = switch("reconnect", given.reconnect)?.unwrap_or(true);
    result.start_without_daemon = switch("start_without_daemon", given.start_without_daemon)?;
    result.log_level = log_level(given.log_level)?;
    result.log = log(given.log, given.log_user);
    Ok(result)
}

fn log_level(value: u32) -> Result<Option<LogLevel>, Error> {
    match value {
        PEGA_DEFAULT => Ok(None),
        PEGA_LOG_OFF => Ok(Some(LogLevel::Off)),
        PEGA_LOG_WARN => Ok(Some(LogLevel::Warn)),
        PEGA_LOG_INFO => Ok(Some(LogLevel::Info)),
        other => {
            let way_out = "PEGA_LOG_OFF, PEGA_LOG_WARN or PEGA_LOG_INFO";
            Err(Error::argument("log_level", other.to_string(), way_out))
        }
    }
}

fn log(function: pega_log_fn, user: *mut c_void) -> Option<Log> {
    let function = function?;
    let user = user.expose_provenance();
    Some(Log::new(move |level, line| {
        let line: Vec<u8> = line.bytes().filter(|byte| *byte != 0).collect();
        let line = CString::new(line).unwrap_or_default();
        let user = std::ptr::with_exposed_provenance_mut(user);
        // SAFETY: by the header, the function takes the pointer that was given with it and a text,
        // on any thread, until `pega_disconnect` has returned.
        unsafe { function(user, level as u32, line.as_ptr()) }
    }))
}

/// Milliseconds, at most some decades, so that a deadline can be computed.
pub(super) fn bounded_millis(ms: u64) -> Duration {
    Duration::from_millis(ms.min(u64::from(u32::MAX) * 1000))
}

pub(super) fn switch(name: &'static str, value: u32) -> Result<Option<bool>, Error> {
    match value {
        PEGA_DEFAULT => Ok(None),
        PEGA_ON => Ok(Some(true)),
        PEGA_OFF => Ok(Some(false)),
        other => Err(Error::argument(
            name,
            other.to_string(),
            "PEGA_DEFAULT, PEGA_ON or PEGA_OFF",
        )),
    }
}

fn stats_of(client: &Client) -> pega_stats {
    let stats = client.stats();
    pega_stats {
        size: size_of::<pega_stats>() as u32,
        state: client.state() as u32,
        submitted: stats.submitted,
        completed: stats.completed,
        failed: stats.failed,
        again: stats.again,
        probes: stats.probes,
        probed_blocks: stats.probed_blocks,
        probe_hits: stats.probe_hits,
        loaded_bytes: stats.loaded_bytes,
        saved_bytes: stats.saved_bytes,
        disconnects: stats.disconnects,
        reconnects: stats.reconnects,
        outstanding: stats.outstanding,
        away_ms: stats.away_ms,
        failed_attempts: stats.failed_attempts,
        refused_registrations: stats.refused_registrations,
        waited_orders: stats.waited_orders,
    }
}

fn limits_of(client: &Client) -> pega_limits {
    let limits = client.limits();
    pega_limits {
        size: size_of::<pega_limits>() as u32,
        reserved: 0,
        query_hashes: limits.query_hashes as u64,
        membership_hashes: limits.membership_hashes as u64,
        save_blocks: limits.save_blocks as u64,
        load_blocks: limits.load_blocks as u64,
        requests: limits.requests as u64,
    }
}
