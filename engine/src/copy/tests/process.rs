use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::support::*;
use crate::copy::*;
use crate::layout::MemoryRef;

const PAGE: u64 = 4096;

/// Changes the protection of `length` bytes at `offset` of a mapping.
fn protect(mapping: &RegionMapping, offset: u64, length: u64, protection: i32) {
    // SAFETY: inside the mapping, whose bytes no test touches through a reference.
    let rc = unsafe {
        let at = mapping.base().as_ptr().add(offset as usize);
        libc::mprotect(at.cast(), length as usize, protection)
    };
    assert_eq!(rc, 0);
}

/// Shared memory at one address in this process and in a child made after it. The daemon's mappings
/// are not inherited by forks, so the child is told to inherit this one.
fn shared_with_children(bytes: u64) -> Arc<RegionMapping> {
    let mapping = region(bytes);
    // SAFETY: the whole mapping, just made.
    let rc = unsafe {
        libc::madvise(
            mapping.base().as_ptr().cast(),
            bytes as usize,
            libc::MADV_DOFORK,
        )
    };
    assert_eq!(rc, 0);
    mapping
}

#[test]
fn process_memory_round_trips_beyond_one_call_s_ranges() {
    // 700 blocks × 3 parts is twice the 1,024 ranges of one call; page and part lengths are odd.
    const BLOCKS: u32 = 700;
    let span = 3000 * u64::from(BLOCKS);
    let memory = shared_with_children(span);
    let pool_map = region(1777 * u64::from(BLOCKS));
    let data = noise(span, 9);
    write(&memory, &data);
    let child = Child::fork();
    let address = memory.base().as_ptr() as u64;
    let parts = [
        (address, 3000, 1000),
        (address + 2000, 3000, 700),
        (address + 1500, 3000, 77),
    ];
    let list = segments(MemoryRef::Process, &parts);
    let target = bind(BLOCKS, list, &[], Some(&child.memory()));
    let at = |b: u32| u64::from((b * 13) % BLOCKS) * 1777;
    let pages: Vec<_> = (0..BLOCKS).map(|b| (at(b), b)).collect();
    let all = 1777 * u64::from(BLOCKS);

    let saved = run(&pool(&pool_map), &task(Direction::Save, &target, &pages));
    assert_eq!(saved, (Ok(all), BLOCKS));
    let bytes = read(&pool_map);
    for &(offset, block) in &pages {
        let (page, block) = (
            &bytes[offset as usize..][..1777],
            &data[block as usize * 3000..],
        );
        assert_eq!(page[..1000], block[..1000]);
        assert_eq!(page[1000..1700], block[2000..2700]);
        assert_eq!(page[1700..], block[1500..1577]);
    }

    let mut expected = vec![0xAA; span as usize];
    for block in expected.chunks_mut(3000).zip(data.chunks(3000)) {
        for range in [0..1000, 2000..2700, 1500..1577] {
            block.0[range.clone()].copy_from_slice(&block.1[range]);
        }
    }
    write(&memory, &vec![0xAA; span as usize]);
    let loaded = run(&pool(&pool_map), &task(Direction::Load, &target, &pages));
    assert_eq!(loaded, (Ok(all), BLOCKS));
    assert!(read(&memory) == expected, "loaded bytes differ");
}

#[test]
fn pages_larger_than_one_call_and_parts_of_both_kinds_round_trip() {
    const BYTES: u64 = 5 << 20;
    let (memory, plain, pool_map) = (
        shared_with_children(2 * BYTES),
        region(64),
        region(3 * BYTES),
    );
    write(&memory, &noise(2 * BYTES, 3));
    write(&plain, &noise(64, 4));
    let child = Child::fork();
    let address = memory.base().as_ptr() as u64;
    let mut list = segments(MemoryRef::Region(0), &[(0, 32, 32)]);
    list.extend(segments(MemoryRef::Process, &[(address, BYTES, BYTES)]));
    let target = bind(2, list, std::slice::from_ref(&plain), Some(&child.memory()));
    let pages = [(BYTES + 64, 1), (0, 0)];
    let before = (read(&memory), read(&plain));
    let save = task(Direction::Save, &target, &pages);
    assert_eq!(run(&pool(&pool_map), &save), (Ok(2 * (BYTES + 32)), 2));
    write(&memory, &vec![0; 2 * BYTES as usize]);
    write(&plain, &[0; 64]);
    assert_eq!(
        run(&pool(&pool_map), &task(Direction::Load, &target, &pages)).1,
        2
    );
    assert!(
        (read(&memory), read(&plain)) == before,
        "loaded bytes differ"
    );
}

