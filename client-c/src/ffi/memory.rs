//! Host memory and registrations.

use std::ffi::{c_int, c_void};
use std::sync::PoisonError;

use super::connect::{bounded_millis, switch};
use super::guard::exports;
use super::pointers::{handle, null, put, read_element, read_sized, text};
use super::types::*;
use crate::{
    Error, GroupMemory, MemoryKind, Mode, NamespaceSpec, Registration, RegistrationId,
    SegmentMemory,
};

exports! {
    /// Allocates memory that the daemon maps too.
    try fn pega_alloc_host(
        client: *mut pega_client, bytes: u64, memory: *mut *mut c_void,
    ) -> c_int {
        if memory.is_null() {
            return Err(null("memory"));
        }
        // SAFETY: by the header, the handle came from `pega_connect` and `memory` is writable.
        unsafe {
            memory.write_unaligned(std::ptr::null_mut());
            let handle = handle(client)?;
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            let host = handle.client.alloc_host(bytes)?;
            let address = host.as_ptr();
            let mut hosts = handle.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            hosts.insert(address.addr(), host);
            put(memory, address.cast::<c_void>(), "memory")?;
        }
        Ok(0)
    }

    /// Frees it.
    try fn pega_free_host(client: *mut pega_client, memory: *mut c_void) -> c_int {
        if memory.is_null() {
            return Ok(0);
        }
        // SAFETY: by the header, the handle came from `pega_connect`.
        let handle = unsafe { handle(client)? };
        handle.client.check_process()?;
        let mut hosts = handle.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let value = || format!("{memory:p}");
        let Some(host) = hosts.get(&memory.addr()) else {
            let way_out = "is no address that pega_alloc_host of this client gave";
            return Err(Error::argument("memory", value(), way_out));
        };
        // Not by counting: the keeper holds regions while it tells a daemon of them.
        if handle.client.shared().uses_region(&host.region) {
            let way_out = "a registration uses it: pega_unregister first";
            return Err(Error::argument("memory", value(), way_out));
        }
        let host = hosts.remove(&memory.addr());
        drop(hosts);
        drop(host);
        Ok(0)
    }

    /// Registers a rank or a scheduler.
    try fn pega_register(
        client: *mut pega_client, spec: *const pega_registration, registration: *mut u32,
    ) -> c_int {
        if registration.is_null() {
            return Err(null("registration"));
        }
        // SAFETY: by the header, the handle came from `pega_connect`, `spec` is as described there,
        // and its memory outlives the registration.
        unsafe {
            let handle = handle(client)?;
            let id = handle.client.register(&read_registration(spec)?)?;
            put(registration, id.0, "registration")?;
        }
        Ok(0)
    }

    /// Ends a registration.
    try fn pega_unregister(client: *mut pega_client, registration: u32) -> c_int {
        // SAFETY: by the header, the handle came from `pega_connect`.
        let handle = unsafe { handle(client)? };
        handle.client.unregister(RegistrationId(registration))?;
        Ok(0)
    }

    /// Waits until the instance is complete.
    try fn pega_wait_ready(
        client: *mut pega_client, registration: u32, timeout_ms: u64,
    ) -> c_int {
        // SAFETY: by the header, the handle came from `pega_connect`.
        let handle = unsafe { handle(client)? };
        handle.client.wait_ready(RegistrationId(registration), bounded_millis(timeout_ms))?;
        Ok(0)
    }
}

/// # Safety
/// `spec` and what it points at are as `pegaflow.h` says.
unsafe fn read_registration(spec: *const pega_registration) -> Result<Registration, Error> {
    // SAFETY: the caller's promise, here and below.
    let spec = unsafe { read_sized(spec)? };
    let mode = match spec.mode {
        PEGA_MODE_READ_WRITE => Mode::ReadWrite,
        PEGA_MODE_SAVE_ONLY => Mode::SaveOnly,
        other => {
            let way_out = "PEGA_MODE_READ_WRITE or PEGA_MODE_SAVE_ONLY";
            return Err(Error::argument("mode", other.to_string(), way_out));
        }
    };
    let rank = match spec.rank {
        PEGA_SCHEDULER => None,
        rank => Some(u32::try_from(rank).map_err(|_| {
            Error::argument("rank", rank.to_string(), "0 or more, or PEGA_SCHEDULER")
        })?),
    };
    // SAFETY: the caller's promise.
    let (instance, namespace) =
        unsafe { (text(spec.instance, "instance")?, read_namespace(spec.ns)?) };
    let groups = (0..spec.num_groups as usize)
        // SAFETY: the caller's promise: there are `num_groups` of them.
        .map(|at| unsafe { read_group(spec.groups, at) })
        .collect::<Result<Vec<_>, Error>>()?;
    let instance = instance.unwrap_or_default();
    Ok(Registration {
        instance,
        namespace,
        world_size: spec.world_size,
        rank,
        mode,
        groups,
    })
}

