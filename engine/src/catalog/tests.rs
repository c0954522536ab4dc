//! The catalog's guarantees: what was sealed comes back, what was not does not, garbage harms
//! nobody, and a `kill -9` at any moment is one of these.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::pool::PoolIdentity;

const EXTENT: u64 = 64 << 10;
const EXTENTS: u64 = 4;
const PAGE: u32 = 4096;
const BOOT: [u8; 16] = [9; 16];

fn geometry() -> Geometry {
    let pool = PoolIdentity {
        inode: 1,
        device: 2,
        created_ns: 3,
    };
    Geometry {
        pool_bytes: EXTENTS * EXTENT,
        extent_bytes: EXTENT,
        pool,
        node: pegaflow_shm::node::text_field("n1"),
    }
}

struct Fixture {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").expect("shared memory is writable");
        Self {
            path: directory.path().join("catalog"),
            _directory: directory,
        }
    }

    fn create(&self) -> Catalog {
        Catalog::create(&self.path, &geometry(), BOOT).expect("there is room")
    }

    /// A catalog with one namespace of two ranks and one prepared extent.
    fn prepared(&self) -> Catalog {
        let mut catalog = self.create();
        assert_eq!(catalog.add_namespace(1000, 2, [5; 32]).expect("room"), 0);
        catalog.prepare_extent(0, PAGE).expect("room");
        catalog
    }

    fn open(&self) -> OpenedCatalog {
        Catalog::open(&self.path, &geometry(), BOOT).expect("no system error")
    }

    fn reopen(&self) -> Catalog {
        match self.open() {
            OpenedCatalog::Ready(catalog) => catalog,
            OpenedCatalog::Discarded(reason) => panic!("discarded: {reason}"),
            OpenedCatalog::Missing => panic!("missing"),
        }
    }

    fn overwrite(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new()
            .write(true)
            .open(&self.path)
            .expect("ours");
        file.write_all_at(bytes, at).expect("writable");
    }

    fn allocated_bytes(&self) -> u64 {
        fs::metadata(&self.path).expect("there").blocks() * 512
    }
}

fn page(hash: u8, rank: u8) -> PageRecord {
    PageRecord {
        hash: [hash; 32],
        checksum: u64::from(hash) << 40,
        namespace: 0,
        group: 1,
        rank,
        shards: 2,
        generation: 7,
        page_bytes: PAGE,
    }
}

fn at(slot: u64) -> PageAddr {
    PageAddr::from_offset(slot * u64::from(PAGE))
}

fn adopted(catalog: &Catalog) -> AdoptReport {
    catalog.adopt().expect("readable")
}

#[test]
fn sealed_pages_come_back_after_the_daemon_is_gone() {
    let fixture = Fixture::new();
    let catalog = fixture.prepared();
    catalog.write_sealed(at(0), &page(1, 0)).expect("prepared");
    catalog.write_sealed(at(15), &page(1, 1)).expect("prepared");
    catalog.write_sealed(at(3), &page(2, 0)).expect("prepared");
    catalog.clear(at(3)).expect("a page");
    drop(catalog);
    let catalog = fixture.reopen();
    let report = adopted(&catalog);
    let expected = [(at(0), page(1, 0)), (at(15), page(1, 1))];
    assert_eq!(
        report.pages,
        expected.map(|(addr, page)| AdoptedPage { addr, page })
    );
    assert_eq!(report.discarded.total(), 0);
    let namespace = Namespace {
        slot: 0,
        domain_key: 1000,
        world_size: 2,
        digest: [5; 32],
    };
    assert_eq!(catalog.namespaces().collect::<Vec<_>>(), [namespace]);
}

/// The file as a kill after each step of `change` leaves it, from none to all.
fn crashes(
    fixture: &Fixture,
    catalog: &mut Catalog,
    change: impl FnOnce(&mut Catalog),
) -> Vec<Vec<u8>> {
    let mut image = fs::read(&fixture.path).expect("ours");
    catalog.steps().record();
    change(catalog);
    let mut images = vec![image.clone()];
    for step in catalog.steps().take() {
        step.apply(&mut image);
        images.push(image.clone());
    }
    assert_eq!(
        fs::read(&fixture.path).expect("ours"),
        image,
        "every change is a step"
    );
    images
}

