//! What the kernel must refuse on sealed memory, and what we must refuse to map.

#![cfg(all(not(loom), not(miri)))]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use pegaflow_shm::mapping::{
    Access, MAX_KV_REGION_BYTES, MAX_SEGMENT_BYTES, Mapping, MappingError, NamedFile,
    create_kv_region, create_segment, memfd, open_peer_kv_region, open_peer_segment,
};
use pegaflow_shm::sync::Ordering;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, ftruncate,
    memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};

const BYTES: u64 = 64 * 1024;

/// A memfd with no help from the code under test.
fn plain_memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn map_shared(fd: &OwnedFd, protection: ProtFlags) -> Result<(), Errno> {
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory; it
    // is left mapped until the test process ends.
    let mapped = unsafe {
        mmap(
            std::ptr::null_mut(),
            BYTES as usize,
            protection,
            MapFlags::SHARED,
            fd,
            0,
        )
    };
    mapped.map(|_| ())
}

#[test]
fn a_segment_cannot_be_resized_punched_written_or_unsealed_by_anyone() {
    let (fd, map) = create_segment("c2d segment", BYTES).unwrap();
    assert!(fcntl_get_seals(&fd).unwrap().contains(memfd::SEGMENT_SEALS));
    assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, BYTES * 2), Err(Errno::PERM));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&fd, punch, 0, 4096), Err(Errno::PERM));
    assert_eq!(rustix::io::pwrite(&fd, b"x", 0), Err(Errno::PERM));
    assert_eq!(fcntl_add_seals(&fd, SealFlags::WRITE), Err(Errno::PERM));
    assert_eq!(
        map_shared(&fd, ProtFlags::READ | ProtFlags::WRITE),
        Err(Errno::PERM)
    );

    // The creator's own mapping still writes, and the peer's read-only one sees it.
    let peer = open_peer_segment(fd.as_fd(), "c2d segment", BYTES).unwrap();
    assert!(map.is_writable() && !peer.is_writable());
    map.atomic_u64(128)
        .unwrap()
        .store(0xFEED, Ordering::Release);
    assert_eq!(
        peer.atomic_u64(128).unwrap().load(Ordering::Relaxed),
        0xFEED
    );
    map.copy_in(4090, b"across a page").unwrap();
    let mut copy = [0; 13];
    peer.copy_out(4090, &mut copy).unwrap();
    assert_eq!(&copy, b"across a page");
    assert!(matches!(
        peer.copy_in(0, b"x"),
        Err(MappingError::ReadOnly { .. })
    ));
}

#[test]
fn a_kv_region_has_two_writers_and_one_size() {
    let (fd, map) = create_kv_region("kv region", BYTES).unwrap();
    assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, BYTES * 2), Err(Errno::PERM));
    let peer = open_peer_kv_region(fd.as_fd(), "kv region", BYTES).unwrap();
    peer.copy_in(BYTES as usize - 4, b"peer").unwrap();
    let mut copy = [0; 4];
    map.copy_out(BYTES as usize - 4, &mut copy).unwrap();
    assert_eq!(&copy, b"peer");
}

#[test]
fn every_missing_seal_is_refused_and_named() {
    for left_out in [
        SealFlags::SHRINK,
        SealFlags::GROW,
        SealFlags::FUTURE_WRITE,
        SealFlags::SEAL,
    ] {
        let seals = memfd::SEGMENT_SEALS.difference(left_out);
        let fd = plain_memfd(BYTES, seals);
        let error = open_peer_segment(fd.as_fd(), "c2d segment", BYTES).unwrap_err();
        match &error {
            MappingError::MissingSeals {
                required, found, ..
            } => {
                assert_eq!(required.0, memfd::SEGMENT_SEALS);
                assert_eq!(found.0.intersection(memfd::SEGMENT_SEALS), seals);
            }
            other => panic!("{other}"),
        }
        assert!(
            error
                .to_string()
                .contains("needs SEAL|SHRINK|GROW|FUTURE_WRITE"),
            "{error}"
        );
    }
    let unsealed = plain_memfd(BYTES, SealFlags::empty());
    let error = open_peer_kv_region(unsealed.as_fd(), "kv region", BYTES).unwrap_err();
    assert_eq!(
        error.to_string(),
        "kv region: memfd has seals none, needs SEAL|SHRINK|GROW; seal it before passing it"
    );
}

