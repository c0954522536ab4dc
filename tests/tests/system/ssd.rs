//! The SSD tier under a real daemon: what was evicted comes back right, after any death; a drive
//! that fails costs hits and nothing else; a file that is not the daemon's own is left alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pegaflow::{BlockHash, Completion, Fetch, State, Status};
use pegaflow_shm::node::{Counter, Gauge, SsdRow, field_text};
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::worker::{Worker, WorkerSpec};
use pegaflow_tests::{binaries, eventually, skip, trials};

/// Blocks that the pool of these daemons holds.
pub const POOL_BLOCKS: usize = 256;
/// Blocks saved at a time: what the worker's memory holds.
const BATCH: usize = 64;
const SHARD_BYTES: &str = "128MiB";

pub fn config(shards: &[PathBuf], further: &[&str]) -> Config {
    let mut arguments = Vec::new();
    for shard in shards {
        arguments.push("--ssd".to_owned());
        arguments.push(format!("{}:{SHARD_BYTES}", shard.display()));
    }
    arguments.extend(further.iter().map(ToString::to_string));
    Config {
        pool: "1MiB".into(),
        extent: "64KiB".into(),
        arguments,
        ..Config::default()
    }
}

fn shard_in(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}

pub fn rows(daemon: &Daemon) -> Vec<SsdRow> {
    daemon
        .node_reader()
        .map_or_else(Vec::new, |node| node.ssds())
}

/// Saves all of them, a batch at a time.
pub fn save_all(worker: &Worker, names: &[BlockHash]) {
    for batch in names.chunks(BATCH) {
        worker.save(batch);
    }
}

/// [`save_all`] no faster than the drives write, so that the tier is given every block.
pub fn save_and_write(daemon: &Daemon, worker: &Worker, names: &[BlockHash]) {
    let mut saved = daemon.counter(Counter::SsdWritten);
    for batch in names.chunks(BATCH) {
        worker.save(batch);
        saved += batch.len() as u64;
        assert!(daemon.counter_reaches(Counter::SsdWritten, saved));
    }
}

/// Waits for blocks below the pool, loads and verifies what the lease has; tells how many.
pub fn fetch_up(worker: &Worker, key: u64, names: &[BlockHash]) -> usize {
    let found = query_up(worker, key, names, Fetch::Wait(None));
    assert_eq!(found.status, Status::Ok);
    let hits = found.count as usize;
    if hits > 0 {
        worker.load_and_verify(found.lease, &names[..hits]);
    }
    hits
}

pub fn query_up(worker: &Worker, key: u64, names: &[BlockHash], fetch: Fetch) -> Completion {
    let asked = worker
        .client
        .query_with(worker.registration, 0, key, names, 0, fetch);
    worker.finish(asked)
}

/// Every block written is on the drive for good.
pub fn wait_durable(daemon: &Daemon, blocks: u64) {
    assert!(daemon.counter_reaches(Counter::SsdWritten, blocks));
    let durable = || {
        // They are as of the last second, and there are some from the start on.
        let rows = rows(daemon);
        let held: u64 = rows.iter().map(|row| row.blocks).sum();
        held >= blocks && rows.iter().all(|row| row.uncommitted_blocks == 0)
    };
    assert!(eventually(durable), "{:?}", rows(daemon));
}

fn wait_back(worker: &Worker) {
    assert!(eventually(|| worker.client.state() == State::Connected));
    worker.wait_ready();
}

