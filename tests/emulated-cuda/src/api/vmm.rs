//! Virtual memory management: physical memory apart from addresses, shared by descriptors.

use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::Arc;

use super::exported;
use super::pointers::{In, Out};
use crate::code::{Code, Outcome};
use crate::driver::{Driver, driver};
use crate::ranges::{Origin, Range};
use crate::storage::{Kind, Object};

/// Physical memory comes in multiples of this.
const GRANULARITY: usize = 2 << 20;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`, `CU_MEM_LOCATION_TYPE_DEVICE`,
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`, `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const PINNED: u32 = 1;
const ON_DEVICE: u32 = 1;
const POSIX_DESCRIPTOR: u32 = 1;
const READ_WRITE: u32 = 3;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Properties {
    kind: u32,
    handle_types: u32,
    location_kind: u32,
    location: i32,
    windows: u64,
    flags: [u8; 8],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Access {
    location_kind: u32,
    location: i32,
    flags: u32,
}

fn check(properties: &Properties) -> Outcome<usize> {
    if properties.kind != PINNED || properties.location_kind != ON_DEVICE {
        return Err(Code::INVALID_VALUE);
    }
    driver()?.device(properties.location)
}

fn insert(driver: &Driver, object: Arc<Object>) -> u64 {
    let mut state = driver.lock();
    let handle = state.handle();
    state.physical.insert(handle, (object, 1));
    handle
}

fn whole(bytes: usize) -> Outcome<u64> {
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
        return Err(Code::INVALID_VALUE);
    }
    Ok(bytes as u64)
}

exported! {
    fn cuMemGetAllocationGranularity(out: Out<usize>, wanted: In<Properties>, _option: u32) {
        check(&wanted.get()?)?;
        out.set(GRANULARITY)
    }

    fn cuMemCreate(out: Out<u64>, bytes: usize, wanted: In<Properties>, flags: u64) {
        let wanted = wanted.get()?;
        let device = check(&wanted)?;
        whole(bytes)?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let driver = driver()?;
        // What was not asked to be shareable is not: it looks like memory of a pool.
        let kind = match wanted.handle_types {
            POSIX_DESCRIPTOR => Kind::Physical,
            0 => Kind::Pool,
            _ => return Err(Code::NOT_SUPPORTED),
        };
        let object = driver.create(kind, device, bytes)?;
        out.set(insert(driver, Arc::new(object)))
    }

    fn cuMemRelease(handle: u64) {
        let mut state = driver()?.lock();
        let (_, references) = state.physical.get_mut(&handle).ok_or(Code::INVALID_VALUE)?;
        *references -= 1;
        if *references == 0 {
            state.physical.remove(&handle);
        }
        Ok(())
    }

    fn cuMemRetainAllocationHandle(out: Out<u64>, address: u64) {
        let driver = driver()?;
        let object = {
            let state = driver.lock();
            let (_, range) = state.ranges.find(address).ok_or(Code::INVALID_VALUE)?;
            if !matches!(range.origin, Origin::Mapped { .. }) {
                return Err(Code::INVALID_VALUE);
            }
            range.object.clone()
        };
        let known = {
            let mut state = driver.lock();
            let mut handles = state.physical.iter_mut();
            let same = handles.find(|(_, (other, _))| Arc::ptr_eq(other, &object));
            same.map(|(handle, (_, references))| {
                *references += 1;
                *handle
            })
        };
        out.set(known.unwrap_or_else(|| insert(driver, object)))
    }

    fn cuMemGetAllocationPropertiesFromHandle(out: Out<Properties>, handle: u64) {
        let driver = driver()?;
        let state = driver.lock();
        let (object, _) = state.physical.get(&handle).ok_or(Code::INVALID_VALUE)?;
        let shareable = object.name.kind == Kind::Physical;
        out.set(Properties {
            kind: PINNED,
            handle_types: if shareable { POSIX_DESCRIPTOR } else { 0 },
            location_kind: ON_DEVICE,
            location: driver.ordinal(object.name.device).ok_or(Code::INVALID_DEVICE)?,
            windows: 0,
            flags: [0; 8],
        })
    }

    fn cuMemExportToShareableHandle(out: Out<i32>, handle: u64, kind: u32, flags: u64) {
        if kind != POSIX_DESCRIPTOR || flags != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let state = driver()?.lock();
        let (object, _) = state.physical.get(&handle).ok_or(Code::INVALID_VALUE)?;
        if object.name.kind != Kind::Physical {
            return Err(Code::INVALID_VALUE);
        }
        let descriptor = object.export().map_err(|_| Code::OPERATING_SYSTEM)?;
        out.set(descriptor.into_raw_fd())
    }

    fn cuMemImportFromShareableHandle(out: Out<u64>, descriptor: u64, kind: u32) {
        if kind != POSIX_DESCRIPTOR {
            return Err(Code::NOT_SUPPORTED);
        }
        let driver = driver()?;
        let number = i32::try_from(descriptor).map_err(|_| Code::INVALID_VALUE)?;
        if number < 0 {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller passes a descriptor that is open during the call; it is looked up by
        // its number in /proc and neither kept nor closed.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        let object = driver.storage().open_descriptor(descriptor);
        let object = object.ok_or(Code::INVALID_VALUE)?;
        if object.name.kind != Kind::Physical {
            return Err(Code::INVALID_VALUE);
        }
        driver.ordinal(object.name.device).ok_or(Code::INVALID_DEVICE)?;
        out.set(insert(driver, Arc::new(object)))
    }

    fn cuMemAddressReserve(out: Out<u64>, bytes: usize, alignment: usize, _wish: u64, flags: u64) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let bytes = whole(bytes)?;
        let mut state = driver()?.lock();
        let address = state.ranges.take_addresses(bytes, alignment as u64)?;
        state.ranges.reserved.insert(address, bytes);
        out.set(address)
    }

    fn cuMemAddressFree(address: u64, bytes: usize) {
        let mut state = driver()?.lock();
        let used = state.ranges.device.range(address..address + bytes as u64).next().is_some();
        if used || state.ranges.reserved.get(&address) != Some(&(bytes as u64)) {
            return Err(Code::INVALID_VALUE);
        }
        state.ranges.reserved.remove(&address);
        Ok(())
    }

    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        if flags != 0 || offset != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let bytes = whole(bytes)?;
        let mut state = driver()?.lock();
        let ranges = &state.ranges;
        let reserved = ranges.reserved.range(..=address).next_back();
        let inside = reserved.is_some_and(|(start, length)| address + bytes <= start + length);
        let before = ranges.device.range(..address + bytes).next_back();
        let taken = before.is_some_and(|(start, range)| start + range.bytes > address);
        let (object, _) = state.physical.get(&handle).ok_or(Code::INVALID_VALUE)?;
        let object = object.clone();
        if !inside || taken || object.bytes as u64 != bytes {
            return Err(Code::INVALID_VALUE);
        }
        let buffer_id = state.handle();
        state.ranges.device.insert(address, Range {
            bytes,
            object,
            context: 0,
            origin: Origin::Mapped { accessible: false },
            buffer_id,
        });
        Ok(())
    }

    fn cuMemSetAccess(address: u64, bytes: usize, wanted: In<Access>, count: usize) {
        let driver = driver()?;
        let mut devices = Vec::new();
        for access in wanted.list(count)? {
            if access.location_kind != ON_DEVICE || access.flags != READ_WRITE {
                return Err(Code::INVALID_VALUE);
            }
            devices.push(driver.device(access.location)?);
        }
        let mut state = driver.lock();
        let end = address + whole(bytes)?;
        let mut next = address;
        for (start, range) in state.ranges.device.range_mut(address..end) {
            let Origin::Mapped { accessible } = &mut range.origin else {
                return Err(Code::INVALID_VALUE);
            };
            // Without peers, only the memory's own device can have access.
            if *start != next || devices != [range.object.name.device] {
                return Err(Code::INVALID_VALUE);
            }
            *accessible = true;
            next += range.bytes;
        }
        if next == end { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    fn cuMemUnmap(address: u64, bytes: usize) {
        let driver = driver()?;
        let end = address + whole(bytes)?;
        let mut removed = Vec::new();
        {
            let mut state = driver.lock();
            let ranges = &mut state.ranges.device;
            let covered: u64 = ranges.range(address..end).map(|(_, range)| range.bytes).sum();
            let mapped = |range: &Range| matches!(range.origin, Origin::Mapped { .. });
            let all = ranges.range(address..end).all(|(_, range)| mapped(range));
            if !all || covered != bytes as u64 {
                return Err(Code::INVALID_VALUE);
            }
            let starts: Vec<u64> = ranges.range(address..end).map(|(start, _)| *start).collect();
            removed.extend(starts.iter().filter_map(|start| ranges.remove(start)));
        }
        // No context need be current; a copy that still runs there breaks its own.
        for range in removed {
            let device = range.object.name.device;
            let contexts: Vec<_> = driver.lock().contexts.values().cloned().collect();
            for context in contexts.iter().filter(|context| context.device == device) {
                driver.closed(context, &range.object);
            }
        }
        Ok(())
    }
}
