//! The C functions called with what a careless caller gives them, and from a forked child.

mod fake;

use std::ffi::{CStr, CString, c_char, c_int};
use std::mem::offset_of;
use std::ptr::{null, null_mut};

use fake::Fake;
use pegaflow::Status;
use pegaflow::ffi::*;

fn last_error() -> String {
    // SAFETY: the text is valid until the next failing call of this thread.
    unsafe { CStr::from_ptr(pega_last_error()) }
        .to_str()
        .unwrap()
        .to_owned()
}

fn code(status: Status) -> c_int {
    -(status as c_int)
}

struct Connected {
    client: *mut pega_client,
    _fake: Fake,
    _folder: tempfile::TempDir,
}

fn zeroed<T>() -> T {
    // SAFETY: only used for the ABI's structs of integers and pointers.
    unsafe { std::mem::zeroed() }
}

fn connect() -> Connected {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("daemon.sock");
    let fake = Fake::start(&socket);
    let text = CString::new(socket.to_str().unwrap()).unwrap();
    let mut options: pega_options = zeroed();
    options.size = size_of::<pega_options>() as u32;
    options.socket = text.as_ptr();
    options.autostart = PEGA_OFF;
    let mut client = null_mut();
    // SAFETY: valid options and place.
    let result = unsafe { pega_connect(&options, &mut client) };
    assert_eq!(result, 0, "{}", last_error());
    Connected {
        client,
        _fake: fake,
        _folder: folder,
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        // SAFETY: made by `connect`, not used any more.
        assert_eq!(unsafe { pega_disconnect(self.client) }, 0);
    }
}

fn scheduler(client: *mut pega_client) -> u32 {
    let mut ns: pega_namespace = zeroed();
    ns.size = size_of::<pega_namespace>() as u32;
    ns.block_tokens = 16;
    (ns.model, ns.dtype, ns.hash_algorithm) = (c"m".as_ptr(), c"bf16".as_ptr(), c"h".as_ptr());
    let mut spec: pega_registration = zeroed();
    spec.size = size_of::<pega_registration>() as u32;
    (spec.instance, spec.ns, spec.world_size, spec.rank) = (c"i".as_ptr(), &ns, 1, PEGA_SCHEDULER);
    let mut id = 0;
    // SAFETY: a complete specification.
    let result = unsafe { pega_register(client, &spec, &mut id) };
    assert_eq!(result, 0, "{}", last_error());
    id
}

#[test]
fn null_is_an_argument_error_everywhere() {
    let invalid = code(Status::InvalidArgument);
    let connected = connect();
    let client = connected.client;
    let mut number = 0u64;
    let mut word = 0u32;
    // SAFETY: NULL is what the functions have to cope with; all else is valid.
    unsafe {
        assert_eq!(pega_connect(null(), null_mut()), invalid);
        assert_eq!(pega_options_init(null_mut(), 8), invalid);
        assert_eq!(pega_state(null()), invalid);
        assert_eq!(pega_get_stats(client, null_mut()), invalid);
        assert_eq!(pega_get_limits(null(), null_mut()), invalid);
        assert_eq!(pega_alloc_host(client, 10, null_mut()), invalid);
        assert_eq!(pega_register(client, null(), &mut word), invalid);
        assert_eq!(pega_register(client, null(), null_mut()), invalid);
        assert_eq!(pega_unregister(null_mut(), 1), invalid);
        assert_eq!(pega_wait_ready(null_mut(), 1, 0), invalid);
        assert_eq!(pega_nop(client, null_mut()), invalid);
        assert_eq!(pega_nop(null_mut(), &mut number), invalid);
        assert_eq!(pega_poll(client, null_mut(), 3), invalid);
        assert_eq!(pega_poll(client, null_mut(), 0), 0);
        assert_eq!(pega_wait(client, 1, 0, null_mut()), invalid);
        assert_eq!(pega_completion_fd(null_mut()), invalid);
        assert_eq!(
            pega_save(client, 1, 0, null(), null(), 4, &mut number),
            invalid
        );
        assert!(last_error().contains("hashes = `NULL`"));
        assert_eq!(
            pega_load(client, 1, 0, 1, 0, null(), 4, &mut number),
            invalid
        );
        assert_eq!(pega_probe(client, 1, 0, null(), 4, &mut word), invalid);
        assert_eq!(pega_free_host(client, null_mut()), 0);
        assert_eq!(pega_disconnect(null_mut()), 0);
    }
}