#[test]
fn evicted_blocks_come_back_from_all_shards_and_both_tiers_survive_kill_9() {
    let folder = tempfile::tempdir().expect("a folder");
    let shards = [shard_in(folder.path(), "a"), shard_in(folder.path(), "b")];
    let arguments = ["--ssd-admit", "seal", "--pool", "adopt"];
    let mut daemon = Daemon::start_with(config(&shards, &arguments));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 3 * POOL_BLOCKS);
    save_and_write(&daemon, &worker, &names);
    assert_eq!(fetch_up(&worker, 1, &names[..40]), 40);
    assert!(daemon.counter_reaches(Counter::QueryHitSsd, 40));
    wait_durable(&daemon, names.len() as u64);
    let used = rows(&daemon);
    assert_eq!(used.len(), 2);
    assert!(used.iter().all(|row| row.blocks > 0 && row.state == 0));

    daemon.kill();
    daemon.launch();
    wait_back(&worker);
    assert!(
        daemon.counter(Counter::AdoptedBlocks) > 0,
        "the pool is adopted"
    );
    let late = &names[names.len() - 20..];
    assert_eq!(fetch_up(&worker, 2, late), 20);
    for (key, from) in (3..).zip((0..names.len() - 40).step_by(97)) {
        assert_eq!(
            fetch_up(&worker, key, &names[from..from + 40]),
            40,
            "from {from}"
        );
    }
    // A new pool leaves the drives alone.
    daemon.stop();
    daemon.set_argument("--pool", "fresh");
    daemon.launch();
    wait_back(&worker);
    assert_eq!(fetch_up(&worker, 100, &names[..40]), 40);
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
    assert!(daemon.gauge_becomes(Gauge::Prefetches, 0));
}

#[test]
fn a_query_says_loading_until_its_blocks_are_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let shards = [shard_in(folder.path(), "a")];
    let daemon = Daemon::start_with(config(&shards, &["--ssd-admit", "seal"]));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 3 * POOL_BLOCKS);
    save_and_write(&daemon, &worker, &names);
    wait_durable(&daemon, names.len() as u64);
    let probe = || worker.client.probe(worker.registration, 0, &names[..8]);
    assert_eq!(probe().expect("probe"), 0, "probes look at the pool alone");
    let now = query_up(&worker, 1, &names[..8], Fetch::Never);
    assert_eq!((now.status, now.count, now.lease), (Status::Ok, 0, 0));
    let first = worker.query(2, &names[..8]);
    assert_eq!((first.status, first.lease), (Status::Loading, 0));
    let mut answer = first;
    assert!(eventually(|| {
        answer = worker.query(2, &names[..8]);
        answer.status != Status::Loading
    }));
    assert_eq!((answer.status, answer.count), (Status::Ok, 8));
    worker.load_and_verify(answer.lease, &names[..8]);
    // A deadline that is over before any drive answers still gets an answer.
    let late = query_up(
        &worker,
        3,
        &names[8..16],
        Fetch::Wait(Some(Duration::from_nanos(1))),
    );
    assert_eq!(late.status, Status::Ok);
    assert!(daemon.gauge_becomes(Gauge::SsdReading, 0));
}

#[test]
fn two_daemons_never_share_a_shard_and_a_foreign_file_is_refused_untouched() {
    let folder = tempfile::tempdir().expect("a folder");
    let shard = shard_in(folder.path(), "a");
    let first = Daemon::start_with(config(std::slice::from_ref(&shard), &[]));
    let mut second = Daemon::prepare(config(std::slice::from_ref(&shard), &[]));
    second.spawn();
    assert!(!second.wait().success());
    let log = second.log();
    assert!(log.contains(&shard.display().to_string()), "{log}");
    assert!(first.is_serving());

    let foreign = shard_in(folder.path(), "letter");
    let content = b"to whom it may concern".repeat(10_000);
    fs::write(&foreign, &content).expect("a file");
    let mut third = Daemon::prepare(config(std::slice::from_ref(&foreign), &[]));
    third.spawn();
    assert!(!third.wait().success());
    let log = third.log();
    assert!(log.contains(&foreign.display().to_string()), "{log}");
    assert_eq!(fs::read(&foreign).expect("still there"), content);
}

