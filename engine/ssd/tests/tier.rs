//! The tier over real files: what is written is what is read, in this process and the next.

mod common;

use std::time::Duration;

use common::{Pool, Rig, bytes_for, key, options, page};
use pegaflow_ssd::{IoChoice, Outcome, PageRef, page_checksum};

const MIB: u64 = 1 << 20;
/// Lengths that direct I/O takes as they are, lengths that it does not, and one of several pieces.
const LENGTHS: [u32; 6] = [4096, 512, 1, 5000, 262_145, 1 << 20];

fn for_each_io(test: impl Fn(IoChoice)) {
    for io in [IoChoice::Uring, IoChoice::Threads] {
        eprintln!("{io:?}");
        test(io);
    }
}

#[test]
fn every_length_at_every_alignment_comes_back_as_it_was_written() {
    for_each_io(|io| {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = Pool::new(8 << 20);
        let path = folder.path().join("shard");
        let mut rig = Rig::open(options(io, &[(&path, 64 * MIB)]), &pool).expect("opens");
        assert!(rig.report.shards[0].created);
        for (number, &bytes) in LENGTHS.iter().enumerate() {
            for (shift, offset) in [0, 512, 64, 1].into_iter().enumerate() {
                let block = (number * 10 + shift) as u64;
                let at = [page(offset, bytes), page(2 * MIB + offset, bytes)];
                for (index, &at) in at.iter().enumerate() {
                    pool.fill(at, &bytes_for(block, 0, index, bytes as usize));
                }
                assert_eq!(rig.write(block, &key(block), &at), Outcome::Written);
                let back = [page(4 * MIB + offset, bytes), page(6 * MIB + offset, bytes)];
                assert_eq!(rig.read(block, &key(block), &back), Outcome::Read);
                for (index, &back) in back.iter().enumerate() {
                    let expected = bytes_for(block, 0, index, bytes as usize);
                    assert!(pool.content(back) == expected, "{bytes} bytes at {offset}");
                }
            }
        }
        assert!(rig.tier.close(Duration::from_secs(60)));
    });
}

#[test]
fn blocks_are_there_after_reopening_over_several_shards() {
    for_each_io(|io| {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = Pool::new(1 << 20);
        let paths = [folder.path().join("a"), folder.path().join("b")];
        let open = || {
            let shards = [
                (paths[0].as_path(), 32 * MIB),
                (paths[1].as_path(), 64 * MIB),
            ];
            Rig::open(options(io, &shards), &pool).expect("opens")
        };
        let mut rig = open();
        let (from, to) = (page(0, 20_000), page(65536, 20_000));
        for block in 0..200 {
            pool.fill(from, &bytes_for(block, 0, 0, 20_000));
            assert_eq!(rig.write(block, &key(block), &[from]), Outcome::Written);
        }
        let spread: Vec<u64> = rig.tier.stats().iter().map(|shard| shard.blocks).collect();
        assert!(
            spread[0] > 50 && spread[1] > spread[0],
            "{spread:?}: by size"
        );
        assert!(rig.tier.close(Duration::from_secs(60)));
        let mut rig = open();
        let found: u64 = rig.report.shards.iter().map(|shard| shard.blocks).sum();
        assert_eq!(found, 200, "{:?}", rig.report);
        for block in 0..200 {
            assert_eq!(rig.read(block, &key(block), &[to]), Outcome::Read);
            assert!(
                pool.content(to) == bytes_for(block, 0, 0, 20_000),
                "block {block}"
            );
        }
        assert!(rig.tier.close(Duration::from_secs(60)));
    });
}

#[test]
fn a_full_shard_gives_up_its_oldest_segments_and_no_wrong_byte_comes_back() {
    for_each_io(|io| {
        let folder = tempfile::tempdir().expect("a folder");
        let pool = Pool::new(1 << 20);
        let path = folder.path().join("shard");
        let mut rig = Rig::open(options(io, &[(&path, 16 * MIB)]), &pool).expect("opens");
        let (from, to) = (page(0, 100_000), page(131_072, 100_000));
        for block in 0..500u64 {
            pool.fill(from, &bytes_for(block, 0, 0, 100_000));
            assert_eq!(rig.write(block, &key(block), &[from]), Outcome::Written);
        }
        let stats = rig.tier.stats()[0].clone();
        assert!(stats.segments_reclaimed >= 20, "{stats:?}");
        assert_eq!(stats.blocks + stats.evicted_blocks, 500);
        assert!(stats.write_amplification() < 1.1, "{stats:?}");
        let held: Vec<u64> = (0..500)
            .filter(|&block| rig.tier.lookup(&key(block)).is_some())
            .collect();
        assert_eq!(held.len() as u64, stats.blocks);
        assert!(
            held.len() > 80 && held[0] > 300,
            "the newest are held: {held:?}"
        );
        for block in held {
            assert_eq!(rig.read(block, &key(block), &[to]), Outcome::Read);
            assert!(
                pool.content(to) == bytes_for(block, 0, 0, 100_000),
                "block {block}"
            );
        }
        assert!(rig.tier.close(Duration::from_secs(60)));
    });
}