#[test]
fn wrong_values_are_named() {
    let connected = connect();
    let client = connected.client;
    let id = scheduler(client);
    let hash = pega_hash { bytes: [1; 32] };
    let (mut request, mut hits) = (0, 9);
    // SAFETY: valid pointers, wrong values.
    unsafe {
        assert_eq!(pega_nop(client, &mut request), 0);
        assert_eq!(
            pega_probe(client, id + 1, 0, &hash, 1, &mut hits),
            code(Status::UnknownRegistration)
        );
        assert_eq!(pega_probe(client, id, 0, &hash, 1, &mut hits), 0);
        assert_eq!(hits, 0);
        let refused = pega_query(client, id, 1, 1, &hash, 1, 0, null_mut(), 0, &mut request);
        assert_eq!(refused, code(Status::InvalidArgument));
        assert!(last_error().contains("a bit for each hash"));
        let crooked = (&raw const hits).cast::<u8>().wrapping_add(1).cast::<u32>();
        let refused = pega_load(client, id, 0, 1, 0, crooked, 1, &mut request);
        assert_eq!(refused, code(Status::InvalidArgument));
        assert!(last_error().contains("align it"));
        let refused = pega_load(client, id, 0, 1, 0, &hits, usize::MAX, &mut request);
        assert_eq!(refused, code(Status::InvalidArgument));
        let mut done = pega_completion::default();
        assert_eq!(
            pega_wait(client, 12345, 0, &mut done),
            code(Status::UnknownRequest)
        );
        let stray = (&raw mut hits).cast();
        assert_eq!(pega_free_host(client, stray), code(Status::InvalidArgument));
        let mut options: pega_options = zeroed();
        let mut other = null_mut();
        assert_eq!(
            pega_connect(&options, &mut other),
            code(Status::InvalidArgument)
        );
        assert!(last_error().contains("sizeof"));
        options.size = size_of::<pega_options>() as u32;
        options.autostart = 7;
        assert_eq!(
            pega_connect(&options, &mut other),
            code(Status::InvalidArgument)
        );
        let latin1: &[u8] = b"\xe9\0";
        (options.autostart, options.node) = (0, latin1.as_ptr().cast::<c_char>());
        assert_eq!(
            pega_connect(&options, &mut other),
            code(Status::InvalidArgument)
        );
        assert!(last_error().contains("UTF-8") && other.is_null());
    }
}

#[test]
fn structs_of_older_and_newer_callers_are_understood() {
    let connected = connect();
    // SAFETY: the buffers are as long as they say.
    unsafe {
        let mut old = [0u64; 4];
        let stats = old.as_mut_ptr().cast::<pega_stats>();
        stats.cast::<u32>().write(24);
        assert_eq!(pega_get_stats(connected.client, stats), 0);
        assert_eq!((old[0] as u32, (old[0] >> 32) as u32, old[3]), (24, 1, 0));
        let mut new = [u64::MAX; 64];
        let options = new.as_mut_ptr().cast::<pega_options>();
        assert_eq!(pega_options_init(options, 512), 0);
        assert_eq!(new[0] as u32, 512);
        assert!(
            new[size_of::<pega_options>() / 8..]
                .iter()
                .all(|word| *word == 0)
        );
        new[60] = 1;
        let mut client = null_mut();
        let refused = pega_connect(new.as_ptr().cast(), &mut client);
        assert_eq!(refused, code(Status::InvalidArgument));
        assert!(last_error().contains("newer library"));
    }
}

#[test]
fn a_program_of_the_first_header_is_served_by_this_library() {
    // Sizes of ABI version 1, and nothing readable behind them that means something.
    const OPTIONS: usize = 88;
    const STATS: usize = 104;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("daemon.sock");
    let _fake = Fake::start(&socket);
    let text = CString::new(socket.to_str().unwrap()).unwrap();
    let mut room = [u64::MAX; 32];
    let options = room.as_mut_ptr().cast::<pega_options>();
    let mut client = null_mut();
    // SAFETY: the buffers are as long as they say.
    unsafe {
        assert_eq!(pega_options_init(options, OPTIONS as u32), 0);
        (&raw mut (*options).socket).write(text.as_ptr());
        (&raw mut (*options).autostart).write(PEGA_OFF);
    }
    assert!(room[OPTIONS / 8..].iter().all(|word| *word == u64::MAX));
    // SAFETY: as above.
    unsafe {
        assert_eq!(pega_connect(options, &mut client), 0, "{}", last_error());
        let stats = room.as_mut_ptr().cast::<pega_stats>();
        room[STATS / 8..].fill(u64::MAX);
        stats.cast::<u32>().write(STATS as u32);
        assert_eq!(pega_get_stats(client, stats), 0);
    }
    assert_eq!(room[0] >> 32, 1, "connected");
    assert!(room[STATS / 8..].iter().all(|word| *word == u64::MAX));
    // SAFETY: not used any more.
    assert_eq!(unsafe { pega_disconnect(client) }, 0);
}

