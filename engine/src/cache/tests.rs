//! The cache against a model: random saves, copies that end or fail, queries and releases, over a
//! pool far too small for them, with two page sizes and blocks of one and of two shards.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use pegaflow_shm::BlockHash;
use pegaflow_shm::index::EntryId;
use proptest::prelude::*;

use crate::cache::block::Shard;
use crate::cache::store::{Offer, ShardScope};
use crate::cache::{Cache, CacheOptions};
use crate::catalog::{Catalog, Geometry};
use crate::isolation::IsolationDomain;
use crate::policy::{AdmissionKind, PolicyKind};
use crate::pool::{Pool, PoolIdentity};
use crate::tier::AdmitWhen;

const EXTENT: u64 = 16 * 1024;

struct Fixture {
    cache: Cache,
    _dir: tempfile::TempDir,
}

fn fixture(extents: u64, max_blocks: u32, policy: PolicyKind) -> Fixture {
    fixture_over(extents, max_blocks, policy, None)
}

fn fixture_over(
    extents: u64,
    max_blocks: u32,
    policy: PolicyKind,
    tier: Option<AdmitWhen>,
) -> Fixture {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in /dev/shm");
    let pool_bytes = extents * EXTENT;
    let identity = PoolIdentity {
        inode: 1,
        device: 1,
        created_ns: 1,
    };
    let geometry = Geometry {
        pool_bytes,
        extent_bytes: EXTENT,
        pool: identity,
        node: [0; 64],
    };
    let mut catalog =
        Catalog::create(&dir.path().join("catalog"), &geometry, [1; 16]).expect("a catalog");
    for namespace in 0..2u8 {
        let world_size = u32::from(namespace) + 1;
        let slot = catalog
            .add_namespace(0, world_size, [namespace; 32])
            .expect("a namespace");
        assert_eq!(slot, u32::from(namespace));
    }
    let options = CacheOptions {
        dir: dir.path().to_owned(),
        boot_id: [1; 16],
        max_blocks,
        policy,
        admission: AdmissionKind::Off,
        incomplete_ttl: Duration::from_secs(3600),
        checksums: true,
        tier,
    };
    let pool = Pool::new(pool_bytes, EXTENT).expect("a pool");
    let mut cache = Cache::new(pool, catalog, options);
    assert_eq!(
        cache
            .domain(&Arc::new(IsolationDomain::of_user(0)))
            .expect("a domain"),
        0
    );
    Fixture { cache, _dir: dir }
}

/// Namespace 0 has one shard of 1 KiB, namespace 1 two of 4 KiB.
fn scope(namespace: u32, shard: u16) -> ShardScope {
    let (shards, page_bytes) = if namespace == 0 { (1, 1024) } else { (2, 4096) };
    ShardScope {
        domain: 0,
        namespace,
        group: 0,
        shard: shard % shards,
        shards,
        page_bytes,
        near: None,
    }
}

fn hash(number: u8) -> BlockHash {
    *blake3::hash(&[number]).as_bytes()
}

#[derive(Clone, Debug)]
enum Step {
    Save {
        namespace: u32,
        shard: u16,
        blocks: Vec<u8>,
    },
    End {
        which: usize,
        ok: bool,
    },
    Query {
        namespace: u32,
        blocks: Vec<u8>,
        members: bool,
    },
    Release {
        which: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = || proptest::collection::vec(0u8..48, 1..12);
    prop_oneof![
        4 => (0u32..2, 0u16..2, blocks())
            .prop_map(|(namespace, shard, blocks)| Step::Save { namespace, shard, blocks }),
        6 => (any::<usize>(), prop::bool::weighted(0.85))
            .prop_map(|(which, ok)| Step::End { which, ok }),
        3 => (0u32..2, blocks(), any::<bool>()).prop_map(|(namespace, blocks, members)| {
            Step::Query { namespace, blocks, members }
        }),
        3 => any::<usize>().prop_map(|which| Step::Release { which }),
    ]
}

struct Copying {
    scope: ShardScope,
    entry: EntryId,
    block: u8,
    page: u64,
}

#[derive(Default)]
struct Model {
    copying: Vec<Copying>,
    /// What each page holds since its last completed copy.
    content: HashMap<u64, (u32, u8, u16)>,
    leases: Vec<Vec<(u32, u32, u8)>>,
}

impl Model {
    fn apply(&mut self, cache: &mut Cache, step: &Step) {
        match step {
            Step::Save {
                namespace,
                shard,
                blocks,
            } => self.save(cache, *namespace, *shard, blocks),
            Step::End { which, ok } => self.end(cache, *which, *ok),
            Step::Query {
                namespace,
                blocks,
                members,
            } => {
                self.query(cache, *namespace, blocks, *members);
            }
            Step::Release { which } => {
                if !self.leases.is_empty() {
                    let lease = self.leases.swap_remove(which % self.leases.len());
                    let entries: Vec<u32> = lease.iter().map(|(entry, ..)| *entry).collect();
                    cache.unpin(0, &entries);
                }
            }
        }
        self.check(cache);
    }

