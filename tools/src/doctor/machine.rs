//! Checks of memory, limits, CPUs and GPUs.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use rustix::fs::{statfs, statvfs};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};

use super::Check;
use super::probe::{self, Cuda};
use crate::output::size;

const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Less free space than this and not even a small pool fits.
const LEAST_FREE_BYTES: u64 = 64 << 20;
/// Less free space than this is a pool that hardly pays.
const GOOD_FREE_BYTES: u64 = 1 << 30;
/// Descriptors: four per session and 256 sessions, with as much again for files and sockets.
const GOOD_DESCRIPTORS: u64 = 2048;
/// Below this a handful of sessions exhausts them.
const LEAST_DESCRIPTORS: u64 = 256;

/// Nearest folder above `path` (or itself) that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Size and free space of the tmpfs that nodes lie in.
pub fn shm_space(shm_dir: &Path) -> Check {
    let name = "shared memory";
    let folder = existing(shm_dir);
    let remount = format!(
        "enlarge it (mount -o remount,size=… {}; docker run --shm-size=…; an emptyDir of medium \
         Memory in Kubernetes), or name another tmpfs with PEGAFLOW_SHM_DIR",
        folder.display()
    );
    let (space, kind) = match (statvfs(&folder), statfs(&folder)) {
        (Ok(space), Ok(kind)) => (space, kind),
        (Err(errno), _) | (_, Err(errno)) => {
            return Check::fail(name, format!("{}: {errno}", folder.display()), remount);
        }
    };
    if kind.f_type as u64 & 0xFFFF_FFFF != TMPFS_MAGIC {
        return Check::fail(name, format!("{} is not tmpfs", folder.display()), remount);
    }
    let (total, free) = (
        space.f_blocks * space.f_frsize,
        space.f_bavail * space.f_frsize,
    );
    let value = format!(
        "{}: {} free of {}",
        folder.display(),
        size(free),
        size(total)
    );
    match free {
        free if free < LEAST_FREE_BYTES => Check::fail(name, value, remount),
        free if free < GOOD_FREE_BYTES => Check::warn(name, value, remount),
        _ => Check::ok(name, value),
    }
}

fn limit_text(limit: Option<u64>, bytes: bool) -> String {
    match limit {
        None => "unlimited".to_owned(),
        Some(value) if bytes => size(value),
        Some(value) => value.to_string(),
    }
}

/// Limits on locked memory and on descriptors.
pub fn limits() -> Vec<Check> {
    let memlock = getrlimit(Resource::Memlock);
    let value = format!(
        "soft {}, hard {}",
        limit_text(memlock.current, true),
        limit_text(memlock.maximum, true)
    );
    let locked = if memlock.current.is_none() {
        Check::ok("memlock limit", value)
    } else {
        Check::info(
            "memlock limit",
            format!("{value}; matters only to RDMA and io_uring buffers"),
        )
    };
    let nofile = getrlimit(Resource::Nofile);
    let value = format!(
        "soft {}, hard {}",
        limit_text(nofile.current, false),
        limit_text(nofile.maximum, false)
    );
    let way_out = "ulimit -n 65536, or LimitNOFILE=65536 in the unit file";
    let files = match nofile.current {
        Some(limit) if limit < LEAST_DESCRIPTORS => Check::fail("descriptor limit", value, way_out),
        Some(limit) if limit < GOOD_DESCRIPTORS => Check::warn("descriptor limit", value, way_out),
        _ => Check::ok("descriptor limit", value),
    };
    vec![locked, files]
}

/// CPU quota of this process's cgroup in CPUs, if it has one.
fn cgroup_quota() -> Option<f64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut folder = PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let mut least: Option<f64> = None;
    loop {
        if let Some(quota) = std::fs::read_to_string(folder.join("cpu.max"))
            .ok()
            .and_then(|text| parse_quota(&text))
        {
            least = Some(least.map_or(quota, |least| least.min(quota)));
        }
        if folder == Path::new("/sys/fs/cgroup") || !folder.pop() {
            return least;
        }
    }
}

