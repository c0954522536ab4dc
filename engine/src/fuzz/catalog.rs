//! A pool and its catalog as a previous daemon left them, then damaged, then adopted.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pegaflow_shm::BlockHash;
use pegaflow_shm::node::text_field;

use super::input::Input;
use super::place::{Place, lane_options};
use crate::cache::adopt::{OpenedCache, open_cache};
use crate::catalog::{
    AdoptReport, AdoptedPage, Catalog, Discarded, Geometry, OpenedCatalog, PageRecord,
};
use crate::lane::LaneOptions;
use crate::pool::{OpenedPool, PageAddr, PoolFile, PopulateOptions};

const EXTENT: u64 = 8 << 10;
const EXTENTS: u32 = 4;
/// Page sizes of the input, good and bad ones.
const PAGE_SIZES: [u32; 8] = [512, 576, 1024, 4096, 8192, 0, 511, u32::MAX];

/// A page as it was sealed, and under which namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Sealed {
    addr: u64,
    hash: BlockHash,
    checksum: u64,
    numbers: [u32; 6],
    domain_key: u64,
    digest: [u8; 32],
}

/// What the previous daemon did: writes of records, then damage to the files.
pub fn catalog(data: &[u8]) {
    let place = Place::new();
    let mut options = lane_options(place.path());
    options.extent_bytes = EXTENT;
    options.pool_bytes = EXTENT * u64::from(EXTENTS);
    let mut input = Input::new(data);
    let geometry = make_pool(&options);
    let sealed = write_records(&mut input, &options, &geometry);
    damage(&mut input, place.path());
    check_adoption(&options, &geometry, &sealed);
}

fn make_pool(options: &LaneOptions) -> Geometry {
    let (path, populate) = (options.dir.join("pool"), populate());
    let pool = PoolFile::create(&path, options.pool_bytes, &populate, &|_| {})
        .expect("there is room for a small pool");
    geometry_of(options, &pool)
}

fn populate() -> PopulateOptions {
    PopulateOptions {
        threads: NonZeroUsize::MIN,
        hugepages: false,
        near: Vec::new(),
    }
}

fn geometry_of(options: &LaneOptions, pool: &PoolFile) -> Geometry {
    Geometry {
        pool_bytes: options.pool_bytes,
        extent_bytes: options.extent_bytes,
        pool: pool.identity(),
        node: text_field(&options.node_name),
    }
}

fn write_records(
    input: &mut Input<'_>,
    options: &LaneOptions,
    geometry: &Geometry,
) -> HashSet<Sealed> {
    let path = options.dir.join("catalog");
    let mut catalog = Catalog::create(&path, geometry, [1; 16]).expect("there is room");
    let mut sizes = [0u32; EXTENTS as usize];
    let mut sealed = HashSet::new();
    for _ in 0..input.u8() {
        let extent = u32::from(input.below(EXTENTS as u8 + 1));
        let page_bytes = sizes.get(extent as usize).copied().unwrap_or(0);
        // Refusals are part of the game: what was refused must have changed nothing.
        match input.below(8) {
            0 => {
                let (key, world_size) = (input.below(4), input.below(5));
                let digest = [input.below(4); 32];
                drop(catalog.add_namespace(key.into(), world_size.into(), digest));
            }
            1 => {
                let wanted = PAGE_SIZES[usize::from(input.below(8))];
                if catalog.prepare_extent(extent, wanted).is_ok() {
                    sizes[extent as usize] = wanted;
                }
            }
            2 => {
                if catalog.release_extent(extent).is_ok() && extent < EXTENTS {
                    sizes[extent as usize] = 0;
                }
            }
            3 => drop(catalog.remove_namespace(input.below(4).into())),
            4 => drop(catalog.clear(addr(input, extent, page_bytes))),
            _ => {
                let addr = addr(input, extent, page_bytes);
                let page = record(input, page_bytes);
                if catalog.write_sealed(addr, &page).is_ok() {
                    sealed.extend(sealed_page(&catalog, &AdoptedPage { addr, page }));
                }
            }
        }
    }
    sealed
}

fn addr(input: &mut Input<'_>, extent: u32, page_bytes: u32) -> PageAddr {
    let start = u64::from(extent) * EXTENT;
    let slot = input.u8();
    if slot == u8::MAX {
        return PageAddr::from_offset(input.u64());
    }
    PageAddr::from_offset(start + u64::from(slot & 15) * u64::from(page_bytes))
}

