//! Every named crash point of the daemon, passed for real: the daemon ends by SIGKILL there, the
//! next one starts over what is left, has every block whose save was answered, and no other byte.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;
use pegaflow::Status;
use pegaflow_engine::catalog::{Catalog, Geometry, MAX_NAMESPACES, OpenedCatalog};
use pegaflow_engine::fault::{CRASH_AT, CrashPoint};
use pegaflow_engine::pool::{OpenedPool, PoolFile};
use pegaflow_shm::node::text_field;
use pegaflow_tests::content::hashes;
use pegaflow_tests::daemon::{Config, Daemon};
use pegaflow_tests::worker::{Worker, WorkerSpec, first_blocks};
use pegaflow_tests::{SOON, eventually};

const POOL_BYTES: u64 = 4 << 20;
const EXTENT_BYTES: u64 = 1 << 20;
/// Pages of 4 KiB in the pool.
const PAGES: u64 = POOL_BYTES / 4096;
/// Blocks of one save.
const BATCH: usize = 64;
/// Requests of a kind that are tried until the daemon dies.
const TRIES: u64 = 8;

/// What brings the daemon to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Starting over a pool with blocks.
    Start,
    /// Starting over a pool with blocks that is thrown away.
    FreshStart,
    /// Starting over what a crash between two shards of a block left.
    SecondCrash,
    /// A namespace that is new.
    NewNamespace,
    /// A namespace that is new when the table is full.
    FullTable,
    /// Saving.
    Save,
    /// Saving a block of two shards.
    SavePair,
    /// Querying and loading.
    Load,
    /// Saving into a full pool.
    Evict,
    /// Saving pages of another size into a full pool.
    HandOver,
    /// SIGTERM.
    Stop,
}

fn way(point: CrashPoint) -> Way {
    match point {
        CrashPoint::Locked
        | CrashPoint::NodeFileMade
        | CrashPoint::BlockAdopted
        | CrashPoint::BlocksAdopted
        | CrashPoint::IndexMade
        | CrashPoint::BeforeSocket => Way::Start,
        CrashPoint::PoolSized
        | CrashPoint::PoolRangeFilled
        | CrashPoint::PoolMade
        | CrashPoint::CatalogHeaderless => Way::FreshStart,
        CrashPoint::RecordDiscarded => Way::SecondCrash,
        CrashPoint::RowHalfWritten | CrashPoint::NamespaceAdded => Way::NewNamespace,
        CrashPoint::NamespaceRemoved => Way::FullTable,
        CrashPoint::PageOffered
        | CrashPoint::ShardCopied
        | CrashPoint::RecordHalfWritten
        | CrashPoint::BlockRecorded
        | CrashPoint::BlockSealed
        | CrashPoint::ExtentReserved
        | CrashPoint::ExtentOpened => Way::Save,
        CrashPoint::ShardRecorded => Way::SavePair,
        CrashPoint::LeaseGranted | CrashPoint::LoadStarted | CrashPoint::LoadCopied => Way::Load,
        CrashPoint::BlockUnindexed | CrashPoint::RecordCleared => Way::Evict,
        CrashPoint::ExtentDrained | CrashPoint::ExtentRowEmptied => Way::HandOver,
        CrashPoint::Drained | CrashPoint::LaneStopped | CrashPoint::IndexRemoved => Way::Stop,
    }
}

/// Which pass of the point is the last; later ones than the first where there are several.
fn passes(point: CrashPoint) -> u64 {
    match way(point) {
        Way::Save => match point {
            CrashPoint::ExtentReserved | CrashPoint::ExtentOpened => 1,
            _ => BATCH as u64 + 7,
        },
        Way::SavePair | Way::Evict => 5,
        Way::Start if point == CrashPoint::BlockAdopted => 11,
        _ => 1,
    }
}

/// An engine of one rank, or one of the two of a pair.
fn single() -> WorkerSpec {
    WorkerSpec::default().instance("single").salt("single")
}

