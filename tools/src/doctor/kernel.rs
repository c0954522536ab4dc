//! Checks of what the kernel can do.

#![forbid(unsafe_code)]

use std::io::IoSliceMut;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use pegaflow_shm::mapping::create_segment;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use rustix::system::uname;

use super::{Check, probe};

/// Oldest kernel with everything that is used: pidfd_open is of 5.3, F_SEAL_FUTURE_WRITE of 5.1.
const OLDEST_KERNEL: (u32, u32) = (5, 3);

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Kernel version and each feature that is used, tried out rather than deduced.
pub fn features() -> Vec<Check> {
    vec![
        version(),
        sealed_memfd(),
        pidfd(),
        peer_memory(),
        ptrace_scope(),
    ]
}

fn version() -> Check {
    let name = "kernel";
    let release = uname().release().to_string_lossy().into_owned();
    match version_of(&release) {
        Some(version) if version >= OLDEST_KERNEL => Check::ok(name, release),
        Some(_) => Check::fail(
            name,
            release,
            format!("use Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        ),
        None => Check::warn(
            name,
            release,
            "unknown version: see the feature checks below",
        ),
    }
}

fn sealed_memfd() -> Check {
    let name = "sealed memfd";
    match create_segment("doctor", 4096) {
        Ok(_) => Check::ok(name, "shrink, grow, future-write and seal are accepted"),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "sessions need memfd_create with F_SEAL_FUTURE_WRITE: Linux 5.1 or newer, and no \
             seccomp filter that forbids it",
        ),
    }
}

fn pidfd() -> Check {
    let name = "pidfd_open";
    match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_) => Check::ok(name, "works"),
        Err(errno) => Check::fail(
            name,
            errno.to_string(),
            "the daemon watches its clients' lives by it: Linux 5.3 or newer, and no seccomp \
             filter that forbids it",
        ),
    }
}

fn peer_memory() -> Check {
    let name = "process_vm_readv";
    let source = *b"pegaflow";
    let mut target = [0_u8; 8];
    let remote = RemoteIoVec {
        base: source.as_ptr().addr(),
        len: source.len(),
    };
    let own = nix::unistd::getpid();
    let result = process_vm_readv(own, &mut [IoSliceMut::new(&mut target)], &[remote]);
    match result {
        Ok(8) if target == source => Check::ok(name, "works"),
        Ok(count) => Check::warn(name, format!("{count} of 8 bytes"), "use shared KV memory"),
        Err(errno) => Check::warn(
            name,
            errno.to_string(),
            "plain process memory cannot be copied: let the engine allocate its KV memory through \
             the library (shared memory), or allow the system call in the container's seccomp profile",
        ),
    }
}

fn ptrace_scope() -> Check {
    let name = "yama ptrace_scope";
    let text = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match text.as_deref().map(str::trim) {
        Err(_) => Check::ok(name, "no yama: same-user processes may be read"),
        Ok("0") => Check::ok(name, "0: same-user processes may be read"),
        Ok("1") => Check::ok(name, "1: the library names the daemon with PR_SET_PTRACER"),
        Ok(value) => Check::warn(
            name,
            value.to_owned(),
            "plain process memory needs CAP_SYS_PTRACE in the daemon (2) or cannot be copied at all \
             (3): use shared KV memory, or sysctl kernel.yama.ptrace_scope=1",
        ),
    }
}

/// Whether io_uring may be used (for the SSD tier).
pub fn io_uring() -> Check {
    let name = "io_uring";
    match probe::io_uring_setup() {
        Ok(()) => Check::ok(name, "works"),
        Err(error) => {
            let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .map_or(String::new(), |text| {
                    format!("; io_uring_disabled = {}", text.trim())
                });
            Check::warn(
                name,
                format!("{error}{setting}"),
                "only an SSD tier needs it: sysctl kernel.io_uring_disabled=0, and allow it in the \
                 container's seccomp profile",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_parse() {
        assert_eq!(version_of("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version_of("5.10.0+"), Some((5, 10)));
        assert_eq!(version_of("weird"), None);
    }
}
