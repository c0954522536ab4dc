//! A driver whose devices are memory of this process, for tests: streams run when they are looked
//! at or when a test says so, and fail as it says.

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pegaflow_shm::control::DeviceUuid;

use crate::device::driver::*;
use crate::device::error::DriverError;
use crate::device::info::DeviceInfo;
use crate::device::part::DevicePart;

pub const ILLEGAL_ADDRESS: i32 = 700;
const INVALID: i32 = 1;

/// What a stream is asked to do.
enum Op {
    Copy(Way, BusCopy),
    Launch(Kernel, KernelArgs),
    Record(usize),
}

/// When streams run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pace {
    /// One operation each time an event of the stream is asked about.
    #[default]
    Looked,
    /// Never, until a test changes it.
    Held,
}

#[derive(Default)]
struct State {
    /// Memory by address, and whether it goes with the context.
    memory: HashMap<u64, (Box<[u64]>, bool)>,
    streams: Vec<VecDeque<Op>>,
    /// Recorded and not reached; and in which stream.
    events: Vec<(bool, usize)>,
    /// Events of other processes by handle: whether they have happened.
    foreign: Vec<bool>,
    pace: Pace,
    broken: Option<i32>,
    refuses_to_open: bool,
    /// Fails the copy with this number from now on.
    fail_copy_in: Option<u64>,
    opened: u64,
    pub copies: u64,
    kernels: u64,
    closed: Vec<u64>,
    mapped: Vec<u64>,
}

/// The driver; clones name the same.
#[derive(Clone, Default)]
pub struct FakeDriver {
    state: Arc<Mutex<State>>,
}

const FOREIGN: usize = 1 << 40;

fn error(call: &'static str, code: i32) -> DriverError {
    DriverError {
        call,
        code,
        name: "CUDA_ERROR_OF_A_TEST",
    }
}

pub fn uuid() -> DeviceUuid {
    DeviceUuid([9; 16])
}

impl FakeDriver {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another process's allocation: its handle, and its bytes' address.
    pub fn export(&self, bytes: usize) -> ([u8; 64], *mut u8) {
        let at = self.lock().allocate(bytes, false);
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&at.to_le_bytes());
        (handle, at as *mut u8)
    }

    /// Another process's event, which has not happened.
    pub fn export_event(&self) -> [u8; 64] {
        let mut state = self.lock();
        state.foreign.push(false);
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&(state.foreign.len() as u64 - 1).to_le_bytes());
        handle
    }

    pub fn happen(&self, handle: &[u8; 64]) {
        let number = u64::from_le_bytes(handle[..8].try_into().unwrap());
        self.lock().foreign[number as usize] = true;
    }

    pub fn set_pace(&self, pace: Pace) {
        self.lock().pace = pace;
    }

    /// Every call fails from now on until a new context is opened.
    pub fn break_context(&self, code: i32) {
        self.lock().broken = Some(code);
    }

    pub fn fail_copy_in(&self, copies: u64) {
        self.lock().fail_copy_in = Some(copies);
    }

    pub fn refuse_to_open(&self, refuse: bool) {
        self.lock().refuses_to_open = refuse;
    }

    /// Allocations of other processes that are mapped.
    pub fn mapped(&self) -> usize {
        self.lock().mapped.len()
    }

    pub fn kernels(&self) -> u64 {
        self.lock().kernels
    }

    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    /// Operations that were queued and have not run.
    pub fn pending(&self) -> usize {
        self.lock().streams.iter().map(VecDeque::len).sum()
    }
}

impl State {
    fn allocate(&mut self, bytes: usize, of_context: bool) -> u64 {
        let memory = vec![0u64; bytes.div_ceil(8).max(1)].into_boxed_slice();
        let at = memory.as_ptr() as u64;
        self.memory.insert(at, (memory, of_context));
        at
    }

    fn check(&self, call: &'static str) -> Result<(), DriverError> {
        self.broken.map_or(Ok(()), |code| Err(error(call, code)))
    }

    fn run_one(&mut self, stream: usize) {
        match self.streams[stream].pop_front() {
            // SAFETY: tests give ranges of their own memory and of this driver's, which live on.
            Some(Op::Copy(way, copy)) => unsafe {
                let (host, device) = (copy.host as *mut u8, copy.device as *mut u8);
                match way {
                    Way::ToHost => std::ptr::copy_nonoverlapping(device, host, copy.bytes),
                    Way::ToDevice => std::ptr::copy_nonoverlapping(host, device, copy.bytes),
                }
            },
            Some(Op::Launch(kernel, args)) => run_kernel(kernel, &args),
            Some(Op::Record(event)) => self.events[event].0 = false,
            None => {}
        }
    }
}

/// What the kernels do, one byte range at a time.
fn run_kernel(kernel: Kernel, args: &KernelArgs) {
    // SAFETY: as for copies; the parts and ids lie where the arguments say.
    unsafe {
        let parts = args.parts as *const DevicePart;
        for page in 0..args.pages as usize {
            let block = (args.blocks as *const u32).add(page).read();
            for number in 0..args.part_count as usize {
                let part = parts.add(number).read();
                let piece = (part.base + u64::from(block) * part.block_stride) as *mut u8;
                let dense =
                    args.staging
                        .wrapping_add(page as u64 * args.page_bytes)
                        .wrapping_add(u64::from(part.page_offset)) as *mut u8;
                let bytes = part.bytes as usize;
                match kernel {
                    Kernel(1) => std::ptr::copy_nonoverlapping(piece, dense, bytes),
                    _ => std::ptr::copy_nonoverlapping(dense, piece, bytes),
                }
            }
        }
    }
}

