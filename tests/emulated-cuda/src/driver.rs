//! The state of the driver in one process.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::code::{Code, Outcome};
use crate::context::{self, Context};
use crate::control::{Control, Count};
use crate::event::Event;
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::ranges::{Origin, Ranges};
use crate::storage::{Kind, Object, Storage};
use crate::stream::Stream;

/// Everything that the process has made, by handle.
pub struct State {
    /// Addresses.
    pub ranges: Ranges,
    /// Contexts that were not destroyed.
    pub contexts: HashMap<u64, Arc<Context>>,
    /// Primary contexts by device of the machine.
    pub primaries: Vec<Primary>,
    /// Streams, but for default ones.
    pub streams: HashMap<u64, Arc<Stream>>,
    /// Events.
    pub events: HashMap<u64, Arc<Event>>,
    /// Handles of `cuMemCreate` and how often each was retained.
    pub physical: HashMap<u64, (Arc<Object>, u32)>,
    /// Modules: context and entry points.
    pub modules: HashMap<u64, (u64, Vec<String>)>,
    /// Functions of modules: context and what they do.
    pub functions: HashMap<u64, (u64, Kernel)>,
    next_handle: u64,
}

/// The primary context of a device.
#[derive(Clone, Default)]
pub struct Primary {
    /// It, if it is active.
    pub context: Option<Arc<Context>>,
    /// How often it was retained.
    pub retained: u32,
}

/// The driver of this process.
pub struct Driver {
    folder: PathBuf,
    machine: Machine,
    visible: Vec<usize>,
    control: Control,
    storage: Storage,
    state: Mutex<State>,
}

static DRIVER: OnceLock<Outcome<Driver>> = OnceLock::new();

/// The driver, if `cuInit` was called and found a machine.
pub fn driver() -> Outcome<&'static Driver> {
    let driver = DRIVER.get().ok_or(Code::NOT_INITIALIZED)?;
    driver.as_ref().map_err(|code| *code)
}

/// As `cuInit`.
pub fn init() -> Outcome {
    let driver = DRIVER.get_or_init(Driver::open);
    driver.as_ref().map(|_| ()).map_err(|code| *code)
}

impl Driver {
    fn open() -> Outcome<Driver> {
        let folder = Machine::folder().ok_or(Code::NO_DEVICE)?;
        let unusable = |error: std::io::Error| {
            eprintln!("emulated libcuda: {}: {error}", folder.display());
            Code::NO_DEVICE
        };
        let machine = Machine::open(&folder).map_err(unusable)?;
        let visible = machine.visible();
        if visible.is_empty() {
            return Err(Code::NO_DEVICE);
        }
        let state = State {
            ranges: Ranges::new().map_err(unusable)?,
            contexts: HashMap::new(),
            primaries: vec![Primary::default(); machine.devices.len()],
            streams: HashMap::new(),
            events: HashMap::new(),
            physical: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            next_handle: 0x10_0000,
        };
        Ok(Driver {
            control: Control::open(&folder).map_err(unusable)?,
            storage: Storage::new(&folder),
            state: Mutex::new(state),
            folder,
            machine,
            visible,
        })
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Devices of the machine that this process sees, by ordinal.
    pub fn visible(&self) -> &[usize] {
        &self.visible
    }

    /// The device of the machine behind an ordinal of this process.
    pub fn device(&self, ordinal: i32) -> Outcome<usize> {
        let at = usize::try_from(ordinal).map_err(|_| Code::INVALID_DEVICE)?;
        self.visible.get(at).copied().ok_or(Code::INVALID_DEVICE)
    }

    /// The ordinal of a device that this process sees.
    pub fn ordinal(&self, device: usize) -> Option<i32> {
        let at = self.visible.iter().position(|seen| *seen == device)?;
        i32::try_from(at).ok()
    }

    /// The shared words.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The shared files.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Used and total bytes of a device.
    pub fn memory(&self, device: usize) -> Outcome<(u64, u64)> {
        let used = self.storage.used_bytes(device).map_err(|error| {
            eprintln!("emulated libcuda: {}: {error}", self.folder.display());
            Code::OPERATING_SYSTEM
        })?;
        Ok((used, self.machine.devices[device].memory_bytes))
    }

    /// A new file of device memory.
    pub fn create(&self, kind: Kind, device: usize, bytes: usize) -> Outcome<Object> {
        let limit = self.machine.devices[device].memory_bytes;
        self.storage.create(kind, device, bytes, limit)
    }

    /// The state; short looks and changes only.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while locked")
    }