#[test]
fn a_record_cut_short_at_any_store_is_ignored_and_a_complete_one_is_not() {
    for over_an_old_one in [false, true] {
        let fixture = Fixture::new();
        let mut catalog = fixture.prepared();
        if over_an_old_one {
            catalog.write_sealed(at(2), &page(1, 0)).expect("prepared");
        }
        let images = crashes(&fixture, &mut catalog, |catalog| {
            catalog.write_sealed(at(2), &page(2, 1)).expect("prepared");
        });
        drop(catalog);
        let last = images.len() - 1;
        assert_eq!(last, WORDS + 1);
        for (steps, image) in images.iter().enumerate() {
            fixture.overwrite(0, image);
            let report = adopted(&fixture.reopen());
            let hashes: Vec<u8> = report
                .pages
                .iter()
                .map(|found| found.page.hash[0])
                .collect();
            let expected: &[u8] = match steps {
                0 if over_an_old_one => &[1],
                steps if steps == last => &[2],
                _ => &[],
            };
            assert_eq!(
                hashes, expected,
                "{steps} stores over an old record: {over_an_old_one}"
            );
        }
    }
}

#[test]
fn a_namespace_row_cut_short_at_any_store_is_free() {
    let fixture = Fixture::new();
    let mut catalog = fixture.create();
    let images = crashes(&fixture, &mut catalog, |catalog| {
        catalog.add_namespace(1, 2, [3; 32]).expect("room");
    });
    drop(catalog);
    let last = images.len() - 1;
    for (steps, image) in images.iter().enumerate() {
        fixture.overwrite(0, image);
        let expected = usize::from(steps == last);
        assert_eq!(
            fixture.reopen().namespaces().count(),
            expected,
            "{steps} stores"
        );
    }
}

#[test]
fn a_record_of_a_namespace_that_gave_up_its_row_is_not_believed() {
    let fixture = Fixture::new();
    let mut catalog = fixture.prepared();
    catalog.write_sealed(at(0), &page(1, 0)).expect("prepared");
    catalog.remove_namespace(0).expect("there");
    drop(catalog);
    let mut catalog = fixture.reopen();
    assert_eq!(adopted(&catalog).discarded.unknown_namespace, 1);
    assert_eq!(
        adopted(&catalog),
        AdoptReport::default(),
        "what was thrown away stays away"
    );

    catalog.add_namespace(1000, 2, [5; 32]).expect("room");
    catalog.write_sealed(at(0), &page(1, 0)).expect("prepared");
    catalog.remove_namespace(0).expect("there");
    assert_eq!(
        catalog.add_namespace(1000, 2, [6; 32]).expect("room"),
        0,
        "the same row"
    );
    drop(catalog);
    let report = adopted(&fixture.reopen());
    assert_eq!((report.pages.len(), report.discarded.bad_checksum), (0, 1));
}

#[test]
fn of_two_records_of_one_shard_the_younger_stays() {
    let fixture = Fixture::new();
    let catalog = fixture.prepared();
    for (slot, generation) in [(0, 3), (1, 5), (2, 4)] {
        let page = PageRecord {
            generation,
            ..page(1, 0)
        };
        catalog.write_sealed(at(slot), &page).expect("prepared");
    }
    let report = adopted(&catalog);
    assert_eq!(report.discarded.duplicate, 2);
    assert_eq!(
        report
            .pages
            .iter()
            .map(|found| found.addr)
            .collect::<Vec<_>>(),
        [at(1)]
    );
    assert_eq!(adopted(&catalog).pages, report.pages);
}