#[test]
fn an_unreadable_address_is_named_and_the_pages_before_it_are_done() {
    let memory = shared_with_children(8 * PAGE);
    protect(&memory, 5 * PAGE, PAGE, libc::PROT_NONE);
    let child = Child::fork();
    protect(&memory, 5 * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE);
    let address = memory.base().as_ptr() as u64;
    let list = segments(
        MemoryRef::Process,
        &[(address, PAGE, 100), (address + 200, PAGE, 50)],
    );
    let target = bind(8, list, &[], Some(&child.memory()));
    let pages: Vec<_> = (0..8).map(|b| (u64::from(b) * 150, b)).collect();
    let pool_map = region(8 * 150);
    for direction in [Direction::Save, Direction::Load] {
        let (result, done) = run(&pool(&pool_map), &task(direction, &target, &pages));
        let expected = CopyError::BadAddress {
            pid: child.pid,
            direction,
            block: 5,
            part: 0,
            segment: 0,
            address: address + 5 * PAGE,
        };
        assert_eq!((result, done), (Err(expected), 5));
    }
}

#[test]
fn memory_that_ends_inside_a_part_names_the_first_bad_byte_and_its_segment() {
    let memory = shared_with_children(2 * PAGE);
    protect(&memory, PAGE, PAGE, libc::PROT_READ);
    let child = Child::fork();
    let address = memory.base().as_ptr() as u64;
    // Two segments, merged into one part; the second one's end lies on the read-only page.
    let list = segments(
        MemoryRef::Process,
        &[(address, 2 * PAGE, 4000), (address + 4000, 2 * PAGE, 1000)],
    );
    let target = bind(1, list, &[], Some(&child.memory()));
    let pool_map = region(5000);
    let pool = pool(&pool_map);
    assert_eq!(
        run(&pool, &task(Direction::Save, &target, &[(0, 0)])),
        (Ok(5000), 1)
    );
    let (result, done) = run(&pool, &task(Direction::Load, &target, &[(0, 0)]));
    let direction = Direction::Load;
    let (pid, address) = (child.pid, address + PAGE);
    let expected = CopyError::BadAddress {
        pid,
        direction,
        block: 0,
        part: 0,
        segment: 1,
        address,
    };
    assert_eq!((result, done), (Err(expected), 0));
}

#[test]
fn a_dead_owner_is_an_error_at_once() {
    let memory = shared_with_children(PAGE);
    let child = Child::fork();
    let (pid, pidfd, owner) = (child.pid, child.pidfd(), child.memory());
    let address = memory.base().as_ptr() as u64;
    let list = segments(MemoryRef::Process, &[(address, 64, 64)]);
    let target = bind(4, list, &[], Some(&owner));
    drop(child);
    assert!(!owner.is_alive());
    let pool_map = region(64);
    for direction in [Direction::Save, Direction::Load] {
        let (result, done) = run(&pool(&pool_map), &task(direction, &target, &[(0, 0)]));
        assert_eq!((result, done), (Err(CopyError::OwnerGone { pid }), 0));
    }
    assert!(matches!(
        ProcessMemory::open(pid, pidfd, own_uid()),
        Err(MemoryError::OwnerGone { .. })
    ));
}

#[test]
fn a_process_that_runs_another_program_is_gone() {
    let mut shell = Command::new("sh")
        .args(["-c", "read line; exec sleep 1000"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = shell.id() as i32;
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let command = || std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let wait_for = |name: &str| {
        while command().trim() != name {
            assert!(Instant::now() < deadline, "the process never became {name}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    wait_for("sh");
    let memory = ProcessMemory::open(pid, pidfd, own_uid()).unwrap();
    assert!(memory.is_alive());
    shell.stdin.take().unwrap().write_all(b"\n").unwrap();
    wait_for("sleep");
    assert!(
        !memory.is_alive(),
        "the old address space is gone though the process lives"
    );
    shell.kill().unwrap();
    shell.wait().unwrap();
}

#[test]
fn missing_permission_is_named() {
    // Only root can give up its permission for one thread and keep it for the others.
    // SAFETY: reads the user id.
    if unsafe { libc::geteuid() } != 0 {
        return;
    }
    let memory = shared_with_children(PAGE);
    let child = Child::fork();
    let address = memory.base().as_ptr() as u64;
    let list = segments(MemoryRef::Process, &[(address, 64, 64)]);
    let target = bind(4, list, &[], Some(&child.memory()));
    let (pid, pidfd) = (child.pid, child.pidfd());
    let as_nobody = move || {
        // The bare system call changes this thread only.
        // SAFETY: changes credentials, no memory.
        let rc = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(rc, 0);
        let opened = ProcessMemory::open(pid, pidfd, 65534).unwrap_err();
        assert!(
            matches!(opened, MemoryError::NotPermitted { .. }),
            "{opened}"
        );
        let direction = Direction::Save;
        let (result, done) = run(&pool(&region(64)), &task(direction, &target, &[(0, 0)]));
        assert_eq!(
            (result, done),
            (Err(CopyError::NotPermitted { pid, direction }), 0)
        );
    };
    std::thread::spawn(as_nobody).join().unwrap();
}
