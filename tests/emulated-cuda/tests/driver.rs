//! What the emulated driver does and refuses, asked through `cudarc` as daemon and library ask it,
//! by two processes: the test starts itself once more for each.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr::null_mut;
use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};
use emulated_cuda::code::Code;
use emulated_cuda::control::{Control, Count};
use emulated_cuda::machine::{self, Machine};

const ROLE: &str = "EMULATED_TEST_ROLE";
const MIB: usize = 1 << 20;

/// An emulated machine of a test, in a folder of its own.
struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(machine: &Machine) -> Rig {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
        machine.create(folder.path()).expect("a machine");
        let library = machine::built_library().expect("a path");
        Machine::install(&library.expect("cargo builds the library"), folder.path())
            .expect("links");
        Rig { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn used(&self, device: usize) -> u64 {
        Machine::used_bytes(self.path(), device).expect("counted")
    }

    /// Runs the named test once more in a process of its own, which plays `role`.
    fn start(&self, test: &str, role: &str) -> Process {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(machine::FOLDER_VARIABLE, self.path())
            .env("LD_LIBRARY_PATH", self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        Process {
            input: child.stdin.take().expect("piped"),
            output: BufReader::new(child.stdout.take().expect("piped")),
            child,
        }
    }
}

struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// The next line that the role told.
    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).expect("a line");
            assert_ne!(read, 0, "the process ended");
            if let Some((_, told)) = line.trim_end().split_once('@') {
                return told.to_owned();
            }
        }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("it listens");
    }

    fn finish(mut self) {
        drop(self.input);
        std::io::copy(&mut self.output, &mut std::io::sink()).expect("its end");
        let status = self.child.wait().expect("its end");
        assert!(status.success(), "{status}");
    }

    fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("its end");
    }
}

/// The role of this process, if it is one that a test started.
fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

fn tell(line: &str) {
    println!("@{line}");
}

fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line");
    line.trim_end().to_owned()
}

/// Calls the driver; only success is expected.
macro_rules! cu {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        let result = try_cu!($function($($argument),*));
        assert_eq!(result, CUresult::CUDA_SUCCESS, stringify!($function));
    }};
}

macro_rules! try_cu {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the library was built with this test; every pointer is one to a local value of
        // the right type, or one that the test wants refused.
        unsafe { sys::$function($($argument),*) }
    }};
}

/// Initialises the driver and makes the primary context of `ordinal` current.
fn enter(ordinal: i32) -> sys::CUcontext {
    cu!(cuInit(0));
    let mut context = null_mut();
    cu!(cuDevicePrimaryCtxRetain(&mut context, ordinal));
    cu!(cuCtxSetCurrent(context));
    context
}

fn allocate(bytes: usize) -> u64 {
    let mut address = 0;
    cu!(cuMemAlloc_v2(&mut address, bytes));
    address
}

fn upload(to: u64, bytes: &[u8]) {
    cu!(cuMemcpyHtoD_v2(to, bytes.as_ptr().cast(), bytes.len()));
}

fn download(from: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    cu!(cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), from, bytes));
    out
}

fn stream() -> sys::CUstream {
    let mut stream = null_mut();
    cu!(cuStreamCreate(&mut stream, 1));
    stream
}

fn event(flags: u32) -> sys::CUevent {
    let mut event = null_mut();
    cu!(cuEventCreate(&mut event, flags));
    event
}

fn hex(bytes: &[std::ffi::c_char; 64]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{:02x}", *byte as u8))
        .collect()
}

fn from_hex(text: &str) -> [std::ffi::c_char; 64] {
    std::array::from_fn(|at| {
        u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex") as std::ffi::c_char
    })
}

fn export(address: u64) -> String {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    cu!(cuIpcGetMemHandle(&mut handle, address));
    hex(&handle.reserved)
}

fn open(handle: &str) -> (CUresult, u64) {
    let handle = sys::CUipcMemHandle {
        reserved: from_hex(handle),
    };
    let mut address = 0;
    let result = try_cu!(cuIpcOpenMemHandle_v2(&mut address, handle, 1));
    (result, address)
}

fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| seed.wrapping_add((at * 7 + at / 251) as u8))
        .collect()
}

