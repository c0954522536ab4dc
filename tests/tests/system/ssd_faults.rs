//! Drives that fail under a real daemon, on a file system of their own that is stopped, made
//! read-only or torn off: the tier degrades and says so, and nothing else happens.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use pegaflow::{BlockHash, Fetch, State, Status};
use pegaflow_shm::node::{Counter, Gauge, field_text};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::Daemon;
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{binaries, eventually, skip};

use crate::ssd::{
    POOL_BLOCKS, config, fetch_up, query_up, rows, save_all, save_and_write, wait_durable,
};

/// ext4 over a loop device over a file.
struct Drive {
    folder: tempfile::TempDir,
    /// Such as `loop3`.
    device: String,
}

fn runs(program: &str, arguments: &[&str]) -> bool {
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

impl Drive {
    /// `None` where this process may not mount one.
    fn mount() -> Option<Drive> {
        let folder = tempfile::tempdir().expect("a folder");
        let (image, at) = (folder.path().join("image"), folder.path().join("mnt"));
        fs::create_dir(&at).expect("a folder");
        let file = fs::File::create(&image).expect("a file");
        file.set_len(256 << 20).expect("its size");
        let (image, at) = (image.display().to_string(), at.display().to_string());
        let mounted = runs("mkfs.ext4", &["-q", "-F", &image])
            && runs("mount", &["-o", "loop,errors=remount-ro", &image, &at]);
        if !mounted {
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").expect("procfs");
        let line = mounts.lines().find(|line| line.contains(&at));
        let device = line.expect("it is mounted").split(' ').next();
        let device = device.and_then(|path| path.strip_prefix("/dev/"));
        let device = device.expect("a device").to_owned();
        Some(Drive { folder, device })
    }

    fn at(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    /// Nothing that changes the file system goes on until the result is dropped.
    fn stop(&self) -> Stopped<'_> {
        assert!(runs("fsfreeze", &["-f", &self.at().display().to_string()]));
        Stopped(self)
    }

    /// The kernel finds the file system damaged, and takes no more writes.
    fn make_read_only(&self) {
        let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", self.device);
        fs::write(&trigger, "as a test wants it").expect("ext4 has it");
    }

    /// What is on the medium cannot be read any more.
    fn tear_off(&self) {
        let image = fs::File::options()
            .write(true)
            .open(self.folder.path().join("image"))
            .expect("the image");
        image.set_len(0).expect("truncate");
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        let at = self.at().display().to_string();
        assert!(runs("umount", &["-l", &at]), "{at} stays mounted");
    }
}

struct Stopped<'a>(&'a Drive);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let at = self.0.at().display().to_string();
        assert!(runs("fsfreeze", &["-u", &at]), "{at} stays frozen");
    }
}

/// What `pegactl ssd` says of the daemon's shards, and whether all is fine.
fn pegactl_ssd(daemon: &Daemon) -> (String, bool) {
    let output = Command::new(binaries::pegactl())
        .args(["--node", daemon.node(), "ssd"])
        .output()
        .expect("pegactl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (text, output.status.success())
}

/// Its state is bad with this reason, everywhere where one may look.
fn expect_trouble(daemon: &Daemon, reason: &str) {
    let down = || rows(daemon).iter().any(|row| row.state != 0);
    assert!(eventually(down), "{:?}", rows(daemon));
    let row = rows(daemon)[0];
    assert!(field_text(&row.reason).contains(reason), "{row:?}");
    assert!(row.degradations > 0);
    let told = || daemon.log().contains(reason);
    assert!(eventually(told), "{}", daemon.log());
}

/// A daemon over a shard on the drive, an engine of its, and what that has saved: twice what the
/// pool holds, all of it durable on the shard.
fn filled(drive: &Drive, further: &[&str]) -> (Daemon, Worker, Vec<BlockHash>) {
    let shard = drive.at().join("shard");
    let arguments = [&["--ssd-admit", "seal"], further].concat();
    let daemon = Daemon::start_with(config(std::slice::from_ref(&shard), &arguments));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 2 * POOL_BLOCKS);
    save_and_write(&daemon, &worker, &names);
    wait_durable(&daemon, names.len() as u64);
    (daemon, worker, names)
}

