//! Whose memory a process's is, and that copies stay with it whatever the process runs next.

use std::ffi::CString;
use std::fs::{Permissions, copy, metadata, set_permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::support::*;
use crate::copy::*;
use crate::layout::MemoryRef;

const PAGE: u64 = 4096;
/// A user that is not root.
const NOBODY: u32 = 65534;
/// Byte of the shared page at which the child is told to run the other program.
const GO: usize = 2048;

/// A process of another user that keeps a page of this one's, and runs a set-user-ID program when
/// it is told to. Its address space outlives that in a child of its own.
struct Nobody {
    pid: i32,
    shared: Arc<RegionMapping>,
    program: PathBuf,
    _folder: tempfile::TempDir,
}

/// The child that shares its parent's memory; `parent` is the address of nothing, but its number.
extern "C" fn linger(parent: *mut libc::c_void) -> i32 {
    // SAFETY: plain system calls; it ends with its parent, also with one that has ended before it
    // could ask for that.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        while libc::getppid() as usize == parent.addr() {
            libc::pause();
        }
        libc::_exit(0)
    }
}

impl Nobody {
    /// `None` where it cannot be: without root's rights, or where set-user-ID has no effect.
    fn start() -> Option<Nobody> {
        // SAFETY: reads the user id.
        if unsafe { libc::geteuid() } != 0 {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let program = folder.path().join("sleep");
        copy("/bin/sleep", &program).unwrap();
        set_permissions(&program, Permissions::from_mode(0o4755)).unwrap();
        let shared = region(PAGE);
        let path = CString::new(program.to_str().unwrap()).unwrap();
        let arguments = [path.as_ptr(), c"1000".as_ptr(), std::ptr::null()];
        let mut stack = vec![0_u128; 4096];
        let top = stack.as_mut_ptr_range().end;
        // SAFETY: the region is mapped; the child makes only system calls and never returns.
        let pid = unsafe {
            let base = shared.base().as_ptr();
            assert_eq!(
                libc::madvise(base.cast(), PAGE as usize, libc::MADV_DOFORK),
                0
            );
            let pid = libc::fork();
            if pid == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY);
                libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY);
                // As after running a program of its own.
                libc::prctl(libc::PR_SET_DUMPABLE, 1);
                base.add(GO).write_volatile(1);
                while base.add(GO).read_volatile() != 2 {
                    libc::usleep(500);
                }
                let me = std::ptr::without_provenance_mut(libc::getpid() as usize);
                libc::clone(linger, top.cast(), libc::CLONE_VM, me);
                libc::execv(path.as_ptr(), arguments.as_ptr());
                libc::_exit(1);
            }
            pid
        };
        assert!(pid > 0, "fork failed");
        let nobody = Nobody {
            pid,
            shared,
            program,
            _folder: folder,
        };
        nobody.wait_until("it is another user", || nobody.word() == 1);
        Some(nobody)
    }

    fn word(&self) -> u8 {
        // SAFETY: inside the region; volatile, because the child writes it.
        unsafe { self.shared.base().as_ptr().add(GO).read_volatile() }
    }

    fn wait_until(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn pidfd(&self) -> OwnedFd {
        pidfd_open(Pid::from_raw(self.pid).unwrap(), PidfdFlags::empty()).unwrap()
    }

    /// Has it run the set-user-ID program; false where that gives it no rights.
    fn run_program(&self) -> bool {
        // SAFETY: inside the region; volatile, because the child reads it.
        unsafe { self.shared.base().as_ptr().add(GO).write_volatile(2) };
        let exe = format!("/proc/{}/exe", self.pid);
        let is_it = || std::fs::read_link(&exe).is_ok_and(|exe| exe == self.program);
        self.wait_until("it runs the program", is_it);
        metadata(format!("/proc/{}/mem", self.pid)).unwrap().uid() == 0
    }
}

impl Drop for Nobody {
    fn drop(&mut self) {
        // SAFETY: our own child, reaped only here.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn memory_of_another_user_than_the_sessions_is_refused() {
    let child = Child::fork();
    let refused = ProcessMemory::open(child.pid, child.pidfd(), own_uid() + 1).unwrap_err();
    let (pid, uid, owner) = (child.pid, own_uid() + 1, own_uid());
    let text = MemoryError::OtherOwner { pid, uid, owner }.to_string();
    assert_eq!(refused.to_string(), text);
}

#[test]
fn a_program_with_more_rights_than_its_sessions_user_is_not_opened() {
    let Some(nobody) = Nobody::start() else {
        return;
    };
    assert!(ProcessMemory::open(nobody.pid, nobody.pidfd(), NOBODY).is_ok());
    if !nobody.run_program() {
        return;
    }
    let refused = ProcessMemory::open(nobody.pid, nobody.pidfd(), NOBODY).unwrap_err();
    assert!(
        matches!(refused, MemoryError::OtherOwner { owner: 0, .. }),
        "{refused}"
    );
}

#[test]
fn a_program_that_the_process_runs_later_is_never_reached() {
    let Some(nobody) = Nobody::start() else {
        return;
    };
    let memory = ProcessMemory::open(nobody.pid, nobody.pidfd(), NOBODY).unwrap();
    let memory = Arc::new(memory);
    nobody.run_program();
    // The address space lives on in the child of its own, and only there is this page.
    let address = nobody.shared.base().as_ptr() as u64;
    let list = segments(
        MemoryRef::Process,
        &[(address, 64, 64), (address + 1024, 64, 64)],
    );
    let target = bind(16, list, &[], Some(&memory));
    let data = noise(PAGE, 5);
    write(&nobody.shared, &data);
    let pool_map = region(3 * 128);
    let pages = [(0, 3), (128, 9), (256, 4)];
    let saved = run(&pool(&pool_map), &task(Direction::Save, &target, &pages));
    assert_eq!(saved, (Ok(3 * 128), 3));
    let moved = [(0, 5), (128, 6), (256, 7)];
    let loaded = run(&pool(&pool_map), &task(Direction::Load, &target, &moved));
    assert_eq!(loaded, (Ok(3 * 128), 3));
    let now = read(&nobody.shared);
    for (from, to) in [(3, 5), (9, 6), (4, 7)] {
        for base in [0, 1024] {
            let at = |block: usize| base + block * 64..base + block * 64 + 64;
            assert_eq!(now[at(to)], data[at(from)], "{from} {to}");
        }
    }
    let beyond = segments(MemoryRef::Process, &[(4096, 64, 64)]);
    let target = bind(4, beyond, &[], Some(&memory));
    let (result, done) = run(&pool(&pool_map), &task(Direction::Save, &target, &[(0, 0)]));
    assert!(
        matches!(result, Err(CopyError::BadAddress { .. })),
        "{result:?}"
    );
    assert_eq!(done, 0);
}