#[test]
fn an_allocation_that_another_process_opens_is_the_same_bytes_and_stays_taken_until_both_let_go() {
    const TEST: &str = "an_allocation_that_another_process_opens_is_the_same_bytes_and_stays_taken_until_both_let_go";
    match role().as_deref() {
        Some("owner") => {
            enter(0);
            let address = allocate(3 * MIB);
            upload(address, &pattern(1, 3 * MIB));
            let handle = export(address);
            assert_eq!(
                open(&handle).0,
                CUresult::CUDA_ERROR_INVALID_CONTEXT,
                "own handle"
            );
            tell(&handle);
            listen();
            assert_eq!(download(address, MIB), pattern(2, MIB));
            cu!(cuMemFree_v2(address));
            assert_eq!(
                try_cu!(cuMemFree_v2(address)),
                CUresult::CUDA_ERROR_INVALID_VALUE
            );
            tell("freed");
            listen();
        }
        Some("user") => {
            enter(0);
            let handle = listen();
            let (result, address) = open(&handle);
            assert_eq!(result, CUresult::CUDA_SUCCESS);
            assert_eq!(
                open(&handle),
                (result, address),
                "opened twice, mapped once"
            );
            assert_eq!(download(address, 3 * MIB), pattern(1, 3 * MIB));
            upload(address, &pattern(2, MIB));
            tell("written");
            listen();
            cu!(cuIpcCloseMemHandle(address));
            assert_eq!(download(address + 5, 100), pattern(2, 200)[5..105]);
            tell("once");
            listen();
            cu!(cuIpcCloseMemHandle(address));
            let mut byte = 0_u8;
            assert_eq!(
                try_cu!(cuMemcpyDtoH_v2((&raw mut byte).cast(), address, 1)),
                CUresult::CUDA_ERROR_INVALID_VALUE
            );
            assert_eq!(open(&handle).0, CUresult::CUDA_ERROR_INVALID_VALUE, "freed");
            tell("closed");
            listen();
        }
        _ => {
            let machine = Machine::with_devices(1);
            let rig = Rig::new(&machine);
            let mut owner = rig.start(TEST, "owner");
            let mut user = rig.start(TEST, "user");
            user.say(&owner.hear());
            user.hear();
            assert_eq!(rig.used(0), 2 * machine.context_bytes + 3 * MIB as u64);
            owner.say("");
            owner.hear();
            assert_eq!(rig.used(0), 2 * machine.context_bytes + 3 * MIB as u64);
            user.say("");
            user.hear();
            user.say("");
            user.hear();
            assert_eq!(rig.used(0), 2 * machine.context_bytes);
            owner.kill();
            assert_eq!(rig.used(0), machine.context_bytes);
            user.finish();
            assert_eq!(rig.used(0), 0);
        }
    }
}

#[test]
fn memory_of_a_killed_process_stays_with_those_who_opened_it_and_is_opened_by_nobody_else() {
    const TEST: &str =
        "memory_of_a_killed_process_stays_with_those_who_opened_it_and_is_opened_by_nobody_else";
    match role().as_deref() {
        Some("owner") => {
            enter(0);
            let address = allocate(MIB);
            upload(address, &pattern(3, MIB));
            tell(&export(address));
            listen();
        }
        Some("user") => {
            enter(0);
            let handle = listen();
            let (_, address) = open(&handle);
            tell("open");
            listen();
            assert_eq!(download(address, MIB), pattern(3, MIB));
            cu!(cuIpcCloseMemHandle(address));
            assert_eq!(open(&handle).0, CUresult::CUDA_ERROR_INVALID_VALUE);
            tell("closed");
            listen();
        }
        _ => {
            let machine = Machine::with_devices(1);
            let rig = Rig::new(&machine);
            let mut owner = rig.start(TEST, "owner");
            let mut user = rig.start(TEST, "user");
            user.say(&owner.hear());
            user.hear();
            owner.kill();
            assert_eq!(rig.used(0), machine.context_bytes + MIB as u64);
            user.say("");
            user.hear();
            assert_eq!(rig.used(0), machine.context_bytes);
            user.finish();
        }
    }
}

