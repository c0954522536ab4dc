//! What opening a set of shards accepts, makes, changes and refuses.

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Pool, Rig, bytes_for, key, options, page};
use pegaflow_ssd::{IoChoice, OpenError, Options, Outcome, ShardSpec, ShardView, Tier};
use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

struct Place {
    folder: tempfile::TempDir,
    pool: Pool,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            pool: Pool::new(1 << 20),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, shards: &[(&Path, u64)]) -> Result<Rig, OpenError> {
        Rig::open(options(IoChoice::Auto, shards), &self.pool)
    }

    fn error(&self, options: Options) -> OpenError {
        match Rig::open(options, &self.pool) {
            Ok(_) => panic!("it opens"),
            Err(error) => error,
        }
    }

    /// Makes shards with so many blocks of 10,000 bytes.
    fn fill(&self, shards: &[(&Path, u64)], blocks: u64) {
        let mut rig = self.open(shards).expect("opens");
        let at = page(0, 10_000);
        for block in 0..blocks {
            self.pool.fill(at, &bytes_for(block, 0, 0, 10_000));
            assert_eq!(rig.write(block, &key(block), &[at]), Outcome::Written);
        }
        assert!(rig.tier.close(LIMIT));
    }

    /// How many of so many blocks are there, each with its bytes.
    fn count(&self, rig: &mut Rig, blocks: u64) -> u64 {
        let at = page(0, 10_000);
        let mut there = 0;
        for block in 0..blocks {
            if rig.tier.lookup(&key(block)).is_some() {
                assert_eq!(rig.read(block, &key(block), &[at]), Outcome::Read);
                assert!(self.pool.content(at) == bytes_for(block, 0, 0, 10_000));
                there += 1;
            }
        }
        there
    }
}

/// Refused, by name, and not a byte of it changed.
fn refused(place: &Place, path: &Path, options: Options) -> OpenError {
    let before = fs::read(path).expect("it is there");
    let error = place.error(options);
    assert!(
        error.to_string().contains(&path.display().to_string()),
        "{error}"
    );
    assert!(
        fs::read(path).expect("still there") == before,
        "it was changed"
    );
    error
}

#[test]
fn a_file_that_is_no_shard_is_refused_by_name_and_left_alone() {
    let place = Place::new();
    let path = place.path("notes.txt");
    for content in [&b"not a shard"[..], &[0; 100_000], &[0xff; 10_000_000]] {
        fs::write(&path, content).expect("written");
        let error = refused(&place, &path, options(IoChoice::Auto, &[(&path, 16 * MIB)]));
        assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
    }
    let error = place.error(options(IoChoice::Auto, &[(place.folder.path(), 16 * MIB)]));
    assert!(matches!(error, OpenError::NotAFile { .. }), "{error}");
}

#[test]
fn what_is_no_regular_file_is_refused_by_name_whoever_looks() {
    let place = Place::new();
    let fifo = place.path("fifo");
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, &fifo, FileType::Fifo, mode, 0).expect("a FIFO");
    let link = place.path("link");
    std::os::unix::fs::symlink("/dev/null", &link).expect("a link");
    for path in [&fifo, &link, &PathBuf::from("/dev/zero")] {
        let error = place.error(options(IoChoice::Auto, &[(path, 16 * MIB)]));
        assert!(matches!(error, OpenError::NotAFile { .. }), "{error}");
        let error = ShardView::open(path).expect_err("it is none");
        assert!(matches!(error, OpenError::NotAFile { .. }), "{error}");
    }
}