/// Counts lines of each level.
unsafe extern "C" fn count_lines(user: *mut std::ffi::c_void, level: u32, line: *const c_char) {
    // SAFETY: `user` is what the test gave, `line` a text.
    let (counts, line) = unsafe {
        (
            &*user.cast::<[std::sync::atomic::AtomicU32; 4]>(),
            CStr::from_ptr(line),
        )
    };
    assert!(!line.is_empty());
    counts[level as usize].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

#[test]
fn a_c_program_begins_without_a_daemon_and_hears_of_its_coming_and_going() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("daemon.sock");
    let text = CString::new(socket.to_str().unwrap()).unwrap();
    let counts: [std::sync::atomic::AtomicU32; 4] = Default::default();
    let warned = || counts[PEGA_LOG_WARN as usize].load(std::sync::atomic::Ordering::Relaxed);
    let mut options: pega_options = zeroed();
    options.size = size_of::<pega_options>() as u32;
    options.socket = text.as_ptr();
    options.autostart = PEGA_OFF;
    options.start_without_daemon = PEGA_ON;
    options.log_level = PEGA_LOG_WARN;
    options.log = Some(count_lines);
    options.log_user = (&raw const counts).cast_mut().cast();
    let mut client = null_mut();
    // SAFETY: valid options and place.
    assert_eq!(unsafe { pega_connect(&options, &mut client) }, 0);
    let until = |state, lines| {
        let start = std::time::Instant::now();
        // SAFETY: a client.
        while unsafe { pega_state(client) } != state || warned() != lines {
            assert!(start.elapsed().as_secs() < 10, "{state} {}", warned());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    };
    until(2, 1);
    let id = scheduler(client);
    let fake = Fake::start(&socket);
    until(1, 2);
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(pega_wait_ready(client, id, 10_000), 0);
        fake.vanish();
        until(2, 3);
        let (mut blocks, mut count) = ([0u32; 2], 9usize);
        let unknown = pega_unloaded_blocks(client, 5, blocks.as_mut_ptr(), 2, &mut count);
        assert_eq!((unknown, count), (code(Status::UnknownRequest), 9));
        assert_eq!(
            pega_unloaded_blocks(client, 5, null_mut(), 0, null_mut()),
            code(Status::InvalidArgument)
        );
        assert_eq!(pega_disconnect(client), 0);
    }
    assert_eq!(warned(), 3, "the own end is no warning");
}

#[test]
fn an_impossible_size_of_options_is_refused_before_anything_is_written() {
    let mut room = [u32::MAX; 4];
    for size in [0, 1, 3, 4, 7, 9, 4097, 4100, u32::MAX] {
        // SAFETY: an impossible size is refused, so that nothing is written.
        let refused = unsafe { pega_options_init(room.as_mut_ptr().cast(), size) };
        assert_eq!(refused, code(Status::InvalidArgument), "size {size}");
        assert!(last_error().contains(&format!("size {size}")));
        assert_eq!(room, [u32::MAX; 4], "size {size}");
    }
    // SAFETY: there is room for as many bytes.
    assert_eq!(unsafe { pega_options_init(room.as_mut_ptr().cast(), 8) }, 0);
    assert_eq!((room[0], room[2], room[3]), (8, u32::MAX, u32::MAX));
}

#[test]
fn texts_exist_for_every_code_and_either_sign() {
    // SAFETY: the texts are valid for ever.
    let text = |pointer: *const c_char| unsafe { CStr::from_ptr(pointer) }.to_str().unwrap();
    for status in Status::ALL {
        let number = *status as c_int;
        // SAFETY: takes numbers only.
        unsafe {
            assert_eq!(text(pega_status_label(number)), status.label());
            assert_eq!(text(pega_status_label(-number)), status.label());
            assert_eq!(text(pega_status_text(-number)), status.text());
        }
    }
    // SAFETY: takes numbers only.
    unsafe {
        assert_eq!(text(pega_status_text(c_int::MIN)), "unknown");
        assert_eq!(text(pega_reason_label(2)), "incomplete");
        assert_eq!(text(pega_reason_label(99)), "unknown");
        assert_eq!(text(pega_op_label(3)), "load");
        assert_eq!(text(pega_version()), env!("CARGO_PKG_VERSION"));
        assert_eq!(pega_abi_version(), PEGA_ABI_VERSION);
    }
}