#[test]
fn an_event_is_seen_by_another_process_when_the_stream_has_reached_it_and_not_before() {
    const TEST: &str =
        "an_event_is_seen_by_another_process_when_the_stream_has_reached_it_and_not_before";
    extern "C" fn wait_for_line(_: *mut std::ffi::c_void) {
        listen();
    }
    match role().as_deref() {
        Some("owner") => {
            enter(0);
            assert_eq!(
                try_cu!(cuEventCreate(&mut null_mut(), 4)),
                CUresult::CUDA_ERROR_INVALID_VALUE,
                "an interprocess event takes no time"
            );
            let (event, stream) = (event(6), stream());
            let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
            cu!(cuIpcGetEventHandle(&mut handle, event));
            cu!(cuEventQuery(event));
            cu!(cuLaunchHostFunc(stream, Some(wait_for_line), null_mut()));
            cu!(cuEventRecord(event, stream));
            assert_eq!(try_cu!(cuEventQuery(event)), CUresult::CUDA_ERROR_NOT_READY);
            assert_eq!(
                try_cu!(cuStreamQuery(stream)),
                CUresult::CUDA_ERROR_NOT_READY
            );
            tell(&hex(&handle.reserved));
            cu!(cuEventSynchronize(event));
            cu!(cuStreamSynchronize(stream));
            tell("done");
            listen();
        }
        Some("user") => {
            enter(0);
            let handle = sys::CUipcEventHandle {
                reserved: from_hex(&listen()),
            };
            let mut event = null_mut();
            cu!(cuIpcOpenEventHandle(&mut event, handle));
            assert_eq!(try_cu!(cuEventQuery(event)), CUresult::CUDA_ERROR_NOT_READY);
            let stream = stream();
            cu!(cuStreamWaitEvent(stream, event, 0));
            assert_eq!(
                try_cu!(cuStreamQuery(stream)),
                CUresult::CUDA_ERROR_NOT_READY
            );
            tell("waiting");
            listen();
            cu!(cuStreamSynchronize(stream));
            cu!(cuEventQuery(event));
            let wrong = sys::CUipcEventHandle { reserved: [7; 64] };
            assert_eq!(
                try_cu!(cuIpcOpenEventHandle(&mut event, wrong)),
                CUresult::CUDA_ERROR_INVALID_HANDLE
            );
        }
        _ => {
            let rig = Rig::new(&Machine::with_devices(1));
            let mut owner = rig.start(TEST, "owner");
            let mut user = rig.start(TEST, "user");
            user.say(&owner.hear());
            user.hear();
            owner.say("");
            owner.hear();
            user.say("");
            user.finish();
            owner.finish();
        }
    }
}

/// A test of one process: `body` runs in it, on a machine as given.
fn alone(test: &str, machine: &Machine, body: fn(), after: fn(&Rig)) {
    if role().is_some() {
        return body();
    }
    let rig = Rig::new(machine);
    rig.start(test, "alone").finish();
    after(&rig);
}

#[test]
fn what_the_driver_refuses_is_refused() {
    alone(
        "what_the_driver_refuses_is_refused",
        &Machine::with_devices(2),
        || {
            let mut count = 0;
            assert_eq!(
                try_cu!(cuDeviceGetCount(&mut count)),
                CUresult::CUDA_ERROR_NOT_INITIALIZED
            );
            cu!(cuInit(0));
            let mut address = 0;
            assert_eq!(
                try_cu!(cuMemAlloc_v2(&mut address, 1)),
                CUresult::CUDA_ERROR_INVALID_CONTEXT
            );
            enter(0);
            cu!(cuDeviceGetCount(&mut count));
            assert_eq!(count, 2);
            assert_eq!(
                try_cu!(cuMemAlloc_v2(&mut address, 2 << 30)),
                CUresult::CUDA_ERROR_OUT_OF_MEMORY
            );
            let first = allocate(MIB);
            let mut host = vec![0_u8; 64 << 10];
            let pointer = host.as_mut_ptr();
            let refused = CUresult::CUDA_ERROR_INVALID_VALUE;
            let copy = |to, from, bytes| try_cu!(cuMemcpyAsync(to, from, bytes, stream()));
            let at = pointer.expose_provenance() as u64;
            assert_eq!(
                copy(first + MIB as u64 - 1, at, 2),
                refused,
                "beyond its end"
            );
            assert_eq!(copy(at, first - 1, 2), refused, "before its start");
            cu!(cuMemHostRegister_v2(pointer.cast(), 4096, 0));
            cu!(cuMemHostRegister_v2(
                pointer.wrapping_add(4096).cast(),
                4096,
                0
            ));
            assert_eq!(
                try_cu!(cuMemHostRegister_v2(pointer.cast(), 100, 0)),
                CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
            );
            assert_eq!(copy(first, at, 8192), refused, "across two registrations");
            assert_eq!(copy(first, at + 100, 3996), CUresult::CUDA_SUCCESS);
            cu!(cuCtxSynchronize());
            cu!(cuMemHostUnregister(pointer.cast()));
            assert_eq!(
                try_cu!(cuMemHostUnregister(pointer.cast())),
                CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
            );
            let foreign = stream();
            enter(1);
            assert_eq!(
                try_cu!(cuMemcpyAsync(first, at, 8, foreign)),
                CUresult::CUDA_ERROR_INVALID_HANDLE,
                "a stream of another context"
            );
            assert_eq!(copy(first, at, 8), refused, "memory of another device");
        },
        |_| (),
    );
}