/// # Safety
/// As for [`read_registration`].
unsafe fn read_namespace(namespace: *const pega_namespace) -> Result<NamespaceSpec, Error> {
    // SAFETY: the caller's promise.
    unsafe {
        let given = read_sized(namespace)?;
        Ok(NamespaceSpec {
            model: text(given.model, "model")?.unwrap_or_default(),
            revision: text(given.revision, "revision")?.unwrap_or_default(),
            dtype: text(given.dtype, "dtype")?.unwrap_or_default(),
            kv_layout: text(given.kv_layout, "kv_layout")?.unwrap_or_default(),
            topology: text(given.topology, "topology")?.unwrap_or_default(),
            hash_algorithm: text(given.hash_algorithm, "hash_algorithm")?.unwrap_or_default(),
            salt: text(given.salt, "salt")?.unwrap_or_default(),
            block_tokens: given.block_tokens,
        })
    }
}

/// # Safety
/// As for [`read_registration`]: there are more than `at` groups.
unsafe fn read_group(groups: *const pega_group, at: usize) -> Result<GroupMemory, Error> {
    // SAFETY: the caller's promise.
    let given = unsafe { read_element(groups, at)? };
    let group = u16::try_from(given.group)
        .map_err(|_| Error::argument("group", given.group.to_string(), "0 to 65535"))?;
    let read_segment = |at| {
        // SAFETY: the caller's promise: there are `num_segments` of them.
        let segment = unsafe { read_element(given.segments, at)? };
        let kind = match segment.memory {
            PEGA_MEMORY_AUTO => MemoryKind::Auto,
            PEGA_MEMORY_HOST => MemoryKind::Host,
            PEGA_MEMORY_CUDA => MemoryKind::Cuda,
            other => {
                let way_out = "PEGA_MEMORY_AUTO, PEGA_MEMORY_HOST or PEGA_MEMORY_CUDA";
                return Err(Error::argument("memory", other.to_string(), way_out));
            }
        };
        let address = segment.address.cast::<u8>();
        // SAFETY: by the header, the memory stays mapped and is the daemon's to read and write
        // while the registration lasts.
        let place = unsafe { SegmentMemory::at(address, segment.block_stride, segment.bytes) };
        Ok(place.of_kind(kind))
    };
    let segments = (0..given.num_segments as usize)
        .map(read_segment)
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(GroupMemory {
        group,
        num_blocks: given.num_blocks,
        segments,
        replicated: switch("replicated", given.replicated)? == Some(true),
    })
}

#[cfg(test)]
mod tests {
    use std::ptr::null_mut;

    use super::*;
    use crate::fake::Fake;
    use crate::ffi::connect::{pega_connect, pega_disconnect};

    #[test]
    fn memory_can_be_freed_while_the_keeper_tells_a_daemon_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("test.sock");
        let _fake = Fake::start(&socket);
        let path = std::ffi::CString::new(socket.to_str().unwrap()).unwrap();
        // SAFETY: zeros are the defaults, the path outlives the call, all places are valid.
        unsafe {
            let mut options: pega_options = std::mem::zeroed();
            options.size = size_of::<pega_options>() as u32;
            options.socket = path.as_ptr();
            let (mut client, mut memory) = (null_mut(), null_mut());
            assert_eq!(pega_connect(&options, &mut client), 0);
            assert_eq!(pega_alloc_host(client, 4096, &mut memory), 0);
            let told = handle(client).unwrap().client.shared().live_regions();
            assert_eq!(told.len(), 1);
            assert_eq!(pega_free_host(client, memory), 0);
            drop(told);
            assert_eq!(pega_disconnect(client), 0);
        }
    }
}