#[test]
fn a_membership_query_writes_the_callers_bitmap() {
    let connected = connect();
    let id = scheduler(connected.client);
    let hashes: Vec<pega_hash> = (0..100).map(|n| pega_hash { bytes: [n; 32] }).collect();
    for number in [3u8, 64, 99] {
        connected
            ._fake
            .world
            .store
            .lock()
            .unwrap()
            .put(2, [number; 32], vec![1]);
    }
    let mut bitmap = [u64::MAX; 3];
    let mut done = [pega_completion::default(); 4];
    let mut request = 0;
    // SAFETY: valid pointers; the bitmap outlives the completion.
    unsafe {
        let (client, hashes) = (connected.client, hashes.as_ptr());
        let queried = pega_query(
            client,
            id,
            2,
            1,
            hashes,
            100,
            0,
            bitmap.as_mut_ptr(),
            3,
            &mut request,
        );
        assert_eq!(queried, 0, "{}", last_error());
        let start = std::time::Instant::now();
        while pega_poll(client, done.as_mut_ptr(), 4) == 0 {
            assert!(start.elapsed().as_secs() < 10);
        }
    }
    assert_eq!(
        (done[0].request, done[0].count, done[0].size),
        (request, 3, 96)
    );
    assert_eq!(
        bitmap,
        [1 << 3, 1 | 1 << 35, u64::MAX],
        "words beyond the list stay"
    );
}

#[test]
fn memory_in_use_is_not_freed() {
    let connected = connect();
    let client = connected.client;
    let mut memory = null_mut();
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(pega_alloc_host(client, 1 << 20, &mut memory), 0);
        let mut ns: pega_namespace = zeroed();
        ns.size = size_of::<pega_namespace>() as u32;
        ns.block_tokens = 16;
        (ns.model, ns.dtype, ns.hash_algorithm) = (c"m".as_ptr(), c"bf16".as_ptr(), c"h".as_ptr());
        let size = size_of::<pega_segment>() as u32;
        let segment = pega_segment {
            size,
            memory: 0,
            address: memory,
            block_stride: 4096,
            bytes: 4096,
        };
        // As a program gives it that was built when the struct ended here.
        let size = offset_of!(pega_group, replicated) as u32;
        let group = pega_group {
            size,
            group: 0,
            num_blocks: 256,
            num_segments: 1,
            segments: &segment,
            replicated: 77,
            reserved: 77,
        };
        let mut spec: pega_registration = zeroed();
        spec.size = size_of::<pega_registration>() as u32;
        (spec.instance, spec.ns, spec.world_size) = (c"i".as_ptr(), &ns, 1);
        (spec.groups, spec.num_groups) = (&group, 1);
        let mut id = 0;
        assert_eq!(pega_register(client, &spec, &mut id), 0, "{}", last_error());
        assert_eq!(
            pega_free_host(client, memory),
            code(Status::InvalidArgument)
        );
        assert!(last_error().contains("pega_unregister"));
        assert_eq!(pega_unregister(client, id), 0);
        assert_eq!(pega_free_host(client, memory), 0);
        assert_eq!(
            pega_free_host(client, memory),
            code(Status::InvalidArgument)
        );
    }
}

#[test]
fn a_forked_child_gets_an_error_and_leaves_the_parents_session_alone() {
    let connected = connect();
    let client = connected.client;
    let mut request = 0;
    // SAFETY: the child calls into the library, whose locks no other thread holds for long, and
    // ends without running destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut done = pega_completion::default();
        let (mut stats, mut limits): (pega_stats, pega_limits) = (zeroed(), zeroed());
        stats.size = size_of::<pega_stats>() as u32;
        limits.size = size_of::<pega_limits>() as u32;
        let mut count = 0usize;
        // SAFETY: valid pointers.
        let refused = unsafe {
            [
                pega_nop(client, &mut request),
                pega_poll(client, &mut done, 1),
                pega_wait(client, 1, 1000, &mut done),
                pega_completion_fd(client),
                pega_unregister(client, 1),
                pega_state(client),
                pega_get_stats(client, &mut stats),
                pega_get_limits(client, &mut limits),
                pega_unloaded_blocks(client, 1, null_mut(), 0, &mut count),
            ]
        };
        let all = refused
            .iter()
            .all(|result| *result == code(Status::InvalidArgument));
        // SAFETY: the child's copy is not used after; `_exit` ends it.
        unsafe {
            let left = pega_disconnect(client) == 0;
            libc::_exit(if all && left { 0 } else { 1 });
        }
    }
    let mut status = 0;
    // SAFETY: `child` is a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 0);
    let mut done = pega_completion::default();
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(pega_state(client), 1);
        assert_eq!(pega_nop(client, &mut request), 0);
        assert_eq!(
            pega_wait(client, request, 10_000, &mut done),
            0,
            "{}",
            last_error()
        );
    }
    assert_eq!(done.status, 0);
}