#[test]
fn a_device_address_cannot_be_followed() {
    alone(
        "a_device_address_cannot_be_followed",
        &Machine::with_devices(1),
        || {
            enter(0);
            let address = allocate(MIB);
            let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
            let line = maps.lines().find(|line| {
                let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
                let bound = |text| u64::from_str_radix(text, 16).unwrap();
                (bound(start)..bound(end)).contains(&address)
            });
            assert!(line.expect("reserved").contains("---p"), "{line:?}");
        },
        |_| (),
    );
}

#[test]
fn a_sticky_error_stays_until_the_context_is_reset() {
    alone(
        "a_sticky_error_stays_until_the_context_is_reset",
        &Machine::with_devices(2),
        || {
            let folder = PathBuf::from(std::env::var_os(machine::FOLDER_VARIABLE).unwrap());
            let control = Control::open(&folder).expect("control");
            let context = enter(0);
            let address = allocate(MIB);
            upload(address, &[1; 100]);
            control.inject(0, std::process::id(), 1, Code::ILLEGAL_ADDRESS);
            upload(address, &[2; 100]);
            let failed = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
            let mut host = [0_u8; 100];
            assert_eq!(
                try_cu!(cuMemcpyDtoH_v2(host.as_mut_ptr().cast(), address, 100)),
                failed
            );
            assert_eq!(try_cu!(cuMemAlloc_v2(&mut 0, 1)), failed);
            assert_eq!(control.count(0, Count::Faults), 1);
            enter(1);
            upload(allocate(MIB), &[1; 100]);
            cu!(cuDevicePrimaryCtxReset_v2(0));
            assert_eq!(
                try_cu!(cuCtxSetCurrent(context)),
                CUresult::CUDA_ERROR_INVALID_CONTEXT
            );
            enter(0);
            assert_eq!(
                try_cu!(cuMemcpyDtoH_v2(host.as_mut_ptr().cast(), address, 100)),
                CUresult::CUDA_ERROR_INVALID_VALUE,
                "memory went with its context"
            );
            upload(allocate(MIB), &[3; 100]);
            control.lose(0, Code::UNKNOWN);
            assert_eq!(try_cu!(cuCtxSynchronize()), CUresult::CUDA_ERROR_UNKNOWN);
        },
        |rig| assert_eq!(rig.used(0), 0),
    );
}

/// `CUmemAllocationProp` of shareable memory on device 0.
fn shareable() -> sys::CUmemAllocationProp {
    // SAFETY: a structure of numbers and a null pointer, for which zeros are valid but for the
    // enumerations, which are set below.
    let mut wanted: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    wanted.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes =
        sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    wanted.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    wanted
}

