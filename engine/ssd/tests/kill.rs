//! A process that writes is killed at a random moment, again and again: what it had made durable is
//! there, and no wrong byte ever is.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Pool, Rig, bytes_for, key, options, page};
use pegaflow_ssd::{IoChoice, Outcome, Refused};

/// Kills per run; `PEGAFLOW_SSD_KILLS` asks for another number.
const KILLS: u64 = if cfg!(debug_assertions) { 25 } else { 200 };
const CHILD: &str = "PEGAFLOW_SSD_CHILD";
const SHARD_BYTES: u64 = 24 << 20;
const PAGE: u32 = 20_000;
const SLOTS: u64 = 16;

fn open(folder: &Path, io: IoChoice, pool: &Pool) -> Rig {
    let (a, b) = (folder.join("a"), folder.join("b"));
    let mut options = options(io, &[(&a, SHARD_BYTES), (&b, SHARD_BYTES)]);
    options.commit_interval = Duration::from_millis(3);
    Rig::open(options, pool).expect("opens, whatever the last process left")
}

/// Writes blocks from `first` on, as fast as it can, and says on its output what is durable.
fn write_until_killed(folder: &Path, io: IoChoice, first: u64) {
    let pool = Pool::new((SLOTS * u64::from(PAGE)) as usize);
    let mut rig = open(folder, io, &pool);
    let mut out = std::io::stdout();
    let (mut next, mut free) = (first, (0..SLOTS).collect::<Vec<u64>>());
    let mut done = Vec::new();
    let mut batch_end = first + 8;
    loop {
        while next < batch_end
            && let Some(&slot) = free.last()
        {
            let at = page(slot * u64::from(PAGE), PAGE);
            pool.fill(at, &bytes_for(next, 0, 0, PAGE as usize));
            match rig.tier.write(Instant::now(), slot, &key(next), &[at]) {
                Ok(()) => {
                    free.pop();
                    next += 1;
                }
                Err(Refused::QueueFull | Refused::Reclaiming) => break,
                Err(Refused::Known) => next += 1,
                Err(why) => panic!("{why}"),
            }
        }
        rig.tier.poll(Instant::now(), &mut done);
        for end in done.drain(..) {
            assert_eq!(end.outcome, Outcome::Written);
            free.push(end.ticket);
        }
        let durable = rig
            .tier
            .stats()
            .iter()
            .all(|shard| shard.uncommitted_blocks == 0);
        if next == batch_end && rig.tier.in_flight() == 0 && durable {
            // One write to a pipe: the parent sees all of the line or nothing.
            writeln!(out, "durable {next}").expect("the parent reads");
            out.flush().expect("the parent reads");
            batch_end = next + next % 23 + 1;
        }
    }
}

#[test]
fn a_killed_process_leaves_what_it_had_made_durable_and_no_wrong_byte() {
    if let Ok(child) = std::env::var(CHILD) {
        let mut words = child.split('\n');
        let (folder, io, first) = (words.next(), words.next(), words.next());
        let io = [IoChoice::Uring, IoChoice::Threads][usize::from(io == Some("threads"))];
        let first = first
            .and_then(|first| first.parse().ok())
            .expect("a number");
        write_until_killed(Path::new(folder.expect("a folder")), io, first);
        return;
    }
    let kills = std::env::var("PEGAFLOW_SSD_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(KILLS);
    let folder = tempfile::tempdir().expect("a folder");
    let pool = Pool::new(PAGE as usize);
    let (mut next, mut checked, mut lived) = (0u64, 0u64, 0u64);
    for kill in 0..kills {
        let io = ["uring", "threads"][(kill % 2) as usize];
        let durable = run_and_kill(folder.path(), io, next, kill);
        lived += u64::from(durable.is_some());
        let first = next;
        next = next.max(durable.unwrap_or(next));
        let mut rig = open(folder.path(), IoChoice::Auto, &pool);
        let there: Vec<u64> = (0..next + 100)
            .filter(|&block| rig.tier.lookup(&key(block)).is_some())
            .collect();
        // Older ones may have made room.
        for block in first..next {
            assert!(
                there.contains(&block),
                "kill {kill}: block {block} of {next} is gone"
            );
        }
        let at = page(0, PAGE);
        let newest = there.iter().rev().take(200);
        let oldest = there.iter().take(50);
        for &block in newest.chain(oldest) {
            if rig.tier.lookup(&key(block)).is_none() {
                continue;
            }
            assert_eq!(
                rig.read(block, &key(block), &[at]),
                Outcome::Read,
                "block {block}"
            );
            let expected = bytes_for(block, 0, 0, PAGE as usize);
            assert!(
                pool.content(at) == expected,
                "kill {kill}: wrong bytes of {block}"
            );
            checked += 1;
        }
        assert!(rig.tier.close(Duration::from_secs(60)));
    }
    eprintln!("{kills} kills, {lived} after something was durable, {next} blocks, {checked} read");
    assert!(lived * 2 > kills, "most children must get somewhere");
}

/// Runs a child until it said something is durable and a while longer. Says what was durable last.
fn run_and_kill(folder: &Path, io: &str, first: u64, kill: u64) -> Option<u64> {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "--nocapture"])
        .arg("a_killed_process_leaves_what_it_had_made_durable_and_no_wrong_byte")
        .env(CHILD, format!("{}\n{io}\n{first}", folder.display()))
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut last = None;
    // So many lines, then some microseconds more: anywhere between two commits.
    let lines = kill % 5;
    let mut line = String::new();
    while last.is_none() || last < Some(first + lines * 10) {
        line.clear();
        assert!(
            output.read_line(&mut line).expect("reads") > 0,
            "the child ended by itself"
        );
        last = durable(&line).or(last);
    }
    std::thread::sleep(Duration::from_micros(kill * 7919 % 20_000));
    child.kill().expect("killed");
    child.wait().expect("waited for");
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("reads");
    rest.lines().filter_map(durable).next_back().or(last)
}

fn durable(line: &str) -> Option<u64> {
    line.trim().strip_prefix("durable ")?.parse().ok()
}
