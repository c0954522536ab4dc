//! A scheduler that goes through the C interface, as an engine in C or Python does.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use pegaflow::ffi::{
    self, PEGA_MODE_READ_WRITE, PEGA_OFF, PEGA_SCHEDULER, pega_client, pega_completion, pega_hash,
    pega_namespace, pega_options, pega_registration,
};
use pegaflow_shm::BlockHash;

use crate::error::ToolError;
use crate::replay::member::Identity;

/// Longest time a request may take, in milliseconds.
const PATIENCE_MS: u64 = 60_000;

/// A connected and registered scheduler.
pub struct CScheduler {
    client: *mut pega_client,
    registration: u32,
}

fn text(bytes: &[u8]) -> Result<CString, ToolError> {
    CString::new(bytes).map_err(|error| ToolError::Io {
        what: "a name with a zero byte".into(),
        source: error.into(),
    })
}

/// Turns a negative return value into the library's words.
fn check(what: &'static str, returned: i32) -> Result<(), ToolError> {
    if returned >= 0 {
        return Ok(());
    }
    // SAFETY: the library answers with a text of this thread that is never NULL and ends with a
    // zero.
    let words = unsafe { std::ffi::CStr::from_ptr(ffi::pega_last_error()) };
    Err(ToolError::Child {
        process: format!("the library, at {what}"),
        what: words.to_string_lossy().into_owned(),
    })
}

impl CScheduler {
    /// Connects, registers and waits until all ranks are there.
    ///
    /// # Errors
    /// The daemon does not answer or refuses, in the library's words.
    pub fn connect(identity: &Identity) -> Result<CScheduler, ToolError> {
        let socket = text(identity.socket.as_os_str().as_bytes())?;
        let instance = text(identity.instance.as_bytes())?;
        let spec = identity.namespace();
        let fields = [&spec.model, &spec.dtype, &spec.hash_algorithm, &spec.salt];
        let [model, dtype, hash_algorithm, salt] = fields.map(|field| text(field.as_bytes()));
        let (model, dtype) = (model?, dtype?);
        let (hash_algorithm, salt) = (hash_algorithm?, salt?);
        let options = pega_options {
            socket: socket.as_ptr(),
            autostart: PEGA_OFF,
            reconnect: PEGA_OFF,
            // SAFETY: a struct of integers and pointers, for which zero is the documented default.
            ..unsafe { std::mem::zeroed() }
        };
        let options = pega_options {
            size: size_of::<pega_options>() as u32,
            ..options
        };
        let mut scheduler = CScheduler {
            client: ptr::null_mut(),
            registration: 0,
        };
        // SAFETY: both arguments point to live structs of the sizes that they name.
        let returned = unsafe { ffi::pega_connect(&options, &mut scheduler.client) };
        check("pega_connect", returned)?;
        let namespace = pega_namespace {
            size: size_of::<pega_namespace>() as u32,
            block_tokens: spec.block_tokens,
            model: model.as_ptr(),
            revision: ptr::null(),
            dtype: dtype.as_ptr(),
            kv_layout: ptr::null(),
            topology: ptr::null(),
            hash_algorithm: hash_algorithm.as_ptr(),
            salt: salt.as_ptr(),
        };
        let registration = pega_registration {
            size: size_of::<pega_registration>() as u32,
            world_size: identity.world_size,
            rank: PEGA_SCHEDULER,
            mode: PEGA_MODE_READ_WRITE,
            instance: instance.as_ptr(),
            ns: &namespace,
            groups: ptr::null(),
            num_groups: 0,
            reserved: 0,
        };
        let (client, id) = (scheduler.client, &mut scheduler.registration);
        // SAFETY: the handle is connected; the structs and the texts they name are alive.
        let returned = unsafe { ffi::pega_register(client, &registration, id) };
        check("pega_register", returned)?;
        // SAFETY: the handle is connected.
        let returned = unsafe { ffi::pega_wait_ready(client, *id, PATIENCE_MS) };
        check("pega_wait_ready", returned)?;
        Ok(scheduler)
    }

    /// Blocks at the front of `hashes` that the shared index shows.
    ///
    /// # Errors
    /// The library refused.
    pub fn probe(&self, hashes: &[BlockHash]) -> Result<u32, ToolError> {
        let mut hits = 0;
        let (names, count) = (hashes.as_ptr().cast::<pega_hash>(), hashes.len());
        let (client, id) = (self.client, self.registration);
        // SAFETY: the handle is connected, and `count` hashes of 32 bytes lie at `names`.
        let returned = unsafe { ffi::pega_probe(client, id, 0, names, count, &mut hits) };
        check("pega_probe", returned).map(|()| hits)
    }

    /// Pins the cached prefix of `hashes` and waits for the answer.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    #[inline]
    pub fn query(&self, key: u64, hashes: &[BlockHash]) -> Result<pega_completion, ToolError> {
        let mut request = 0;
        let (names, count) = (hashes.as_ptr().cast::<pega_hash>(), hashes.len());
        let (client, id, bits) = (self.client, self.registration, ptr::null_mut());
        // SAFETY: the handle is connected, `count` hashes lie at `names`, and group 0 needs no
        // bitmap.
        let returned =
            unsafe { ffi::pega_query(client, id, 0, key, names, count, 0, bits, 0, &mut request) };
        check("pega_query", returned)?;
        self.wait(request)
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn release(&self, lease: u64) -> Result<pega_completion, ToolError> {
        let mut request = 0;
        let (client, id) = (self.client, self.registration);
        // SAFETY: the handle is connected.
        let returned = unsafe { ffi::pega_release(client, id, lease, &mut request) };
        check("pega_release", returned)?;
        self.wait(request)
    }

    #[inline]
    fn wait(&self, request: u64) -> Result<pega_completion, ToolError> {
        let mut done = pega_completion {
            size: size_of::<pega_completion>() as u32,
            ..pega_completion::default()
        };
        // SAFETY: the handle is connected and `done` has the size that it names.
        let returned = unsafe { ffi::pega_wait(self.client, request, PATIENCE_MS, &mut done) };
        check("pega_wait", returned).map(|()| done)
    }
}

impl Drop for CScheduler {
    fn drop(&mut self) {
        // SAFETY: the handle is NULL or connected, and nobody uses it after this.
        unsafe { ffi::pega_disconnect(self.client) };
    }
}