fn parse_quota(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
}

/// CPUs by affinity against the cgroup's quota: spinning pays only with a CPU for each spinner.
pub fn cpus() -> Check {
    let name = "CPUs";
    let by_affinity = sched_getaffinity(None).map_or(0, |set: CpuSet| set.count());
    let quota = cgroup_quota();
    let value = match quota {
        None => format!("{by_affinity} by affinity, no cgroup quota"),
        Some(quota) => format!("{by_affinity} by affinity, cgroup quota {quota:.2}"),
    };
    let usable = quota.map_or(f64::from(by_affinity), |quota| {
        quota.min(f64::from(by_affinity))
    });
    if usable < 2.0 {
        let way_out = "with fewer than two CPUs nobody spins and each request costs a wake-up: raise the \
                       quota or the affinity";
        return Check::warn(name, value, way_out);
    }
    if usable < f64::from(by_affinity) {
        let way_out = "the quota is below the CPUs in sight: spinning threads can use it up and be \
                       throttled; raise it, or pin the daemon to as many CPUs as the quota pays for";
        return Check::warn(name, value, way_out);
    }
    Check::ok(name, value)
}

/// Huge pages: reserved ones, and whether tmpfs may use transparent ones.
pub fn huge_pages(shm_dir: &Path) -> Vec<Check> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let shmem = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let chosen = shmem
        .as_deref()
        .and_then(|text| text.split_once('[')?.1.split_once(']'))
        .map_or("absent", |(chosen, _)| chosen);
    let mount = mount_option(&existing(shm_dir), "huge").unwrap_or_else(|| "never".to_owned());
    let value = format!("shmem_enabled = {chosen}, mounted with huge={mount}");
    let transparent = if chosen == "never" || chosen == "absent" {
        Check::info(
            "huge pages, tmpfs",
            format!("{value}; the pool uses 4-KiB pages"),
        )
    } else {
        Check::ok("huge pages, tmpfs", value)
    };
    let reserved = read("/proc/sys/vm/nr_hugepages").unwrap_or_else(|| "none".to_owned());
    vec![
        transparent,
        Check::info("huge pages, reserved", format!("nr_hugepages = {reserved}")),
    ]
}

/// Value of a mount option of the file system that `folder` lies on.
fn mount_option(folder: &Path, option: &str) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    let line = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.nth(1)?))
        })
        .filter(|(point, _)| folder.starts_with(point))
        .max_by_key(|(point, _)| point.len())?;
    line.1
        .split(',')
        .find_map(|entry| entry.strip_prefix(option)?.strip_prefix('='))
        .map(str::to_owned)
}

/// CUDA driver and devices.
pub fn cuda() -> Check {
    let name = "CUDA";
    match probe::cuda() {
        Cuda::NoDriver => Check::info(name, "no libcuda.so.1: host memory only"),
        Cuda::Broken(what, code) => Check::warn(
            name,
            format!("libcuda.so.1 is there, but {what} (CUresult {code})"),
            "GPU memory cannot be copied: check nvidia-smi, and the driver's version against the \
             kernel module's",
        ),
        Cuda::Devices { count, version } => Check::ok(
            name,
            format!(
                "{count} devices, driver interface {}.{}",
                version / 1000,
                version % 1000 / 10
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_parse_and_max_is_none() {
        assert_eq!(parse_quota("max 100000\n"), None);
        assert_eq!(parse_quota("150000 100000\n"), Some(1.5));
    }

    #[test]
    fn a_folder_that_is_not_there_is_judged_by_its_parent() {
        assert_eq!(
            existing(Path::new("/dev/shm/no/such")),
            PathBuf::from("/dev/shm")
        );
        assert_eq!(
            shm_space(Path::new("/proc/nothing")).level,
            super::super::Level::Fail
        );
    }
}