    /// The current context of this thread, if it can be used.
    pub fn current(&self) -> Outcome<Arc<Context>> {
        let id = context::current();
        if id == 0 {
            return Err(Code::INVALID_CONTEXT);
        }
        let known = self.lock().contexts.get(&id).cloned();
        let context = known.ok_or(Code::CONTEXT_IS_DESTROYED)?;
        if let Some(code) = self.control.lost(context.device) {
            context.fail(code);
        }
        context.state()?;
        Ok(context)
    }

    /// Makes a context on a device of the machine.
    pub fn create_context(&self, device: usize) -> Outcome<Arc<Context>> {
        if let Some(code) = self.control.lost(device) {
            return Err(code);
        }
        let bytes = self.machine.context_bytes as usize;
        let memory = self.create(Kind::Context, device, bytes)?;
        let mut state = self.lock();
        let context = Arc::new(Context::new(state.handle(), device, memory));
        state.contexts.insert(context.id, context.clone());
        Ok(context)
    }

    /// Ends a context and everything in it.
    pub fn destroy_context(&self, context: &Context) {
        context.destroy();
        let mut state = self.lock();
        let state = &mut *state;
        state.contexts.remove(&context.id);
        let ours = |owner: u64| owner == context.id;
        state.streams.retain(|_, stream| !ours(stream.context.id));
        state.events.retain(|_, event| !ours(event.context));
        state.modules.retain(|_, module| !ours(module.0));
        state.functions.retain(|_, function| !ours(function.0));
        state.ranges.device.retain(|_, range| {
            if ours(range.context) && range.origin == Origin::Own {
                self.storage.free(&range.object);
            }
            // What was mapped into reserved addresses belongs to the process.
            !ours(range.context) || matches!(range.origin, Origin::Mapped { .. })
        });
    }

    /// The stream behind a handle, which must belong to the current context.
    pub fn stream(&self, handle: u64) -> Outcome<Arc<Stream>> {
        let context = self.current()?;
        // The legacy default stream, and that of the thread, which is no other one here.
        if handle <= 2 {
            return Ok(context.default_stream());
        }
        let stream = self.lock().streams.get(&handle).cloned();
        let stream = stream.ok_or(Code::INVALID_HANDLE)?;
        if stream.context.id != context.id {
            eprintln!("emulated libcuda: a stream of another context than the current one");
            return Err(Code::INVALID_HANDLE);
        }
        Ok(stream)
    }

    /// The event behind a handle.
    pub fn event(&self, handle: u64) -> Outcome<Arc<Event>> {
        let event = self.lock().events.get(&handle).cloned();
        event.ok_or(Code::INVALID_HANDLE)
    }

    /// Notes that memory was closed under a copy, which is an illegal address in the context.
    pub fn closed(&self, context: &Context, object: &Object) {
        if object.is_in_use() {
            eprintln!(
                "emulated libcuda: memory closed while in use: {:?}",
                object.name
            );
            self.control.add(object.name.device, Count::ClosedInUse, 1);
            context.fail(Code::ILLEGAL_ADDRESS);
        }
    }
}

impl State {
    /// A handle that was never given out before.
    pub fn handle(&mut self) -> u64 {
        self.next_handle += 0x10;
        self.next_handle
    }
}