/// The pool serves saves, queries and loads as if nothing had happened.
fn expect_service(worker: &Worker, seed: u64) {
    let fresh = hashes(seed * 100_000, POOL_BLOCKS / 2);
    save_all(worker, &fresh);
    let late = &fresh[fresh.len() - 40..];
    assert_eq!(fetch_up(worker, seed << 8, late), 40);
}

/// What a process reads from a drive takes for ever, until this is dropped.
struct Throttle {
    folder: PathBuf,
    file: &'static str,
    lifted: String,
}

impl Throttle {
    /// `None` where the block I/O controller is not to be had.
    fn reads(drive: &Drive, pid: u32) -> Option<Throttle> {
        let device = fs::read_to_string(format!("/sys/block/{}/dev", drive.device)).ok()?;
        let device = device.trim();
        let root = PathBuf::from("/sys/fs/cgroup");
        let name = format!("pegaflow-test-{pid}");
        let (folder, file, limit, lifted) = if root.join("blkio").is_dir() {
            let file = "blkio.throttle.read_bps_device";
            let folder = root.join("blkio").join(name);
            (folder, file, format!("{device} 1"), format!("{device} 0"))
        } else {
            fs::write(root.join("cgroup.subtree_control"), "+io").ok()?;
            let limit = format!("{device} rbps=1");
            (
                root.join(name),
                "io.max",
                limit,
                format!("{device} rbps=max"),
            )
        };
        fs::create_dir(&folder).ok()?;
        let throttle = Throttle {
            folder,
            file,
            lifted,
        };
        fs::write(throttle.folder.join("cgroup.procs"), pid.to_string()).ok()?;
        fs::write(throttle.folder.join(file), limit).ok()?;
        Some(throttle)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Where it could not be set there is nothing to lift.
        let _ = fs::write(self.folder.join(self.file), &self.lifted);
        // It stays while somebody is in it.
        let _ = fs::remove_dir(&self.folder);
    }
}

#[test]
fn what_a_killed_daemon_left_at_a_drive_touches_no_page_of_its_successor() {
    let Some(drive) = Drive::mount() else {
        return skip("ssd: reads that outlive", "mounting needs root and ext4");
    };
    let quick = ["--pool", "adopt", "--prefetch-timeout", "300ms"];
    let (mut daemon, worker, names) = filled(&drive, &quick);
    let Some(throttle) = Throttle::reads(&drive, daemon.pid()) else {
        return skip("ssd: reads that outlive", "no block I/O controller");
    };
    let early = query_up(&worker, 1, &names[..40], Fetch::Wait(None));
    assert_eq!((early.status, early.count), (Status::Ok, 0));
    assert!(daemon.gauge(Gauge::SsdReading) > 0, "the drive has them");
    daemon.kill();
    // Its memory may be written to: nobody else gets it, nor the shard.
    for (start, told) in [("adopt", "has not ended yet"), ("fresh", "not ended yet")] {
        daemon.set_argument("--pool", start);
        daemon.spawn();
        assert!(!daemon.wait().success());
        let log = daemon.log();
        let told = log.lines().last().is_some_and(|line| line.contains(told));
        assert!(told, "{log}");
    }
    drop(throttle);
    daemon.set_argument("--pool", "adopt");
    daemon.launch();
    assert!(eventually(|| worker.client.state() == State::Connected));
    worker.wait_ready();
    for (key, part) in (2..).zip(names.chunks(40)) {
        assert_eq!(fetch_up(&worker, key, part), part.len());
    }
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
}

