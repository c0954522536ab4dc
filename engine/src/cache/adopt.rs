//! Opening the cache at start: the pool of a previous daemon with every block that was sealed, or a
//! new one.
//!
//! Only blocks all of whose shards have valid records come back; everything else is cleared from
//! the catalog, so that it is not looked at again. The index is always built anew, under the new
//! boot id.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytemuck::Zeroable;
use bytesize::ByteSize;
use pegaflow_shm::BlockHash;
use pegaflow_shm::index::BlockKey;
use pegaflow_shm::node::text_field;

use crate::cache::block::Shard;
use crate::cache::homes::Homes;
use crate::cache::lookup::key_hash;
use crate::cache::{Cache, CacheOptions};
use crate::catalog::{AdoptedPage, Catalog, CatalogError, Differences, Geometry, OpenedCatalog};
use crate::config::PoolStart;
use crate::copy::{ChecksumMode, PoolMemory};
use crate::fault::{self, CrashPoint};
use crate::isolation::DomainRules;
use crate::lane::LaneOptions;
use crate::pool::{
    NearCpus, NodePart, OpenedPool, Pool, PoolError, PoolFile, PoolFileError, PoolIdentity,
    PopulateOptions, pool_memory,
};

/// The cache cannot be brought up.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Sizes.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The pool file.
    #[error(transparent)]
    PoolFile(#[from] PoolFileError),
    /// The catalog file.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A file of a previous daemon cannot be removed.
    #[error("removing the files of a previous daemon: {0}")]
    Remove(#[source] io::Error),
    /// The thread that maps an adopted pool cannot be started.
    #[error("starting a thread that maps the pool: {0}")]
    MapPages(#[source] io::Error),
}

/// A cache ready for use.
pub struct OpenedCache {
    /// The cache.
    pub cache: Cache,
    /// The pool's bytes, for the copy threads.
    pub pool_memory: PoolMemory,
    /// Blocks taken over.
    pub adopted_blocks: u64,
    /// Pages of the previous daemon that were given up.
    pub discarded_pages: u64,
}

type BlockName = (u32, u16, BlockHash);

/// Opens or makes pool and catalog and fills the cache with what can be taken over.
///
/// # Errors
/// The pool does not fit or a file cannot be made.
pub fn open_cache(
    options: &LaneOptions,
    threads: NonZeroUsize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<OpenedCache, OpenError> {
    let mut parts = Vec::new();
    let pool = Pool::with_parts(options.pool_bytes, options.extent_bytes, |extents| {
        parts = options.nodes.parts(extents);
        parts.clone()
    })?;
    let stretch = |part: &NodePart| {
        let Range { start, end } = part.extents;
        NearCpus {
            bytes: u64::from(start) * options.extent_bytes..u64::from(end) * options.extent_bytes,
            cpus: part.cpus.clone(),
        }
    };
    let populate = PopulateOptions {
        threads,
        hugepages: options.hugepages,
        near: parts.iter().map(stretch).collect(),
    };
    let files = open_files(options, &populate, progress)?;
    if !files.previous_pool {
        tell_nodes(&files.pool, &parts, options.extent_bytes);
    }
    let (file, catalog) = (Arc::new(files.pool), files.catalog);
    let cache_options = CacheOptions {
        dir: options.dir.clone(),
        boot_id: options.boot_id,
        max_blocks: options.max_blocks,
        policy: options.policy,
        admission: options.admission,
        incomplete_ttl: options.incomplete_ttl,
        checksums: options.checksum != ChecksumMode::Off,
        tier: options.tier.map(|tier| tier.admit),
    };
    let mut cache = Cache::new(pool, catalog, cache_options);
    let (mut adopted_blocks, mut discarded_pages) = (0, 0);
    if files.previous_blocks {
        let started = Instant::now();
        let report = cache.catalog.adopt()?;
        let read = started.elapsed();
        discarded_pages = report.discarded.total();
        let (blocks, given_up) = cache.adopt_pages(report.pages, &options.rules)?;
        adopted_blocks = blocks;
        discarded_pages += given_up;
        tracing::info!(
            blocks,
            discarded_pages,
            ?read,
            took = ?started.elapsed(),
            "took over the pool of a previous daemon"
        );
    }
    if files.previous_pool {
        map_pages_later(&file, options.hugepages).map_err(OpenError::MapPages)?;
    } else if options.hugepages {
        tell_hugepages(&file);
    }
    Ok(OpenedCache {
        cache,
        pool_memory: pool_memory(file).in_huge_pages(options.hugepages),
        adopted_blocks,
        discarded_pages,
    })
}

struct OpenedFiles {
    pool: PoolFile,
    catalog: Catalog,
    /// The pool was there.
    previous_pool: bool,
    /// The catalog was there too, and fits it.
    previous_blocks: bool,
}

fn open_files(
    options: &LaneOptions,
    populate: &PopulateOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<OpenedFiles, OpenError> {
    let pool_path = options.dir.join("pool");
    let catalog_path = options.dir.join("catalog");
    let geometry = |pool| Geometry {
        pool_bytes: options.pool_bytes,
        extent_bytes: options.extent_bytes,
        pool,
        node: text_field(&options.node_name),
    };
    // Opened whatever becomes of it: a pool that is another daemon's is refused here, before
    // anything of that daemon's is touched.
    let previous = match (
        PoolFile::open(&pool_path, options.pool_bytes)?,
        options.pool,
    ) {
        (OpenedPool::Missing, _) => OpenedPool::Missing,
        (previous, PoolStart::Adopt) => previous,
        (_, PoolStart::Fresh) => {
            tracing::warn!("--pool fresh: the pool of the previous daemon is thrown away");
            OpenedPool::Missing
        }
    };
    remove_indexes(&options.dir).map_err(OpenError::Remove)?;
    match previous {
        OpenedPool::Ready(file) => {
            let geometry = geometry(file.identity());
            match Catalog::open(&catalog_path, &geometry, options.boot_id)? {
                OpenedCatalog::Ready(catalog) => {
                    return Ok(OpenedFiles {
                        pool: file,
                        catalog,
                        previous_pool: true,
                        previous_blocks: true,
                    });
                }
                OpenedCatalog::Missing => warn_given_up(&"it has no catalog"),
                OpenedCatalog::Discarded(reason) => warn_given_up(&reason),
            }
            let catalog = Catalog::create(&catalog_path, &geometry, options.boot_id)?;
            return Ok(OpenedFiles {
                pool: file,
                catalog,
                previous_pool: true,
                previous_blocks: false,
            });
        }
        OpenedPool::Missing => {}
        OpenedPool::Unusable(reason) => {
            let also = Catalog::differences(&catalog_path, &geometry(PoolIdentity::zeroed()))?;
            // The reason may be the size already.
            let also = also.map(|also| Differences {
                pool_bytes: None,
                ..also
            });
            let also = also.filter(|also| *also != Differences::default());
            warn_given_up(
                &also.map_or_else(|| reason.to_string(), |also| format!("{reason}; {also}")),
            );
        }
    }
    let file = PoolFile::create(&pool_path, options.pool_bytes, populate, progress)?;
    fault::point(CrashPoint::PoolMade);
    let catalog = Catalog::create(&catalog_path, &geometry(file.identity()), options.boot_id)?;
    Ok(OpenedFiles {
        pool: file,
        catalog,
        previous_pool: false,
        previous_blocks: false,
    })
}

/// A pool of a previous daemon has its memory: nobody needs to wait for the page tables.
fn map_pages_later(pool: &Arc<PoolFile>, hugepages: bool) -> io::Result<()> {
    let started = Instant::now();
    pool.map_pages_later(hugepages, move |pool, outcome| {
        match outcome {
            Ok(()) => tracing::info!(took = ?started.elapsed(), "the adopted pool is mapped"),
            Err(error) => tracing::warn!(%error, "copies will map the rest of the pool"),
        }
        if hugepages {
            tell_hugepages(pool);
        }
    })
}

fn tell_hugepages(pool: &PoolFile) {
    match pool.hugepages() {
        Ok(report) => tracing::info!(?report, "hugepages"),
        Err(error) => tracing::warn!(%error, "hugepages: what was got cannot be told"),
    }
}

/// Says where the pool's memory has come to lie, if that matters.
fn tell_nodes(pool: &PoolFile, parts: &[NodePart], extent_bytes: u64) {
    /// A node has some memory in use before.
    const SLACK_BYTES: u64 = 64 << 20;
    if parts.is_empty() {
        return;
    }
    let found = match pool.bytes_by_node() {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "on which memory nodes the pool lies cannot be told");
            return;
        }
    };
    for part in parts {
        let wanted = part.extents.len() as u64 * extent_bytes;
        let got = found.get(&part.node).copied().unwrap_or(0);
        let node = part.node;
        if got + SLACK_BYTES < wanted {
            tracing::warn!(
                node,
                wanted = %ByteSize(wanted),
                got = %ByteSize(got),
                "the part of the pool near the GPUs of a memory node lies elsewhere in part: has \
                 the node as much free memory, and may the daemon run on its processors?"
            );
        } else {
            tracing::info!(node, bytes = %ByteSize(got), "memory near the GPUs of a node");
        }
    }
}

/// One line, whatever the reason, for who wonders where the cache is.
fn warn_given_up(reason: &dyn std::fmt::Display) {
    tracing::warn!("the previous daemon's pool is given up and the cache starts empty: {reason}");
}

/// Index files carry the boot id of the daemon that wrote them; none outlives it.
pub(super) fn remove_indexes(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("index-") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl Cache {
    /// Takes whole blocks in and clears the rest. Returns blocks taken over and pages given up.
    pub(super) fn adopt_pages(
        &mut self,
        pages: Vec<AdoptedPage>,
        rules: &DomainRules,
    ) -> Result<(u64, u64), OpenError> {
        let homes = self.stored_domains(rules);
        let mut blocks: HashMap<BlockName, Vec<AdoptedPage>> = HashMap::new();
        let mut order = Vec::new();
        let (mut adopted_blocks, mut given_up) = (0, 0);
        for adopted in pages {
            if adopted.page.shards == 1 {
                // Most blocks: nothing to gather.
                self.adopt_or_clear(&homes, &[adopted], &mut adopted_blocks, &mut given_up)?;
                continue;
            }
            let name = (
                adopted.page.namespace,
                adopted.page.group,
                adopted.page.hash,
            );
            let shards = blocks.entry(name).or_insert_with(|| {
                order.push(name);
                Vec::new()
            });
            shards.push(adopted);
        }
        for name in order {
            let shards = blocks.remove(&name).unwrap_or_default();
            self.adopt_or_clear(&homes, &shards, &mut adopted_blocks, &mut given_up)?;
        }
        fault::point(CrashPoint::BlocksAdopted);
        self.forget_homeless(&homes)?;
        let pool = &self.pool;
        self.catalog
            .retain_extents(|extent| pool.page_bytes_of_extent(extent).is_some())?;
        Ok((adopted_blocks, given_up))
    }

    /// Takes the block of these pages in, or clears their records.
    fn adopt_or_clear(
        &mut self,
        homes: &Homes,
        pages: &[AdoptedPage],
        adopted: &mut u64,
        given_up: &mut u64,
    ) -> Result<(), OpenError> {
        if self.adopt_block(homes, pages) {
            *adopted += 1;
            fault::point(CrashPoint::BlockAdopted);
            return Ok(());
        }
        *given_up += pages.len() as u64;
        for page in pages {
            self.catalog.clear(page.addr)?;
            fault::point(CrashPoint::RecordDiscarded);
        }
        Ok(())
    }

    /// Takes a block in, if these pages, all of one namespace, group and hash, are all of it.
    fn adopt_block(&mut self, homes: &Homes, pages: &[AdoptedPage]) -> bool {
        let Some(first) = pages.first() else {
            return false;
        };
        let (slot, group, hash) = (first.page.namespace, first.page.group, first.page.hash);
        let Some(domain) = homes.of(slot) else {
            return false;
        };
        let mut ranks: Vec<u8> = pages.iter().map(|adopted| adopted.page.rank).collect();
        ranks.sort_unstable();
        // A group that only some ranks hold has fewer shards than there are ranks.
        let whole = ranks.len() == usize::from(pages[0].page.shards)
            && ranks
                .iter()
                .enumerate()
                .all(|(at, rank)| usize::from(*rank) == at)
            && pages.iter().all(|a| {
                a.page.generation == pages[0].page.generation
                    && a.page.shards == pages[0].page.shards
            });
        if !whole {
            return false;
        }
        let Ok(entry) = self.domains[domain].insert(&BlockKey::new(slot, group, &hash)) else {
            return false;
        };
        let born_s = self.now_s;
        let home = &mut self.domains[domain];
        let block = &mut home.blocks[entry.0 as usize];
        block.begin(ranks.len() as u16, born_s, &mut home.runs);
        self.begin_unfinished(slot);
        for adopted in pages {
            if let Err(error) = self.pool.claim(adopted.addr, adopted.page.page_bytes) {
                tracing::warn!(%error, "a page of a previous daemon cannot be claimed");
                self.evict(domain, entry);
                return false;
            }
            let home = &mut self.domains[domain];
            home.bytes += u64::from(adopted.page.page_bytes);
            let block = &mut home.blocks[entry.0 as usize];
            block.shards_in += 1;
            block.set_shard(
                u16::from(adopted.page.rank),
                Shard::In(adopted.addr),
                &mut home.runs,
            );
        }
        let home = &mut self.domains[domain];
        home.blocks[entry.0 as usize].sealed = true;
        home.policy.insert(entry.0, key_hash(&hash));
        let sealed = home.index.writer.seal(entry).is_ok();
        let bytes: i64 = pages
            .iter()
            .map(|adopted| i64::from(adopted.page.page_bytes))
            .sum();
        self.end_unfinished(slot);
        self.hold(slot, 1, bytes);
        sealed
    }
}
