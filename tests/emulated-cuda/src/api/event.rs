//! Events, within and between processes.

use std::sync::{Arc, Mutex};

use super::exported;
use super::pointers::Out;
use crate::code::{Code, Outcome};
use crate::driver::{Driver, driver};
use crate::event::{BYTES, DISABLE_TIMING, Event, FLAGS, INTERPROCESS, LOOK};
use crate::storage::{Kind, Name};
use crate::stream::Work;

fn insert(driver: &Driver, event: Event) -> u64 {
    let mut state = driver.lock();
    let id = state.handle();
    state.events.insert(id, Arc::new(event));
    id
}

fn record(event: u64, stream: u64) -> Outcome {
    let driver = driver()?;
    let stream = driver.stream(stream)?;
    let event = driver.event(event)?;
    if event.device != stream.context.device {
        return Err(Code::INVALID_HANDLE);
    }
    let record = event.record();
    stream.submit(Work::Record(event, record));
    Ok(())
}

fn elapsed(out: &Out<f32>, start: u64, end: u64) -> Outcome {
    let driver = driver()?;
    let (start, end) = (driver.event(start)?, driver.event(end)?);
    if (start.flags | end.flags) & DISABLE_TIMING != 0 {
        return Err(Code::INVALID_HANDLE);
    }
    let at = |event: &Event| *event.at.lock().expect("no panic while locked");
    let (Some(first), Some(last)) = (at(&start), at(&end)) else {
        return Err(Code::INVALID_HANDLE);
    };
    if !start.has_reached(start.recorded()) || !end.has_reached(end.recorded()) {
        return Err(Code::NOT_READY);
    }
    out.set((last.saturating_duration_since(first)).as_secs_f32() * 1e3)
}

exported! {
    fn cuEventCreate(out: Out<u64>, flags: u32) {
        let shared = flags & INTERPROCESS != 0;
        if flags > FLAGS || shared && flags & DISABLE_TIMING == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let driver = driver()?;
        let context = driver.current()?;
        let object = driver.create(Kind::Event, context.device, BYTES)?;
        out.set(insert(driver, Event {
            context: context.id,
            device: context.device,
            flags,
            imported: false,
            object: Arc::new(object),
            at: Mutex::default(),
        }))
    }

    fn cuEventDestroy_v2(event: u64) {
        let driver = driver()?;
        let event = driver.lock().events.remove(&event).ok_or(Code::INVALID_HANDLE)?;
        if !event.imported {
            driver.storage().free(&event.object);
        }
        Ok(())
    }

    fn cuEventRecord(event: u64, stream: u64) {
        record(event, stream)
    }

    fn cuEventRecordWithFlags(event: u64, stream: u64, _flags: u32) {
        record(event, stream)
    }

    fn cuEventQuery(event: u64) {
        let driver = driver()?;
        let event = driver.event(event)?;
        let reached = event.has_reached(event.recorded());
        if let Some(context) = driver.lock().contexts.get(&event.context) {
            context.state()?;
        }
        if reached { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuEventSynchronize(event: u64) {
        let driver = driver()?;
        let event = driver.event(event)?;
        let context = driver.lock().contexts.get(&event.context).cloned();
        let context = context.ok_or(Code::CONTEXT_IS_DESTROYED)?;
        let recorded = event.recorded();
        while !event.has_reached(recorded) {
            context.state()?;
            std::thread::sleep(LOOK);
        }
        context.state()
    }

    fn cuEventElapsedTime(out: Out<f32>, start: u64, end: u64) {
        elapsed(&out, start, end)
    }

    fn cuEventElapsedTime_v2(out: Out<f32>, start: u64, end: u64) {
        elapsed(&out, start, end)
    }

    fn cuIpcGetEventHandle(out: Out<[u8; 64]>, event: u64) {
        let event = driver()?.event(event)?;
        if event.flags & INTERPROCESS == 0 || event.imported {
            return Err(Code::INVALID_HANDLE);
        }
        out.set(event.object.name.to_handle())
    }

    fn cuIpcOpenEventHandle(out: Out<u64>, handle: Handle) {
        let driver = driver()?;
        let context = driver.current()?;
        let name = Name::from_handle(&handle.0).ok_or(Code::INVALID_HANDLE)?;
        if name.kind != Kind::Event {
            return Err(Code::INVALID_HANDLE);
        }
        if name.pid == std::process::id() {
            return Err(Code::INVALID_CONTEXT);
        }
        if name.device != context.device {
            return Err(Code::INVALID_DEVICE);
        }
        let object = driver.storage().open(name).ok_or(Code::INVALID_HANDLE)?;
        out.set(insert(driver, Event {
            context: context.id,
            device: context.device,
            flags: INTERPROCESS | DISABLE_TIMING,
            imported: true,
            object: Arc::new(object),
            at: Mutex::default(),
        }))
    }
}

/// `CUipcEventHandle` and `CUipcMemHandle`, by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Handle(pub [u8; 64]);
