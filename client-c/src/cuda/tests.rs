//! What the library finds out about memory, shares of it, and orders after, with a fake driver.

#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};
use std::time::Duration;

use pegaflow_shm::control::{DeviceHandle, DeviceUuid};

use super::fake::{self, Kind, allocate};
use super::*;

const MIB: u64 = 1 << 20;

fn cuda() -> Cuda {
    let cuda = Cuda::default();
    cuda.use_fake();
    cuda
}

fn span(cuda: &Cuda, start: u64, bytes: u64) -> Span {
    match cuda.locate(start).unwrap() {
        Location::Device(place) => Span::new(place, start, start + bytes),
        Location::Process => panic!("{start:#x} is device memory"),
    }
}

type Shared = (Vec<Arc<DeviceRegion>>, Arc<DeviceEvents>);

fn share(cuda: &Cuda, spans: &[Span]) -> Result<Shared, Error> {
    let mut last = 0;
    let next = || {
        last += 1;
        last
    };
    let shared = cuda.share(spans, &Weak::new(), 4, next);
    assert!(fake::is_undisturbed());
    shared
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} in {text:?}");
    }
}

#[test]
fn memory_that_cuda_does_not_know_is_the_process_s_own() {
    let byte = 7u8;
    let address = std::ptr::from_ref(&byte).addr() as u64;
    assert_eq!(cuda().locate(address).unwrap(), Location::Process);
    // And without a driver nothing else is.
    assert_eq!(Cuda::default().locate(address).unwrap(), Location::Process);
    assert!(fake::is_undisturbed());
}

#[test]
fn a_thread_with_a_context_of_its_own_keeps_it() {
    let base = allocate(1, MIB, Kind::Plain);
    let cuda = cuda();
    let found = cuda.locate(base).unwrap();
    let own = fake::with_context(2, || {
        assert_eq!(cuda.locate(base).unwrap(), found);
        share(&cuda, &[span(&cuda, base, MIB)]).map(drop)
    });
    own.unwrap();
}

#[test]
fn pinned_memory_that_others_can_read_is_the_process_s_and_other_is_refused() {
    let bytes = [7u8; 16];
    let readable = std::ptr::from_ref(&bytes).addr() as u64;
    allocate(0, 16, Kind::Host(readable));
    assert_eq!(cuda().locate(readable).unwrap(), Location::Process);
    allocate(0, 16, Kind::Host(64));
    refusal(
        cuda().locate(64),
        &["no other process can read", "pega_alloc_host"],
    );
}

#[test]
fn memory_that_cannot_be_shared_is_refused_with_the_way_out() {
    let cases: [(Kind, &[&str]); 3] = [
        (Kind::Managed, &["managed", "cudaMalloc"]),
        (Kind::Pooled, &["cudaMallocAsync", "cudaMalloc"]),
        (
            Kind::Vmm(vec![MIB], false),
            &["CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"],
        ),
    ];
    for (kind, words) in cases {
        let address = allocate(0, MIB, kind);
        refusal(cuda().locate(address + 5), words);
    }
    assert!(fake::is_undisturbed());
}

#[test]
fn the_segments_of_one_allocation_share_one_region_and_so_does_the_next_registration() {
    let cuda = cuda();
    let base = allocate(1, 8 * MIB, Kind::Plain);
    let spans: Vec<Span> = (0..8).map(|at| span(&cuda, base + at * MIB, MIB)).collect();
    let (regions, events) = share(&cuda, &spans).unwrap();
    assert_eq!(regions.len(), 8);
    assert!(
        regions
            .iter()
            .all(|region| Arc::ptr_eq(region, &regions[0]))
    );
    assert_eq!((regions[0].base(), regions[0].bytes()), (base, 8 * MIB));
    assert_eq!(regions[0].device().uuid(), DeviceUuid(fake::uuid(1)));
    let DeviceHandle::Ipc { handle } = regions[0].handle() else {
        panic!("{:?}", regions[0].handle());
    };
    assert_eq!(handle.0[..8], base.to_le_bytes());
    let (again, same) = share(&cuda, &spans[3..4]).unwrap();
    assert!(Arc::ptr_eq(&again[0], &regions[0]) && Arc::ptr_eq(&same, &events));
    drop((regions, again));
    let (anew, _) = share(&cuda, &spans[..1]).unwrap();
    assert!(!anew[0].is_told(1));
}