#[test]
fn every_other_size_is_refused_with_both_sizes() {
    let (fd, _map) = create_segment("c2d segment", BYTES).unwrap();
    for expected in [BYTES - 4096, BYTES - 1, BYTES + 1, BYTES + 4096, BYTES * 2] {
        match open_peer_segment(fd.as_fd(), "c2d segment", expected) {
            Err(MappingError::WrongSize {
                expected: said,
                found: BYTES,
                ..
            }) => {
                assert_eq!(said, expected);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_segment_with_a_hole_is_refused() {
    let holes = |allocated: u64| {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, BYTES).unwrap();
        if allocated > 0 {
            fallocate(&fd, FallocateFlags::empty(), 0, allocated).unwrap();
        }
        fcntl_add_seals(&fd, memfd::SEGMENT_SEALS).unwrap();
        open_peer_segment(fd.as_fd(), "c2d segment", BYTES)
    };
    for allocated in [0, BYTES - 4096] {
        match holes(allocated) {
            Err(MappingError::Holes {
                expected: BYTES,
                allocated: found,
                ..
            }) => assert_eq!(found, allocated),
            other => panic!("{other:?}"),
        }
    }
    assert!(holes(BYTES).is_ok());
}

#[test]
fn sizes_of_zero_and_above_the_maximum_are_refused() {
    let (fd, _map) = create_segment("c2d segment", BYTES).unwrap();
    assert!(matches!(
        create_segment("s", 0),
        Err(MappingError::Empty { .. })
    ));
    assert!(matches!(
        open_peer_segment(fd.as_fd(), "s", 0),
        Err(MappingError::Empty { .. })
    ));
    assert!(matches!(
        create_segment("s", MAX_SEGMENT_BYTES + 1),
        Err(MappingError::TooLarge {
            maximum: MAX_SEGMENT_BYTES,
            ..
        })
    ));
    assert!(matches!(
        open_peer_segment(fd.as_fd(), "s", u64::MAX),
        Err(MappingError::TooLarge {
            maximum: MAX_SEGMENT_BYTES,
            found: u64::MAX,
            ..
        })
    ));
    assert!(matches!(
        open_peer_kv_region(fd.as_fd(), "s", MAX_KV_REGION_BYTES + 1),
        Err(MappingError::TooLarge {
            maximum: MAX_KV_REGION_BYTES,
            ..
        })
    ));
}

#[test]
fn whatever_is_no_tmpfs_memfd_is_refused() {
    let refuse = |fd: OwnedFd| open_peer_segment(fd.as_fd(), "s", BYTES).unwrap_err();

    let executable = File::open(std::env::current_exe().unwrap()).unwrap();
    assert!(matches!(
        refuse(executable.into()),
        MappingError::NotTmpfs { .. } | MappingError::MissingSeals { .. }
    ));
    assert!(matches!(
        refuse(File::open("/").unwrap().into()),
        MappingError::NotRegular { .. }
    ));
    assert!(matches!(
        refuse(File::open("/dev/zero").unwrap().into()),
        MappingError::NotRegular { .. }
    ));
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert!(matches!(refuse(reader), MappingError::NotRegular { .. }));

    // A named file on tmpfs has no seals but the one against adding any.
    let path = scratch("unsealed");
    let named = NamedFile::create(&path, "named", BYTES).unwrap();
    let error = refuse(named.into_fd());
    std::fs::remove_file(&path).unwrap();
    assert!(
        matches!(error, MappingError::MissingSeals { .. }),
        "{error}"
    );
}

#[test]
fn a_hugetlb_memfd_is_refused() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    // A kernel without huge pages makes none; then there is nothing to refuse.
    let Ok(fd) = memfd_create("huge", flags) else {
        return;
    };
    if ftruncate(&fd, 2 << 20).is_err() || fcntl_add_seals(&fd, memfd::SEGMENT_SEALS).is_err() {
        return;
    }
    let error = open_peer_segment(fd.as_fd(), "s", 2 << 20).unwrap_err();
    assert!(
        matches!(
            error,
            MappingError::NotTmpfs {
                found: 0x9584_58F6,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn no_offset_reaches_outside_the_mapping() {
    let map = Mapping::anonymous(4096).unwrap();
    for (offset, length) in [
        (0, 4097),
        (4096, 1),
        (4097, 0),
        (usize::MAX, 1),
        (1, usize::MAX),
    ] {
        assert!(matches!(
            map.ptr_at(offset, length),
            Err(MappingError::OutOfBounds { .. })
        ));
    }
    assert!(map.ptr_at(4096, 0).is_ok());
    assert!(map.atomic_u64(4088).is_ok());
    assert!(matches!(
        map.atomic_u64(4096),
        Err(MappingError::OutOfBounds { .. })
    ));
    assert!(matches!(
        map.atomic_u64(4),
        Err(MappingError::Misaligned { alignment: 8, .. })
    ));
    assert!(matches!(
        map.atomic_u32(2),
        Err(MappingError::Misaligned { alignment: 4, .. })
    ));
    assert!(matches!(
        map.atomic_u32(usize::MAX - 3),
        Err(MappingError::OutOfBounds { .. })
    ));
    assert!(map.copy_in(4090, &[0; 7]).is_err());
    assert!(map.copy_out(usize::MAX, &mut [0; 2]).is_err());
    assert!(map.aligned_ptr(64, 64, 64).is_ok());
    assert!(matches!(
        map.aligned_ptr(96, 64, 64),
        Err(MappingError::Misaligned { .. })
    ));
}

/// A path on tmpfs that no other test or process uses.
fn scratch(name: &str) -> PathBuf {
    PathBuf::from(format!(
        "/dev/shm/pegaflow-test-{}-{name}",
        std::process::id()
    ))
}

#[test]
fn a_named_file_is_written_by_its_owner_and_read_by_others() {
    let path = scratch("named");
    let file = NamedFile::create(&path, "node file", BYTES).unwrap();
    assert!(
        matches!(
            NamedFile::create(&path, "node file", BYTES),
            Err(MappingError::Io { .. })
        ),
        "an existing file is not taken over"
    );
    file.reserve(0, 8192).unwrap();
    assert!(matches!(
        file.reserve(BYTES - 1, 2),
        Err(MappingError::OutOfBounds { .. })
    ));
    assert!(matches!(
        file.release(u64::MAX, 2),
        Err(MappingError::OutOfBounds { .. })
    ));
    let writer = file.map(Access::ReadWrite).unwrap();
    writer.copy_in(100, b"boot").unwrap();

    let opened = NamedFile::open(&path, "node file", Access::ReadOnly).unwrap();
    assert_eq!(opened.bytes(), BYTES);
    let reader = opened.map_exact(Access::ReadOnly, BYTES).unwrap();
    let mut copy = [0; 4];
    reader.copy_out(100, &mut copy).unwrap();
    assert_eq!(&copy, b"boot");
    assert!(matches!(
        opened.map(Access::ReadWrite),
        Err(MappingError::Io { .. })
    ));
    assert!(matches!(
        opened.map_exact(Access::ReadOnly, BYTES * 2),
        Err(MappingError::WrongSize { .. })
    ));

    file.release(0, 8192).unwrap();
    reader.copy_out(100, &mut copy).unwrap();
    assert_eq!(copy, [0; 4]);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_named_file_that_cannot_be_made_leaves_nothing_behind() {
    let path = scratch("too-large");
    let too_large = i64::MAX as u64 + 1;
    assert!(NamedFile::create(&path, "node file", too_large).is_err());
    assert!(!path.exists());

    std::fs::write(&path, b"someone else's").unwrap();
    assert!(NamedFile::create(&path, "node file", BYTES).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"someone else's");
    std::fs::remove_file(&path).unwrap();
}
