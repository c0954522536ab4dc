//! The cache: which blocks the node holds, where their pages lie, and who holds on to them.
//!
//! One thread, the lane, owns it. Nothing here locks, waits or copies a block's bytes.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`block`] | a block's pins and shards |
//! | [`domain`] | one isolation domain's blocks: index, records, eviction order |
//! | [`lookup`] | pinning what a query hits, unpinning what a lease held |
//! | [`store`] | taking shards in: offer, copied, failed |
//! | [`exchange`] | blocks on their way to the tier below, and back |
//! | [`withdraw`] | checksums, and taking a block back whose bytes are wrong |
//! | [`room`] | finding a page: allocate, evict, evacuate an extent |
//! | [`lease`] | leases: grant, consume, renew, release, expire |
//! | [`adopt`] | taking over the pages of a previous daemon |
//! | `homes` | which domain a stored namespace belongs to now |

pub mod adopt;
pub mod block;
pub mod domain;
pub mod exchange;
mod homes;
pub mod index_file;
#[cfg(test)]
pub mod inspect;
pub mod lease;
pub mod lookup;
pub mod room;
pub mod store;
pub mod withdraw;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pegaflow_shm::BootId;
use pegaflow_shm::index::EntryId;
use pegaflow_shm::node::DOMAIN_ROWS;

use crate::cache::domain::{Domain, DomainId};
use crate::cache::index_file::IndexFileError;
use crate::catalog::Catalog;
use crate::isolation::{DomainKey, IsolationDomain};
use crate::policy::{self, Admission, AdmissionKind, PolicyKind};
use crate::pool::{ExtentId, PageAddr, Pool};
use crate::tier::AdmitWhen;

/// Most isolation domains of one daemon.
pub const MAX_DOMAINS: usize = DOMAIN_ROWS;
/// Pins that leases and unfinished queries may hold at once, for each block that an index can hold.
/// A block that many requests share has many pins, and each costs its holder four bytes.
pub const PINS_PER_BLOCK: u32 = 8;

/// How a cache behaves.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Folder of the index files.
    pub dir: PathBuf,
    /// Boot id written into them.
    pub boot_id: BootId,
    /// Most blocks of one domain.
    pub max_blocks: u32,
    /// Eviction order.
    pub policy: PolicyKind,
    /// Gate before insertion into a full cache.
    pub admission: AdmissionKind,
    /// How long a block may wait for its remaining shards.
    pub incomplete_ttl: Duration,
    /// Whether pages have checksums.
    pub checksums: bool,
    /// When blocks are written to a tier below; `None` without one.
    pub tier: Option<AdmitWhen>,
}

/// Why blocks left, since the last time it was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evictions {
    /// To make room.
    pub capacity: u64,
    /// With an extent that went to another page size.
    pub extent: u64,
    /// Because the remaining shards never came.
    pub incomplete: u64,
    /// Of all that were sealed: the tier below would have taken them and had not been given them.
    pub unwritten: u64,
}

/// A block that waits for shards, as remembered in order of age.
#[derive(Clone, Copy, Debug)]
struct Unfinished {
    domain: DomainId,
    entry: EntryId,
    generation: u32,
}

/// All blocks of the node.
pub struct Cache {
    domains: Vec<Domain>,
    pool: Pool,
    catalog: Catalog,
    admission: Option<Box<dyn Admission>>,
    unfinished: VecDeque<Unfinished>,
    options: CacheOptions,
    /// Seconds since the start, as the lane told last.
    now_s: u32,
    /// Blocks in an index without all their shards.
    unsealed: u64,
    evictions: Evictions,
    held: Vec<Held>,
    /// Nothing could be evicted for an earlier block of the list at hand, and nothing has changed
    /// since.
    exhausted: bool,
    /// Extents of another page size that could not be evacuated for the list at hand.
    busy_extents: Vec<ExtentId>,
    /// Pages that were taken from another part of the pool than the one near their GPU.
    far_pages: u64,
    /// Bytes of pages that copies were ever begun into.
    taken_bytes: u64,
    /// Victims that the tier has are preferred: those that it has not are on their way there.
    spares_unwritten: bool,
    /// Blocks that ever left an index: tells whether an earlier look-up may be stale.
    removals: u64,
    found: Vec<Option<EntryId>>,
    /// Checksums of shards whose blocks wait for others, by page, until they are recorded with
    /// them; `None` when no page gets one.
    checksums: Option<HashMap<PageAddr, u64>>,
}

/// Sealed blocks of a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// How many.
    pub blocks: u64,
    /// Bytes of their pages.
    pub bytes: u64,
    /// Blocks without all their shards.
    pub unfinished: u64,
}

/// Figures for gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheFigures {
    /// Sealed blocks.
    pub sealed: u64,
    /// Blocks without all their shards.
    pub unfinished: u64,
    /// Blocks that leases hold.
    pub pinned: u64,
    /// Bytes of the pool in pages.
    pub used_bytes: u64,
    /// Extents in use.
    pub used_extents: u64,
}

