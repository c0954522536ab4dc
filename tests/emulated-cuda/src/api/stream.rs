//! Streams.

use super::exported;
use super::pointers::{HostFunction, Out, Sent};
use crate::code::{Code, Outcome};
use crate::driver::driver;
use crate::stream::{Stream, Work};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

/// `CU_STREAM_WAIT_VALUE_GEQ`; the other ways of comparing are not emulated.
const WAIT_GEQ: u32 = 0;

fn create(out: &Out<u64>, flags: u32) -> Outcome {
    if flags > NON_BLOCKING {
        return Err(Code::INVALID_VALUE);
    }
    let driver = driver()?;
    let context = driver.current()?;
    let id = driver.lock().handle();
    let stream = Stream::start(id, &context, flags & NON_BLOCKING == 0);
    driver.lock().streams.insert(id, stream);
    out.set(id)
}

exported! {
    fn cuStreamCreate(out: Out<u64>, flags: u32) {
        create(&out, flags)
    }

    fn cuStreamCreateWithPriority(out: Out<u64>, flags: u32, _priority: i32) {
        create(&out, flags)
    }

    fn cuStreamDestroy_v2(stream: u64) {
        driver()?.lock().streams.remove(&stream).map(|_| ()).ok_or(Code::INVALID_HANDLE)
    }

    fn cuStreamSynchronize(stream: u64) {
        let stream = driver()?.stream(stream)?;
        stream.last().wait();
        stream.context.state()
    }

    fn cuStreamQuery(stream: u64) {
        let stream = driver()?.stream(stream)?;
        let done = stream.last().is_done();
        stream.context.state()?;
        if done { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuStreamWaitEvent(stream: u64, event: u64, _flags: u32) {
        let driver = driver()?;
        let stream = driver.stream(stream)?;
        let event = driver.event(event)?;
        let recorded = event.recorded();
        stream.submit(Work::Wait(event, recorded));
        Ok(())
    }

    fn cuStreamWaitValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        if flags != WAIT_GEQ {
            return Err(Code::INVALID_VALUE);
        }
        let driver = driver()?;
        let stream = driver.stream(stream)?;
        let word = driver.lock().ranges.resolve(address, 4)?;
        let place = word.places.into_iter().next();
        let place = place.filter(|place| word.pinned && place.word().is_some());
        stream.submit(Work::WaitWord(place.ok_or(Code::INVALID_VALUE)?, value));
        Ok(())
    }

    fn cuStreamGetCtx(stream: u64, out: Out<u64>) {
        out.set(driver()?.stream(stream)?.context.id)
    }

    fn cuStreamGetFlags(stream: u64, out: Out<u32>) {
        out.set(u32::from(!driver()?.stream(stream)?.blocking))
    }

    fn cuStreamGetPriority(stream: u64, out: Out<i32>) {
        driver()?.stream(stream)?;
        out.set(0)
    }

    fn cuStreamIsCapturing(stream: u64, out: Out<u32>) {
        driver()?.stream(stream)?;
        out.set(0)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        driver()?;
        // Nothing is ever captured; the mode of a thread is the driver's default.
        mode.set(0)
    }

    fn cuLaunchHostFunc(stream: u64, function: Option<HostFunction>, argument: Out<u8>) {
        let function = function.ok_or(Code::INVALID_VALUE)?;
        let argument = Sent(argument.into_raw().cast());
        driver()?.stream(stream)?.submit(Work::Call(Box::new(move || {
            let argument = argument;
            function(argument.0);
        })));
        Ok(())
    }
}
