//! A pool, regions and child processes for the tests.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::copy::*;
use crate::layout::{GroupLayout, MemoryRef, SegmentLayout, ValidLayout};

pub fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("copy-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

pub fn region(bytes: u64) -> Arc<RegionMapping> {
    RegionMapping::map(memfd(bytes, SealFlags::SHRINK).as_fd(), bytes).unwrap()
}

pub fn pool(mapping: &Arc<RegionMapping>) -> PoolMemory {
    // SAFETY: the mapping lives as long as its Arc and the file behind it cannot shrink.
    unsafe { PoolMemory::new(mapping.base(), mapping.bytes(), mapping.clone()) }
}

/// A copy of the mapping's bytes.
pub fn read(mapping: &RegionMapping) -> Vec<u8> {
    let mut bytes = vec![0; mapping.bytes() as usize];
    // SAFETY: `bytes` is as long as the mapping; the tests run no copy meanwhile.
    unsafe {
        mapping
            .base()
            .as_ptr()
            .copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len())
    };
    bytes
}

pub fn write(mapping: &RegionMapping, bytes: &[u8]) {
    assert_eq!(bytes.len() as u64, mapping.bytes());
    // SAFETY: lengths are equal; the tests run no copy meanwhile.
    unsafe {
        mapping
            .base()
            .as_ptr()
            .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
    };
}

/// Bytes without a short period.
pub fn noise(bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(next).collect()
}

pub fn segments(memory: MemoryRef, list: &[(u64, u64, u64)]) -> Vec<SegmentLayout> {
    let one = |&(base, block_stride, bytes)| SegmentLayout {
        memory,
        base,
        block_stride,
        bytes,
    };
    list.iter().map(one).collect()
}

/// Binds `segments` with region ids counting `regions` from 0.
pub fn bind(
    num_blocks: u32,
    segments: Vec<SegmentLayout>,
    regions: &[Arc<RegionMapping>],
    process: Option<&Arc<ProcessMemory>>,
) -> Arc<BoundLayout> {
    let layout = GroupLayout {
        group: 0,
        num_blocks,
        segments,
        replicated: false,
    };
    let find = |id: u32| regions.get(id as usize).cloned();
    let valid = ValidLayout::new(&layout, |id| find(id).map(|r| r.bytes())).unwrap();
    let resolve = |memory| match memory {
        MemoryRef::Region(id) => find(id).map(ClientMemory::Region),
        MemoryRef::Process => process.cloned().map(ClientMemory::Process),
    };
    BoundLayout::bind(Arc::new(valid), resolve).unwrap()
}

pub fn task(direction: Direction, target: &Arc<BoundLayout>, pages: &[(u64, u32)]) -> CopyTask {
    let page = |&(pool_offset, block)| PageCopy {
        pool_offset,
        block,
        checksum: NO_CHECKSUM,
    };
    CopyTask {
        session: 1,
        direction,
        target: target.clone(),
        pages: pages.iter().map(page).collect(),
        tag: 0,
        cancelled: Arc::new(AtomicBool::new(false)),
        after: None,
        step: None,
    }
}

/// Runs a task on this thread.
pub fn run(pool: &PoolMemory, task: &CopyTask) -> (Result<u64, CopyError>, u32) {
    let mut pages_done = 77;
    let mut task = CopyTask {
        pages: task.pages.clone(),
        target: task.target.clone(),
        cancelled: task.cancelled.clone(),
        after: None,
        step: None,
        ..*task
    };
    let result = HostBackend::new(pool.clone()).copy(&mut task, &mut pages_done);
    (result, pages_done)
}

/// The user that the tests run as.
pub fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// A forked process that sleeps until it is killed. What was mapped shared before it was made is
/// shared with it, at the same addresses.
pub struct Child {
    pub pid: i32,
}

impl Child {
    pub fn fork() -> Self {
        // SAFETY: the child makes only async-signal-safe system calls and never returns.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            loop {
                // SAFETY: plain system calls; the child ends with the thread that made it.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            }
        }
        Self { pid }
    }

    pub fn pidfd(&self) -> OwnedFd {
        pidfd_open(Pid::from_raw(self.pid).unwrap(), PidfdFlags::empty()).unwrap()
    }

    pub fn memory(&self) -> Arc<ProcessMemory> {
        Arc::new(ProcessMemory::open(self.pid, self.pidfd(), own_uid()).unwrap())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child, reaped only here.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
