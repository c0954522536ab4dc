//! Every crash of short histories: whatever sequence of saves, failed copies, evictions, hand-overs
//! of extents and uses of a namespace row by another namespace, cut after each store to the catalog
//! and each write to a page, the next daemon adopts what was sealed before the cut and nothing with
//! a foreign byte; and so it does when it dies itself after each store of its adoption.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_shm::BlockHash;
use pegaflow_shm::index::EntryId;

use crate::cache::block::Shard;
use crate::cache::store::{Offer, ShardScope};
use crate::cache::{Cache, CacheOptions};
use crate::catalog::steps::{Step, Steps};
use crate::catalog::{Catalog, Geometry, OpenedCatalog};
use crate::isolation::{DomainRules, IsolationDomain};
use crate::policy::{AdmissionKind, PolicyKind};
use crate::pool::{Pool, PoolIdentity};

const EXTENT: u64 = 16 * 1024;
const EXTENTS: u64 = 2;
/// What page contents are told apart by.
const UNIT: u64 = 4096;
const BOOT: [u8; 16] = [1; 16];

/// Operations in a history; each history's proper beginnings are histories of their own.
const LONGEST: usize = 3;

/// One operation. Each saves blocks that no other did, so pages change hands all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A block of one shard is sealed.
    Single,
    /// A block of two shards is sealed.
    Double,
    /// One of two shards comes in, the other never.
    Half,
    /// A copy writes half a page and fails.
    Fail,
    /// A block of one large page: an extent is handed over.
    Large,
    /// The blocks of one namespace leave, and another takes its row.
    OtherNamespace,
}

const OPERATIONS: [Operation; 6] = [
    Operation::Single,
    Operation::Double,
    Operation::Half,
    Operation::Fail,
    Operation::Large,
    Operation::OtherNamespace,
];

/// Namespace rows, in the order in which they are made.
const SINGLE: u32 = 0;
const DOUBLE: u32 = 1;
const LARGE: u32 = 2;

/// A block by the digest of its namespace and its number.
type Name = (u8, u8);

/// What lies in a unit of the pool; `None` is half-written or nothing.
type Content = Option<(Name, u16)>;

struct PageWrite {
    first_unit: usize,
    units: usize,
    content: Content,
}

fn geometry() -> Geometry {
    Geometry {
        pool_bytes: EXTENTS * EXTENT,
        extent_bytes: EXTENT,
        pool: PoolIdentity {
            inode: 1,
            device: 1,
            created_ns: 1,
        },
        node: [0; 64],
    }
}

fn cache_over(catalog: Catalog, dir: &Path) -> Cache {
    let options = CacheOptions {
        dir: dir.to_owned(),
        boot_id: BOOT,
        max_blocks: 64,
        policy: PolicyKind::Lru,
        admission: AdmissionKind::Off,
        incomplete_ttl: Duration::from_secs(3600),
        checksums: true,
        tier: None,
    };
    let pool = Pool::new(EXTENTS * EXTENT, EXTENT).expect("a pool");
    crate::cache::adopt::remove_indexes(dir).expect("ours");
    Cache::new(pool, catalog, options)
}

/// Digests are one byte repeated, hashes the number behind the digest's byte.
fn hash(name: Name) -> BlockHash {
    let mut hash = [name.1; 32];
    hash[0] = name.0;
    hash
}

/// The daemon that will be cut short.
struct Before {
    cache: Cache,
    steps: Arc<Steps>,
    writes: Vec<PageWrite>,
    next_number: u8,
    digests: [u8; 3],
}

impl Before {
    /// A pool with all but one page in use: five blocks of one shard, one of two.
    fn new(dir: &Path) -> Before {
        let path = dir.join("catalog");
        let catalog = Catalog::create(&path, &geometry(), BOOT).expect("room");
        let steps = catalog.steps();
        let mut cache = cache_over(catalog, dir);
        assert_eq!(
            cache
                .domain(&Arc::new(IsolationDomain::of_user(0)))
                .expect("a domain"),
            0
        );
        let mut before = Before {
            cache,
            steps,
            writes: Vec::new(),
            next_number: 0,
            digests: [10, 20, 30],
        };
        for (row, world_size) in [(SINGLE, 1), (DOUBLE, 2), (LARGE, 1)] {
            let digest = [before.digests[row as usize]; 32];
            let added = before
                .cache
                .catalog_mut()
                .add_namespace(0, world_size, digest);
            assert_eq!(added.expect("room"), row);
        }
        for _ in 0..5 {
            before.run(Operation::Single);
        }
        before.run(Operation::Double);
        before
    }

    fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Single => self.save(SINGLE, &[0], true),
            Operation::Double => self.save(DOUBLE, &[0, 1], true),
            Operation::Half => self.save(DOUBLE, &[0], true),
            Operation::Fail => self.save(SINGLE, &[0], false),
            Operation::Large => self.save(LARGE, &[0], true),
            Operation::OtherNamespace => self.replace_namespace(),
        }
    }

    fn save(&mut self, namespace: u32, ranks: &[u16], succeeds: bool) {
        self.next_number += 1;
        let name = (self.digests[namespace as usize], self.next_number);
        for rank in ranks {
            let scope = ShardScope {
                domain: 0,
                namespace,
                group: 0,
                shard: *rank,
                shards: if namespace == DOUBLE { 2 } else { 1 },
                page_bytes: if namespace == LARGE { EXTENT } else { UNIT } as u32,
                near: None,
            };
            let mut taken = None;
            self.cache
                .offer(&scope, &[hash(name)], |_, offer| match offer {
                    Offer::Copy { entry, page } => taken = Some((entry, page)),
                    // Half a block holds its page for good: a full pool may refuse another one.
                    other => assert_eq!(other, Offer::NoSpace),
                });
            let Some((entry, page)) = taken else { return };
            let units = (u64::from(scope.page_bytes) / UNIT) as usize;
            let first_unit = (page.offset() / UNIT) as usize;
            self.write(first_unit, units, None);
            if !succeeds {
                self.cache.shard_failed(&scope, entry);
                return;
            }
            self.write(first_unit, units, Some((name, *rank)));
            self.cache.shard_copied(&scope, entry, 5);
        }
    }

    fn write(&mut self, first_unit: usize, units: usize, content: Content) {
        self.steps.note(Step::Elsewhere(self.writes.len()));
        self.writes.push(PageWrite {
            first_unit,
            units,
            content,
        });
    }

    fn replace_namespace(&mut self) {
        for entry in 0..64 {
            let key = self.cache.domains[0].index.writer.key(EntryId(entry));
            if key.is_some_and(|key| key.namespace == SINGLE) {
                self.cache.evict(0, EntryId(entry));
            }
        }
        assert_eq!(
            self.cache.unused_namespace(|row| row != SINGLE),
            Some(SINGLE)
        );
        let catalog = self.cache.catalog_mut();
        catalog.remove_namespace(SINGLE).expect("there");
        self.digests[SINGLE as usize] += 1;
        let digest = [self.digests[SINGLE as usize]; 32];
        let row = catalog.add_namespace(0, 1, digest);
        assert_eq!(row.expect("room"), SINGLE, "the row is used again");
    }
}

/// The blocks that readers see, each of whose shards holds its bytes.
fn sealed(cache: &Cache, memory: &[Content]) -> BTreeSet<Name> {
    let mut names = BTreeSet::new();
    let Some(home) = cache.domains.first() else {
        return names;
    };
    for entry in (0..64).map(EntryId) {
        let block = home.block(entry);
        let Some(key) = home.index.writer.key(entry).filter(|_| block.sealed) else {
            continue;
        };
        let namespace = cache.catalog().namespace_in(key.namespace).expect("there");
        let name = (namespace.digest[0], key.hash()[1]);
        assert_eq!(key.hash(), hash(name), "a hash of its namespace");
        // In these namespaces every rank holds a shard.
        let shards = u32::from(block.shards);
        assert_eq!(shards, namespace.world_size, "{name:?} has all its shards");
        for shard in 0..block.shards {
            let Shard::In(page) = block.shard(shard, &home.runs) else {
                panic!("{name:?} is sealed without shard {shard}");
            };
            let bytes = cache.pool().page_bytes_of(page).expect("allocated");
            let first = (page.offset() / UNIT) as usize;
            for content in &memory[first..first + (u64::from(bytes) / UNIT) as usize] {
                assert_eq!(*content, Some((name, shard)), "foreign bytes in {name:?}");
            }
        }
        assert!(names.insert(name));
    }
    names
}