    fn save(&mut self, cache: &mut Cache, namespace: u32, shard: u16, blocks: &[u8]) {
        let scope = scope(namespace, shard);
        let hashes: Vec<BlockHash> = blocks.iter().map(|block| hash(*block)).collect();
        let mut heard = 0;
        let copying = &mut self.copying;
        cache.offer(&scope, &hashes, |at, offer| {
            assert_eq!(at, heard);
            heard += 1;
            if let Offer::Copy { entry, page } = offer {
                copying.push(Copying {
                    scope,
                    entry,
                    block: blocks[at],
                    page: page.offset(),
                });
            }
        });
        assert_eq!(heard, blocks.len());
    }

    fn end(&mut self, cache: &mut Cache, which: usize, ok: bool) {
        if self.copying.is_empty() {
            return;
        }
        let done = self.copying.swap_remove(which % self.copying.len());
        if ok {
            let key = (done.scope.namespace, done.block, done.scope.shard);
            self.content.insert(done.page, key);
            cache.shard_copied(&done.scope, done.entry, 0);
        } else {
            cache.shard_failed(&done.scope, done.entry);
        }
    }

    fn query(&mut self, cache: &mut Cache, namespace: u32, blocks: &[u8], members: bool) {
        let hashes: Vec<BlockHash> = blocks.iter().map(|block| hash(*block)).collect();
        let mut entries = Vec::new();
        let mut hits = Vec::new();
        if members {
            cache.pin_members(0, (namespace, 0), &hashes, &mut entries, |at, miss| {
                if miss.is_none() {
                    hits.push(blocks[at]);
                }
            });
        } else {
            let miss = cache.pin_prefix(0, (namespace, 0), &hashes, &mut entries);
            hits.extend(&blocks[..entries.len()]);
            assert_eq!(miss.is_none(), entries.len() == blocks.len());
        }
        let lease: Vec<_> = entries
            .iter()
            .zip(hits)
            .map(|(entry, block)| (*entry, namespace, block))
            .collect();
        self.leases.push(lease);
    }

    /// Leased blocks keep their pages and bytes; no page belongs to two shards.
    fn check(&self, cache: &Cache) {
        for (entry, namespace, block) in self.leases.iter().flatten() {
            let shards = scope(*namespace, 0).shards;
            for shard in 0..shards {
                let page_of = |shards| {
                    let mut pages = cache.pinned_pages(0, std::slice::from_ref(entry), shards);
                    pages.next().expect("one for each block")
                };
                assert_eq!(page_of((shard, shards + 1)), None);
                let page = page_of((shard, shards)).expect("a leased block has a page");
                let expected = (*namespace, *block, shard);
                assert_eq!(self.content.get(&page.offset()), Some(&expected));
            }
        }
        let mut used = HashSet::new();
        let (mut bytes, mut copying) = (0, 0);
        let home = cache.domain_ref(0);
        for block in home.blocks.iter().filter(|block| block.shards > 0) {
            for shard in 0..block.shards {
                match block.shard(shard, &home.runs) {
                    Shard::Empty => assert!(!block.sealed),
                    Shard::In(page) => {
                        assert!(used.insert(page));
                        assert_eq!(cache.catalog().record(page).is_some(), block.sealed);
                        bytes += u64::from(cache.pool().page_bytes_of(page).expect("allocated"));
                    }
                    Shard::Copying(page) => {
                        copying += 1;
                        assert!(!block.sealed && used.insert(page));
                        // A crash now must not bring back what the page held before.
                        assert!(cache.catalog().record(page).is_none());
                        bytes += u64::from(cache.pool().page_bytes_of(page).expect("allocated"));
                    }
                }
            }
        }
        assert_eq!(copying, self.copying.len());
        assert_eq!(bytes, home.bytes);
        assert_eq!(bytes, cache.pool().stats().used_bytes);
        let pinned: HashSet<_> = self
            .leases
            .iter()
            .flatten()
            .map(|(entry, ..)| entry)
            .collect();
        assert_eq!(cache.figures().pinned, pinned.len() as u64);
    }

