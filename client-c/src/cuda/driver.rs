//! The CUDA driver that the engine's process has loaded: the functions that the library calls.
//!
//! They are looked up in that very library, never found by a search of our own: the search path of
//! an engine may hold a stub of the toolkit or another driver's copy. Results are plain numbers,
//! since a newer driver may return one that this file does not know.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::null_mut;
use std::sync::OnceLock;

use pegaflow_shm::control::{DeviceUuid, IpcHandle};

/// `CUresult`.
pub(super) type Code = c_uint;
/// `CUcontext`, `CUstream` and `CUevent`: opaque, and passed on as they are.
pub(super) type Opaque = *mut c_void;

const SUCCESS: Code = 0;
/// `CUDA_ERROR_INVALID_VALUE`.
pub(super) const INVALID_VALUE: Code = 1;
/// `CUDA_ERROR_NOT_INITIALIZED`.
pub(super) const NOT_INITIALIZED: Code = 3;
/// `CUDA_ERROR_DEINITIALIZED`.
pub(super) const DEINITIALIZED: Code = 4;
/// `CUDA_ERROR_INVALID_CONTEXT`.
pub(super) const INVALID_CONTEXT: Code = 201;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: Code = 600;

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const CAPTURE_RELAXED: c_uint = 2;
/// `CU_EVENT_DISABLE_TIMING`.
const EVENT_DISABLE_TIMING: c_uint = 2;
/// `CU_EVENT_INTERPROCESS`.
const EVENT_INTERPROCESS: c_uint = 4;
/// `CU_STREAM_PER_THREAD`, the largest number that names a default stream instead of a stream.
const LAST_DEFAULT_STREAM: usize = 2;
/// `CU_STREAM_NON_BLOCKING`.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `CUDA_ERROR_NOT_SUPPORTED`.
const NOT_SUPPORTED: Code = 801;
/// `CU_MEMHOSTREGISTER_PORTABLE`.
const HOST_PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_DEVICEMAP`.
const HOST_DEVICEMAP: c_uint = 2;
/// `CU_STREAM_WAIT_VALUE_GEQ`.
const WAIT_GEQ: c_uint = 0;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub(super) const HANDLE_POSIX_FD: u64 = 1;

macro_rules! functions {
    ($(#[$meta:meta])* $functions:ident: $($name:ident($($kind:ty),*);)*) => {
        $(#[$meta])*
        #[allow(non_snake_case, reason = "the driver's names")]
        #[derive(Clone, Copy)]
        pub(super) struct $functions {
            $(pub(super) $name: unsafe extern "C" fn($($kind),*) -> Code,)*
        }

        impl $functions {
            /// # Safety
            /// `find` gives the address of the CUDA driver's function of that name, or null.
            unsafe fn find(
                find: impl Fn(&CStr) -> *mut c_void,
            ) -> Result<$functions, &'static str> {
                Ok($functions { $($name: {
                    let name = concat!(stringify!($name), "\0");
                    let name = CStr::from_bytes_with_nul(name.as_bytes());
                    let address = name.map_or(null_mut(), &find);
                    if address.is_null() {
                        return Err(stringify!($name));
                    }
                    type Function = unsafe extern "C" fn($($kind),*) -> Code;
                    // SAFETY: not null, and by the caller's promise the function that `cuda.h`
                    // declares with these arguments.
                    unsafe { std::mem::transmute::<*mut c_void, Function>(address) }
                },)* })
            }
        }
    };
}

functions! {
    /// Addresses of the driver's functions.
    Functions:
    cuGetErrorName(Code, *mut *const c_char);
    cuGetErrorString(Code, *mut *const c_char);
    cuThreadExchangeStreamCaptureMode(*mut c_uint);
    cuCtxGetCurrent(*mut Opaque);
    cuCtxPushCurrent_v2(Opaque);
    cuCtxPopCurrent_v2(*mut Opaque);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetUuid_v2(*mut [u8; 16], c_int);
    cuDevicePrimaryCtxGetState(c_int, *mut c_uint, *mut c_int);
    cuDevicePrimaryCtxRetain(*mut Opaque, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuPointerGetAttributes(c_uint, *mut c_uint, *mut *mut c_void, c_ulonglong);
    cuMemGetAddressRange_v2(*mut c_ulonglong, *mut usize, c_ulonglong);
    cuIpcGetMemHandle(*mut [u8; 64], c_ulonglong);
    cuIpcGetEventHandle(*mut [u8; 64], Opaque);
    cuMemRetainAllocationHandle(*mut c_ulonglong, *mut c_void);
    cuMemExportToShareableHandle(*mut c_void, c_ulonglong, c_uint, c_ulonglong);
    cuMemRelease(c_ulonglong);
    cuEventCreate(*mut Opaque, c_uint);
    cuEventDestroy_v2(Opaque);
    cuEventRecord(Opaque, Opaque);
    cuEventQuery(Opaque);
    cuStreamCreate(*mut Opaque, c_uint);
    cuStreamDestroy_v2(Opaque);
    cuStreamWaitEvent(Opaque, Opaque, c_uint);
    cuStreamGetCtx(Opaque, *mut Opaque);
    cuStreamIsCapturing(Opaque, *mut c_uint);
}

functions! {
    /// Those that make a stream wait for a word of host memory: not every driver has them.
    WordFunctions:
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemHostGetDevicePointer_v2(*mut c_ulonglong, *mut c_void, c_uint);
    cuStreamWaitValue32_v2(Opaque, c_ulonglong, c_uint, c_uint);
}

/// A call of the CUDA driver that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code}), {text}")]
pub struct CudaError {
    /// The function.
    pub call: &'static str,
    /// The driver's number.
    pub code: u32,
    /// The driver's name for it.
    pub name: String,
    /// The driver's words.
    pub text: String,
}

/// Why the driver of this process cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoDriver {
    /// It is not loaded, so there is no device memory.
    #[error("this process has not loaded the CUDA driver (libcuda.so.1)")]
    NotLoaded,
    /// It lacks a function.
    #[error("the CUDA driver of this process has no {0}: use one of CUDA 11.4 or later")]
    TooOld(&'static str),
}

/// The driver's functions, each kind as far as it is whole.
struct Found {
    functions: Result<Functions, &'static str>,
    words: Result<WordFunctions, &'static str>,
}

/// The driver.
#[derive(Clone, Copy)]
pub(crate) struct Driver {
    functions: &'static Functions,
    /// Or the name of one that is missing.
    words: Result<&'static WordFunctions, &'static str>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

impl Driver {
    /// The driver, if this process has loaded it. Cheap, and asked again until it has.
    pub(crate) fn of_process() -> Result<Driver, NoDriver> {
        static FUNCTIONS: OnceLock<Found> = OnceLock::new();
        if let Some(known) = FUNCTIONS.get() {
            return Driver::over(known);
        }
        // SAFETY: a name; with `RTLD_NOLOAD` nothing is loaded and no code runs.
        let library = unsafe {
            libc::dlopen(
                c"libcuda.so.1".as_ptr(),
                libc::RTLD_LAZY | libc::RTLD_NOLOAD,
            )
        };
        if library.is_null() {
            return Err(NoDriver::NotLoaded);
        }
        // SAFETY: the library stays loaded, since its handle is never closed, and `libcuda.so.1` is
        // the CUDA driver, whose functions have kept their declarations since CUDA 11.
        Driver::over(FUNCTIONS.get_or_init(|| unsafe {
            let find = |name: &CStr| libc::dlsym(library, name.as_ptr());
            Found {
                functions: Functions::find(find),
                words: WordFunctions::find(find),
            }
        }))
    }

    fn over(found: &'static Found) -> Result<Driver, NoDriver> {
        let functions = found.functions.as_ref();
        Ok(Driver {
            functions: functions.map_err(|name| NoDriver::TooOld(name))?,
            words: found.words.as_ref().map_err(|name| *name),
        })
    }

    /// A driver of these functions.
    #[cfg(test)]
    pub(super) fn with(functions: Functions) -> Driver {
        Driver {
            functions: Box::leak(Box::new(functions)),
            words: Err("functions for words of memory"),
        }
    }

    fn check(self, call: &'static str, code: Code) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(self.failure(call, code))
    }

    fn failure(self, call: &'static str, code: Code) -> CudaError {
        CudaError {
            call,
            code,
            name: describe(self.functions.cuGetErrorName, code),
            text: describe(self.functions.cuGetErrorString, code),
        }
    }

    /// Makes a context the calling thread's current one until the result is dropped, and lets the
    /// thread call what another thread's stream capture would forbid. `None` leaves the context.
    pub(super) fn enter(self, context: Option<Context>) -> Result<Entered, CudaError> {
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: the place is writable.
        let code = unsafe { (self.functions.cuThreadExchangeStreamCaptureMode)(&mut mode) };
        self.check("cuThreadExchangeStreamCaptureMode", code)?;
        let mut entered = Entered {
            driver: self,
            mode,
            is_pushed: false,
        };
        if let Some(context) = context {
            // SAFETY: a context that the driver gave out; a destroyed one is refused by it.
            let code = unsafe { (self.functions.cuCtxPushCurrent_v2)(context.0) };
            self.check("cuCtxPushCurrent", code)?;
            entered.is_pushed = true;
        }
        Ok(entered)
    }

    /// The calling thread's context, if it has one.
    pub(super) fn current(self) -> Result<Option<Context>, CudaError> {
        let mut context = null_mut();
        // SAFETY: the place is writable.
        let code = unsafe { (self.functions.cuCtxGetCurrent)(&mut context) };
        self.check("cuCtxGetCurrent", code)?;
        Ok(Context::new(context))
    }

    /// Handle and UUID of the device with this ordinal in this process.
    pub(super) fn device(self, ordinal: c_int) -> Result<(c_int, DeviceUuid), CudaError> {
        let (mut device, mut uuid) = (0, [0; 16]);
        // SAFETY: both places are writable.
        unsafe {
            let code = (self.functions.cuDeviceGet)(&mut device, ordinal);
            self.check("cuDeviceGet", code)?;
            let code = (self.functions.cuDeviceGetUuid_v2)(&mut uuid, device);
            self.check("cuDeviceGetUuid", code)?;
        }
        Ok((device, DeviceUuid(uuid)))
    }

    /// Whether the device's primary context exists.
    pub(super) fn has_primary(self, device: c_int) -> Result<bool, CudaError> {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: both places are writable.
        let code =
            unsafe { (self.functions.cuDevicePrimaryCtxGetState)(device, &mut flags, &mut active) };
        self.check("cuDevicePrimaryCtxGetState", code)?;
        Ok(active != 0)
    }

    /// Takes a hold on the device's primary context, to be given back with
    /// [`Self::release_primary`].
    pub(super) fn retain_primary(self, device: c_int) -> Result<Context, CudaError> {
        let mut context = null_mut();
        // SAFETY: the place is writable.
        let code = unsafe { (self.functions.cuDevicePrimaryCtxRetain)(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Context(context))
    }

    pub(super) fn release_primary(self, device: c_int) -> Result<(), CudaError> {
        // SAFETY: gives back one hold that `retain_primary` took.
        let code = unsafe { (self.functions.cuDevicePrimaryCtxRelease_v2)(device) };
        self.check("cuDevicePrimaryCtxRelease", code)
    }

    /// Attributes of an address, each as its low bytes; 0 where the driver knows none.
    pub(super) fn attributes<const N: usize>(
        self,
        mut names: [c_uint; N],
        address: u64,
    ) -> Result<[u64; N], CudaError> {
        let mut values = [0u64; N];
        let mut places = values
            .each_mut()
            .map(|value| std::ptr::from_mut(value).cast::<c_void>());
        // SAFETY: `N` names and `N` places of 8 writable bytes each, no less than any attribute
        // that is asked for here has.
        let code = unsafe {
            let (names, places) = (names.as_mut_ptr(), places.as_mut_ptr());
            (self.functions.cuPointerGetAttributes)(N as c_uint, names, places, address)
        };
        self.check("cuPointerGetAttributes", code)?;
        Ok(values)
    }

    /// First byte and length of the allocation, or mapping, that an address lies in.
    pub(super) fn range(self, address: u64) -> Result<(u64, u64), CudaError> {
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: both places are writable.
        let code =
            unsafe { (self.functions.cuMemGetAddressRange_v2)(&mut base, &mut bytes, address) };
        self.check("cuMemGetAddressRange", code)?;
        Ok((base, bytes as u64))
    }

    /// The handle that another process opens an allocation of `cuMemAlloc` with.
    pub(super) fn memory_handle(self, address: u64) -> Result<IpcHandle, CudaError> {
        let mut handle = [0; 64];
        // SAFETY: the place is writable and as long as a `CUipcMemHandle`.
        let code = unsafe { (self.functions.cuIpcGetMemHandle)(&mut handle, address) };
        self.check("cuIpcGetMemHandle", code)?;
        Ok(IpcHandle(handle))
    }

    /// The physical allocation that is mapped at an address; held until the result is dropped.
    pub(super) fn physical(self, address: u64) -> Result<Physical, CudaError> {
        let mut handle = 0;
        let at = std::ptr::without_provenance_mut(address as usize);
        // SAFETY: the place is writable; the address is only looked up.
        let code = unsafe { (self.functions.cuMemRetainAllocationHandle)(&mut handle, at) };
        self.check("cuMemRetainAllocationHandle", code)?;
        Ok(Physical {
            driver: self,
            handle,
        })
    }

    /// An event without timing.
    pub(super) fn create_event(self, is_interprocess: bool) -> Result<Event, CudaError> {
        let mut event = null_mut();
        let shared = if is_interprocess {
            EVENT_INTERPROCESS
        } else {
            0
        };
        // SAFETY: the place is writable.
        let code =
            unsafe { (self.functions.cuEventCreate)(&mut event, EVENT_DISABLE_TIMING | shared) };
        self.check("cuEventCreate", code)?;
        Ok(Event(event))
    }

    /// The event is not used again.
    pub(super) fn destroy_event(self, event: Event) -> Result<(), CudaError> {
        // SAFETY: an event that `create_event` gave and that its one owner gives up.
        let code = unsafe { (self.functions.cuEventDestroy_v2)(event.0) };
        self.check("cuEventDestroy", code)
    }

    /// The handle that another process opens an interprocess event with.
    pub(super) fn event_handle(self, event: Event) -> Result<IpcHandle, CudaError> {
        let mut handle = [0; 64];
        // SAFETY: the place is writable and as long as a `CUipcEventHandle`; the event lives.
        let code = unsafe { (self.functions.cuIpcGetEventHandle)(&mut handle, event.0) };
        self.check("cuIpcGetEventHandle", code)?;
        Ok(IpcHandle(handle))
    }

    /// The event happens once the stream is through with what it has now.
    pub(super) fn record(self, event: Event, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: the event lives; the stream is one of ours or, by the contract of `Order`, lives.
        let code = unsafe { (self.functions.cuEventRecord)(event.0, stream.0) };
        self.check("cuEventRecord", code)
    }

    /// Whether an event has happened; true for one that was never recorded.
    pub(super) fn has_happened(self, event: Event) -> Result<bool, CudaError> {
        // SAFETY: the event lives.
        match unsafe { (self.functions.cuEventQuery)(event.0) } {
            NOT_READY => Ok(false),
            code => self.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// A stream that waits for no other.
    pub(super) fn create_stream(self) -> Result<Stream, CudaError> {
        let mut stream = null_mut();
        // SAFETY: the place is writable.
        let code = unsafe { (self.functions.cuStreamCreate)(&mut stream, STREAM_NON_BLOCKING) };
        self.check("cuStreamCreate", code)?;
        Ok(Stream(stream))
    }

    /// The stream is not used again; what it has it still does.
    pub(super) fn destroy_stream(self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: a stream that `create_stream` gave and that its one owner gives up.
        let code = unsafe { (self.functions.cuStreamDestroy_v2)(stream.0) };
        self.check("cuStreamDestroy", code)
    }

    /// What the stream gets from now on comes after the event.
    pub(super) fn make_wait(self, stream: Stream, event: Event) -> Result<(), CudaError> {
        // SAFETY: the stream is one of ours; the event is, too, or, by the contract of `Order`,
        // lives.
        let code = unsafe { (self.functions.cuStreamWaitEvent)(stream.0, event.0, 0) };
        self.check("cuStreamWaitEvent", code)
    }

    fn words(self) -> Result<&'static WordFunctions, CudaError> {
        self.words.map_err(|name| CudaError {
            call: name,
            code: NOT_SUPPORTED,
            name: "CUDA_ERROR_NOT_SUPPORTED".to_owned(),
            text: "the CUDA driver of this process has no such function".to_owned(),
        })
    }

    /// Whether streams can be made to wait for words of memory at all.
    pub(super) fn check_words(self) -> Result<(), CudaError> {
        self.words().map(drop)
    }

    /// Lets all GPUs read host memory in place.
    ///
    /// # Safety
    /// The range is mapped until [`Self::unpin`], or to the end of the process.
    pub(super) unsafe fn pin(self, host: *mut u8, bytes: usize) -> Result<(), CudaError> {
        let flags = HOST_PORTABLE | HOST_DEVICEMAP;
        let words = self.words()?;
        // SAFETY: the caller's promise.
        let code = unsafe { (words.cuMemHostRegister_v2)(host.cast(), bytes, flags) };
        self.check("cuMemHostRegister", code)
    }

    /// Undoes [`Self::pin`].
    pub(super) fn unpin(self, host: *mut u8) -> Result<(), CudaError> {
        let words = self.words()?;
        // SAFETY: the driver refuses an address that is not pinned.
        let code = unsafe { (words.cuMemHostUnregister)(host.cast()) };
        self.check("cuMemHostUnregister", code)
    }

    /// What the stream gets from now on comes after a word of pinned host memory is at least
    /// `value`, in the order that wraps around. In the context of the stream.
    pub(super) fn wait_for_word(
        self,
        stream: Stream,
        word: *mut u8,
        value: u32,
    ) -> Result<(), CudaError> {
        let words = self.words()?;
        let mut address = 0;
        // SAFETY: the place is writable, and the word only looked up; by the contract of `Order`
        // the stream lives. The word stays pinned while streams may wait for it.
        unsafe {
            let code = (words.cuMemHostGetDevicePointer_v2)(&mut address, word.cast(), 0);
            self.check("cuMemHostGetDevicePointer", code)?;
            let code = (words.cuStreamWaitValue32_v2)(stream.0, address, value, WAIT_GEQ);
            self.check("cuStreamWaitValue32", code)
        }
    }

    /// The context that a stream belongs to.
    pub(super) fn context_of(self, stream: Stream) -> Result<Option<Context>, CudaError> {
        let mut context = null_mut();
        // SAFETY: the place is writable; by the contract of `Order` the stream lives.
        let code = unsafe { (self.functions.cuStreamGetCtx)(stream.0, &mut context) };
        self.check("cuStreamGetCtx", code)?;
        Ok(Context::new(context))
    }

    /// The context that work for a stream is given in; a default stream is that of the calling
    /// thread's current context.
    pub(super) fn context_for(self, stream: Stream) -> Result<Option<Context>, CudaError> {
        if stream.0.addr() <= LAST_DEFAULT_STREAM {
            self.current()
        } else {
            self.context_of(stream)
        }
    }

    /// Whether the stream records a graph instead of doing anything.
    pub(super) fn is_capturing(self, stream: Stream) -> Result<bool, CudaError> {
        let mut status = 0;
        // SAFETY: the place is writable; by the contract of `Order` the stream lives.
        let code = unsafe { (self.functions.cuStreamIsCapturing)(stream.0, &mut status) };
        self.check("cuStreamIsCapturing", code)?;
        Ok(status != 0)
    }
}

fn describe(ask: unsafe extern "C" fn(Code, *mut *const c_char) -> Code, code: Code) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the place is writable; the driver answers with a text that lives for ever, or none.
    unsafe {
        if ask(code, &mut text) != SUCCESS || text.is_null() {
            return "unknown to the driver".to_owned();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

macro_rules! opaque {
    ($($(#[$meta:meta])* $name:ident;)*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct $name(pub(super) Opaque);

        // SAFETY: a name that only the driver looks behind, and the driver is called from any
        // thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}
    )* };
}

opaque! {
    /// A context of the engine's process.
    Context;
    /// A stream.
    Stream;
    /// An event.
    Event;
}

impl Context {
    pub(super) fn new(context: Opaque) -> Option<Context> {
        (!context.is_null()).then_some(Context(context))
    }
}

/// While this lives, a context is the thread's current one; then the one before it is again.
#[derive(Debug)]
pub(super) struct Entered {
    driver: Driver,
    mode: c_uint,
    is_pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let functions = self.driver.functions;
        let mut context = null_mut();
        // SAFETY: both places are writable; what is popped was pushed by `enter`. A driver that is
        // shutting down fails, and has no current context to go back to.
        unsafe {
            if self.is_pushed {
                (functions.cuCtxPopCurrent_v2)(&mut context);
            }
            (functions.cuThreadExchangeStreamCaptureMode)(&mut self.mode);
        }
    }
}

/// A hold on a physical allocation of `cuMemCreate`.
#[derive(Debug)]
pub(super) struct Physical {
    driver: Driver,
    handle: c_ulonglong,
}

impl Physical {
    /// The driver's number of it; the same for each hold.
    pub(super) fn number(&self) -> u64 {
        self.handle
    }

    /// A descriptor that another process imports it with.
    pub(super) fn export(&self) -> Result<OwnedFd, CudaError> {
        let mut fd: RawFd = -1;
        let place = std::ptr::from_mut(&mut fd).cast::<c_void>();
        let kind = HANDLE_POSIX_FD as c_uint;
        let driver = self.driver;
        // SAFETY: for this kind of handle the place is an `int`, which it is.
        let code =
            unsafe { (driver.functions.cuMemExportToShareableHandle)(place, self.handle, kind, 0) };
        driver.check("cuMemExportToShareableHandle", code)?;
        if fd < 0 {
            return Err(driver.failure("cuMemExportToShareableHandle", INVALID_VALUE));
        }
        // SAFETY: a descriptor that the driver just made for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: gives back the hold that `physical` took. A driver that is shutting down fails,
        // and holds nothing any more.
        unsafe { (self.driver.functions.cuMemRelease)(self.handle) };
    }
}