#[test]
fn mapped_chunks_are_one_range_and_travel_by_descriptor() {
    alone(
        "mapped_chunks_are_one_range_and_travel_by_descriptor",
        &Machine::with_devices(1),
        || {
            enter(0);
            let (chunk, wanted) = (2 * MIB, shareable());
            let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
            let (mut base, mut other) = (0, 0);
            cu!(cuMemAddressReserve(&mut base, 3 * chunk, 0, 0, 0));
            cu!(cuMemAddressReserve(&mut other, 3 * chunk, 0, 0, 0));
            for part in 0..3 {
                let (mut handle, mut copy, mut descriptor) = (0, 0, -1_i32);
                cu!(cuMemCreate(&mut handle, chunk, &wanted, 0));
                let offset = (part * chunk) as u64;
                cu!(cuMemMap(base + offset, chunk, 0, handle, 0));
                cu!(cuMemExportToShareableHandle(
                    (&raw mut descriptor).cast(),
                    handle,
                    kind,
                    0
                ));
                let number = std::ptr::without_provenance_mut(descriptor as usize);
                cu!(cuMemImportFromShareableHandle(&mut copy, number, kind));
                cu!(cuMemMap(other + offset, chunk, 0, copy, 0));
                cu!(cuMemRelease(copy));
                cu!(cuMemRelease(handle));
            }
            let mut byte = 0_u8;
            assert_eq!(
                try_cu!(cuMemcpyDtoH_v2((&raw mut byte).cast(), base, 1)),
                CUresult::CUDA_ERROR_INVALID_VALUE,
                "no access yet"
            );
            // SAFETY: as in `shareable`.
            let mut access: sys::CUmemAccessDesc = unsafe { std::mem::zeroed() };
            access.location = wanted.location;
            access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            cu!(cuMemSetAccess(base, 3 * chunk, &access, 1));
            cu!(cuMemSetAccess(other, 3 * chunk, &access, 1));
            upload(base, &pattern(9, 3 * chunk));
            assert_eq!(download(other, 3 * chunk), pattern(9, 3 * chunk));
            assert_eq!(
                try_cu!(cuIpcGetMemHandle(
                    &mut sys::CUipcMemHandle { reserved: [0; 64] },
                    base
                )),
                CUresult::CUDA_ERROR_INVALID_VALUE
            );
            cu!(cuMemUnmap(other, 3 * chunk));
            cu!(cuMemAddressFree(other, 3 * chunk));
            assert_eq!(
                try_cu!(cuMemAddressFree(base, 3 * chunk)),
                CUresult::CUDA_ERROR_INVALID_VALUE,
                "still mapped"
            );
        },
        |rig| assert_eq!(rig.used(0), 0),
    );
}

#[repr(C)]
struct Part {
    base: u64,
    stride: u64,
    bytes: u32,
    offset: u32,
}

#[test]
fn kernels_gather_and_scatter_pages_and_fault_beyond_memory() {
    alone(
        "kernels_gather_and_scatter_pages_and_fault_beyond_memory",
        &Machine::with_devices(1),
        || {
            enter(0);
            let ptx = c".version 8.0\n.target sm_70\n.address_size 64\n\
                        .visible .entry pega_gather(\n.visible .entry pega_scatter(\n";
            let mut module = null_mut();
            cu!(cuModuleLoadData(&mut module, ptx.as_ptr().cast()));
            let function = |name: &std::ffi::CStr| {
                let mut function = null_mut();
                cu!(cuModuleGetFunction(&mut function, module, name.as_ptr()));
                function
            };
            let kv = allocate(64 << 10);
            upload(kv, &pattern(5, 64 << 10));
            // Two layers of eight blocks of 100 bytes, padded to 128.
            let parts = [
                Part {
                    base: kv,
                    stride: 128,
                    bytes: 100,
                    offset: 0,
                },
                Part {
                    base: kv + 1024,
                    stride: 128,
                    bytes: 100,
                    offset: 100,
                },
            ];
            let (table, staging) = (allocate(48), allocate(MIB));
            cu!(cuMemcpyHtoD_v2(table, parts.as_ptr().cast(), 48));
            let mut blocks: *mut std::ffi::c_void = null_mut();
            cu!(cuMemHostAlloc(&mut blocks, 4096, 2));
            // SAFETY: the driver has just allocated the memory.
            unsafe { blocks.cast::<[u32; 3]>().write([6, 0, 3]) };
            let launch = |name, pages: u32| {
                let (mut table, mut count) = (table, 2_u32);
                let (mut blocks, mut pages) = (blocks, pages);
                let (mut page_bytes, mut staging) = (200_u64, staging);
                let mut arguments: [*mut std::ffi::c_void; 6] = [
                    (&raw mut table).cast(),
                    (&raw mut count).cast(),
                    (&raw mut blocks).cast(),
                    (&raw mut pages).cast(),
                    (&raw mut page_bytes).cast(),
                    (&raw mut staging).cast(),
                ];
                let list = arguments.as_mut_ptr();
                let function = function(name);
                cu!(cuLaunchKernel(
                    function,
                    4,
                    1,
                    1,
                    256,
                    1,
                    1,
                    0,
                    stream(),
                    list,
                    null_mut()
                ));
            };
            launch(c"pega_gather", 3);
            cu!(cuCtxSynchronize());
            let all = pattern(5, 64 << 10);
            let mut expected = Vec::new();
            for block in [6, 0, 3] {
                expected.extend_from_slice(&all[128 * block..][..100]);
                expected.extend_from_slice(&all[1024 + 128 * block..][..100]);
            }
            assert_eq!(download(staging, 600), expected);
            cu!(cuMemsetD8_v2(kv, 0, 64 << 10));
            launch(c"pega_scatter", 3);
            cu!(cuCtxSynchronize());
            assert_eq!(download(kv + 6 * 128, 100), all[6 * 128..][..100]);
            assert_eq!(download(kv + 6 * 128 + 100, 28), [0; 28], "padding");
            assert_eq!(download(kv + 128, 100), [0; 100], "no such block");
            // SAFETY: as above.
            unsafe { blocks.cast::<u32>().write(600) };
            launch(c"pega_gather", 1);
            assert_eq!(
                try_cu!(cuCtxSynchronize()),
                CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            );
        },
        |rig| {
            let control = Control::open(rig.path()).expect("control");
            assert_eq!(control.count(0, Count::Kernels), 3);
        },
    );
}