fn record(input: &mut Input<'_>, page_bytes: u32) -> PageRecord {
    let bits = input.u16();
    let field = |shift: u16, width: u16| bits >> shift & ((1 << width) - 1);
    PageRecord {
        hash: [input.below(6); 32],
        checksum: u64::from(field(0, 1)),
        namespace: field(1, 3).into(),
        group: field(4, 2),
        rank: field(6, 3) as u8,
        shards: field(9, 3) as u8,
        generation: field(12, 2).into(),
        page_bytes: if field(14, 2) == 3 { 512 } else { page_bytes },
    }
}

/// The page with what gives its record its meaning; `None` under a namespace that is not there.
fn sealed_page(catalog: &Catalog, adopted: &AdoptedPage) -> Option<Sealed> {
    let page = adopted.page;
    let mut namespaces = catalog.namespaces();
    let namespace = namespaces.find(|row| row.slot == page.namespace)?;
    let PageRecord {
        hash,
        checksum,
        group,
        rank,
        shards,
        generation,
        page_bytes,
        ..
    } = page;
    let (group, rank, shards) = (group.into(), rank.into(), shards.into());
    Some(Sealed {
        addr: adopted.addr.offset(),
        hash,
        checksum,
        numbers: [page.namespace, group, rank, shards, generation, page_bytes],
        domain_key: namespace.domain_key,
        digest: namespace.digest,
    })
}

/// Changes the files. Nothing here can forge a checksum: contents are constants, single bits,
/// copies, and a stream of numbers that the input only starts.
fn damage(input: &mut Input<'_>, dir: &Path) {
    for _ in 0..input.below(32) {
        let kind = input.below(10);
        let name = if kind == 9 { "pool" } else { "catalog" };
        let Ok(file) = OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join(name))
        else {
            continue;
        };
        let file_bytes = file.metadata().map_or(0, |found| found.len());
        let at = place(input, file_bytes);
        let mut piece = vec![0; usize::from(input.u8()) + 1];
        let room = file_bytes.saturating_sub(at).min(piece.len() as u64) as usize;
        let piece = &mut piece[..room];
        let result = match kind {
            0 => file.write_all_at(piece, at),
            1 => {
                piece.fill(0xff);
                file.write_all_at(piece, at)
            }
            2..=4 => flip(&file, at, input.u8() & 7),
            5 | 6 => {
                // Records and rows have 64 bytes.
                let from = place(input, file_bytes) & !63;
                let length = 64.min(file_bytes.saturating_sub(from)) as usize;
                let mut copied = vec![0; length];
                file.read_exact_at(&mut copied, from).and_then(|()| {
                    let room = file_bytes.saturating_sub(at & !63).min(64) as usize;
                    file.write_all_at(&copied[..length.min(room)], at & !63)
                })
            }
            7 => {
                let mut number = u64::from(input.u16());
                for byte in piece.iter_mut() {
                    number = number
                        .wrapping_mul(0x5851_f42d_4c95_7f2d)
                        .wrapping_add(0x1405_7b7e);
                    *byte = (number >> 56) as u8;
                }
                file.write_all_at(piece, at)
            }
            _ => match input.below(4) {
                0 => fs::remove_file(dir.join(name)),
                1 => file.set_len(at),
                2 => file.set_len(file_bytes + at),
                _ => Ok(()),
            },
        };
        result.expect("the files are the target's own");
    }
}

/// A byte of the file: mostly where header, tables and first records lie.
fn place(input: &mut Input<'_>, file_bytes: u64) -> u64 {
    const NAMESPACES_AT: u64 = 4096;
    const EXTENT_TABLE_AT: u64 = NAMESPACES_AT + 64 * 1024;
    const RECORDS_AT: u64 = EXTENT_TABLE_AT + 4096;
    let within = u64::from(input.u16());
    let at = match input.below(5) {
        0 => within % 128,
        1 => NAMESPACES_AT + within % 512,
        2 => EXTENT_TABLE_AT + within % 64,
        3 => RECORDS_AT + within % (4 * 4096),
        _ => within,
    };
    at.min(file_bytes)
}

fn flip(file: &fs::File, at: u64, bit: u8) -> std::io::Result<()> {
    let mut byte = [0];
    if file.read_at(&mut byte, at)? == 1 {
        file.write_all_at(&[byte[0] ^ 1 << bit], at)?;
    }
    Ok(())
}

fn check_adoption(options: &LaneOptions, geometry: &Geometry, sealed: &HashSet<Sealed>) {
    let path = options.dir.join("catalog");
    let pool = PoolFile::open(&options.dir.join("pool"), options.pool_bytes);
    if let Ok(OpenedPool::Ready(pool)) = pool
        && geometry_of(options, &pool) == *geometry
        && let Ok(OpenedCatalog::Ready(catalog)) = Catalog::open(&path, geometry, [2; 16])
    {
        check_records(&catalog, sealed);
    }
    let first = open(options);
    check_cache(&first);
    let figures = first.cache.figures();
    let (adopted, used_bytes) = (first.adopted_blocks, figures.used_bytes);
    drop(first);
    let second = open(options);
    check_cache(&second);
    assert_eq!(second.discarded_pages, 0, "what was thrown away stays away");
    assert_eq!(second.adopted_blocks, adopted);
    assert_eq!(second.cache.figures().used_bytes, used_bytes);
}