impl Driver for FakeDriver {
    fn version(&self) -> u32 {
        12_080
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>, DriverError> {
        Ok(vec![DeviceInfo {
            uuid: uuid(),
            name: "fake".into(),
            ordinal: 0,
            pci_bus_id: "0000:00:00.0".into(),
            numa_node: None,
            memory_bytes: 1 << 30,
        }])
    }

    fn open(&self, _ordinal: u32) -> Result<Arc<dyn Context>, DriverError> {
        let mut state = self.lock();
        if state.refuses_to_open {
            return Err(error("cuDevicePrimaryCtxRetain", 2));
        }
        state.broken = None;
        state.opened += 1;
        Ok(Arc::new(self.clone()))
    }
}

impl Context for FakeDriver {
    fn bind(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.streams.clear();
        state.events.clear();
        state.mapped.clear();
        state.memory.retain(|_, (_, of_context)| !*of_context);
        Ok(())
    }

    fn memory(&self) -> Result<(u64, u64), DriverError> {
        Ok((1 << 29, 1 << 30))
    }

    fn multiprocessors(&self) -> Result<u32, DriverError> {
        Ok(4)
    }

    fn create_stream(&self) -> Result<Stream, DriverError> {
        let mut state = self.lock();
        state.streams.push(VecDeque::new());
        Ok(Stream(state.streams.len() - 1))
    }

    fn create_event(&self) -> Result<Event, DriverError> {
        let mut state = self.lock();
        state.events.push((false, 0));
        Ok(Event(state.events.len() - 1))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.check("cuEventRecord")?;
        state.events[event.0] = (true, stream.0);
        state.streams[stream.0].push_back(Op::Record(event.0));
        Ok(())
    }

    fn is_done(&self, event: Event) -> Result<bool, DriverError> {
        let mut state = self.lock();
        state.check("cuEventQuery")?;
        if event.0 >= FOREIGN {
            return Ok(state.foreign[event.0 - FOREIGN]);
        }
        let (waits, stream) = state.events[event.0];
        if waits && state.pace == Pace::Looked {
            state.run_one(stream);
        }
        Ok(!state.events[event.0].0)
    }

    fn destroy_event(&self, _event: Event) -> Result<(), DriverError> {
        Ok(())
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr, DriverError> {
        Ok(self.lock().allocate(bytes as usize, true))
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedBuffer, DriverError> {
        let device = self.lock().allocate(bytes, true);
        Ok(PinnedBuffer {
            host: NonNull::new(device as *mut u8).unwrap(),
            device,
        })
    }

    unsafe fn pin(&self, _host: NonNull<u8>, _bytes: usize) -> Result<(), DriverError> {
        Ok(())
    }

    fn unpin(&self, _host: NonNull<u8>) -> Result<(), DriverError> {
        Ok(())
    }

    unsafe fn copy(&self, way: Way, copies: &[BusCopy], stream: Stream) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.check("cuMemcpyAsync")?;
        for copy in copies {
            state.copies += 1;
            if let Some(left) = &mut state.fail_copy_in {
                *left -= 1;
                if *left == 0 {
                    state.fail_copy_in = None;
                    return Err(error("cuMemcpyAsync", INVALID));
                }
            }
            state.streams[stream.0].push_back(Op::Copy(way, *copy));
        }
        Ok(())
    }

    fn kernel(&self, name: &'static CStr) -> Result<Kernel, DriverError> {
        Ok(Kernel(usize::from(name == c"pega_gather")))
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        _size: (u32, u32),
        args: &KernelArgs,
        stream: Stream,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.check("cuLaunchKernel")?;
        state.kernels += 1;
        state.streams[stream.0].push_back(Op::Launch(kernel, *args));
        Ok(())
    }

    fn open_memory(&self, handle: &[u8; 64]) -> Result<DevicePtr, DriverError> {
        let mut state = self.lock();
        state.check("cuIpcOpenMemHandle")?;
        let at = u64::from_le_bytes(handle[..8].try_into().unwrap());
        if !state.memory.contains_key(&at) {
            return Err(error("cuIpcOpenMemHandle", INVALID));
        }
        state.mapped.push(at);
        Ok(at)
    }

    fn close_memory(&self, base: DevicePtr) -> Result<(), DriverError> {
        let mut state = self.lock();
        let mapped = state.mapped.iter().position(|at| *at == base);
        let mapped = mapped.ok_or(error("cuIpcCloseMemHandle", INVALID))?;
        state.mapped.remove(mapped);
        state.closed.push(base);
        Ok(())
    }

    fn allocation_bytes(&self, base: DevicePtr) -> Result<u64, DriverError> {
        Ok(self.lock().memory[&base].0.len() as u64 * 8)
    }

    fn device_of(&self, _base: DevicePtr) -> Result<u32, DriverError> {
        Ok(0)
    }

    fn map_chunks(&self, _chunks: &[(OwnedFd, u64)]) -> Result<DevicePtr, ChunkError> {
        Err(error("cuMemMap", INVALID).into())
    }

    fn unmap_chunks(&self, _base: DevicePtr, _chunks: &[u64]) -> Result<(), DriverError> {
        Ok(())
    }

    fn open_event(&self, handle: &[u8; 64]) -> Result<Event, DriverError> {
        let number = u64::from_le_bytes(handle[..8].try_into().unwrap()) as usize;
        let known = number < self.lock().foreign.len();
        known
            .then_some(Event(FOREIGN + number))
            .ok_or(error("cuIpcOpenEventHandle", INVALID))
    }
}