#[test]
fn a_start_that_waits_for_a_drive_says_so_and_goes_on_with_it() {
    let Some(drive) = Drive::mount() else {
        return skip("ssd: a start that waits", "mounting needs root and ext4");
    };
    let patient = ["--pool", "adopt", "--ssd-open-wait", "10m"];
    let (mut daemon, worker, _) = filled(&drive, &patient);
    drop(worker);
    daemon.stop();
    let stopped = drive.stop();
    daemon.set_argument("--ssd", &larger(&drive));
    daemon.spawn();
    let told = || daemon.log().contains("a drive is slow or does not answer");
    assert!(eventually(told), "{}", daemon.log());
    drop(stopped);
    assert!(eventually(|| daemon.is_serving()), "{}", daemon.log());
    assert!(daemon.stop().success());
}

/// A start that goes on soon without a drive.
const BRIEF: [&str; 4] = ["--pool", "adopt", "--ssd-open-wait", "1s"];

/// The drive's shard with another size: it is written to before it is opened.
fn larger(drive: &Drive) -> String {
    format!("{}:160MiB", drive.at().join("shard").display())
}

#[test]
fn a_drive_that_stands_still_at_the_start_costs_the_tier_and_joins_when_it_answers() {
    let Some(drive) = Drive::mount() else {
        return skip(
            "ssd: a drive that stands still at the start",
            "mounting needs root and ext4",
        );
    };
    let (mut daemon, worker, names) = filled(&drive, &BRIEF);
    let in_pool = &names[names.len() - 40..];
    assert_eq!(fetch_up(&worker, 1, in_pool), 40);
    daemon.stop();
    let stopped = drive.stop();
    daemon.set_argument("--ssd", &larger(&drive));
    daemon.launch();
    expect_trouble(&daemon, "has not finished opening since the start");
    let (text, fine) = pegactl_ssd(&daemon);
    assert!(
        !fine && text.contains("has not finished opening since"),
        "{text}"
    );
    // The pool was adopted, and serves saves, queries and loads.
    assert!(eventually(|| worker.client.state() == State::Connected));
    worker.wait_ready();
    assert_eq!(fetch_up(&worker, 2, in_pool), 40);
    for seed in 3..6 {
        expect_service(&worker, seed);
    }
    let early = query_up(&worker, 3, &names[..20], Fetch::Wait(None));
    assert_eq!((early.status, early.count), (Status::Ok, 0));
    // A block of the shard is saved once more before that is there.
    save_all(&worker, &names[..4]);
    drop(stopped);
    let joined = || rows(&daemon)[0].state == 0 && rows(&daemon)[0].blocks > 0;
    assert!(eventually(joined), "{:?}", rows(&daemon));
    assert!(eventually(|| daemon.log().contains("in order again")));
    for (key, part) in (10..).zip(names.chunks(40)) {
        assert_eq!(fetch_up(&worker, key, part), part.len());
    }
    let (text, fine) = pegactl_ssd(&daemon);
    assert!(fine && text.contains("healthy"), "{text}");
    assert!(daemon.stop().success());
}

#[test]
fn a_shard_that_cannot_grow_gives_the_space_back_and_keeps_what_it_has() {
    let Some(drive) = Drive::mount() else {
        return skip("ssd: no space to grow", "mounting needs root and ext4");
    };
    let (mut daemon, worker, names) = filled(&drive, &["--pool", "adopt"]);
    drop(worker);
    daemon.stop();
    let shard = drive.at().join("shard");
    let before = fs::metadata(&shard).expect("it is there").len();
    let (small, large) = (shard.display().to_string(), "600MiB");
    daemon.set_argument("--ssd", &format!("{small}:{large}"));
    daemon.spawn();
    assert!(!daemon.wait().success());
    let log = daemon.log();
    assert!(
        log.contains(&small) && log.contains("No space left"),
        "{log}"
    );
    assert_eq!(fs::metadata(&shard).expect("it is there").len(), before);
    daemon.set_argument("--ssd", &small);
    daemon.launch();
    assert_eq!(rows(&daemon).len(), 1, "it is shown from the start on");
    let all = || rows(&daemon).iter().map(|row| row.blocks).sum::<u64>();
    assert!(
        eventually(|| all() == names.len() as u64),
        "nothing is lost"
    );
}

