//! A CUDA driver for tests, in this process: allocations are numbers, streams are busy while a test
//! says so.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::IntoRawFd;
use std::ptr::without_provenance_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::driver::{Code, Driver, Functions, INVALID_CONTEXT, Opaque};

/// Ordinals of this driver's devices are below.
const DEVICES: i32 = 4;
/// Its events cannot be shared.
pub(crate) const DEVICE_WITHOUT_IPC_EVENTS: i32 = 3;

const INVALID_VALUE: Code = 1;
const INVALID_HANDLE: Code = 400;
const NOT_READY: Code = 600;
const NOT_SUPPORTED: Code = 801;

/// What kind of memory a test allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `cuMemAlloc`.
    Plain,
    /// `cuMemCreate` and `cuMemMap`, in chunks of these lengths; exportable or not.
    Vmm(Vec<u64>, bool),
    Managed,
    Pooled,
    /// Host memory at an address of the test's.
    Host(u64),
}

#[derive(Clone, Debug)]
struct Allocation {
    base: u64,
    bytes: u64,
    ordinal: i32,
    kind: Kind,
}

#[derive(Debug, Default)]
struct World {
    allocations: Vec<Allocation>,
    last: u64,
    /// Streams that are not through, and those that wait for them.
    busy: Vec<usize>,
    waits: HashMap<usize, usize>,
    capturing: Vec<usize>,
    contexts: HashMap<usize, usize>,
    /// What each event was recorded on, and its context.
    events: HashMap<usize, (Option<usize>, usize)>,
    exported: usize,
    interprocess: usize,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

thread_local! {
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    /// The context that a test gave the thread; 0 for none.
    static OWN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    static MODE: RefCell<c_uint> = const { RefCell::new(0) };
}

struct Locked(MutexGuard<'static, Option<World>>);

impl std::ops::Deref for Locked {
    type Target = World;

    fn deref(&self) -> &World {
        self.0.as_ref().expect("made by `world`")
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut World {
        self.0.as_mut().expect("made by `world`")
    }
}

fn world() -> Locked {
    let mut guard = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    guard.get_or_insert_with(World::default);
    Locked(guard)
}

impl World {
    fn number(&mut self) -> usize {
        self.last += 1;
        self.last as usize + 0x100
    }

    fn find(&self, address: u64) -> Option<&Allocation> {
        let mut all = self.allocations.iter();
        all.find(|known| (known.base..known.base + known.bytes).contains(&address))
    }

    fn is_busy(&self, stream: usize) -> bool {
        self.busy.contains(&stream) || self.waits.get(&stream).is_some_and(|on| self.is_busy(*on))
    }
}

/// Allocates; the bytes of several chunks are those of all.
pub(crate) fn allocate(ordinal: i32, bytes: u64, kind: Kind) -> u64 {
    let mut world = world();
    world.last += 1;
    // Apart from each other and from everything that a process has.
    let own = 0x0000_7a00_0000_0000 + (world.last << 32);
    let base = match &kind {
        Kind::Host(address) => *address,
        _ => own,
    };
    world.allocations.push(Allocation {
        base,
        bytes,
        ordinal,
        kind,
    });
    base
}

/// A stream of a device's primary context, or of another one.
pub(crate) fn stream(ordinal: i32, is_primary: bool) -> *mut c_void {
    let mut world = world();
    let number = world.number();
    let other = if is_primary { 0 } else { 0x100 };
    world.contexts.insert(number, primary(ordinal) + other);
    without_provenance_mut(number)
}

/// An event that was recorded on a stream.
pub(crate) fn event_on(stream: *mut c_void) -> *mut c_void {
    let mut world = world();
    let number = world.number();
    let context = world.contexts[&stream.addr()];
    world.events.insert(number, (Some(stream.addr()), context));
    without_provenance_mut(number)
}

pub(crate) fn set_busy(stream: *mut c_void, is_busy: bool) {
    let mut world = world();
    world.busy.retain(|known| *known != stream.addr());
    if is_busy {
        world.busy.push(stream.addr());
    }
}

pub(crate) fn set_capturing(stream: *mut c_void) {
    world().capturing.push(stream.addr());
}

/// Does something in a thread that has the primary context of a device.
pub(crate) fn with_context<T>(ordinal: i32, work: impl FnOnce() -> T) -> T {
    let own = primary(ordinal);
    OWN.set(own);
    CURRENT.with_borrow_mut(|stack| stack.push(own));
    let done = work();
    assert_eq!(CURRENT.with_borrow_mut(Vec::pop), Some(own));
    OWN.set(0);
    done
}

/// Nothing of this thread is left as the library must not leave it.
pub(crate) fn is_undisturbed() -> bool {
    let stack = CURRENT.with_borrow(Clone::clone);
    let own: &[usize] = if OWN.get() == 0 { &[] } else { &[OWN.get()] };
    stack == own && MODE.with_borrow(|mode| *mode == 0)
}

fn primary(ordinal: i32) -> usize {
    0x10_0000 + ordinal as usize
}

/// The UUID of a device.
pub(crate) fn uuid(ordinal: i32) -> [u8; 16] {
    [0xf0 + ordinal as u8; 16]
}

/// The driver.
pub(crate) fn driver() -> Driver {
    Driver::with(Functions {
        cuGetErrorName: error_text,
        cuGetErrorString: error_text,
        cuThreadExchangeStreamCaptureMode: exchange_mode,
        cuCtxGetCurrent: current,
        cuCtxPushCurrent_v2: push,
        cuCtxPopCurrent_v2: pop,
        cuDeviceGet: device,
        cuDeviceGetUuid_v2: device_uuid,
        cuDevicePrimaryCtxGetState: primary_state,
        cuDevicePrimaryCtxRetain: retain,
        cuDevicePrimaryCtxRelease_v2: release,
        cuPointerGetAttributes: attributes,
        cuMemGetAddressRange_v2: range,
        cuIpcGetMemHandle: memory_handle,
        cuIpcGetEventHandle: event_handle,
        cuMemRetainAllocationHandle: retain_physical,
        cuMemExportToShareableHandle: export,
        cuMemRelease: release_physical,
        cuEventCreate: create_event,
        cuEventDestroy_v2: destroy_event,
        cuEventRecord: record,
        cuEventQuery: query,
        cuStreamCreate: create_stream,
        cuStreamDestroy_v2: destroy_stream,
        cuStreamWaitEvent: wait_event,
        cuStreamGetCtx: stream_context,
        cuStreamIsCapturing: is_capturing,
    })
}

/// Puts a value where the caller wants it.
fn put<T>(place: *mut T, value: T) -> Code {
    // SAFETY: every caller of this driver gives places of its own stack.
    unsafe { place.write_unaligned(value) };
    0
}

fn context() -> usize {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

unsafe extern "C" fn error_text(_: Code, text: *mut *const c_char) -> Code {
    put(text, c"a fake's error".as_ptr())
}

unsafe extern "C" fn exchange_mode(mode: *mut c_uint) -> Code {
    // SAFETY: as for `put`.
    let wanted = unsafe { mode.read() };
    put(mode, MODE.replace(wanted))
}

unsafe extern "C" fn current(place: *mut Opaque) -> Code {
    put(place, without_provenance_mut(context()))
}

unsafe extern "C" fn push(context: Opaque) -> Code {
    CURRENT.with_borrow_mut(|stack| stack.push(context.addr()));
    0
}

unsafe extern "C" fn pop(place: *mut Opaque) -> Code {
    let popped = CURRENT.with_borrow_mut(Vec::pop).unwrap_or(0);
    put(place, without_provenance_mut(popped))
}

unsafe extern "C" fn device(place: *mut c_int, ordinal: c_int) -> Code {
    if (0..DEVICES).contains(&ordinal) {
        return put(place, ordinal + 50);
    }
    INVALID_VALUE
}

unsafe extern "C" fn device_uuid(place: *mut [u8; 16], device: c_int) -> Code {
    put(place, uuid(device - 50))
}

unsafe extern "C" fn primary_state(_: c_int, _: *mut c_uint, active: *mut c_int) -> Code {
    put(active, 1)
}

unsafe extern "C" fn retain(place: *mut Opaque, device: c_int) -> Code {
    put(place, without_provenance_mut(primary(device - 50)))
}

unsafe extern "C" fn release(_: c_int) -> Code {
    0
}

unsafe extern "C" fn attributes(
    count: c_uint,
    names: *mut c_uint,
    places: *mut *mut c_void,
    address: c_ulonglong,
) -> Code {
    if context() == 0 {
        return INVALID_CONTEXT;
    }
    let found = world().find(address).cloned();
    for at in 0..count as usize {
        // SAFETY: the caller gives so many names and places of 8 bytes.
        let (name, place) = unsafe { (names.add(at).read(), places.add(at).read().cast::<u64>()) };
        let Some(Allocation { ordinal, kind, .. }) = &found else {
            put(place, 0);
            continue;
        };
        let value = match name {
            1 if !matches!(kind, Kind::Vmm(..)) => primary(*ordinal) as u64,
            2 if matches!(kind, Kind::Host(_)) => 1,
            2 => 2,
            7 => 9,
            8 => u64::from(*kind == Kind::Managed),
            9 => *ordinal as u64,
            10 => u64::from(*kind == Kind::Plain),
            14 => u64::from(matches!(kind, Kind::Vmm(_, true))),
            17 => u64::from(*kind == Kind::Pooled),
            _ => 0,
        };
        put(place, value);
    }
    0
}

/// The chunk of an allocation that an address lies in: its first byte, length and place.
fn chunk(found: &Allocation, address: u64) -> (u64, u64, usize) {
    let Kind::Vmm(chunks, _) = &found.kind else {
        return (found.base, found.bytes, 0);
    };
    let mut base = found.base;
    for (at, bytes) in chunks.iter().enumerate() {
        if address < base + bytes {
            return (base, *bytes, at);
        }
        base += bytes;
    }
    unreachable!("the chunks are the allocation")
}

unsafe extern "C" fn range(base: *mut c_ulonglong, bytes: *mut usize, address: u64) -> Code {
    let Some(found) = world().find(address).cloned() else {
        return INVALID_VALUE;
    };
    let (start, length, _) = chunk(&found, address);
    put(base, start) | put(bytes, length as usize)
}

unsafe extern "C" fn memory_handle(place: *mut [u8; 64], address: c_ulonglong) -> Code {
    if context() == 0 {
        return INVALID_CONTEXT;
    }
    let mut handle = [0; 64];
    handle[..8].copy_from_slice(&address.to_le_bytes());
    put(place, handle)
}

unsafe extern "C" fn retain_physical(place: *mut c_ulonglong, address: *mut c_void) -> Code {
    let address = address.addr() as u64;
    let Some(found) = world().find(address).cloned() else {
        return INVALID_VALUE;
    };
    let (start, ..) = chunk(&found, address);
    put(place, start)
}

unsafe extern "C" fn export(
    place: *mut c_void,
    handle: c_ulonglong,
    kind: c_uint,
    _: c_ulonglong,
) -> Code {
    if kind != 1 {
        return NOT_SUPPORTED;
    }
    world().exported += 1;
    let name = format!("chunk-{handle:x}");
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create(&*name, flags).expect("a descriptor is left");
    put(place.cast::<c_int>(), fd.into_raw_fd())
}

unsafe extern "C" fn release_physical(_: c_ulonglong) -> Code {
    0
}

unsafe extern "C" fn create_event(place: *mut Opaque, flags: c_uint) -> Code {
    let context = context();
    if flags & 4 != 0 && context == primary(DEVICE_WITHOUT_IPC_EVENTS) {
        return NOT_SUPPORTED;
    }
    let mut world = world();
    let number = world.number();
    world.interprocess += usize::from(flags & 4 != 0);
    world.events.insert(number, (None, context));
    put(place, without_provenance_mut(number))
}

unsafe extern "C" fn destroy_event(event: Opaque) -> Code {
    match world().events.remove(&event.addr()) {
        Some(_) => 0,
        None => INVALID_HANDLE,
    }
}

unsafe extern "C" fn event_handle(place: *mut [u8; 64], event: Opaque) -> Code {
    let mut handle = [0xee; 64];
    handle[..8].copy_from_slice(&event.addr().to_le_bytes());
    put(place, handle)
}

unsafe extern "C" fn record(event: Opaque, stream: Opaque) -> Code {
    let context = context();
    let mut world = world();
    if world
        .contexts
        .get(&stream.addr())
        .is_some_and(|own| *own != context)
    {
        return INVALID_HANDLE;
    }
    match world.events.get_mut(&event.addr()) {
        Some((on, own)) if *own == context => {
            *on = Some(stream.addr());
            0
        }
        _ => INVALID_HANDLE,
    }
}

unsafe extern "C" fn query(event: Opaque) -> Code {
    let world = world();
    match world.events.get(&event.addr()) {
        Some((Some(stream), _)) if world.is_busy(*stream) => NOT_READY,
        Some(_) => 0,
        None => INVALID_HANDLE,
    }
}

unsafe extern "C" fn create_stream(place: *mut Opaque, _: c_uint) -> Code {
    let context = context();
    let mut world = world();
    let number = world.number();
    world.contexts.insert(number, context);
    put(place, without_provenance_mut(number))
}

unsafe extern "C" fn destroy_stream(stream: Opaque) -> Code {
    world().contexts.remove(&stream.addr());
    0
}

unsafe extern "C" fn wait_event(stream: Opaque, event: Opaque, _: c_uint) -> Code {
    let mut world = world();
    let Some((on, _)) = world.events.get(&event.addr()).copied() else {
        return INVALID_HANDLE;
    };
    if let Some(on) = on {
        world.waits.insert(stream.addr(), on);
    }
    0
}

unsafe extern "C" fn stream_context(stream: Opaque, place: *mut Opaque) -> Code {
    match world().contexts.get(&stream.addr()) {
        Some(context) => put(place, without_provenance_mut(*context)),
        None => INVALID_HANDLE,
    }
}

unsafe extern "C" fn is_capturing(stream: Opaque, place: *mut c_uint) -> Code {
    put(place, u32::from(world().capturing.contains(&stream.addr())))
}