#[test]
fn one_file_under_two_names_is_refused_by_both() {
    let place = Place::new();
    let (a, soft, hard) = (place.path("a"), place.path("soft"), place.path("hard"));
    place.fill(&[(&a, 16 * MIB)], 3);
    std::os::unix::fs::symlink(&a, &soft).expect("a link");
    fs::hard_link(&a, &hard).expect("a link");
    for other in [&soft, &hard] {
        let both = options(IoChoice::Auto, &[(&a, 16 * MIB), (other, 16 * MIB)]);
        let error = refused(&place, &a, both);
        assert!(matches!(error, OpenError::SameFile { .. }), "{error}");
        assert!(error.to_string().contains(&other.display().to_string()));
    }
    // Also if it is still to be made.
    let (new, link) = (place.path("new"), place.path("to-new"));
    std::os::unix::fs::symlink(&new, &link).expect("a link");
    let both = options(IoChoice::Auto, &[(&link, 16 * MIB), (&new, 16 * MIB)]);
    let error = place.error(both);
    assert!(matches!(error, OpenError::SameFile { .. }), "{error}");
    assert!(!new.exists(), "neither is made");
    // By one of its names it is fine.
    let mut rig = place.open(&[(&soft, 16 * MIB)]).expect("opens");
    assert_eq!(place.count(&mut rig, 3), 3);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_shard_is_made_where_a_link_points_and_what_cannot_be_made_leaves_no_file() {
    let place = Place::new();
    let (link, there) = (place.path("link"), place.path("drive"));
    std::os::unix::fs::symlink("drive/shard", &link).expect("a link");
    let gone = || options(IoChoice::Auto, &[(&link, 16 * MIB)]);
    // The drive is not mounted: nothing takes the link's place.
    let error = place.error(gone());
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
    fs::create_dir(&there).expect("a folder");
    place.fill(&[(&link, 16 * MIB)], 3);
    assert!(fs::symlink_metadata(&link).expect("it stays").is_symlink());
    let mut rig = place
        .open(&[(&there.join("shard"), 16 * MIB)])
        .expect("it is there");
    assert_eq!(place.count(&mut rig, 3), 3);
    assert!(rig.tier.close(LIMIT));
    // A name that no file can have, and more than there is space for.
    let files = || fs::read_dir(place.folder.path()).expect("a folder").count();
    let before = files();
    let folder = place.folder.path().join("new/");
    let error = place.error(options(IoChoice::Auto, &[(&folder, 16 * MIB)]));
    assert!(error.to_string().contains("new"), "{error}");
    assert_eq!(files(), before);
    let loops = place.path("loop");
    std::os::unix::fs::symlink(&loops, &loops).expect("a link");
    let error = place.error(options(IoChoice::Auto, &[(&loops, 16 * MIB)]));
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
}

#[test]
fn a_shard_of_another_node_version_or_set_is_refused_and_a_copy_too() {
    let place = Place::new();
    let (a, b) = (place.path("a"), place.path("b"));
    place.fill(&[(&a, 16 * MIB)], 3);
    place.fill(&[(&b, 16 * MIB)], 3);
    let mut other = options(IoChoice::Auto, &[(&a, 16 * MIB)]);
    other.node = "another".to_owned();
    let error = refused(&place, &a, other);
    assert!(matches!(error, OpenError::OtherNode { .. }), "{error}");
    let both = || options(IoChoice::Auto, &[(&a, 16 * MIB), (&b, 16 * MIB)]);
    let error = refused(&place, &b, both());
    assert!(matches!(error, OpenError::OtherSet { .. }), "{error}");
    fs::copy(&a, &b).expect("copied");
    let error = refused(&place, &b, both());
    assert!(matches!(error, OpenError::SameShard { .. }), "{error}");
    let mut bytes = fs::read(&a).expect("read");
    bytes[8..12].copy_from_slice(&99u32.to_le_bytes());
    bytes[4096..8192].fill(0);
    fs::write(&b, &bytes).expect("written");
    let error = refused(&place, &b, options(IoChoice::Auto, &[(&b, 16 * MIB)]));
    assert!(
        matches!(error, OpenError::OtherVersion { found: 99, .. }),
        "{error}"
    );
}

#[test]
fn a_damaged_superblock_is_refused_and_one_good_copy_of_it_is_enough() {
    let place = Place::new();
    let path = place.path("shard");
    place.fill(&[(&path, 16 * MIB)], 20);
    // Opened again it has written its superblock to both places.
    let good = fs::read(&path).expect("read");
    let magic = |slot: usize| good[slot * 4096..][..7] == *b"PEGASSD";
    let written: Vec<usize> = (0..2).filter(|&slot| magic(slot)).collect();
    assert!(!written.is_empty());
    let mut bad = good.clone();
    for &slot in &written {
        bad[slot * 4096 + 50] ^= 1;
    }
    fs::write(&path, &bad).expect("written");
    let error = refused(&place, &path, options(IoChoice::Auto, &[(&path, 16 * MIB)]));
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    for &slot in &written {
        let mut half = good.clone();
        if written.len() > 1 {
            half[slot * 4096 + 50] ^= 1;
        }
        fs::write(&path, &half).expect("written");
        let mut rig = place.open(&[(&path, 16 * MIB)]).expect("one is enough");
        assert_eq!(place.count(&mut rig, 20), 20);
        assert!(rig.tier.close(LIMIT));
    }
}

#[test]
fn two_owners_never_share_a_shard() {
    let place = Place::new();
    let path = place.path("shard");
    let rig = place.open(&[(&path, 16 * MIB)]).expect("opens");
    let error = place.error(options(IoChoice::Auto, &[(&path, 16 * MIB)]));
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()));
    let used_by = ShardView::open(&path)
        .expect("looking is allowed")
        .layout()
        .used_by;
    assert_eq!(used_by, Some(std::process::id()));
    assert!(rig.tier.close(LIMIT));
    let rig = place.open(&[(&path, 16 * MIB)]).expect("it is free again");
    drop(rig);
    let twice = [(path.as_path(), 16 * MIB), (path.as_path(), 16 * MIB)];
    let error = place.error(options(IoChoice::Auto, &twice));
    assert!(matches!(error, OpenError::NamedTwice { .. }), "{error}");
}

