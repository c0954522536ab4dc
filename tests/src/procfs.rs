//! What a process uses, from `/proc`.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// A field of `/proc/<pid>/status` in KiB, such as `RssAnon`.
pub fn status_kib(pid: u32, field: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("{field}:")))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A field of `/proc/<pid>/status` that is a plain number, such as `Threads`.
pub fn status_number(pid: u32, field: &str) -> Option<u64> {
    status_kib(pid, field)
}

/// CPU time that a process has used, user and system, all threads; in clock ticks of 10 ms.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

/// CPU time of all threads in nanoseconds, where the kernel keeps it; finer than [`cpu_time`].
pub fn cpu_nanos(pid: u32) -> Option<u64> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let text = fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        total += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(total)
}

/// Whether somebody listens on a Unix socket; a file that a dead process left does not count.
pub fn listens(path: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let path = path.to_string_lossy();
    fs::read_to_string("/proc/net/unix").is_ok_and(|text| {
        text.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(3) == Some(&ACCEPTS_CONNECTIONS) && fields.get(7) == Some(&&*path)
        })
    })
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Open descriptors of a daemon once it has closed those of sessions that ended: it tells of a
/// session's end before it closes them.
pub fn settled_descriptors(pid: u32) -> usize {
    let mut last = descriptors(pid);
    let mut same = 0;
    while same < 10 {
        std::thread::sleep(Duration::from_millis(20));
        let now = descriptors(pid);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// Threads of a process.
pub fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// Threads that the process has started itself: the kernel adds some to an io_uring when it likes.
pub fn own_threads(pid: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    Some(names.filter(|name| !name.starts_with("iou-")).count() as u64)
}

/// Mappings of shared memory in a process: segments, regions, files of a node. Threads that have
/// been leave anonymous ones, which the allocator uses again.
pub fn shared_mappings(pid: u32) -> usize {
    let shared = |line: &&str| line.contains("memfd:") || line.contains("/dev/shm/");
    fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_or(0, |text| text.lines().filter(shared).count())
}

/// Names of all files below a folder, sorted.
pub fn files_below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    walk(folder, &mut |path, _| {
        names.push(path.display().to_string())
    });
    names.sort();
    names
}

/// Memory that the files below a folder of tmpfs take, in KiB.
pub fn allocated_kib(folder: &Path) -> u64 {
    let mut kib = 0;
    walk(folder, &mut |_, found| kib += found.blocks() / 2);
    kib
}

fn walk(folder: &Path, visit: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // What goes away meanwhile is not there.
        let Ok(found) = entry.metadata() else {
            continue;
        };
        visit(&entry.path(), &found);
        if found.is_dir() {
            walk(&entry.path(), visit);
        }
    }
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat"));
    state.is_ok_and(|text| {
        !text
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.starts_with(" Z"))
    })
}