#[test]
fn records_that_strayed_or_name_a_rank_too_many_are_thrown_away() {
    let fixture = Fixture::new();
    let catalog = fixture.prepared();
    catalog.write_sealed(at(0), &page(1, 2)).expect("prepared");
    catalog.write_sealed(at(1), &page(2, 0)).expect("prepared");
    drop(catalog);
    let area = Layout::new(&geometry()).expect("good").area(0);
    let mut record = [0; 64];
    let file = fs::File::open(&fixture.path).expect("ours");
    file.read_exact_at(&mut record, area + 64)
        .expect("allocated");
    fixture.overwrite(area + 5 * 64, &record);
    let report = adopted(&fixture.reopen());
    let expected = Discarded {
        bad_checksum: 1,
        bad_rank: 1,
        ..Discarded::default()
    };
    assert_eq!((report.pages.len(), report.discarded), (1, expected));
}

#[test]
fn memory_of_records_follows_the_extents_in_use() {
    let fixture = Fixture::new();
    let mut catalog = fixture.create();
    let empty = fixture.allocated_bytes();
    for extent in 0..EXTENTS as u32 {
        catalog.prepare_extent(extent, 512).expect("room");
    }
    assert_eq!(fixture.allocated_bytes(), empty + 4 * 8192);
    catalog.release_extent(1).expect("prepared");
    catalog.release_extent(1).expect("nothing to do");
    assert_eq!(fixture.allocated_bytes(), empty + 3 * 8192);
    // As if the daemon had died between emptying the row and giving the area back.
    catalog.store(Layout::extent_row(3), 0).expect("inside");
    drop(catalog);
    let mut catalog = fixture.reopen();
    catalog
        .retain_extents(|extent| extent == 2)
        .expect("no system error");
    assert_eq!(fixture.allocated_bytes(), empty + 8192);
    catalog.prepare_extent(3, 1024).expect("free");
    assert_eq!(adopted(&catalog), AdoptReport::default());
}

#[test]
fn an_extent_prepared_anew_has_no_records_of_its_past() {
    let fixture = Fixture::new();
    let mut catalog = fixture.prepared();
    catalog.write_sealed(at(0), &page(1, 0)).expect("prepared");
    // As if the daemon had died in the middle of giving the extent back.
    catalog.store(Layout::extent_row(0), 0).expect("inside");
    drop(catalog);
    catalog = fixture.reopen();
    catalog.prepare_extent(0, PAGE).expect("free");
    assert_eq!(adopted(&catalog), AdoptReport::default());
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let fixture = Fixture::new();
    let mut catalog = fixture.prepared();
    let wrong_size = PageRecord {
        page_bytes: 8192,
        ..page(1, 0)
    };
    assert!(matches!(
        catalog.write_sealed(at(0), &wrong_size),
        Err(CatalogError::PageSize {
            extent: 0,
            found_bytes: PAGE,
            wanted_bytes: 8192
        })
    ));
    let unknown = PageRecord {
        namespace: 1,
        ..page(1, 0)
    };
    assert!(matches!(
        catalog.write_sealed(at(0), &unknown),
        Err(CatalogError::UnknownNamespace { namespace: 1 })
    ));
    assert!(matches!(
        catalog.write_sealed(at(16), &page(1, 0)),
        Err(CatalogError::PageSize {
            extent: 1,
            found_bytes: 0,
            ..
        })
    ));
    for offset in [8, EXTENTS * EXTENT, u64::MAX] {
        let addr = PageAddr::from_offset(offset);
        assert!(catalog.write_sealed(addr, &page(1, 0)).is_err());
        assert!(catalog.clear(addr).is_err());
    }
    assert!(catalog.prepare_extent(0, PAGE).is_err(), "in use");
    assert!(catalog.prepare_extent(9, PAGE).is_err());
    assert!(catalog.prepare_extent(1, EXTENT as u32 + 64).is_err());
    assert!(catalog.remove_namespace(1).is_err());
    assert!(matches!(
        catalog.add_namespace(1000, 3, [5; 32]),
        Err(CatalogError::OtherWorldSize {
            found: 2,
            wanted: 3
        })
    ));
    for key in 0..u64::from(MAX_NAMESPACES) - 1 {
        catalog.add_namespace(key, 1, [1; 32]).expect("room");
    }
    assert!(matches!(
        catalog.add_namespace(1, 1, [2; 32]),
        Err(CatalogError::NamespacesFull)
    ));
}