fn open(options: &LaneOptions) -> OpenedCache {
    open_cache(options, NonZeroUsize::MIN, &|_| {}).expect("damage is no reason not to start")
}

/// Every page that is believed was sealed so, lies where a page can lie, and is the only one of its
/// shard; the second look finds the same.
fn check_records(catalog: &Catalog, sealed: &HashSet<Sealed>) {
    let AdoptReport { pages, .. } = catalog.adopt().expect("no system error");
    let mut shards = HashSet::new();
    let mut taken: HashMap<u64, u32> = HashMap::new();
    for adopted in &pages {
        let page = adopted.page;
        let known = sealed_page(catalog, adopted);
        assert!(
            known.is_some_and(|page| sealed.contains(&page)),
            "{adopted:?}"
        );
        assert!(page.rank < page.shards);
        assert!(shards.insert((page.namespace, page.group, page.hash, page.rank)));
        taken.insert(adopted.addr.offset(), page.page_bytes);
    }
    assert_eq!(taken.len(), pages.len(), "no page is adopted twice");
    check_apart(taken.into_iter().collect());
    let again = catalog.adopt().expect("no system error");
    assert_eq!(again.pages, pages);
    let discarded = Discarded {
        bad_extents: again.discarded.bad_extents,
        ..Discarded::default()
    };
    assert_eq!(again.discarded, discarded);
}

/// No two pages share a byte or reach beyond an extent.
fn check_apart(mut pages: Vec<(u64, u32)>) {
    pages.sort_unstable();
    let mut end = 0;
    for (at, bytes) in pages {
        assert!(at >= end, "pages share bytes at {at}");
        end = at + u64::from(bytes);
        assert!(at / EXTENT == (end - 1) / EXTENT && end <= EXTENT * u64::from(EXTENTS));
    }
}

/// What the cache counts is what lies in the pool.
fn check_cache(opened: &OpenedCache) {
    let pool = opened.cache.pool();
    let pages: Vec<(u64, u32)> = (0..EXTENTS)
        .flat_map(|extent| pool.live_pages(extent))
        .map(|addr| {
            (
                addr.offset(),
                pool.page_bytes_of(addr).expect("a live page"),
            )
        })
        .collect();
    let bytes: u64 = pages.iter().map(|(_, bytes)| u64::from(*bytes)).sum();
    check_apart(pages);
    let figures = opened.cache.figures();
    assert_eq!(figures.used_bytes, bytes);
    assert_eq!(figures.sealed, opened.adopted_blocks);
    assert_eq!((figures.unfinished, figures.pinned), (0, 0));
    let held: u64 = opened.cache.held().iter().map(|held| held.blocks).sum();
    assert_eq!(held, opened.adopted_blocks);
}

/// Blocks of one and of two shards in two page sizes; then one kind of damage each.
#[cfg(test)]
pub(super) fn seeds() -> Vec<Vec<u8>> {
    use super::input::Seed;
    let page = |seed: Seed, extent: u8, slot: u8, hash: u8, rank: u16, shards: u16| {
        let bits = rank << 6 | shards << 9 | 1 << 12;
        seed.u8(extent).u8(5).u8(slot).u16(bits).u8(hash)
    };
    let daemon = || {
        let mut seed = Seed::default().u8(16);
        seed = seed.u8(0).u8(0).u8(1).u8(2).u8(3);
        seed = seed.u8(0).u8(1).u8(0).u8(2).u8(1).u8(4);
        for slot in 0..6u8 {
            seed = page(seed, 0, slot, slot, 0, 1);
        }
        for slot in 0..2u8 {
            seed = page(seed, 2, slot, 5, slot.into(), 2);
        }
        // Cleared, and sealed again as something else.
        seed = seed.u8(0).u8(4).u8(3);
        seed = page(seed, 0, 3, 4, 0, 1);
        page(page(seed, 0, 7, 1, 0, 1), 0, 8, 2, 1, 2)
    };
    let mut seeds = vec![daemon().u8(0).0];
    for kind in 0..10u8 {
        for region in 0..4u8 {
            let damaged = daemon().u8(1).u8(kind).u16(u16::from(kind) * 8).u8(region);
            let damaged = damaged.u8(15).u8(3).u16(64).u8(region);
            seeds.push(damaged.0);
        }
    }
    seeds
}