#[test]
fn memory_closed_under_a_copy_is_an_illegal_address() {
    const TEST: &str = "memory_closed_under_a_copy_is_an_illegal_address";
    extern "C" fn pause(_: *mut std::ffi::c_void) {
        std::thread::sleep(Duration::from_millis(100));
    }
    match role().as_deref() {
        Some("owner") => {
            enter(0);
            tell(&export(allocate(MIB)));
            listen();
        }
        Some("user") => {
            enter(0);
            let (_, address) = open(&listen());
            let mut host: *mut std::ffi::c_void = null_mut();
            cu!(cuMemHostAlloc(&mut host, MIB, 0));
            let stream = stream();
            cu!(cuLaunchHostFunc(stream, Some(pause), null_mut()));
            cu!(cuMemcpyDtoHAsync_v2(host, address, MIB, stream));
            cu!(cuIpcCloseMemHandle(address));
            assert_eq!(
                try_cu!(cuStreamSynchronize(stream)),
                CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            );
        }
        _ => {
            let rig = Rig::new(&Machine::with_devices(1));
            let mut owner = rig.start(TEST, "owner");
            let mut user = rig.start(TEST, "user");
            user.say(&owner.hear());
            user.finish();
            owner.finish();
            let control = Control::open(rig.path()).expect("control");
            assert_eq!(control.count(0, Count::ClosedInUse), 1);
        }
    }
}

#[test]
fn devices_that_a_process_may_not_see_do_not_exist_for_it() {
    let machine = Machine::with_devices(3);
    if role().is_some() {
        let wanted: u8 = listen().parse().expect("a number");
        cu!(cuInit(0));
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        cu!(cuDeviceGetUuid_v2(&mut uuid, 0));
        assert_eq!(uuid.bytes[0] as u8, wanted);
        let absent = try_cu!(cuDeviceGetUuid_v2(&mut uuid, 1));
        assert_eq!(absent, CUresult::CUDA_ERROR_INVALID_DEVICE);
        return;
    }
    let rig = Rig::new(&machine);
    for wanted in [2_u8, 1] {
        let text = machine::uuid_text(&machine.devices[wanted as usize].uuid);
        let visible = if wanted == 2 {
            "2".to_owned()
        } else {
            format!("GPU-{text}")
        };
        let mut child = Command::new(std::env::current_exe().expect("a path"));
        let status = child
            .args([
                "--exact",
                "devices_that_a_process_may_not_see_do_not_exist_for_it",
            ])
            .env(ROLE, "alone")
            .env("CUDA_VISIBLE_DEVICES", visible)
            .env(machine::FOLDER_VARIABLE, rig.path())
            .env("LD_LIBRARY_PATH", rig.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .and_then(|mut child| {
                writeln!(child.stdin.take().expect("piped"), "{wanted}")?;
                child.wait()
            });
        assert!(status.expect("it ran").success());
    }
}
