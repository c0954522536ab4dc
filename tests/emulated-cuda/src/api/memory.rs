//! Device memory: allocations, IPC handles, what lies at an address.

use std::sync::Arc;

use super::event::Handle;
use super::exported;
use super::pointers::{In, Out, at, set_attribute};
use crate::code::{Code, Outcome};
use crate::context::Context;
use crate::driver::{Driver, driver};
use crate::ranges::{Origin, Range};
use crate::storage::{Kind, Name, Object};

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY_PEER_ACCESS: u32 = 1;
/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
const HOST_MEMORY: u32 = 1;
const DEVICE_MEMORY: u32 = 2;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const POSIX_DESCRIPTOR: u32 = 1;

/// Gives an object an address of its own in a context.
fn place(driver: &Driver, context: &Context, object: Object, origin: Origin) -> Outcome<u64> {
    let mut state = driver.lock();
    let bytes = object.bytes as u64;
    let address = state.ranges.take_addresses(bytes, 1)?;
    let buffer_id = state.handle();
    state.ranges.device.insert(
        address,
        Range {
            bytes,
            object: Arc::new(object),
            context: context.id,
            origin,
            buffer_id,
        },
    );
    Ok(address)
}

fn allocate(out: &Out<u64>, bytes: usize, kind: Kind) -> Outcome {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let driver = driver()?;
    let context = driver.current()?;
    let object = driver.create(kind, context.device, bytes)?;
    out.set(place(driver, &context, object, Origin::Own)?)
}

/// Frees what was allocated here; the device is idle then, as after the driver's own call.
fn free(address: u64) -> Outcome {
    let driver = driver()?;
    driver.current()?.synchronize()?;
    let mut state = driver.lock();
    let own = |range: &Range| range.origin == Origin::Own;
    if !state.ranges.device.get(&address).is_some_and(own) {
        return Err(Code::INVALID_VALUE);
    }
    let range = state.ranges.device.remove(&address);
    drop(state);
    range
        .into_iter()
        .for_each(|range| driver.storage().free(&range.object));
    Ok(())
}

/// Opens another process's allocation, or once more what is open already.
fn open(driver: &Driver, context: &Context, handle: &[u8; 64]) -> Outcome<u64> {
    let name = Name::from_handle(handle).ok_or(Code::INVALID_VALUE)?;
    if name.kind != Kind::Memory {
        return Err(Code::INVALID_VALUE);
    }
    if name.pid == std::process::id() {
        return Err(Code::INVALID_CONTEXT);
    }
    if name.device != context.device {
        return Err(Code::INVALID_DEVICE);
    }
    {
        let mut state = driver.lock();
        let mut ranges = state.ranges.device.iter_mut();
        let known = ranges.find(|(_, range)| range.object.name == name);
        if let Some((address, range)) = known
            && let Origin::Imported(times) = &mut range.origin
        {
            *times += 1;
            return Ok(*address);
        }
    }
    let object = driver.storage().open(name).ok_or(Code::INVALID_VALUE)?;
    place(driver, context, object, Origin::Imported(1))
}

fn attribute(driver: &Driver, out: &Out<u8>, wanted: u32, address: u64) -> Outcome {
    let state = driver.lock();
    let Some((start, range)) = state.ranges.find(address) else {
        let Some((start, host)) = state.ranges.find_host(address) else {
            return Err(Code::INVALID_VALUE);
        };
        return match wanted {
            2 => set_attribute(out, HOST_MEMORY),
            3 | 4 => set_attribute(out, address),
            11 => set_attribute(out, start),
            12 => set_attribute(out, host.bytes as usize),
            _ => Err(Code::INVALID_VALUE),
        };
    };
    let name = range.object.name;
    let mapped = matches!(range.origin, Origin::Mapped { .. });
    // Attributes in the order of the driver's list; booleans have four bytes.
    match wanted {
        1 if mapped => set_attribute(out, 0_u64),
        1 => set_attribute(out, range.context),
        2 => set_attribute(out, DEVICE_MEMORY),
        3 => set_attribute(out, address),
        7 => set_attribute(out, range.buffer_id),
        8 => set_attribute(out, 0_u32),
        9 => set_attribute(
            out,
            driver.ordinal(name.device).ok_or(Code::INVALID_DEVICE)?,
        ),
        10 => set_attribute(out, u32::from(name.kind == Kind::Memory)),
        11 => set_attribute(out, start),
        12 => set_attribute(out, range.bytes as usize),
        13 => set_attribute(out, 1_u32),
        14 if name.kind == Kind::Physical => set_attribute(out, POSIX_DESCRIPTOR),
        14 => set_attribute(out, 0_u32),
        17 => set_attribute(out, u64::from(name.kind == Kind::Pool)),
        _ => {
            eprintln!("emulated libcuda: pointer attribute {wanted} is not emulated");
            Err(Code::INVALID_VALUE)
        }
    }
}

