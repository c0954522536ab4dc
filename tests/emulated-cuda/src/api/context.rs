//! Primary and other contexts, and which is current.

use super::exported;
use super::pointers::Out;
use crate::code::{Code, Outcome};
use crate::context;
use crate::driver::{Driver, driver};

fn known(driver: &Driver, handle: u64) -> Outcome {
    match handle {
        0 => Ok(()),
        handle if driver.lock().contexts.contains_key(&handle) => Ok(()),
        _ => Err(Code::INVALID_CONTEXT),
    }
}

/// Ends the primary context, once nobody retains it or by force.
fn end_primary(driver: &Driver, device: usize, release: bool) -> Outcome {
    let ended = {
        let mut state = driver.lock();
        let primary = &mut state.primaries[device];
        if release {
            primary.retained = primary
                .retained
                .checked_sub(1)
                .ok_or(Code::INVALID_CONTEXT)?;
            if primary.retained > 0 {
                return Ok(());
            }
        }
        primary.context.take()
    };
    if let Some(context) = ended {
        driver.destroy_context(&context);
    }
    Ok(())
}

exported! {
    fn cuDevicePrimaryCtxRetain(out: Out<u64>, device: i32) {
        let driver = driver()?;
        let device = driver.device(device)?;
        let active = driver.lock().primaries[device].context.clone();
        let context = match active {
            Some(context) => context,
            None => driver.create_context(device)?,
        };
        let id = {
            let mut state = driver.lock();
            let primary = &mut state.primaries[device];
            primary.retained += 1;
            // Of two threads that retain it first, one makes it.
            primary.context.get_or_insert(context).id
        };
        out.set(id)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        let driver = driver()?;
        end_primary(driver, driver.device(device)?, true)
    }

    fn cuDevicePrimaryCtxReset_v2(device: i32) {
        let driver = driver()?;
        end_primary(driver, driver.device(device)?, false)
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) {
        let driver = driver()?;
        let device = driver.device(device)?;
        flags.set(0)?;
        active.set(i32::from(driver.lock().primaries[device].context.is_some()))
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, _flags: u32) {
        driver()?.device(device).map(|_| ())
    }

    fn cuCtxCreate_v2(out: Out<u64>, _flags: u32, device: i32) {
        let driver = driver()?;
        let context = driver.create_context(driver.device(device)?)?;
        context::push(context.id);
        out.set(context.id)
    }

    fn cuCtxDestroy_v2(handle: u64) {
        let driver = driver()?;
        let context = driver.lock().contexts.get(&handle).cloned();
        let context = context.ok_or(Code::INVALID_CONTEXT)?;
        driver.destroy_context(&context);
        if context::current() == handle {
            context::pop()?;
        }
        Ok(())
    }

    fn cuCtxSetCurrent(handle: u64) {
        known(driver()?, handle)?;
        context::set_current(handle);
        Ok(())
    }

    fn cuCtxGetCurrent(out: Out<u64>) {
        driver()?;
        out.set(context::current())
    }

    fn cuCtxPushCurrent_v2(handle: u64) {
        known(driver()?, handle)?;
        context::push(handle);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(out: Out<u64>) {
        driver()?;
        let popped = context::pop()?;
        if out.is_null() { Ok(()) } else { out.set(popped) }
    }

    fn cuCtxGetDevice(out: Out<i32>) {
        let driver = driver()?;
        let id = context::current();
        let context = driver.lock().contexts.get(&id).cloned();
        let device = context.ok_or(Code::INVALID_CONTEXT)?.device;
        out.set(driver.ordinal(device).ok_or(Code::INVALID_CONTEXT)?)
    }

    fn cuCtxGetApiVersion(_context: u64, version: Out<u32>) {
        driver()?;
        version.set(3020)
    }

    fn cuCtxGetFlags(flags: Out<u32>) {
        driver()?.current()?;
        flags.set(0)
    }

    fn cuCtxSynchronize() {
        driver()?.current()?.synchronize()
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        driver()?.current()?;
        least.set(0)?;
        greatest.set(-5)
    }
}