#[test]
fn a_catalog_of_another_pool_or_daemon_is_discarded_with_the_reason() {
    let fixture = Fixture::new();
    assert!(matches!(fixture.open(), OpenedCatalog::Missing));
    drop(fixture.create());
    let reason = |geometry: &Geometry| match Catalog::open(&fixture.path, geometry, BOOT)
        .expect("no system error")
    {
        OpenedCatalog::Discarded(reason) => reason,
        _ => panic!("must be discarded"),
    };
    let good = geometry();
    let larger = Geometry {
        pool_bytes: 8 * EXTENT,
        ..good
    };
    let text = reason(&larger).to_string();
    assert_eq!(text, "its pool size is 262144 bytes, configured are 524288");
    let coarser = Geometry {
        extent_bytes: 2 * EXTENT,
        ..larger
    };
    let text = reason(&coarser).to_string();
    assert!(text.contains("524288; its extent size is 65536 bytes, configured are 131072"));
    let replaced = Geometry {
        pool: PoolIdentity {
            inode: 8,
            ..good.pool
        },
        ..good
    };
    assert!(matches!(reason(&replaced), DiscardReason::OtherPoolFile));
    let mut renamed = good;
    renamed.node[1] = b'2';
    assert_eq!(reason(&renamed).to_string(), "it is of node `n1`, not `n2`");
    let file = OpenOptions::new()
        .write(true)
        .open(&fixture.path)
        .expect("ours");
    file.set_len(8192).expect("ours");
    assert!(matches!(
        reason(&good),
        DiscardReason::FileBytes {
            found_bytes: 8192,
            ..
        }
    ));
    fixture.overwrite(20, b"x");
    assert!(matches!(reason(&good), DiscardReason::HeaderChecksum));
    fixture.overwrite(8, b"x");
    assert!(matches!(reason(&good), DiscardReason::Version { .. }));
    fixture.overwrite(0, b"x");
    assert!(matches!(reason(&good), DiscardReason::Magic { .. }));
    file.set_len(3).expect("ours");
    assert!(matches!(reason(&good), DiscardReason::Magic { .. }));
    file.set_len(0).expect("ours");
    assert!(matches!(reason(&good), DiscardReason::NotACatalog(_)));
    fs::remove_file(&fixture.path).expect("ours");
    std::os::unix::fs::symlink("elsewhere", &fixture.path).expect("writable");
    assert!(matches!(reason(&good), DiscardReason::NotACatalog(_)));
    drop(fixture.create());
    assert_eq!(adopted(&fixture.reopen()), AdoptReport::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbage_behind_the_header_is_never_adopted_and_never_panics(
        writes in prop::collection::vec(
            (144..150_000_u64, prop::collection::vec(any::<u8>(), 1..200)),
            1..40,
        ),
    ) {
        let fixture = Fixture::new();
        let catalog = fixture.prepared();
        catalog.write_sealed(at(0), &page(1, 0)).expect("prepared");
        catalog.write_sealed(at(1), &page(1, 1)).expect("prepared");
        drop(catalog);
        let file_bytes = fs::metadata(&fixture.path).expect("there").len();
        for (at, bytes) in writes {
            let room = file_bytes.saturating_sub(at).min(bytes.len() as u64) as usize;
            fixture.overwrite(at, &bytes[..room]);
        }
        let mut catalog = fixture.reopen();
        for found in adopted(&catalog).pages {
            let slot = found.addr.offset() / u64::from(PAGE);
            prop_assert!(slot < 2 && found.page == page(1, slot as u8));
        }
        catalog.retain_extents(|_| false).expect("no system error");
        prop_assert_eq!(adopted(&catalog), AdoptReport::default());
    }
}

const CRASH_DIRECTORY: &str = "PEGAFLOW_TEST_CATALOG_CRASH";
const CRASH_PAGES: u64 = 2 * EXTENT / PAGE as u64;

fn crash_paths(directory: &Path) -> (PathBuf, PathBuf) {
    (directory.join("catalog"), directory.join("pool"))
}

/// Writes, seals and clears pages until it is killed; all bytes of a page are its hash.
fn write_until_killed(directory: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (path, pool) = crash_paths(directory);
    let pool = OpenOptions::new().write(true).open(pool)?;
    let mut catalog = Catalog::create(&path, &geometry(), BOOT)?;
    catalog.add_namespace(1000, 2, [5; 32])?;
    catalog.prepare_extent(0, PAGE)?;
    catalog.prepare_extent(1, PAGE)?;
    let mut state = u64::from(std::process::id());
    loop {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let slot = (state >> 33) % CRASH_PAGES;
        let mut hash = [0; 32];
        hash.chunks_exact_mut(8)
            .for_each(|part| part.copy_from_slice(&state.to_le_bytes()));
        catalog.clear(at(slot))?;
        pool.write_all_at(&hash.repeat(PAGE as usize / hash.len()), at(slot).offset())?;
        catalog.write_sealed(at(slot), &PageRecord { hash, ..page(0, 0) })?;
        if state >> 50 & 63 == 0 {
            let extent = (slot * u64::from(PAGE) / EXTENT) as ExtentId;
            let pages = EXTENT / u64::from(PAGE);
            let first = u64::from(extent) * pages;
            (first..first + pages).try_for_each(|slot| catalog.clear(at(slot)))?;
            catalog.release_extent(extent)?;
            catalog.prepare_extent(extent, PAGE)?;
        }
    }
}

/// The child of the next test, which does nothing when run by itself.
#[test]
fn crash_child() {
    if let Some(directory) = std::env::var_os(CRASH_DIRECTORY) {
        let ended = write_until_killed(Path::new(&directory));
        panic!("the writer ended by itself: {ended:?}");
    }
}

#[test]
fn after_kill_9_every_adopted_page_holds_the_bytes_of_its_hash() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("shared memory is writable");
    let (path, pool_path) = crash_paths(directory.path());
    let test = std::env::current_exe().expect("known");
    let mut adopted_pages = 0;
    for round in 0..12_u64 {
        // The pool outlives its daemons; the catalog of this test starts anew each round.
        // That of the last round describes bytes that are gone.
        let _ = fs::remove_file(&path);
        fs::write(&pool_path, vec![0; 2 * EXTENT as usize]).expect("room");
        let mut child = Command::new(&test)
            .args(["--exact", "catalog::tests::crash_child", "--nocapture"])
            .env(CRASH_DIRECTORY, directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test binary runs");
        for _ in 0..10_000 {
            if path.exists() || child.try_wait().expect("a child").is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(30_000 + 1_713 * round));
        assert!(
            child.try_wait().expect("a child").is_none(),
            "the writer ended by itself"
        );
        child.kill().expect("a child");
        child.wait().expect("a child");
        let opened = Catalog::open(&path, &geometry(), BOOT).expect("no system error");
        // Killed before the header was complete: nothing to adopt.
        let OpenedCatalog::Ready(catalog) = opened else {
            continue;
        };
        let report = adopted(&catalog);
        assert_eq!(
            report.discarded.total(),
            0,
            "a crash leaves records whole or absent"
        );
        let pool = fs::File::open(&pool_path).expect("ours");
        for found in &report.pages {
            let mut bytes = vec![0; PAGE as usize];
            pool.read_exact_at(&mut bytes, found.addr.offset())
                .expect("inside");
            assert!(
                bytes.chunks_exact(32).all(|part| part == found.page.hash),
                "{found:?}"
            );
        }
        adopted_pages += report.pages.len();
    }
    assert!(adopted_pages > 0, "no round reached its first seal");
}