fn pair(rank: u32) -> WorkerSpec {
    WorkerSpec::default()
        .instance("pair")
        .salt("pair")
        .rank(rank, 2)
}

/// Pages of a whole extent.
fn large() -> WorkerSpec {
    WorkerSpec {
        half_bytes: EXTENT_BYTES as usize / 4,
        blocks: 2,
        ..WorkerSpec::default().instance("large").salt("large")
    }
}

/// One daemon, and what it has said about its blocks.
struct Case {
    point: CrashPoint,
    daemon: Daemon,
    /// Numbers of the hashes whose save was answered, of each kind of engine; blocks that may have
    /// been evicted since are not in it.
    singles: BTreeSet<u64>,
    pairs: BTreeSet<u64>,
    /// Numbers of the hashes that were ever offered.
    offered: u64,
}

impl Case {
    fn new(point: CrashPoint) -> Case {
        let config = Config {
            pool: POOL_BYTES.to_string(),
            extent: EXTENT_BYTES.to_string(),
            arguments: ["--pool", "adopt", "--copy-threads", "1"]
                .map(String::from)
                .to_vec(),
            ..Config::default()
        };
        Case {
            point,
            daemon: Daemon::start_with(config),
            singles: BTreeSet::new(),
            pairs: BTreeSet::new(),
            offered: 0,
        }
    }

    fn open(&self, spec: WorkerSpec) -> Option<Worker> {
        let worker = Worker::open(self.daemon.options(), spec).ok()?;
        let ready = worker.client.wait_ready(worker.registration, SOON);
        ready.is_ok().then_some(worker)
    }

    /// Both ranks of the pair.
    fn open_pair(&self) -> Option<[Worker; 2]> {
        let first = Worker::open(self.daemon.options(), pair(0)).ok()?;
        let second = self.open(pair(1))?;
        let ready = first.client.wait_ready(first.registration, SOON);
        ready.is_ok().then_some([first, second])
    }

    /// Saves `count` new blocks of one shard; what was answered with OK must survive.
    fn save(&mut self, worker: &Worker, count: usize) -> bool {
        let first = self.offered;
        self.offered += count as u64;
        let saved = save(worker, &hashes(first, count));
        if saved {
            self.singles.extend(first..self.offered);
        }
        saved
    }

    fn save_pair(&mut self, workers: &[Worker; 2], count: usize) -> bool {
        let first = self.offered;
        self.offered += count as u64;
        let names = hashes(first, count);
        let saved = save(&workers[0], &names) && save(&workers[1], &names);
        if saved {
            self.pairs.extend(first..self.offered);
        }
        saved
    }

    /// Blocks of both kinds, before anything is armed.
    fn fill(&mut self) {
        let worker = self.open(single()).expect("an engine");
        assert!(self.save(&worker, 40) && self.save(&worker, 40));
        let workers = self.open_pair().expect("a pair");
        assert!(self.save_pair(&workers, 20));
        if matches!(way(self.point), Way::Evict | Way::HandOver) {
            while self.offered + 20 < PAGES {
                let rest = (PAGES - self.offered - 20) as usize;
                assert!(self.save(&worker, rest.min(BATCH)));
            }
        }
    }

    /// Starts the daemon with the point armed; it may be dead before it serves.
    fn arm(&mut self) {
        let armed = format!("{}:{}", self.point.name(), passes(self.point));
        self.daemon.set_environment(CRASH_AT, Some(&armed));
        self.daemon.spawn();
        assert!(
            eventually(|| self.daemon.is_serving() || !self.daemon.is_alive()),
            "{}",
            self.daemon.log()
        );
    }