#[test]
fn a_daemon_stops_also_while_a_drive_has_not_answered_since_the_start() {
    let Some(drive) = Drive::mount() else {
        return skip(
            "ssd: a stop while a drive stands still",
            "mounting needs root and ext4",
        );
    };
    let (mut daemon, worker, names) = filled(&drive, &BRIEF);
    drop(worker);
    daemon.stop();
    let stopped = drive.stop();
    daemon.set_argument("--ssd", &larger(&drive));
    daemon.launch();
    daemon.signal(Signal::SIGTERM);
    let told = || daemon.log().contains("sealed blocks stay in shared memory");
    assert!(eventually(told), "{}", daemon.log());
    drop(stopped);
    assert!(daemon.wait().success());
    daemon.launch();
    let all = || rows(&daemon).iter().map(|row| row.blocks).sum::<u64>();
    assert!(
        eventually(|| all() == names.len() as u64),
        "nothing is lost"
    );
}

#[test]
fn a_drive_that_stands_still_costs_the_tier_and_not_the_pool() {
    let Some(drive) = Drive::mount() else {
        return skip(
            "ssd: a drive that stands still",
            "mounting needs root and ext4",
        );
    };
    let (daemon, worker, names) = filled(&drive, &["--ssd-stall-limit", "300ms"]);
    let stopped = drive.stop();
    expect_service(&worker, 2);
    expect_trouble(&daemon, "does not answer");
    for seed in 3..6 {
        expect_service(&worker, seed);
    }
    // A query that would have to wait for the drive is answered.
    let early = query_up(&worker, 1, &names[..20], Fetch::Wait(None));
    assert_eq!((early.status, early.count), (Status::Ok, 0));
    drop(stopped);
    let back = || rows(&daemon).iter().all(|row| row.state == 0);
    assert!(eventually(back), "{:?}", rows(&daemon));
    assert!(eventually(|| daemon.log().contains("in order again")));
    assert_eq!(fetch_up(&worker, 2, &names[..40]), 40);
    assert!(daemon.gauge_becomes(Gauge::SsdWriting, 0));
    let (text, fine) = pegactl_ssd(&daemon);
    assert!(fine && text.contains("healthy"), "{text}");
}

#[test]
fn a_file_system_that_turns_read_only_serves_on_what_it_has() {
    let Some(drive) = Drive::mount() else {
        return skip(
            "ssd: a read-only file system",
            "mounting needs root and ext4",
        );
    };
    let (daemon, worker, names) = filled(&drive, &[]);
    drive.make_read_only();
    expect_service(&worker, 2);
    expect_trouble(&daemon, "read-only");
    assert_eq!(rows(&daemon)[0].state, 1, "it takes no writes, and reads");
    assert!(rows(&daemon)[0].write_errors > 0);
    assert_eq!(fetch_up(&worker, 1, &names[..40]), 40);
    expect_service(&worker, 3);
    let (text, fine) = pegactl_ssd(&daemon);
    assert!(!fine && text.contains("reads only"), "{text}");
}

#[test]
fn a_drive_that_answers_reads_with_errors_costs_those_hits_and_no_more() {
    let Some(drive) = Drive::mount() else {
        return skip("ssd: a drive with errors", "mounting needs root and ext4");
    };
    let (daemon, worker, names) = filled(&drive, &[]);
    drive.tear_off();
    for (key, from) in (1..).zip((0..POOL_BLOCKS).step_by(POOL_BLOCKS / 4)) {
        let early = query_up(&worker, key, &names[from..from + 4], Fetch::Wait(None));
        assert_eq!((early.status, early.count), (Status::Ok, 0));
    }
    expect_trouble(&daemon, "Input/output error");
    assert!(rows(&daemon)[0].read_errors > 0);
    assert!(daemon.counter(Counter::SsdFetchFailed) > 0);
    expect_service(&worker, 2);
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    let (text, fine) = pegactl_ssd(&daemon);
    assert!(!fine && text.contains("degraded"), "{text}");
}
