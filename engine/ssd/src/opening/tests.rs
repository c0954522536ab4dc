use std::collections::BTreeSet;
use std::fs;

use rustix::fs::{FlockOperation, flock};

use super::*;
use crate::block::{BlockKey, NO_CHECKSUM, PageRef};
use crate::options::ShardSpec;
use crate::outcome::{Completion, Outcome};
use crate::stats::{ShardFault, ShardHealth};

const BYTES: u32 = 10_000;
const SLOTS: u64 = 64;
/// Long enough for a drive that answers, however busy the machine is.
const OPEN_WAIT: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(60);

/// Holds shards up before a step.
#[derive(Default)]
struct Gate {
    held: Mutex<BTreeSet<(PathBuf, u8)>>,
    changed: Condvar,
    /// Where a thread panics.
    fatal: Mutex<Option<(PathBuf, Step)>>,
}

impl Gate {
    fn hold(self: &Arc<Self>, path: &Path, step: Step) {
        self.lock().insert((path.to_owned(), step as u8));
    }

    fn release_one(&self, path: &Path, step: Step) {
        self.lock().remove(&(path.to_owned(), step as u8));
        self.changed.notify_all();
    }

    fn release(&self) {
        self.lock().clear();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<(PathBuf, u8)>> {
        self.held.lock().expect("no test panics with it")
    }

    fn before(self: &Arc<Self>) -> Before {
        let gate = Arc::clone(self);
        Arc::new(move |step, path| {
            let place = (path.to_owned(), step as u8);
            let held = gate.lock();
            let waited = gate
                .changed
                .wait_while(held, |held| held.contains(&place))
                .expect("no test panics with it");
            drop(waited);
            let fatal = gate.fatal.lock().expect("no thread panics with it").clone();
            assert!(fatal != Some((path.to_owned(), step)), "as the test wants");
        })
    }
}

struct Place {
    folder: tempfile::TempDir,
    gate: Arc<Gate>,
}

/// An open tier, and its pool.
struct Rig {
    tier: Tier,
    report: OpenReport,
    pool: PoolMemory,
}

fn key(block: u64) -> BlockKey {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey {
        scope: [4; 32],
        group: 0,
        hash,
    }
}

/// The bytes of a version of a block.
fn content(block: u64, version: u8) -> Vec<u8> {
    let byte = |at: u32| (at as u8) ^ (block as u8) ^ version.wrapping_mul(77);
    (0..BYTES).map(byte).collect()
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            gate: Arc::default(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, names: &[&str]) -> Result<Rig, OpenError> {
        let spec = |name: &&str| ShardSpec {
            path: self.path(name),
            bytes: Some(16 << 20),
        };
        let mut options = Options::new("test", names.iter().map(spec).collect());
        options.segment_bytes = 1 << 20;
        options.open_wait = OPEN_WAIT;
        let pool = PoolMemory::with_content(&vec![0; (SLOTS * 16_384) as usize]);
        let (tier, report) = open(options, pool.clone(), Arc::new(|| ()), self.gate.before())?;
        Ok(Rig { tier, report, pool })
    }

    fn error(&self, names: &[&str]) -> OpenError {
        match self.open(names) {
            Ok(_) => panic!("it opens"),
            Err(error) => error,
        }
    }

    /// Makes shards with blocks.
    fn fill(&self, names: &[&str], blocks: std::ops::Range<u64>) {
        let mut rig = self.open(names).expect("opens");
        for block in blocks {
            rig.write(block, 0);
        }
        assert!(rig.tier.close(LIMIT));
    }
}

impl Rig {
    fn page(block: u64) -> PageRef {
        PageRef {
            offset: block % SLOTS * 16_384,
            bytes: BYTES,
            checksum: NO_CHECKSUM,
        }
    }