#[test]
fn a_missing_shard_is_reported_its_blocks_come_back_with_it_and_new_ones_join() {
    let place = Place::new();
    let (a, b, c) = (place.path("a"), place.path("b"), place.path("c"));
    let both = [(a.as_path(), 16 * MIB), (b.as_path(), 16 * MIB)];
    place.fill(&both, 100);
    let mut rig = place.open(&both[..1]).expect("one is enough");
    assert_eq!(rig.report.missing_shards, 1);
    let one = place.count(&mut rig, 100);
    assert!((20..80).contains(&one), "{one}");
    assert!(rig.tier.close(LIMIT));
    let mut rig = place.open(&both).expect("opens");
    assert_eq!(
        (rig.report.missing_shards, place.count(&mut rig, 100)),
        (0, 100)
    );
    assert!(rig.tier.close(LIMIT));
    // In another order, with a new one.
    let three = [
        (c.as_path(), 32 * MIB),
        (b.as_path(), 16 * MIB),
        (a.as_path(), 16 * MIB),
    ];
    let mut rig = place.open(&three).expect("opens");
    assert!(rig.report.shards[0].created && !rig.report.shards[1].created);
    assert_eq!(place.count(&mut rig, 100), 100);
    assert!(rig.tier.close(LIMIT));
    let rig = place.open(&three[1..]).expect("opens");
    assert_eq!(
        rig.report.missing_shards, 1,
        "the new one belongs to the set"
    );
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_shard_grows_and_shrinks_and_keeps_what_fits() {
    let place = Place::new();
    let path = place.path("shard");
    place.fill(&[(&path, 16 * MIB)], 1000);
    let mut rig = place.open(&[(&path, 40 * MIB)]).expect("grows");
    assert_eq!(place.count(&mut rig, 1000), 1000);
    assert!(
        rig.report.shards[0]
            .notes
            .iter()
            .any(|note| note.contains("resized"))
    );
    let grown = rig.tier.stats()[0].capacity_bytes;
    assert!(grown > 36 * MIB, "{grown}");
    assert!(rig.tier.close(LIMIT));
    place.fill(&[(&path, 40 * MIB)], 0);
    let mut rig = place.open(&[(&path, 10 * MIB)]).expect("shrinks");
    let kept = place.count(&mut rig, 1000);
    assert!((300..1000).contains(&kept), "{kept}");
    assert!(fs::metadata(&path).expect("there").len() <= 10 * MIB);
    assert!(rig.tier.close(LIMIT));
    // Without a size it stays as it is.
    let mut as_it_is = options(IoChoice::Auto, &[(&path, 0)]);
    as_it_is.shards[0].bytes = None;
    let mut rig = Rig::open(as_it_is, &place.pool).expect("opens");
    assert_eq!(place.count(&mut rig, 1000), kept);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_file_that_was_cut_loses_its_end_only_and_says_so() {
    let place = Place::new();
    let path = place.path("shard");
    place.fill(&[(&path, 16 * MIB)], 1000);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("opens");
    file.set_len(10 * MIB).expect("cut");
    let mut options = options(IoChoice::Auto, &[(&path, 0)]);
    options.shards[0].bytes = None;
    let mut rig = Rig::open(options, &place.pool).expect("opens");
    let notes = &rig.report.shards[0].notes;
    assert!(
        notes.iter().any(|note| note.contains("was cut")),
        "{notes:?}"
    );
    let kept = place.count(&mut rig, 1000);
    assert!((300..1000).contains(&kept), "{kept}");
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_new_shard_needs_a_size_and_enough_of_it() {
    let place = Place::new();
    let path = place.path("shard");
    let mut without = options(IoChoice::Auto, &[(&path, 0)]);
    without.shards[0].bytes = None;
    let error = place.error(without);
    assert!(matches!(error, OpenError::SizeMissing { .. }), "{error}");
    let error = place.error(options(IoChoice::Auto, &[(&path, MIB)]));
    let OpenError::TooSmall { least, .. } = error else {
        panic!("{error}");
    };
    assert!(!path.exists(), "nothing was made");
    place.fill(&[(&path, least)], 3);
}

#[test]
fn what_a_crash_leaves_while_a_shard_is_made_is_no_shard_and_no_obstacle() {
    let place = Place::new();
    let path = place.path("shard");
    fs::write(place.path(".shard.pegaflow-new"), b"PEGASSD half").expect("written");
    fs::write(&path, b"").expect("an empty file holds nothing");
    place.fill(&[(&path, 16 * MIB)], 3);
    assert!(!place.path(".shard.pegaflow-new").exists());
    let mut rig = place.open(&[(&path, 16 * MIB)]).expect("opens");
    assert_eq!(place.count(&mut rig, 3), 3);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn too_many_shards_and_too_long_names_are_refused() {
    let place = Place::new();
    let shards: Vec<ShardSpec> = (0..=Options::MAX_SHARDS)
        .map(|index| ShardSpec {
            path: place.path(&index.to_string()),
            bytes: Some(16 * MIB),
        })
        .collect();
    let error = place.error(Options::new("test", shards));
    assert!(matches!(error, OpenError::TooManyShards { .. }), "{error}");
    let error = place.error(Options::new("n".repeat(65), Vec::new()));
    assert!(matches!(error, OpenError::NodeName { .. }), "{error}");
}

#[test]
fn looking_from_outside_finds_what_is_there_and_what_is_damaged() {
    let place = Place::new();
    let path = place.path("shard");
    place.fill(&[(&path, 16 * MIB)], 200);
    let view = ShardView::open(&path).expect("opens");
    let layout = view.layout();
    assert_eq!((layout.node.as_str(), layout.used_by), ("test", None));
    assert_eq!(layout.file_bytes, layout.expected_bytes);
    let fill = view.fill().expect("reads");
    assert_eq!(
        (fill.blocks, fill.pages, fill.page_bytes),
        (200, 200, 2_000_000)
    );
    assert_eq!((fill.broken_blocks, fill.bad_chunks), (0, 0));
    let good = view.verify(|_, _| ()).expect("reads");
    assert_eq!((good.good_pages, good.bad_pages.len()), (200, 0));
    let content = bytes_for(77, 0, 0, 10_000);
    let mut file = fs::read(&path).expect("read");
    let mut windows = file.windows(content.len()).step_by(4096);
    let start = windows.position(|window| window == content).expect("there") * 4096;
    file[start + 9_999] ^= 0x10;
    fs::write(&path, file).expect("written");
    let bad = ShardView::open(&path)
        .expect("opens")
        .verify(|_, _| ())
        .expect("reads");
    assert_eq!((bad.good_pages, bad.bad_pages.len()), (199, 1));
    assert_eq!(bad.bad_pages[0].hash, key(77).hash);
    assert_eq!(bad.bad_pages[0].file_offset, start as u64);
    assert!(ShardView::open(&place.path("nothing")).is_err());
}

#[test]
fn the_pools_lock_is_the_rings_until_no_drive_can_touch_the_memory() {
    let place = Place::new();
    let (shard, name) = (place.path("a"), place.path("lock"));
    let lock = |file: &File| flock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let file = File::create(&name).expect("a file");
    assert!(lock(&file));
    let memory = place.pool.memory().locked_by(Arc::new(file));
    let options = options(IoChoice::Uring, &[(&shard, 64 * MIB)]);
    let (tier, _) = Tier::open(options, memory, || {}).expect("opens");
    // As after a kill, no descriptor of the file is open any more.
    let next = File::open(&name).expect("the file");
    assert!(!lock(&next), "the ring may still touch the memory");
    assert!(tier.close(LIMIT));
    assert!(lock(&next), "the ring is gone");
}