exported! {
    fn cuMemAlloc_v2(out: Out<u64>, bytes: usize) {
        allocate(&out, bytes, Kind::Memory)
    }

    fn cuMemFree_v2(address: u64) {
        if address == 0 { Ok(()) } else { free(address) }
    }

    fn cuMemAllocAsync(out: Out<u64>, bytes: usize, stream: u64) {
        driver()?.stream(stream)?;
        allocate(&out, bytes, Kind::Pool)
    }

    fn cuMemFreeAsync(address: u64, stream: u64) {
        driver()?.stream(stream)?;
        free(address)
    }

    fn cuMemGetInfo_v2(unused: Out<usize>, total: Out<usize>) {
        let driver = driver()?;
        let (used, all) = driver.memory(driver.current()?.device)?;
        unused.set(all.saturating_sub(used) as usize)?;
        total.set(all as usize)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, address: u64) {
        let driver = driver()?;
        driver.current()?;
        let state = driver.lock();
        let (start, range) = state.ranges.find(address).ok_or(Code::NOT_FOUND)?;
        if !base.is_null() {
            base.set(start)?;
        }
        if bytes.is_null() { Ok(()) } else { bytes.set(range.bytes as usize) }
    }

    fn cuPointerGetAttribute(out: Out<u8>, wanted: u32, address: u64) {
        attribute(driver()?, &out, wanted, address)
    }

    fn cuPointerGetAttributes(count: u32, wanted: In<u32>, outs: In<u64>, address: u64) {
        let driver = driver()?;
        for position in 0..count as usize {
            let out = at::<u8>(outs.get_at(position)?).into_out();
            let wanted = wanted.get_at(position)?;
            // An attribute that the memory does not have is zero here, as the driver has it.
            if attribute(driver, &out, wanted, address).is_err() {
                match wanted {
                    1 | 3 | 4 | 11 | 12 | 17 => set_attribute(&out, 0_u64)?,
                    9 => set_attribute(&out, -2_i32)?,
                    _ => set_attribute(&out, 0_u32)?,
                }
            }
        }
        Ok(())
    }

    fn cuPointerSetAttribute(_value: In<u8>, wanted: u32, address: u64) {
        // CU_POINTER_ATTRIBUTE_SYNC_MEMOPS changes nothing that can be seen here.
        match driver()?.lock().ranges.find(address) {
            Some(_) if wanted == 6 => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuIpcGetMemHandle(out: Out<[u8; 64]>, address: u64) {
        let driver = driver()?;
        driver.current()?;
        let state = driver.lock();
        let (_, range) = state.ranges.find(address).ok_or(Code::INVALID_VALUE)?;
        if range.origin != Origin::Own || range.object.name.kind != Kind::Memory {
            return Err(Code::INVALID_VALUE);
        }
        out.set(range.object.name.to_handle())
    }

    fn cuIpcOpenMemHandle_v2(out: Out<u64>, handle: Handle, flags: u32) {
        if flags != LAZY_PEER_ACCESS {
            return Err(Code::INVALID_VALUE);
        }
        let driver = driver()?;
        let context = driver.current()?;
        out.set(open(driver, &context, &handle.0)?)
    }

    fn cuIpcCloseMemHandle(address: u64) {
        let driver = driver()?;
        let context = driver.current()?;
        let mut state = driver.lock();
        let range = state.ranges.device.get_mut(&address).ok_or(Code::INVALID_VALUE)?;
        let Origin::Imported(times) = &mut range.origin else {
            return Err(Code::INVALID_VALUE);
        };
        *times -= 1;
        if *times > 0 {
            return Ok(());
        }
        let range = state.ranges.device.remove(&address);
        drop(state);
        range.into_iter().for_each(|range| driver.closed(&context, &range.object));
        Ok(())
    }
}
