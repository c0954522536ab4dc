//! Copies and fills.

use std::sync::LazyLock;
use std::time::Duration;

use super::exported;
use super::pointers::{In, Out};
use crate::code::{Code, Outcome};
use crate::control::Count;
use crate::driver::{Driver, driver};
use crate::machine::LATE_VARIABLE;
use crate::ranges::Resolved;
use crate::stream::{Stream, Ticket, Way, Work};

/// `CUmemcpyAttributes`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Attributes {
    source_order: u32,
    source_hint: [u32; 2],
    target_hint: [u32; 2],
    flags: u32,
}

/// What a copy may be, by the function that was called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Any,
    Only(Way),
}

fn way(to: &Resolved, from: &Resolved) -> Way {
    match (to.device, from.device) {
        (None, Some(_)) => Way::Out,
        (Some(_), None) => Way::In,
        _ => Way::Inside,
    }
}

/// How late bytes of pageable memory come to a device; `None` where they are waited for.
static LATE: LazyLock<Option<Duration>> = LazyLock::new(|| {
    let us = std::env::var(LATE_VARIABLE).ok()?.parse().ok()?;
    Some(Duration::from_micros(us))
});

/// Submits a copy. The caller may not reuse host memory that the driver does not know before the
/// copy is done, so that is waited for.
fn submit(
    driver: &Driver,
    stream: &Stream,
    (to, from, bytes): (u64, u64, usize),
    wanted: Wanted,
) -> Outcome<Option<Ticket>> {
    if bytes == 0 {
        return Ok(None);
    }
    let state = driver.lock();
    let to = state.ranges.resolve(to, bytes as u64)?;
    let from = state.ranges.resolve(from, bytes as u64)?;
    drop(state);
    let way = way(&to, &from);
    if wanted != Wanted::Any && wanted != Wanted::Only(way) {
        return Err(Code::INVALID_VALUE);
    }
    let own = |side: &Resolved| {
        side.device
            .is_none_or(|device| device == stream.context.device)
    };
    if !own(&to) || !own(&from) {
        eprintln!("emulated libcuda: a copy on the stream of another device than its memory's");
        return Err(Code::INVALID_VALUE);
    }
    let pinned = to.pinned && from.pinned;
    if let (Way::In, false, Some(late)) = (way, from.pinned, *LATE) {
        let mut staged = Vec::with_capacity(bytes);
        for place in &from.places {
            let mut part = vec![0; place.bytes()];
            place.read(&mut part);
            staged.append(&mut part);
        }
        let to = to.places;
        stream.submit(Work::Land { to, staged, late });
        return Ok(None);
    }
    let ticket = stream.submit(Work::Copy {
        to: to.places,
        from: from.places,
        way,
    });
    if !pinned {
        ticket.wait();
    }
    Ok(Some(ticket))
}

fn copy_async(to: u64, from: u64, bytes: usize, stream: u64, wanted: Wanted) -> Outcome {
    let driver = driver()?;
    let stream = driver.stream(stream)?;
    submit(driver, &stream, (to, from, bytes), wanted).map(|_| ())
}

fn copy(to: u64, from: u64, bytes: usize, wanted: Wanted) -> Outcome {
    let driver = driver()?;
    let stream = driver.stream(0)?;
    if let Some(ticket) = submit(driver, &stream, (to, from, bytes), wanted)? {
        ticket.wait();
    }
    stream.context.state()
}

fn fill(to: u64, pattern: &[u8], count: usize, stream: u64) -> Outcome<Ticket> {
    let driver = driver()?;
    let stream = driver.stream(stream)?;
    let to = driver
        .lock()
        .ranges
        .resolve(to, (count * pattern.len()) as u64)?;
    if to
        .device
        .is_some_and(|device| device != stream.context.device)
    {
        return Err(Code::INVALID_VALUE);
    }
    Ok(stream.submit(Work::Fill {
        to: to.places,
        pattern: pattern.to_vec(),
    }))
}

fn fill_and_wait(to: u64, pattern: &[u8], count: usize) -> Outcome {
    fill(to, pattern, count, 0)?.wait();
    driver()?.current().map(|_| ())
}

exported! {
    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        copy(to, from, bytes, Wanted::Any)
    }

    fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) {
        copy(to, from, bytes, Wanted::Only(Way::In))
    }

    fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) {
        copy(to, from, bytes, Wanted::Only(Way::Out))
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        copy(to, from, bytes, Wanted::Only(Way::Inside))
    }

    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) {
        copy_async(to, from, bytes, stream, Wanted::Any)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        copy_async(to, from, bytes, stream, Wanted::Only(Way::In))
    }

    fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        copy_async(to, from, bytes, stream, Wanted::Only(Way::Out))
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        copy_async(to, from, bytes, stream, Wanted::Only(Way::Inside))
    }

    fn cuMemcpyBatchAsync(
        to: In<u64>,
        from: In<u64>,
        bytes: In<usize>,
        count: usize,
        attributes: In<Attributes>,
        positions: In<usize>,
        attribute_count: usize,
        failed: Out<usize>,
        stream: u64,
    ) {
        let driver = driver()?;
        // The default stream is refused by the driver, too.
        if stream <= 2 || count == 0 || attribute_count == 0 || attribute_count > count {
            return Err(Code::INVALID_VALUE);
        }
        for position in 0..attribute_count {
            let order = attributes.get_at(position)?.source_order;
            let first = positions.get_at(position)?;
            if !(1..=3).contains(&order) || first >= count || position == 0 && first != 0 {
                return Err(Code::INVALID_VALUE);
            }
        }
        let stream = driver.stream(stream)?;
        driver.control().add(stream.context.device, Count::Batches, 1);
        for at in 0..count {
            let one = (to.get_at(at)?, from.get_at(at)?, bytes.get_at(at)?);
            if let Err(code) = submit(driver, &stream, one, Wanted::Any) {
                if !failed.is_null() {
                    failed.set(at)?;
                }
                return Err(code);
            }
        }
        Ok(())
    }

    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) {
        fill_and_wait(to, &[value], count)
    }

    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) {
        fill_and_wait(to, &value.to_le_bytes(), count)
    }

    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) {
        fill(to, &[value], count, stream).map(|_| ())
    }

    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: u64) {
        fill(to, &value.to_le_bytes(), count, stream).map(|_| ())
    }
}