#[test]
fn a_page_damaged_on_the_drive_is_a_miss_that_is_counted_and_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let pool = Pool::new(1 << 20);
    let path = folder.path().join("shard");
    let mut rig = Rig::open(options(IoChoice::Auto, &[(&path, 16 * MIB)]), &pool).expect("opens");
    let at: [PageRef; 2] = [page(0, 8192), page(8192, 8192)];
    let content = bytes_for(1, 0, 0, 8192);
    pool.fill(at[0], &content);
    pool.fill(at[1], &bytes_for(1, 0, 1, 8192));
    assert_eq!(rig.write(1, &key(1), &at), Outcome::Written);
    assert!(rig.tier.close(Duration::from_secs(60)));
    // One bit, wherever the page is.
    let mut file = std::fs::read(&path).expect("the shard");
    let start = file
        .windows(8192)
        .step_by(4096)
        .position(|window| window == content)
        .expect("pages lie as they are");
    file[start * 4096 + 5000] ^= 1;
    std::fs::write(&path, &file).expect("written");
    let mut rig = Rig::open(options(IoChoice::Auto, &[(&path, 16 * MIB)]), &pool).expect("opens");
    assert!(
        rig.tier.lookup(&key(1)).is_some(),
        "tables alone do not tell"
    );
    assert_eq!(rig.read(2, &key(1), &at), Outcome::Bad);
    assert!(rig.tier.lookup(&key(1)).is_none());
    let stats = rig.tier.stats()[0].clone();
    assert_eq!((stats.bad_pages, stats.blocks, stats.live_bytes), (1, 0, 0));
    // It can be stored again.
    pool.fill(at[0], &content);
    assert_eq!(rig.write(3, &key(1), &at), Outcome::Written);
    assert_eq!(rig.read(4, &key(1), &at), Outcome::Read);
    assert!(rig.tier.close(Duration::from_secs(60)));
}

#[test]
fn a_page_that_does_not_have_its_checksum_is_not_taken_and_one_that_is_read_gets_it_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let pool = Pool::new(1 << 20);
    let path = folder.path().join("shard");
    let mut rig = Rig::open(options(IoChoice::Auto, &[(&path, 16 * MIB)]), &pool).expect("opens");
    // The second one goes through bounce buffers.
    let mut at: [PageRef; 2] = [page(0, 8192), page(8192 + 64, 5056)];
    let contents = [bytes_for(1, 0, 0, 8192), bytes_for(1, 0, 1, 5056)];
    for (at, content) in at.iter_mut().zip(&contents) {
        pool.fill(*at, content);
        at.checksum = page_checksum(content);
    }
    let checksums = at.map(|page| page.checksum);
    let mut changed = contents[1].clone();
    changed[4999] ^= 1;
    pool.fill(at[1], &changed);
    assert_eq!(rig.write(1, &key(1), &at), Outcome::Bad);
    assert!(!rig.tier.knows(&key(1)));
    pool.fill(at[1], &contents[1]);
    assert_eq!(rig.write(2, &key(1), &at), Outcome::Written);
    let stats = rig.tier.stats()[0].clone();
    assert_eq!(
        (stats.bad_pages, stats.blocks),
        (0, 1),
        "the drive is not to blame"
    );
    for asked in [[1, 1], [0, 1], [0, 0]] {
        at[0].checksum = asked[0];
        at[1].checksum = asked[1];
        let read = rig.tier.read(std::time::Instant::now(), 3, &key(1), &at);
        read.expect("it is taken");
        let end = rig.completions().remove(0);
        assert_eq!(end.outcome, Outcome::Read);
        let wanted = [asked[0] * checksums[0], asked[1] * checksums[1]];
        let wanted = if asked == [0, 0] {
            &[][..]
        } else {
            &wanted[..]
        };
        assert_eq!(end.checksums, wanted);
    }
    assert!(rig.tier.close(Duration::from_secs(60)));
}
