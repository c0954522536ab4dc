//! Devices and what they are.

use super::exported;
use super::pointers::{In, Out, set_text, text};
use crate::code::{Code, Outcome};
use crate::driver::driver;

/// What the emulated devices answer to `cuDeviceGetAttribute`; others are refused by name, so that
/// nobody relies on a made-up answer.
fn attribute(device: usize, attribute: u32) -> Outcome<i32> {
    let value = match attribute {
        // Threads per block, and each dimension of block and grid.
        1..=3 => 1024,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65_535,
        // Shared memory per block, warp.
        8 => 48 << 10,
        10 => 32,
        // Clock in kHz.
        13 => 1_980_000,
        // Copies and kernels overlap; multiprocessors.
        15 => 1,
        16 => 132,
        // Integrated, can map host memory, exclusive mode.
        18 => 0,
        19 => 1,
        20 => 0,
        // Concurrent kernels, error correction, PCI bus and device.
        31 | 32 => 1,
        33 => 1 + device as i32,
        34 => 0,
        // Copy engines, unified addresses, PCI domain.
        40 => 3,
        41 => 1,
        50 => 0,
        // Compute capability, stream priorities.
        75 => 9,
        76 => 0,
        78 => 1,
        // Managed memory, board groups, pageable memory access, registered host pointers.
        83 => 0,
        84 | 85 => 0,
        88 => 0,
        91 => 1,
        // Stream memory operations are not emulated.
        92..=94 => 0,
        // Host registration, VMM, POSIX descriptors, other handles.
        99 | 102 | 103 => 1,
        104 | 105 => 0,
        // GPUDirect RDMA of VMM memory.
        110 => 0,
        // Pools; their memory cannot be shared here.
        115 => 1,
        116 => 0,
        119 => 0,
        // Interprocess events.
        125 => 1,
        // No NUMA node of its own or of the host is known.
        130 | 134 => -1,
        _ => {
            eprintln!("emulated libcuda: device attribute {attribute} is not emulated");
            return Err(Code::INVALID_VALUE);
        }
    };
    Ok(value)
}

fn bus_id(device: usize) -> String {
    format!("0000:{:02X}:00.0", 1 + device)
}

fn uuid(out: &Out<[u8; 16]>, ordinal: i32) -> Outcome {
    let driver = driver()?;
    out.set(driver.machine().devices[driver.device(ordinal)?].uuid)
}

exported! {
    fn cuDeviceGetCount(count: Out<i32>) {
        count.set(driver()?.visible().len() as i32)
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) {
        driver()?.device(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetName(name: Out<u8>, room: i32, device: i32) {
        let device = driver()?.device(device)?;
        set_text(&name, room, &format!("emulated GPU {device}"))
    }

    fn cuDeviceGetUuid(out: Out<[u8; 16]>, device: i32) {
        uuid(&out, device)
    }

    fn cuDeviceGetUuid_v2(out: Out<[u8; 16]>, device: i32) {
        uuid(&out, device)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) {
        let driver = driver()?;
        let device = &driver.machine().devices[driver.device(device)?];
        bytes.set(device.memory_bytes as usize)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, wanted: u32, device: i32) {
        value.set(attribute(driver()?.device(device)?, wanted)?)
    }

    fn cuDeviceGetPCIBusId(id: Out<u8>, room: i32, device: i32) {
        set_text(&id, room, &bus_id(driver()?.device(device)?))
    }

    fn cuDeviceGetByPCIBusId(device: Out<i32>, id: In<u8>) {
        let (driver, id) = (driver()?, text(id)?);
        let seen = driver.visible().iter().position(|device| bus_id(*device) == id);
        device.set(seen.ok_or(Code::INVALID_DEVICE)? as i32)
    }

    fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) {
        driver()?.device(device)?;
        driver()?.device(peer)?;
        can.set(0)
    }
}