    /// Works until the daemon is dead.
    fn drive(&mut self) {
        match way(self.point) {
            Way::Start | Way::FreshStart | Way::SecondCrash => {}
            Way::NewNamespace | Way::FullTable => {
                drop(self.open(WorkerSpec::default().instance("new").salt("new")));
            }
            Way::Save => {
                self.drive_saves();
            }
            Way::SavePair => {
                if let Some(workers) = self.open_pair() {
                    (0..TRIES).all(|_| self.save_pair(&workers, 2));
                }
            }
            Way::Load => {
                let names = hashes(0, 40);
                if let Some(worker) = self.open(single()) {
                    (0..TRIES).all(|key| query_and_load(&worker, key, &names));
                }
            }
            Way::Evict => self.drive_evictions(),
            Way::HandOver => self.drive_hand_over(),
            Way::Stop => self.daemon.signal(Signal::SIGTERM),
        }
    }

    fn drive_saves(&mut self) {
        let odd = WorkerSpec {
            half_bytes: 2048,
            ..WorkerSpec::default().instance("odd").salt("odd")
        };
        // Pages of a size that nobody else has open an extent.
        if let Some(worker) = self.open(odd) {
            save(&worker, &hashes(0, 1));
        }
        if let Some(worker) = self.open(single()) {
            (0..TRIES).all(|_| self.save(&worker, BATCH));
        }
    }

    fn drive_evictions(&mut self) {
        let Some(worker) = self.open(single()) else {
            return;
        };
        for _ in 0..TRIES {
            // Adoption and use order what leaves first: of the old blocks any may be the victim.
            self.singles.clear();
            self.pairs.clear();
            if !self.save(&worker, BATCH) {
                return;
            }
        }
    }

    fn drive_hand_over(&mut self) {
        if let Some(worker) = self.open(large()) {
            // Whole extents leave: any old block may be in one.
            self.singles.clear();
            self.pairs.clear();
            (0..TRIES).all(|number| save(&worker, &hashes(number, 1)));
        }
    }

    fn expect_death(&mut self) {
        let status = self.daemon.wait();
        assert_eq!(
            status.signal(),
            Some(Signal::SIGKILL as i32),
            "the point {} was not reached: {status}\n{}",
            self.point.name(),
            self.daemon.log()
        );
    }

    /// What the next daemon must have, and must not have.
    fn verify(&mut self) {
        self.daemon.set_environment(CRASH_AT, None);
        self.daemon.set_argument("--pool", "adopt");
        self.daemon.launch();
        let point = self.point.name();
        let worker = self.open(single()).expect("an engine");
        let workers = self.open_pair().expect("a pair");
        let mut key = 100;
        for number in 0..self.offered {
            let name = hashes(number, 1);
            key += 1;
            let hit = worker.fetch(key, &name) == 1;
            assert!(
                hit || !self.singles.contains(&number),
                "{point}: lost block {number}"
            );
            let found = workers[0].query(key, &name);
            let hit = found.count == 1;
            assert!(
                hit || !self.pairs.contains(&number),
                "{point}: lost pair {number}"
            );
            if hit {
                workers[0].load_and_verify(found.lease, &name);
                workers[1].load_and_verify(found.lease, &name);
            }
        }
        assert!(self.save(&worker, 10), "{point}: the next daemon works");
        let known = ["pool", "catalog", "lock", "node", "sessions", "index-"];
        for entry in std::fs::read_dir(self.daemon.shm()).expect("the node's folder") {
            let name = entry.expect("an entry").file_name();
            let name = name.to_string_lossy();
            let is_known = known.iter().any(|known| name.starts_with(known));
            assert!(
                is_known && name != "node.new",
                "{point}: left behind: {name}"
            );
        }
    }

