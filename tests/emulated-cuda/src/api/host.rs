//! Host memory that the driver knows.

use std::sync::Arc;

use super::exported;
use super::pointers::Out;
use crate::code::{Code, Outcome};
use crate::driver::driver;
use crate::mapping::Mapping;
use crate::ranges::HostRange;

/// `PORTABLE`, `DEVICEMAP`, `IOMEMORY` and `READ_ONLY` of `cuMemHostRegister`.
const REGISTER_FLAGS: u32 = 0xF;

fn allocate(out: &Out<u64>, bytes: usize) -> Outcome {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let driver = driver()?;
    driver.current()?;
    let mapping = Arc::new(Mapping::private(bytes).map_err(|_| Code::OUT_OF_MEMORY)?);
    let address = mapping.address() as u64;
    driver.lock().ranges.host.insert(
        address,
        HostRange {
            bytes: bytes as u64,
            allocated: Some(mapping),
            user: Arc::new(()),
        },
    );
    out.set(address)
}

exported! {
    fn cuMemHostAlloc(out: Out<u64>, bytes: usize, _flags: u32) {
        allocate(&out, bytes)
    }

    fn cuMemAllocHost_v2(out: Out<u64>, bytes: usize) {
        allocate(&out, bytes)
    }

    fn cuMemFreeHost(address: u64) {
        let driver = driver()?;
        driver.current()?.synchronize()?;
        let mut state = driver.lock();
        match state.ranges.host.get(&address) {
            Some(range) if range.allocated.is_some() => {
                state.ranges.host.remove(&address);
                Ok(())
            }
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: u32) {
        let driver = driver()?;
        driver.current()?;
        if address == 0 || bytes == 0 || flags > REGISTER_FLAGS {
            return Err(Code::INVALID_VALUE);
        }
        let mut state = driver.lock();
        if state.ranges.overlaps_host(address, bytes as u64) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        state.ranges.host.insert(address, HostRange {
            bytes: bytes as u64,
            allocated: None,
            user: Arc::new(()),
        });
        Ok(())
    }

    fn cuMemHostUnregister(address: u64) {
        let driver = driver()?;
        let context = driver.current()?;
        let mut state = driver.lock();
        let registered = |range: &HostRange| range.allocated.is_none();
        if !state.ranges.host.get(&address).is_some_and(registered) {
            return Err(Code::HOST_MEMORY_NOT_REGISTERED);
        }
        let range = state.ranges.host.remove(&address);
        if range.is_some_and(|range| Arc::strong_count(&range.user) > 1) {
            eprintln!("emulated libcuda: host memory unregistered while in use");
            context.fail(Code::ILLEGAL_ADDRESS);
        }
        Ok(())
    }

    fn cuMemHostGetDevicePointer_v2(out: Out<u64>, address: u64, flags: u32) {
        let driver = driver()?;
        driver.current()?;
        if flags != 0 || driver.lock().ranges.find_host(address).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        out.set(address)
    }

    fn cuMemHostGetFlags(out: Out<u32>, address: u64) {
        let driver = driver()?;
        if driver.lock().ranges.find_host(address).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        // Everything is portable and mapped where addresses are unified.
        out.set(3)
    }
}