    fn wait(&mut self) -> Completion {
        let mut out = Vec::new();
        let started = Instant::now();
        while out.is_empty() {
            assert!(started.elapsed() < LIMIT, "it does not end");
            self.tier.poll(Instant::now(), &mut out);
            std::thread::yield_now();
        }
        out.remove(0)
    }

    fn write(&mut self, block: u64, version: u8) {
        let page = Self::page(block);
        self.pool.area().fill(page.offset, &content(block, version));
        let taken = self.tier.write(Instant::now(), block, &key(block), &[page]);
        taken.expect("taken");
        assert_eq!(self.wait().outcome, Outcome::Written);
    }

    /// Which version of a block is there.
    fn read(&mut self, block: u64) -> Option<u8> {
        self.tier.lookup(&key(block))?;
        let page = Self::page(block);
        let taken = self.tier.read(Instant::now(), block, &key(block), &[page]);
        taken.expect("taken");
        assert_eq!(self.wait().outcome, Outcome::Read);
        let got = self.pool.area().content(page.offset, BYTES);
        let version = (0..2).find(|version| got == content(block, *version));
        Some(version.expect("bytes that were written"))
    }

    fn there(&mut self, blocks: std::ops::Range<u64>) -> Vec<u64> {
        blocks.filter(|block| self.read(*block).is_some()).collect()
    }

    fn health(&self, shard: usize) -> ShardHealth {
        self.tier.stats()[shard].health.clone()
    }