    /// Fills the namespace table of the stopped daemon with namespaces that nobody uses.
    fn fill_table(&self) {
        let dir = self.daemon.shm();
        let opened = PoolFile::open(&dir.join("pool"), POOL_BYTES).expect("no system error");
        let OpenedPool::Ready(pool) = opened else {
            panic!("the pool of the stopped daemon");
        };
        let geometry = Geometry {
            pool_bytes: POOL_BYTES,
            extent_bytes: EXTENT_BYTES,
            pool: pool.identity(),
            node: text_field(self.daemon.node()),
        };
        let opened = Catalog::open(&dir.join("catalog"), &geometry, [7; 16]);
        let Ok(OpenedCatalog::Ready(mut catalog)) = opened else {
            panic!("the catalog of the stopped daemon");
        };
        let used = catalog.namespaces().count() as u32;
        for number in used..MAX_NAMESPACES {
            let mut digest = [0xEE; 32];
            digest[..4].copy_from_slice(&number.to_le_bytes());
            catalog.add_namespace(0, 1, digest).expect("room");
        }
    }
}

/// Saves blocks; true when all of them were answered as sealed, as far as this rank goes.
fn save(worker: &Worker, names: &[pegaflow::BlockHash]) -> bool {
    let blocks = first_blocks(names.len());
    for (block, hash) in blocks.iter().zip(names) {
        worker.compute(0, *block, hash);
    }
    let request = worker.client.save(worker.registration, 0, names, &blocks);
    let done = request.and_then(|request| worker.client.wait(request, SOON));
    done.is_ok_and(|done| done.status == Status::Ok)
}

/// False when the daemon has died meanwhile.
fn query_and_load(worker: &Worker, key: u64, names: &[pegaflow::BlockHash]) -> bool {
    let request = worker.client.query(worker.registration, 0, key, names, 0);
    let Ok(found) = request.and_then(|request| worker.client.wait(request, SOON)) else {
        return false;
    };
    let blocks = first_blocks(found.count as usize);
    let request = worker
        .client
        .load(worker.registration, 0, found.lease, 0, &blocks);
    let done = request.and_then(|request| worker.client.wait(request, SOON));
    done.is_ok_and(|done| done.status == Status::Ok)
}

fn crash_at(point: CrashPoint) {
    let mut case = Case::new(point);
    case.fill();
    if way(point) == Way::SecondCrash {
        case.daemon.stop();
        case.point = CrashPoint::ShardRecorded;
        case.arm();
        case.drive();
        case.expect_death();
        case.point = point;
    } else if way(point) == Way::FullTable {
        case.daemon.stop();
        case.fill_table();
    } else {
        case.daemon.kill();
    }
    if way(point) == Way::FreshStart {
        case.daemon.set_argument("--pool", "fresh");
        case.singles.clear();
        case.pairs.clear();
    }
    case.arm();
    case.drive();
    case.expect_death();
    case.verify();
}

/// Crashes at all points that are reached in one of these ways.
#[track_caller]
fn crash_at_all(ways: &[Way]) {
    let points = CrashPoint::ALL
        .iter()
        .filter(|point| ways.contains(&way(**point)));
    let mut passed = 0;
    for point in points {
        eprintln!("crash point {}", point.name());
        crash_at(*point);
        passed += 1;
    }
    assert!(passed > 0, "no point is reached by {ways:?}");
}

#[test]
fn a_crash_while_starting_loses_nothing() {
    crash_at_all(&[Way::Start, Way::SecondCrash]);
}

#[test]
fn a_crash_while_a_fresh_pool_is_made_leaves_a_node_that_starts() {
    crash_at_all(&[Way::FreshStart]);
}

#[test]
fn a_crash_while_a_namespace_comes_or_goes_loses_nothing() {
    crash_at_all(&[Way::NewNamespace, Way::FullTable]);
}

#[test]
fn a_crash_in_a_save_loses_no_sealed_block_and_shows_no_half_one() {
    crash_at_all(&[Way::Save, Way::SavePair]);
}

#[test]
fn a_crash_in_a_query_or_load_loses_nothing() {
    crash_at_all(&[Way::Load]);
}

#[test]
fn a_crash_while_blocks_leave_never_shows_their_successors_bytes() {
    crash_at_all(&[Way::Evict, Way::HandOver]);
}

#[test]
fn a_crash_while_stopping_loses_nothing() {
    crash_at_all(&[Way::Stop]);
}