#[test]
fn crashes_at_any_moment_lose_no_synced_block_and_bring_no_wrong_byte() {
    let folder = tempfile::tempdir().expect("a folder");
    let shards = [shard_in(folder.path(), "a"), shard_in(folder.path(), "b")];
    let mut daemon = Daemon::start_with(config(&shards, &["--ssd-admit", "seal"]));
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let kept = hashes(1, POOL_BLOCKS);
    save_all(&worker, &kept);
    wait_durable(&daemon, kept.len() as u64);
    for trial in 0..trials("PEGAFLOW_SSD_CRASHES", 6) {
        let fresh = hashes(100_000 * (trial + 1), POOL_BLOCKS);
        save_all(&worker, &fresh);
        // Some while everything moves, some once it has settled.
        std::thread::sleep(Duration::from_micros(trial * 7919 % 40_000));
        daemon.kill();
        daemon.launch();
        wait_back(&worker);
        let key = 1000 + trial * 100;
        let from = (trial as usize * 31) % (kept.len() - BATCH);
        let hits = fetch_up(&worker, key, &kept[from..from + BATCH]);
        assert_eq!(hits, BATCH, "trial {trial}: a synced block is gone");
        // Of these, what is there is right: `fetch_up` compares every byte.
        for (at, part) in (1..).zip(fresh.chunks(BATCH)) {
            fetch_up(&worker, key + at, part);
        }
    }
    assert!(daemon.gauge_becomes(Gauge::BlocksPinned, 0));
}

