//! Modules and kernels.

use super::exported;
use super::pointers::{In, Out, at, text};
use crate::code::{Code, Outcome};
use crate::driver::driver;
use crate::kernel::{ARGUMENT_BYTES, Kernel, Launch, entries};
use crate::stream::Work;

/// Multiprocessors hold so many threads.
const THREADS: i32 = 2048;

fn load(out: &Out<u64>, image: In<u8>) -> Outcome {
    let driver = driver()?;
    let context = driver.current()?;
    let entries = entries(&text(image)?)?;
    let mut state = driver.lock();
    let handle = state.handle();
    state.modules.insert(handle, (context.id, entries));
    out.set(handle)
}

exported! {
    fn cuModuleLoadData(out: Out<u64>, image: In<u8>) {
        load(&out, image)
    }

    fn cuModuleLoadDataEx(
        out: Out<u64>,
        image: In<u8>,
        _count: u32,
        _options: In<u32>,
        _values: In<u64>,
    ) {
        load(&out, image)
    }

    fn cuModuleUnload(module: u64) {
        let mut state = driver()?.lock();
        state.modules.remove(&module).map(|_| ()).ok_or(Code::INVALID_HANDLE)
    }

    fn cuModuleGetFunction(out: Out<u64>, module: u64, name: In<u8>) {
        let name = text(name)?;
        let mut state = driver()?.lock();
        let (context, entries) = state.modules.get(&module).ok_or(Code::INVALID_HANDLE)?;
        let context = *context;
        if !entries.contains(&name) {
            return Err(Code::NOT_FOUND);
        }
        let kernel = Kernel::named(&name).ok_or_else(|| {
            eprintln!("emulated libcuda: no kernel {name} is emulated");
            Code::NOT_FOUND
        })?;
        let handle = state.handle();
        state.functions.insert(handle, (context, kernel));
        out.set(handle)
    }

    fn cuFuncGetAttribute(out: Out<i32>, wanted: u32, function: u64) {
        if !driver()?.lock().functions.contains_key(&function) {
            return Err(Code::INVALID_HANDLE);
        }
        match wanted {
            // Most threads per block, shared bytes, constant bytes, local bytes, registers.
            0 => out.set(1024),
            1..=3 => out.set(0),
            4 => out.set(32),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuFuncSetAttribute(function: u64, _wanted: u32, _value: i32) {
        match driver()?.lock().functions.contains_key(&function) {
            true => Ok(()),
            false => Err(Code::INVALID_HANDLE),
        }
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        out: Out<i32>,
        _function: u64,
        threads: i32,
        _shared: usize,
    ) {
        if threads < 1 {
            return Err(Code::INVALID_VALUE);
        }
        out.set(THREADS / threads)
    }

    fn cuLaunchKernel(
        function: u64,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        _shared: u32,
        stream: u64,
        arguments: In<u64>,
        extra: In<u64>,
    ) {
        let driver = driver()?;
        let stream = driver.stream(stream)?;
        let known = driver.lock().functions.get(&function).copied();
        let (context, kernel) = known.ok_or(Code::INVALID_HANDLE)?;
        if context != stream.context.id {
            return Err(Code::INVALID_HANDLE);
        }
        let threads = block_x.saturating_mul(block_y).saturating_mul(block_z);
        let blocks = u64::from(grid_x) * u64::from(grid_y) * u64::from(grid_z);
        if threads == 0 || threads > 1024 || blocks == 0 || extra.address() != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let mut values = [0_u64; 6];
        for (position, bytes) in ARGUMENT_BYTES.into_iter().enumerate() {
            let address = arguments.get_at(position)?;
            values[position] = if bytes == 4 {
                u64::from(at::<u32>(address).get()?)
            } else {
                at::<u64>(address).get()?
            };
        }
        stream.submit(Work::Kernel(Launch {
            kernel,
            arguments: values,
        }));
        Ok(())
    }
}
