//! What every engine must hold, tried on each of them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::Dice;
use super::{Ended, Engine, Kind, Piece, Threads, Uring};
use crate::memory::{Area, aligned};

const DEPTH: u32 = 16;
const SLOT: u64 = 16384;
/// Only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

type Make = fn(Arc<File>, Area) -> Box<dyn Engine>;

/// Runs a test over an engine of each kind, over a file of `bytes` zeroes.
fn for_each_engine(bytes: u64, test: impl Fn(&mut dyn Engine, &Area, &File)) {
    let makers: [(&str, Make); 4] = [
        ("io_uring", |file, area| {
            let engine = Uring::new(file, DEPTH, None, vec![area]).expect("io_uring is allowed");
            Box::new(engine.0)
        }),
        ("io_uring, memory not registered", |file, _| {
            let engine = Uring::new(file, DEPTH, None, vec![aligned(4096)]);
            Box::new(engine.expect("io_uring is allowed").0)
        }),
        ("io_uring, polled", |file, area| {
            let idle = Some(Duration::from_millis(50));
            let engine = Uring::new(file, DEPTH, idle, vec![area]).expect("io_uring is allowed");
            Box::new(engine.0)
        }),
        ("threads", |file, area| {
            Box::new(Threads::new(file, DEPTH, vec![area]).expect("threads start"))
        }),
    ];
    for (name, make) in makers {
        eprintln!("{name}");
        let file = tempfile::tempfile().expect("a file");
        file.set_len(bytes).expect("its size");
        let area = aligned((SLOT * u64::from(DEPTH)) as usize);
        let file = Arc::new(file);
        let mut engine = make(Arc::clone(&file), area.clone());
        assert_eq!(engine.depth(), DEPTH);
        test(&mut *engine, &area, &file);
    }
}

fn piece(area: &Area, id: u64, kind: Kind, offset: u64, bytes: u32) -> Piece {
    Piece {
        id,
        kind,
        offset,
        address: area.at(id % u64::from(DEPTH) * SLOT, u64::from(bytes)),
        bytes,
    }
}

fn wait_for(engine: &mut dyn Engine, count: usize) -> Vec<Ended> {
    let end = Instant::now() + PATIENCE;
    let mut out = Vec::new();
    while out.len() < count {
        assert!(Instant::now() < end, "{} of {count} ended", out.len());
        engine.wait(Some(PATIENCE), &mut out).expect("waits");
    }
    assert_eq!(out.len(), count);
    out
}

#[test]
fn every_piece_ends_once_with_its_own_id_and_no_more_than_the_depth_are_taken() {
    for_each_engine(1 << 20, |engine, area, _| {
        for id in 0..u64::from(DEPTH) {
            let kind = [Kind::Read, Kind::Write, Kind::Sync][id as usize % 3];
            let taken = engine.submit(piece(area, id, kind, id * SLOT, 4096));
            assert!(taken.is_ok());
        }
        let over = piece(area, 99, Kind::Read, 0, 4096);
        assert_eq!(engine.submit(over).expect_err("it is full").id, 99);
        let ended = wait_for(engine, DEPTH as usize);
        let ids: HashSet<u64> = ended.iter().map(|end| end.id).collect();
        assert_eq!(ids.len(), DEPTH as usize);
        for end in ended {
            let expected = if end.id % 3 == 2 { 0 } else { 4096 };
            assert_eq!(end.result, Ok(expected), "{}", end.id);
        }
        assert!(engine.submit(over).is_ok(), "there is room again");
        wait_for(engine, 1);
    });
}

#[test]
fn what_was_written_is_read_by_pieces_submitted_after_its_end() {
    const PLACES: u64 = 64;
    for_each_engine(PLACES * SLOT, |engine, area, file| {
        let mut dice = Dice::new(5);
        let mut content: HashMap<u64, u8> = HashMap::new();
        for round in 0..60u8 {
            let mut places: HashMap<u64, (u64, Kind)> = HashMap::new();
            for id in 0..u64::from(DEPTH) {
                // Each piece has a place of its own, or the order would not be known.
                let place = dice.below(PLACES / 16) * 16 + id;
                let kind = [Kind::Read, Kind::Write][dice.below(2) as usize];
                let fill = if kind == Kind::Write { round + 1 } else { 0xff };
                area.fill(id * SLOT, &[fill; SLOT as usize]);
                places.insert(id, (place, kind));
                let piece = piece(area, id, kind, place * SLOT, SLOT as u32);
                assert!(engine.submit(piece).is_ok());
            }
            for end in wait_for(engine, DEPTH as usize) {
                assert_eq!(end.result, Ok(SLOT as u32));
                let (place, kind) = places[&end.id];
                if kind == Kind::Write {
                    content.insert(place, round + 1);
                    continue;
                }
                let expected = content.get(&place).copied().unwrap_or(0);
                let found = area.content(end.id * SLOT, SLOT as u32);
                assert!(found.iter().all(|&byte| byte == expected), "place {place}");
            }
        }
        for (place, byte) in content {
            let mut found = [0];
            file.read_exact_at(&mut found, place * SLOT + SLOT - 1)
                .expect("there");
            assert_eq!(found[0], byte, "it is in the file");
        }
    });
}