/// A replay against a running daemon whose blocks go by `salt`.
fn replay(daemon: &Daemon, salt: &str) -> serde_json::Value {
    let output = Command::new(binaries::pegactl())
        .args(["--node", daemon.node(), "--socket"])
        .arg(daemon.socket())
        .args(["--json", "replay", "--requests", "120", "--salt", salt])
        .output()
        .expect("pegactl runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).expect("a report")
}

#[test]
fn a_replay_after_kill_9_goes_on_with_the_hits_of_both_tiers() {
    let folder = tempfile::tempdir().expect("a folder");
    let shards = [shard_in(folder.path(), "a"), shard_in(folder.path(), "b")];
    let arguments = ["--ssd-admit", "seal", "--pool", "adopt"];
    let mut daemon = Daemon::start_with(config(&shards, &arguments));
    let number = |report: &serde_json::Value, name: &str| {
        let number = report[name].as_u64();
        number.unwrap_or_else(|| panic!("{name} of {report}"))
    };
    let first = replay(&daemon, "one");
    let all = number(&first, "blocks");
    assert!(number(&first, "miss_blocks") >= number(&first, "different_blocks"));
    let written = daemon.counter(Counter::SsdWritten);
    assert!(eventually(|| daemon.gauge_becomes(Gauge::SsdWriting, 0)));
    wait_durable(&daemon, written);
    daemon.kill();
    daemon.launch();
    assert!(daemon.counter(Counter::AdoptedBlocks) > 0);
    let again = replay(&daemon, "one");
    let (ram, ssd) = (
        number(&again, "ram_hit_blocks"),
        number(&again, "ssd_hit_blocks"),
    );
    assert!(ram > 0 && ssd > 0, "{again}");
    assert_eq!(ram + ssd + number(&again, "miss_blocks"), all);
    assert_eq!(ram + ssd, number(&again, "hit_blocks"));
    // What the first replay had to compute the second one finds.
    let lost = number(&again, "ssd_unwritten_blocks") + number(&first, "ssd_unwritten_blocks");
    assert!(number(&again, "miss_blocks") <= lost + all / 50, "{again}");
    // Another name is another namespace.
    let other = replay(&daemon, "two");
    assert!(number(&other, "miss_blocks") >= number(&other, "different_blocks"));
}

#[test]
fn a_replay_beside_ram_has_both_daemons_do_every_request_and_compares_the_same_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("replay.ssd");
    let pegactl = |arguments: &[&str]| {
        let mut command = Command::new(binaries::pegactl());
        let shard = format!("{}:1GiB", file.display());
        command.args(["--json", "replay", "--requests", "700", "--beside-ram"]);
        command.args(["--capacity-blocks", "400", "--ssd", &shard]);
        command.args(arguments).output().expect("pegactl runs")
    };
    let output = pegactl(&[]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
    let number = |side: &str, name: &str| {
        let number = report[side][name].as_u64();
        number.unwrap_or_else(|| panic!("{side} {name} of {report}"))
    };
    for side in ["without_ssd", "with_ssd"] {
        assert_eq!(number(side, "requests"), 700);
        assert_eq!(number(side, "mismatches") + number(side, "errors"), 0);
    }
    assert!(number("with_ssd", "ssd_hit_blocks") > 0, "{report}");
    assert_eq!(number("without_ssd", "ssd_hit_blocks"), 0);
    assert!(number("with_ssd", "hit_blocks") > number("without_ssd", "hit_blocks"));
    // Compared are all but those that wait for blocks from below.
    let same = number("same_requests", "requests");
    assert!(0 < same && same < 700, "{report}");
    let ratio = report["same_requests"]["p99_ratio"].as_f64();
    assert!(ratio.is_some_and(|ratio| ratio > 0.0), "{report}");
    assert!(!file.exists(), "a file that was made stays");
    // Several engines share out a workload as they like: nothing is the same then.
    let refused = pegactl(&["--engines", "2"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--engines"));
}

/// A file system of its own, as small as wanted; unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(bytes: &str) -> Option<SmallDisk> {
        let folder = tempfile::tempdir().expect("a folder");
        let options = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let path = self.0.path();
        let done = Command::new("umount").arg("-l").arg(path).status();
        assert!(
            done.is_ok_and(|status| status.success()),
            "{}",
            path.display()
        );
    }
}

#[test]
fn a_disk_that_is_full_costs_the_tier_and_not_the_pool() {
    let Some(disk) = SmallDisk::mount("160M") else {
        return skip(
            "ssd: a full disk",
            "mounting a small file system needs root",
        );
    };
    let shard = shard_in(disk.0.path(), "a");
    let daemon = Daemon::start_with(config(
        std::slice::from_ref(&shard),
        &["--ssd-admit", "seal"],
    ));
    // The space that the shard has reserved is taken from under it.
    let file = fs::File::options()
        .write(true)
        .open(&shard)
        .expect("the shard");
    let length = file.metadata().expect("its size").len();
    let ballast = fs::File::create(disk.0.path().join("ballast")).expect("a file");
    file.set_len(1 << 20).expect("truncate");
    file.set_len(length).expect("a hole");
    let mut bytes = 0u64;
    let chunk = vec![1u8; 1 << 20];
    while std::io::Write::write_all(&mut &ballast, &chunk).is_ok() {
        bytes += chunk.len() as u64;
    }
    assert!(bytes > 1 << 20);
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 2 * POOL_BLOCKS);
    save_all(&worker, &names);
    let down = || rows(&daemon).iter().any(|row| row.state != 0);
    assert!(eventually(down), "{:?}", rows(&daemon));
    let row = rows(&daemon)[0];
    assert!(!field_text(&row.reason).is_empty());
    assert!(row.write_errors > 0 && row.degradations > 0);
    let told = || daemon.log().contains("it takes no writes for now");
    assert!(eventually(told), "{}", daemon.log());
    // The pool serves as ever, and nobody waits for what cannot come.
    let late = &names[names.len() - 20..];
    assert_eq!(fetch_up(&worker, 1, late), 20);
    let early = query_up(&worker, 2, &names[..20], Fetch::Wait(None));
    assert_eq!(early.status, Status::Ok);
    save_all(&worker, &hashes(100_000, POOL_BLOCKS));
    assert!(daemon.gauge_becomes(Gauge::SsdWriting, 0));
    assert!(daemon.is_serving());
}