/// Starts a daemon over an image of the catalog and says what it has. `dies` also cuts its adoption
/// after each store and starts another one each time.
fn adopt(dir: &Path, image: &[u8], memory: &[Content], dies: bool) -> BTreeSet<Name> {
    let path = dir.join("catalog");
    fs::write(&path, image).expect("room");
    let opened = Catalog::open(&path, &geometry(), BOOT).expect("no system error");
    let OpenedCatalog::Ready(catalog) = opened else {
        panic!("the header does not change");
    };
    let steps = catalog.steps();
    steps.record();
    let report = catalog.adopt().expect("readable");
    let mut cache = cache_over(catalog, dir);
    cache
        .adopt_pages(report.pages, &DomainRules::any_user())
        .expect("no system error");
    let found = sealed(&cache, memory);
    let steps = steps.take();
    drop(cache);
    if dies {
        let last = fs::read(&path).expect("ours");
        let mut image = image.to_vec();
        for step in &steps {
            step.apply(&mut image);
            let again = adopt(dir, &image, memory, false);
            assert_eq!(again, found, "adopted otherwise after {step:?}");
        }
        assert_eq!(image, last, "every change is a step");
    }
    found
}

/// Runs a history and cuts its last operation after each step.
fn crash_everywhere(dir: &Path, history: &[Operation]) -> usize {
    let (first, second) = (dir.join("before"), dir.join("after"));
    for dir in [&first, &second] {
        fs::create_dir_all(dir).expect("room");
    }
    let _ = fs::remove_file(first.join("catalog"));
    let (last, others) = history.split_last().expect("not empty");
    let mut before = Before::new(&first);
    for operation in others {
        before.run(*operation);
    }
    let mut memory = vec![None; (EXTENTS * EXTENT / UNIT) as usize];
    let write = |memory: &mut Vec<Content>, write: &PageWrite| {
        memory[write.first_unit..write.first_unit + write.units].fill(write.content);
    };
    for done in &before.writes {
        write(&mut memory, done);
    }
    let had = sealed(&before.cache, &memory);
    let mut image = fs::read(first.join("catalog")).expect("ours");
    before.steps.record();
    before.run(*last);
    let steps = before.steps.take();
    let after_memory = before
        .writes
        .iter()
        .fold(memory.clone(), |mut memory, done| {
            write(&mut memory, done);
            memory
        });
    let has = sealed(&before.cache, &after_memory);
    let dies = history.len() < LONGEST;
    for step in 0..=steps.len() {
        if let Some(step) = step.checked_sub(1).map(|at| &steps[at]) {
            step.apply(&mut image);
            if let Step::Elsewhere(number) = step {
                write(&mut memory, &before.writes[*number]);
            }
        }
        let found = adopt(&second, &image, &memory, dies);
        let context = || format!("{history:?} cut after {:?}", &steps[..step]);
        assert!(
            had.intersection(&has).all(|name| found.contains(name)),
            "lost a block that both states have: {}",
            context()
        );
        assert!(
            found
                .iter()
                .all(|name| had.contains(name) || has.contains(name)),
            "has a block of neither state: {}",
            context()
        );
        if step == 0 {
            assert_eq!(found, had, "{}", context());
        }
        if step == steps.len() {
            assert_eq!(found, has, "{}", context());
        }
    }
    assert_eq!(
        fs::read(first.join("catalog")).expect("ours"),
        image,
        "every change is a step"
    );
    steps.len()
}

#[test]
fn every_history_cut_after_any_store_is_adopted_as_it_was_before_or_after() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in /dev/shm");
    let mut histories: Vec<Vec<Operation>> = vec![Vec::new()];
    let mut cuts = 0;
    for _ in 0..LONGEST {
        histories = histories
            .iter()
            .flat_map(|begun| OPERATIONS.map(|next| [begun.as_slice(), &[next]].concat()))
            .collect();
        for history in &histories {
            cuts += crash_everywhere(dir.path(), history);
        }
    }
    assert!(cuts > 1000, "only {cuts} places to cut");
}