#[test]
fn a_read_at_the_end_of_the_file_is_short_and_behind_it_empty() {
    for_each_engine(6000, |engine, area, _| {
        assert!(
            engine
                .submit(piece(area, 1, Kind::Read, 4096, 4096))
                .is_ok()
        );
        assert!(
            engine
                .submit(piece(area, 2, Kind::Read, 8192, 4096))
                .is_ok()
        );
        let mut ended = wait_for(engine, 2);
        ended.sort_by_key(|end| end.id);
        assert_eq!(ended[0].result, Ok(6000 - 4096));
        assert_eq!(ended[1].result, Ok(0));
    });
}

#[test]
fn an_error_ends_the_piece_with_its_number() {
    for_each_engine(4096, |engine, area, _| {
        let offset = u64::try_from(i64::MAX).expect("positive") - 100;
        assert!(
            engine
                .submit(piece(area, 1, Kind::Write, offset, 4096))
                .is_ok()
        );
        let ended = wait_for(engine, 1);
        let errno = ended[0].result.expect_err("no file is that large");
        assert!([libc::EFBIG, libc::EINVAL].contains(&errno), "{errno}");
    });
}

#[test]
fn a_wait_ends_with_the_bell_even_if_it_rang_before() {
    for_each_engine(4096, |engine, _, _| {
        let mut out = Vec::new();
        engine.bell().ring();
        engine.wait(Some(PATIENCE), &mut out).expect("waits");
        let bell = engine.bell();
        let ringer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            bell.ring();
        });
        let started = Instant::now();
        engine.wait(Some(PATIENCE), &mut out).expect("waits");
        assert!(started.elapsed() < PATIENCE / 2, "the bell was not heard");
        assert!(out.is_empty());
        ringer.join().expect("rings");
        engine
            .wait(Some(Duration::from_millis(1)), &mut out)
            .expect("comes back");
        engine.wait(None, &mut out).expect("does not wait");
        assert!(out.is_empty());
    });
}

#[test]
fn an_engine_is_dropped_only_after_its_pieces_have_ended() {
    for_each_engine(1 << 20, |engine, area, _| {
        // The engine goes with these under way; the area is checked to be quiet afterwards.
        for id in 0..u64::from(DEPTH) {
            area.fill(id * SLOT, &[1; SLOT as usize]);
            let taken = engine.submit(piece(area, id, Kind::Read, id * SLOT, SLOT as u32));
            assert!(taken.is_ok());
        }
    });
    let area = aligned(SLOT as usize * DEPTH as usize);
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&vec![9; SLOT as usize * DEPTH as usize])
        .expect("written");
    let file = Arc::new(file);
    let engines: [Box<dyn Engine>; 2] = [
        Box::new(
            Uring::new(Arc::clone(&file), DEPTH, None, vec![area.clone()])
                .expect("made")
                .0,
        ),
        Box::new(Threads::new(file, DEPTH, vec![area.clone()]).expect("made")),
    ];
    for mut engine in engines {
        area.fill(0, &vec![1; SLOT as usize * DEPTH as usize]);
        for id in 0..u64::from(DEPTH) {
            let taken = engine.submit(piece(&area, id, Kind::Read, id * SLOT, SLOT as u32));
            assert!(taken.is_ok());
        }
        // The last pieces are started by a wait, the end of all is awaited by the drop.
        engine.wait(None, &mut Vec::new()).expect("starts them");
        drop(engine);
        let found = area.content(0, (SLOT * u64::from(DEPTH)) as u32);
        let done = found
            .chunks(SLOT as usize)
            .filter(|slot| slot.iter().all(|&b| b == 9))
            .count();
        assert_eq!(done, DEPTH as usize, "a piece was left under way");
    }
}