#[test]
fn physical_allocations_are_shared_as_far_as_segments_reach() {
    let cuda = cuda();
    let lengths = vec![2 * MIB, 2 * MIB, 4 * MIB, 2 * MIB, 2 * MIB];
    let base = allocate(0, 12 * MIB, Kind::Vmm(lengths, true));
    // From the middle of the second to the middle of the fourth, in two segments given in turn.
    let spans = [
        span(&cuda, base + 5 * MIB, 4 * MIB),
        span(&cuda, base + 3 * MIB, 2 * MIB),
    ];
    let (regions, _) = share(&cuda, &spans).unwrap();
    assert!(Arc::ptr_eq(&regions[0], &regions[1]));
    let region = &regions[0];
    assert_eq!((region.base(), region.bytes()), (base + 2 * MIB, 8 * MIB));
    let chunks = vec![2 * MIB, 4 * MIB, 2 * MIB];
    assert_eq!(region.handle(), DeviceHandle::Vmm { chunks });
    assert_eq!(
        (region.chunks(), region.export(1, 2).unwrap().len()),
        (3, 2)
    );
    // Apart from them, another region.
    let (apart, _) = share(&cuda, &[span(&cuda, base, MIB)]).unwrap();
    assert_eq!((apart[0].base(), apart[0].bytes()), (base, 2 * MIB));
}

#[test]
fn segments_beyond_their_allocation_and_on_two_devices_are_refused() {
    let cuda = cuda();
    let one = allocate(0, MIB, Kind::Plain);
    let other = allocate(1, MIB, Kind::Plain);
    refusal(
        share(&cuda, &[span(&cuda, one, 2 * MIB)]),
        &["reaches beyond"],
    );
    let both = [span(&cuda, one, MIB), span(&cuda, other, MIB)];
    let (first, second) = (format!("{one:#x}"), format!("{other:#x}"));
    refusal(share(&cuda, &both), &[&first, &second, "GPU 0", "GPU 1"]);
    let error = share(&cuda, &both).unwrap_err();
    assert_eq!(error.status(), crate::Status::BadLayout);
}

/// Events of a device's primary context.
fn events(cuda: &Cuda, ordinal: i32) -> Arc<DeviceEvents> {
    let base = allocate(ordinal, MIB, Kind::Plain);
    share(cuda, &[span(cuda, base, MIB)]).unwrap().1
}

const SHORT: Duration = Duration::from_millis(30);

/// An order of a fake stream or event.
fn after(handle: *mut std::ffi::c_void, is_event: bool) -> Order {
    order::tests::order(handle, is_event)
}

#[test]
fn an_event_happens_when_the_stream_is_through_whatever_context_it_has() {
    let cuda = cuda();
    let events = events(&cuda, 0);
    assert_eq!(events.handles().unwrap().len(), 4);
    for is_primary in [true, false] {
        for is_event in [false, true] {
            let stream = fake::stream(0, is_primary);
            fake::set_busy(stream, true);
            let named = if is_event {
                fake::event_on(stream)
            } else {
                stream
            };
            let slot = events.record(after(named, is_event)).unwrap().unwrap();
            let early = slot.wait(SHORT).unwrap_err();
            assert_eq!(early.status(), crate::Status::Timeout);
            fake::set_busy(stream, false);
            slot.wait(SHORT).unwrap();
            assert!(fake::is_undisturbed());
        }
    }
}

#[test]
fn an_event_is_used_again_only_after_its_request() {
    let cuda = cuda();
    let events = events(&cuda, 0);
    let stream = fake::stream(0, true);
    let record = || events.record(after(stream, false));
    let mut held: Vec<EventSlot> = (0..4).map(|_| record().unwrap().unwrap()).collect();
    let mut indices: Vec<u32> = held.iter().map(EventSlot::index).collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert!(matches!(record(), Err(Error::Again(_))));
    let freed = held[2].index();
    drop(held.remove(2));
    assert_eq!(record().unwrap().unwrap().index(), freed);
    assert!(events.record(Order::NONE).unwrap().is_none());
}

#[test]
fn a_stream_under_capture_is_refused_and_takes_no_event() {
    let cuda = cuda();
    let events = events(&cuda, 0);
    let stream = fake::stream(0, true);
    fake::set_capturing(stream);
    for _ in 0..9 {
        refusal(events.record(after(stream, false)), &["captured"]);
    }
    assert!(fake::is_undisturbed());
}

#[test]
fn events_that_cannot_be_shared_say_why_and_are_still_waited_for() {
    let cuda = cuda();
    let events = events(&cuda, fake::DEVICE_WITHOUT_IPC_EVENTS);
    assert_eq!(events.handles().unwrap_err().code, 801);
    assert!(events.is_news() && !events.is_news());
    let stream = fake::stream(fake::DEVICE_WITHOUT_IPC_EVENTS, true);
    let slot = events.record(after(stream, false)).unwrap().unwrap();
    assert!(!slot.is_shared_with(1));
    slot.wait(SHORT).unwrap();
}