    /// Waits until a shard's state is another one.
    fn becomes(&mut self, shard: usize, wanted: impl Fn(&ShardHealth) -> bool) {
        let started = Instant::now();
        while !wanted(&self.health(shard)) {
            assert!(started.elapsed() < LIMIT, "{:?}", self.health(shard));
            self.tier.poll(Instant::now(), &mut Vec::new());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn is_opening(health: &ShardHealth) -> bool {
    *health == ShardHealth::Degraded(ShardFault::Opening)
}

fn is_healthy(health: &ShardHealth) -> bool {
    *health == ShardHealth::Healthy
}

/// `b` is held up at some step; `a` serves meanwhile.
fn held_up_at(step: Step) {
    let place = Place::new();
    place.fill(&["a", "b"], 0..40);
    let mut rig = place.open(&["a"]).expect("opens");
    let on_a = rig.there(0..40);
    assert!(rig.tier.close(LIMIT));
    let on_b: Vec<u64> = (0..40).filter(|block| !on_a.contains(block)).collect();
    assert!(on_a.len() > 5 && on_b.len() > 5, "{on_a:?}");

    place.gate.hold(&place.path("b"), step);
    let mut rig = place.open(&["b", "a"]).expect("a is there");
    assert_eq!(rig.report.late, [place.path("b")]);
    assert_eq!(rig.report.shards.len(), 1);
    assert!(is_opening(&rig.health(0)) && is_healthy(&rig.health(1)));
    assert_eq!(rig.tier.stats()[0].path, place.path("b"));
    assert_eq!(rig.there(0..40), on_a);
    // Saved again meanwhile, and withdrawn meanwhile.
    let (again, gone, both) = (on_b[0], on_b[1], on_b[2]);
    rig.write(again, 1);
    rig.tier.remove(&key(gone));
    rig.write(both, 1);
    rig.tier.remove(&key(both));
    rig.write(100, 0);
    assert_eq!(rig.tier.lookup(&key(100)).map(|info| info.shard), Some(1));

    place.gate.release();
    rig.becomes(0, is_healthy);
    let report = rig.tier.joined().expect("it is told");
    assert_eq!(report.path, place.path("b"));
    assert_eq!(report.blocks as usize, on_b.len());
    assert!(rig.tier.joined().is_none());
    assert_eq!(rig.tier.stats()[0].degradations, 1, "it was out of order");
    let withdrawn = [gone, both];
    for block in 0..40 {
        let wanted = match block {
            block if withdrawn.contains(&block) => None,
            block if block == again => Some(1),
            _ => Some(0),
        };
        assert_eq!(rig.read(block), wanted, "{block}");
    }
    // The late shard takes part in everything.
    let before = rig.tier.stats()[0].page_bytes_written;
    for block in 200..230 {
        rig.write(block, 0);
    }
    assert!(rig.tier.stats()[0].page_bytes_written > before);
    assert_eq!(rig.there(200..230).len(), 30);
    let other = on_b[3];
    rig.tier.remove(&key(other));
    assert_eq!(rig.read(other), None);
    assert!(rig.tier.close(LIMIT));

    let mut rig = place.open(&["a", "b"]).expect("opens");
    assert_eq!((rig.report.late.len(), rig.report.missing_shards), (0, 0));
    assert_eq!(rig.read(again), Some(1), "the newest counts");
    assert_eq!(rig.there(200..230).len(), 30);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_shard_that_is_late_to_look_at_joins_and_contradicts_nothing_that_happened_meanwhile() {
    held_up_at(Step::Look);
}

#[test]
fn a_shard_that_is_late_to_resize_joins_and_contradicts_nothing_that_happened_meanwhile() {
    held_up_at(Step::Prepare);
}

#[test]
fn a_shard_that_is_late_to_read_joins_and_contradicts_nothing_that_happened_meanwhile() {
    held_up_at(Step::Tables);
}

#[test]
fn a_late_file_that_cannot_be_used_is_left_alone_and_its_state_says_why() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    let copy = fs::read(place.path("a")).expect("read");
    for wrong in [&b"something else"[..], &copy] {
        fs::write(place.path("c"), wrong).expect("written");
        place.gate.hold(&place.path("c"), Step::Look);
        let mut rig = place.open(&["c", "a", "b"]).expect("the others are there");
        assert!(is_opening(&rig.health(0)));
        place.gate.release();
        let name = place.path("c").display().to_string();
        rig.becomes(0, |health| match health {
            ShardHealth::Degraded(ShardFault::Unusable(why)) => why.contains(&name),
            _ => false,
        });
        assert!(fs::read(place.path("c")).expect("read") == wrong, "changed");
        assert_eq!(rig.there(0..4).len(), 4);
        assert!(rig.tier.close(LIMIT));
    }
}

#[test]
fn a_late_shard_that_another_process_uses_joins_when_that_lets_go_of_it() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    let other = fs::File::open(place.path("b")).expect("opens");
    flock(&other, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
    let mut rig = place.open(&["a", "b"]).expect("a is there");
    rig.becomes(1, |health| {
        *health == ShardHealth::Degraded(ShardFault::InUse)
    });
    // Longer than one waits for that is in time.
    std::thread::sleep(LOCK_WAIT);
    rig.tier.poll(Instant::now(), &mut Vec::new());
    assert_eq!(rig.health(1), ShardHealth::Degraded(ShardFault::InUse));
    drop(other);
    rig.becomes(1, is_healthy);
    assert_eq!(rig.there(0..4).len(), 4);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_new_shard_waits_for_a_late_one_that_says_of_which_set_it_is() {
    let place = Place::new();
    place.fill(&["a"], 0..4);
    place.gate.hold(&place.path("a"), Step::Look);
    let mut rig = place.open(&["new", "a"]).expect("opens without any");
    assert!(is_opening(&rig.health(0)) && is_opening(&rig.health(1)));
    let page = Rig::page(9);
    assert!(rig.tier.write(Instant::now(), 9, &key(9), &[page]).is_err());
    assert!(!place.path("new").exists());
    place.gate.release();
    rig.becomes(0, is_healthy);
    rig.becomes(1, is_healthy);
    assert_eq!(rig.there(0..4).len(), 4);
    assert!(rig.tier.close(LIMIT));
    let rig = place.open(&["a", "new"]).expect("they are one set");
    assert_eq!((rig.report.late.len(), rig.report.missing_shards), (0, 0));
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_new_shard_does_not_wait_for_a_late_one_that_cannot_say_of_which_set_it_is() {
    let place = Place::new();
    fs::write(place.path("b"), b"something else").expect("written");
    place.gate.hold(&place.path("b"), Step::Look);
    place.gate.hold(&place.path("c"), Step::Look);
    let mut rig = place.open(&["new", "b", "c"]).expect("opens without any");
    assert!((0..3).all(|shard| is_opening(&rig.health(shard))));
    place.gate.release_one(&place.path("b"), Step::Look);
    let unusable = |health: &ShardHealth, wanted: &[String]| match health {
        ShardHealth::Degraded(ShardFault::Unusable(why)) => {
            wanted.iter().all(|part| why.contains(part))
        }
        _ => false,
    };
    let name = |name: &str| place.path(name).display().to_string();
    rig.becomes(1, |health| unusable(health, &[name("b")]));
    // The third one may say it still.
    assert!(is_opening(&rig.health(0)));
    place.gate.release();
    rig.becomes(0, |health| {
        unusable(health, &[name("new"), name("b"), "not made".to_owned()])
    });
    rig.becomes(2, |health| unusable(health, &[name("c"), name("b")]));
    assert!(!place.path("new").exists() && !place.path("c").exists());
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_late_shard_takes_its_part_of_what_is_written_and_no_more() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    place.gate.hold(&place.path("b"), Step::Look);
    let mut rig = place.open(&["a", "b"]).expect("a is there");
    for block in 100..130 {
        rig.write(block, 0);
    }
    place.gate.release();
    rig.becomes(1, is_healthy);
    let on = |rig: &Rig, shard: u16| {
        let places = (200..220).filter_map(|block| rig.tier.lookup(&key(block)));
        places.filter(|info| info.shard == shard).count()
    };
    for block in 200..220 {
        rig.write(block, 0);
    }
    assert_eq!([0, 1].map(|shard| on(&rig, shard)), [10, 10]);
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_panic_while_a_late_shard_joins_is_told_as_its_state() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    let fatal = (place.path("b"), Step::Join);
    *place.gate.fatal.lock().expect("no thread panics with it") = Some(fatal);
    place.gate.hold(&place.path("b"), Step::Look);
    let mut rig = place.open(&["a", "b"]).expect("a is there");
    place.gate.release();
    rig.becomes(1, |health| match health {
        ShardHealth::Degraded(ShardFault::Unusable(why)) => why.contains("panicked"),
        _ => false,
    });
    assert!(rig.tier.close(LIMIT));
}

#[test]
fn a_file_that_cannot_be_used_ends_the_start_also_while_another_drive_does_not_answer() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    let before = fs::read(place.path("b")).expect("read");
    fs::write(place.path("c"), b"something else").expect("written");
    place.gate.hold(&place.path("b"), Step::Look);
    let error = place.error(&["a", "b", "c"]);
    assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
    // Nobody wants the late one any more.
    place.gate.release();
    let mut rig = place.open(&["a", "b"]).expect("nothing is locked");
    assert_eq!(rig.there(0..4).len(), 4);
    assert!(rig.tier.close(LIMIT));
    let after = fs::read(place.path("b")).expect("read");
    assert!(before == after, "it was only looked at");
}

#[test]
fn a_tier_that_closes_does_not_wait_for_a_late_shard_which_is_free_afterwards() {
    let place = Place::new();
    place.fill(&["a", "b"], 0..4);
    for step in [Step::Look, Step::Prepare, Step::Tables] {
        place.gate.hold(&place.path("b"), step);
        let rig = place.open(&["a", "b"]).expect("opens");
        assert!(rig.tier.close(LIMIT), "nothing is left undone");
        place.gate.release();
        let mut rig = place.open(&["a", "b"]).expect("nothing is locked");
        assert_eq!(rig.report.late.len(), 0);
        assert_eq!(rig.there(0..4).len(), 4);
        assert!(rig.tier.close(LIMIT));
    }
}