    fn finish(mut self, cache: &mut Cache) {
        while !self.copying.is_empty() {
            self.end(cache, 0, false);
        }
        for lease in std::mem::take(&mut self.leases) {
            let entries: Vec<u32> = lease.iter().map(|(entry, ..)| *entry).collect();
            cache.unpin(0, &entries);
        }
        assert_eq!(cache.figures().pinned, 0);
        self.check(cache);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_a_lease_or_loses_a_page(
        steps in proptest::collection::vec(step(), 1..120),
        extents in 1u64..6,
        max_blocks in 4u32..40,
        s3_fifo: bool,
    ) {
        let policy = if s3_fifo { PolicyKind::S3Fifo } else { PolicyKind::Lru };
        let mut fixture = fixture(extents, max_blocks, policy);
        let mut model = Model::default();
        for step in &steps {
            model.apply(&mut fixture.cache, step);
        }
        model.finish(&mut fixture.cache);
    }
}

#[test]
fn a_pool_of_one_model_makes_way_for_another_page_size() {
    let mut fixture = fixture(2, 64, PolicyKind::Lru);
    let mut model = Model::default();
    let small: Vec<u8> = (0..32).collect();
    model.save(&mut fixture.cache, 0, 0, &small);
    while !model.copying.is_empty() {
        model.end(&mut fixture.cache, 0, true);
    }
    assert_eq!(fixture.cache.figures().sealed, 32);
    for shard in 0..2 {
        model.save(&mut fixture.cache, 1, shard, &[100]);
    }
    assert_eq!(model.copying.len(), 2, "the second model got its pages");
    while !model.copying.is_empty() {
        model.end(&mut fixture.cache, 0, true);
    }
    assert_eq!(
        fixture.cache.figures().sealed,
        16 + 1,
        "one extent of the first model went"
    );
    model.check(&fixture.cache);
}

#[test]
fn a_full_pool_of_leased_blocks_refuses_and_keeps_everything() {
    let mut fixture = fixture(1, 64, PolicyKind::Lru);
    let mut model = Model::default();
    let blocks: Vec<u8> = (0..16).collect();
    model.save(&mut fixture.cache, 0, 0, &blocks);
    while !model.copying.is_empty() {
        model.end(&mut fixture.cache, 0, true);
    }
    model.query(&mut fixture.cache, 0, &blocks, true);
    let mut refused = 0;
    fixture.cache.offer(&scope(0, 0), &[hash(99)], |_, offer| {
        refused += usize::from(offer == Offer::NoSpace);
    });
    assert_eq!(refused, 1);
    model.check(&fixture.cache);
}

#[test]
fn an_unfinished_block_past_its_time_makes_room() {
    let mut fixture = fixture(1, 64, PolicyKind::Lru);
    fixture.cache.options.incomplete_ttl = Duration::ZERO;
    let mut model = Model::default();
    model.save(&mut fixture.cache, 1, 0, &[1, 2, 3, 4]);
    while !model.copying.is_empty() {
        model.end(&mut fixture.cache, 0, true);
    }
    assert_eq!(fixture.cache.figures().unfinished, 4);
    model.save(&mut fixture.cache, 0, 0, &[9]);
    assert_eq!(model.copying.len(), 1, "unfinished blocks went");
    assert!(fixture.cache.take_evictions().incomplete >= 1);
}

#[test]
fn an_unfinished_block_past_its_time_stays_while_a_copy_runs_into_it() {
    let mut fixture = fixture(1, 64, PolicyKind::Lru);
    fixture.cache.options.incomplete_ttl = Duration::ZERO;
    let mut model = Model::default();
    model.save(&mut fixture.cache, 1, 0, &[1]);
    model.end(&mut fixture.cache, 0, true);
    model.save(&mut fixture.cache, 1, 1, &[1]);
    assert_eq!(model.copying.len(), 1, "its second shard is on the way");
    assert!(!fixture.cache.drop_expired_unfinished());
    model.end(&mut fixture.cache, 0, true);
    assert_eq!(fixture.cache.figures().sealed, 1);
    model.check(&fixture.cache);
}

#[test]
fn a_page_of_another_size_gets_the_extent_that_nobody_holds() {
    for policy in PolicyKind::ALL {
        let mut fixture = fixture(2, 256, policy);
        let cache = &mut fixture.cache;
        let small: Vec<BlockHash> = (0..32).map(hash).collect();
        let mut copies = Vec::new();
        cache.offer(&scope(0, 0), &small, |_, offer| match offer {
            Offer::Copy { entry, .. } => copies.push(entry),
            other => panic!("{other:?}"),
        });
        for entry in copies {
            assert!(cache.shard_copied(&scope(0, 0), entry, 0));
        }
        // One block of the first extent is held; its fifteen neighbours are the oldest of all.
        let mut pinned = Vec::new();
        assert_eq!(cache.pin_prefix(0, (0, 0), &small[..1], &mut pinned), None);
        let mut offers = Vec::new();
        cache.offer(&scope(1, 0), &[hash(40)], |_, offer| offers.push(offer));
        assert!(
            matches!(offers[..], [Offer::Copy { .. }]),
            "{policy:?} {offers:?}"
        );
        cache.unpin(0, &pinned);
    }
}

/// Saves a block of namespace 0 and tells its entry; it must find room.
fn save_one(cache: &mut Cache, number: u8) -> EntryId {
    let mut taken = None;
    cache.offer(&scope(0, 0), &[hash(number)], |_, offer| match offer {
        Offer::Copy { entry, .. } => taken = Some(entry),
        other => panic!("block {number}: {other:?}"),
    });
    let entry = taken.expect("an offer");
    assert!(cache.shard_copied(&scope(0, 0), entry, 0));
    entry
}

fn has(cache: &Cache, number: u8) -> bool {
    cache.presence(0, (0, 0), &hash(number)) != crate::cache::exchange::Presence::Absent
}

#[test]
fn what_would_be_lost_is_spared_as_long_as_the_tier_takes_blocks_and_no_longer() {
    const FULL: u8 = 64;
    for policy in PolicyKind::ALL {
        let tier = Some(AdmitWhen::Evict);
        let mut fixture = fixture_over(4, 1024, policy, tier);
        let cache = &mut fixture.cache;
        let entries: Vec<EntryId> = (0..FULL).map(|number| save_one(cache, number)).collect();
        assert_eq!(cache.pool().free_bytes(), 0);
        // The tier has this one alone, which is not the next to leave.
        const STORED: u8 = 40;
        cache.mark_stored(0, entries[usize::from(STORED)], true);
        cache.spare_unwritten(true);
        save_one(cache, FULL);
        assert!((0..FULL).all(|number| has(cache, number) == (number != STORED)));
        assert_eq!(cache.take_evictions().unwritten, 0);
        // Now it has none: a save finds room all the same, and the loss is counted.
        save_one(cache, FULL + 1);
        assert_eq!(cache.take_evictions().unwritten, 1);
        cache.spare_unwritten(false);
        save_one(cache, FULL + 2);
        assert_eq!(cache.take_evictions().unwritten, 1);
    }
}

#[test]
fn what_the_tier_can_never_take_is_not_spared_for_it() {
    const FULL: u8 = 64;
    for policy in PolicyKind::ALL {
        let mut fixture = fixture_over(4, 1024, policy, Some(AdmitWhen::Evict));
        let cache = &mut fixture.cache;
        let entries: Vec<EntryId> = (0..FULL).map(|number| save_one(cache, number)).collect();
        cache.mark_stored(0, entries[40], true);
        cache.mark_unfit(0, entries[20]);
        cache.spare_unwritten(true);
        // In the policy's order, past those that the tier may still take.
        for gone in [20, 40] {
            save_one(cache, FULL + gone);
            assert!(!has(cache, gone), "{policy:?} {gone}");
        }
        let kept = (0..FULL).filter(|number| has(cache, *number));
        assert_eq!(kept.count(), usize::from(FULL) - 2);
    }
}