impl Cache {
    /// An empty cache over a pool and its catalog.
    pub fn new(pool: Pool, catalog: Catalog, options: CacheOptions) -> Cache {
        Cache {
            domains: Vec::new(),
            pool,
            catalog,
            checksums: options.checksums.then(HashMap::new),
            admission: policy::build_admission(options.admission, options.max_blocks),
            unfinished: VecDeque::new(),
            options,
            now_s: 0,
            unsealed: 0,
            evictions: Evictions::default(),
            held: Vec::new(),
            exhausted: false,
            far_pages: 0,
            busy_extents: Vec::new(),
            taken_bytes: 0,
            spares_unwritten: false,
            removals: 0,
            found: Vec::new(),
        }
    }

    /// The blocks of a domain, created at first use.
    ///
    /// # Errors
    /// Its index file cannot be made, or there are [`MAX_DOMAINS`] already.
    pub fn domain(&mut self, identity: &Arc<IsolationDomain>) -> Result<DomainId, DomainError> {
        if let Some(found) = self.domain_of_key(identity.key()) {
            return Ok(found);
        }
        if self.domains.len() == MAX_DOMAINS {
            let name = identity.name().to_owned();
            return Err(DomainError::TooMany { name });
        }
        let path = self.options.dir.join(format!("index-{identity}"));
        let seed = {
            let id = self.options.boot_id;
            u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]])
        };
        let (max_blocks, boot_id) = (self.options.max_blocks, self.options.boot_id);
        let policy = policy::build(self.options.policy, max_blocks);
        let domain = Domain::create(identity.clone(), path, max_blocks, boot_id, seed, policy)?;
        self.domains.push(domain);
        Ok(self.domains.len() - 1)
    }

    fn domain_of_key(&self, key: DomainKey) -> Option<DomainId> {
        let mut domains = self.domains.iter();
        domains.position(|domain| domain.identity.key() == key)
    }

    /// The name of a domain that the cache has; empty for another one.
    pub fn name_of_domain(&self, key: DomainKey) -> &str {
        let found = self.domain_of_key(key);
        found.map_or("", |domain| self.domains[domain].identity.name())
    }

    /// All domains, in the order of their positions.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// A domain by position.
    pub fn domain_ref(&self, domain: DomainId) -> &Domain {
        &self.domains[domain]
    }

    /// Bytes of pages that copies were ever begun into: how fast the pool turns over.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }

    /// Pool bookkeeping, for limits and figures.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What each namespace holds, by its slot.
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    fn held_mut(&mut self, namespace: u32) -> &mut Held {
        let position = namespace as usize;
        if self.held.len() <= position {
            self.held.resize(position + 1, Held::default());
        }
        &mut self.held[position]
    }

    /// Counts a block without all its shards.
    fn begin_unfinished(&mut self, namespace: u32) {
        self.unsealed += 1;
        self.held_mut(namespace).unfinished += 1;
    }

    /// It has all its shards, or is gone.
    fn end_unfinished(&mut self, namespace: u32) {
        self.unsealed -= 1;
        self.held_mut(namespace).unfinished -= 1;
    }

    /// A namespace of the catalog that holds no block and is not `in_use`.
    pub fn unused_namespace(&self, in_use: impl Fn(u32) -> bool) -> Option<u32> {
        let mut slots = self.catalog.namespaces().map(|namespace| namespace.slot);
        slots.find(|slot| {
            let held = self.held.get(*slot as usize).copied().unwrap_or_default();
            held.blocks == 0 && held.unfinished == 0 && !in_use(*slot)
        })
    }

    fn hold(&mut self, namespace: u32, blocks: i64, bytes: i64) {
        let held = self.held_mut(namespace);
        held.blocks = held.blocks.wrapping_add_signed(blocks);
        held.bytes = held.bytes.wrapping_add_signed(bytes);
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The catalog, to change.
    pub fn catalog_mut(&mut self) -> &mut Catalog {
        &mut self.catalog
    }

    /// Figures for gauges.
    pub fn figures(&self) -> CacheFigures {
        let sealed: u64 = self
            .domains
            .iter()
            .map(|d| u64::from(d.index.writer.sealed_len()))
            .sum();
        let stats = self.pool.stats();
        CacheFigures {
            sealed,
            unfinished: self.unsealed,
            pinned: self.domains.iter().map(|d| u64::from(d.pinned)).sum(),
            used_bytes: self.domains.iter().map(|domain| domain.bytes).sum(),
            used_extents: u64::from(stats.extents - stats.extents_free),
        }
    }

    /// Takes the eviction counts, and tells the admission gate how much really fits.
    pub fn take_evictions(&mut self) -> Evictions {
        let sealed: u32 = self
            .domains
            .iter()
            .map(|domain| domain.index.writer.sealed_len())
            .sum();
        if let Some(admission) = &mut self.admission
            && self.evictions.capacity > 0
        {
            admission.set_resident(sealed as usize);
        }
        std::mem::take(&mut self.evictions)
    }

    /// Sets the cache's clock, by which blocks that wait for shards grow old: seconds since the
    /// start.
    pub fn tell_time(&mut self, now_s: u32) {
        self.now_s = now_s;
    }
}

/// A domain cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// Too many domains.
    #[error(
        "isolation domain `{name}` would be the {}th of this daemon: put users that may share blocks \
         into one [[domain]] of the configuration, or start another daemon",
        MAX_DOMAINS + 1
    )]
    TooMany {
        /// The domain.
        name: String,
    },
    /// The index file.
    #[error(transparent)]
    Index(#[from] IndexFileError),
}
