//! Sizes of a replay: what the daemon's pool and the engines' KV memory must hold.

#![forbid(unsafe_code)]

use std::num::NonZero;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::{Args, ValueEnum};

use super::kv::{KvShape, MemoryKind};
use super::member::Identity;
use super::trace::Request;
use super::workload::totals;
use crate::daemon::DaemonSpec;
use crate::error::ToolError;

/// The daemon stores a page as a multiple of this.
const PAGE_ALIGN_BYTES: u64 = 64;
/// Smallest page that the daemon stores.
const MIN_PAGE_BYTES: u64 = 512;
/// Extents are a multiple of this.
const EXTENT_GRANULE_BYTES: u64 = 4096;
/// Smallest and largest extent.
const EXTENT_RANGE_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=2 << 30;
/// A pool has at least as many extents.
const MIN_EXTENTS: u64 = 4;
/// Smallest pool.
const MIN_POOL_BYTES: u64 = 1 << 20;
/// Extent that a pool of several is cut into.
const USUAL_EXTENT_BYTES: u64 = 64 << 20;
/// KV blocks of an engine, as a multiple of its longest request.
const KV_REQUESTS: usize = 2;

/// Eviction policies of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Least recently used.
    Lru,
    /// Small, main and ghost queue.
    S3Fifo,
}

/// Admission gates of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Admission {
    /// Everything is let in.
    None,
    /// What was used more often than the victim is let in.
    Tinylfu,
}

fn flag_value(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Flags of `replay`.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// Trace in the Mooncake format (one JSON object a line: timestamp, input_length,
    /// output_length, hash_ids). Without it a seeded workload of multi-turn conversations is
    /// generated. Timestamps are ignored: requests follow one another as fast as they are done
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Engines: each is a scheduler process with its own instance; requests are dealt to them by
    /// conversation, else in turn. With one engine they run in order, and hit ratios can be
    /// compared
    #[arg(long, value_name = "N", default_value = "1")]
    pub engines: NonZero<usize>,
    /// Worker processes per engine; each holds one shard of every block
    #[arg(long, value_name = "R", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=128))]
    pub ranks: u32,
    /// Bytes of a block in one rank, such as 4KiB; a multiple of 8 times --segments
    #[arg(long, value_name = "BYTES", default_value = "4KiB")]
    pub page_bytes: ByteSize,
    /// Arrays that a block is spread over in the KV memory: 2 is K and V apart
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub segments: u32,
    /// KV memory: allocated through the library and shared with the daemon, or plain process memory
    #[arg(long, value_enum, default_value_t = MemoryKind::Shared)]
    pub memory: MemoryKind,
    /// Size of the daemon's pool, such as 1GiB [default: half of what the workload's different
    /// blocks need]
    #[arg(long, value_name = "SIZE", conflicts_with = "capacity_blocks")]
    pub pool_size: Option<ByteSize>,
    /// Size the pool so that exactly this many blocks fit
    #[arg(long, value_name = "BLOCKS")]
    pub capacity_blocks: Option<NonZero<u64>>,
    /// Which block leaves first
    #[arg(long, value_enum, default_value_t = Policy::Lru)]
    pub policy: Policy,
    /// What is let into a full cache
    #[arg(long, value_enum, default_value_t = Admission::None)]
    pub admission: Admission,
    /// File of the daemon's SSD tier, an absolute path with a size, such as
    /// /mnt/nvme0/replay.ssd:20GiB; repeat it for several. A file that is not there is made, and
    /// removed at the end
    #[arg(long, value_name = "PATH:SIZE")]
    pub ssd: Vec<String>,
    /// Also replay without the SSD tier, through a daemon of its own, a few hundred requests of
    /// each in turns, and compare how long the same queries take that need nothing from SSD
    #[arg(long, requires = "ssd")]
    pub beside_ram: bool,
    /// Which blocks the SSD tier is given: evict, seal or hits:N [default: the daemon's]
    #[arg(long, value_name = "WHEN", requires = "ssd")]
    pub ssd_admit: Option<String>,
    /// How long the answer to a save waits for the SSD tier, or off. A replay saves faster than any
    /// engine: without this its figures are those of a tier that loses what the drives are too slow
    /// for
    #[arg(long, value_name = "TIME", default_value = "2s")]
    pub ssd_save_wait: String,
    /// Copy threads of the daemon [default: the daemon's]
    #[arg(long, value_name = "N")]
    pub copy_threads: Option<NonZero<u32>>,
    /// Replay this many requests at most [default: the whole trace; 2000 without one]
    #[arg(long, value_name = "COUNT")]
    pub requests: Option<NonZero<usize>>,
    /// Name under which the blocks are kept: a later replay of the same sizes with the same name
    /// finds those of this one, for as long as the daemon of --socket or its SSD tier has them
    /// [default: a name that no other run has]
    #[arg(long, value_name = "TEXT")]
    pub salt: Option<String>,
    /// Decides the generated workload and which KV blocks are used
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
}

/// Everything that follows from the flags and the workload.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon, if it is to be our own.
    pub daemon: DaemonSpec,
    /// Engines.
    pub engines: usize,
    /// Ranks of each.
    pub ranks: u32,
    /// KV memory of each rank.
    pub kv: KvShape,
    /// Blocks that fit, if the pool is ours.
    pub capacity_blocks: Option<u64>,
    /// Policy by its flag.
    pub policy: String,
    /// Files of the SSD tier, as given.
    pub ssd: Vec<String>,
    salt: String,
}

/// Pool and extent in bytes for `pages` pages with as little to spare as the daemon's limits allow.
fn fit_pool(pages: u64, page_bytes: u64) -> Result<(u64, u64), ToolError> {
    let stored = page_bytes
        .max(MIN_PAGE_BYTES)
        .next_multiple_of(PAGE_ALIGN_BYTES);
    let total = pages * stored;
    let extents = MIN_EXTENTS.max(total.div_ceil(USUAL_EXTENT_BYTES));
    let pages_per_extent = pages.div_ceil(extents);
    let extent = (pages_per_extent * stored)
        .next_multiple_of(EXTENT_GRANULE_BYTES)
        .max(*EXTENT_RANGE_BYTES.start());
    if extent > *EXTENT_RANGE_BYTES.end() {
        let limit = EXTENT_RANGE_BYTES.end();
        return Err(ToolError::Plan(format!(
            "--page-bytes {page_bytes}: the largest page is {limit} bytes, the largest extent"
        )));
    }
    let extents = pages.div_ceil(extent / stored).max(MIN_EXTENTS);
    let extents = extents.max(MIN_POOL_BYTES.div_ceil(extent));
    Ok((extents * extent, extent))
}

impl Plan {
    /// Works the sizes out. With `uses_running` the daemon exists already and flags for it are
    /// refused.
    ///
    /// # Errors
    /// Sizes that contradict each other.
    pub fn new(
        args: &ReplayArgs,
        requests: &[Request],
        uses_running: bool,
    ) -> Result<Plan, ToolError> {
        let page_bytes = args.page_bytes.as_u64();
        let granule = 8 * u64::from(args.segments);
        if page_bytes == 0 || !page_bytes.is_multiple_of(granule) {
            return Err(ToolError::Plan(format!(
                "--page-bytes {page_bytes}: give a multiple of {granule} (8 times --segments {})",
                args.segments
            )));
        }
        let sized = args.pool_size.is_some() || args.capacity_blocks.is_some();
        if uses_running && (sized || !args.ssd.is_empty()) {
            return Err(ToolError::Plan(
                "--pool-size, --capacity-blocks and --ssd are for a daemon of our own: leave them out \
                 with --socket"
                    .into(),
            ));
        }
        let (_, different, longest) = totals(requests);
        let ranks = u64::from(args.ranks);
        let kv_blocks = u32::try_from(longest * KV_REQUESTS)
            .map_err(|_| ToolError::Plan(format!("a request of {longest} blocks is too long")))?;
        let kv = KvShape {
            memory: args.memory,
            num_blocks: kv_blocks.max(1),
            page_bytes: page_bytes as usize,
            segments: args.segments as usize,
        };
        let mut daemon = DaemonSpec::with_pool(0);
        let capacity = args.capacity_blocks.map(NonZero::get);
        if let Some(size) = args.pool_size {
            daemon.pool_bytes = size.as_u64();
            // Pages larger than a quarter of the default extent need a larger one.
            daemon.extent_bytes = (page_bytes * 4 > USUAL_EXTENT_BYTES).then(|| {
                (page_bytes * 4)
                    .next_multiple_of(EXTENT_GRANULE_BYTES)
                    .min(*EXTENT_RANGE_BYTES.end())
            });
        } else {
            let blocks = capacity.unwrap_or((different / 2).max(longest as u64 * 4));
            let (pool_bytes, extent_bytes) = fit_pool(blocks * ranks, page_bytes)?;
            daemon.pool_bytes = pool_bytes;
            daemon.extent_bytes = Some(extent_bytes);
            daemon.max_blocks = Some(blocks);
        }
        daemon.policy = Some(flag_value(args.policy));
        daemon.admission = Some(flag_value(args.admission));
        daemon.copy_threads = args.copy_threads.map(NonZero::get);
        for shard in &args.ssd {
            daemon.further.extend(["--ssd".to_owned(), shard.clone()]);
        }
        if let Some(when) = &args.ssd_admit {
            let further = ["--ssd-admit".to_owned(), when.clone()];
            daemon.further.extend(further);
        }
        if !args.ssd.is_empty() {
            let further = ["--ssd-save-wait".to_owned(), args.ssd_save_wait.clone()];
            daemon.further.extend(further);
        }
        let fresh = || {
            let time = crate::output::unix_now_ms();
            format!("replay {}-{time}", std::process::id())
        };
        Ok(Plan {
            // A running daemon has the room that it was started with.
            capacity_blocks: daemon.max_blocks.filter(|_| !uses_running),
            daemon,
            engines: args.engines.get(),
            ranks: args.ranks,
            kv,
            policy: flag_value(args.policy),
            ssd: args.ssd.clone(),
            salt: args.salt.clone().unwrap_or_else(fresh),
        })
    }

    /// Files of the SSD tier that are not there yet: the daemon makes them.
    pub fn new_files(&self) -> Vec<PathBuf> {
        let paths = self.ssd.iter().map(|shard| {
            let path = shard
                .rsplit_once(':')
                .map_or(shard.as_str(), |(path, _)| path);
            PathBuf::from(path)
        });
        paths.filter(|path| !path.exists()).collect()
    }

    /// What the processes of one engine agree on.
    pub fn identity(&self, socket: &Path, engine: usize) -> Identity {
        Identity {
            socket: socket.to_owned(),
            instance: format!("replay-{}-engine-{engine}", std::process::id()),
            salt: self.salt.clone(),
            world_size: self.ranks,
            kv: self.kv,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_holds_the_pages_and_hardly_more() {
        for (pages, page_bytes) in [
            (10_000, 4096),
            (20_000, 4096),
            (7, 2 << 20),
            (1, 1000),
            (365_580, 4096),
            (100, 96 << 10),
        ] {
            let (pool, extent) = fit_pool(pages, page_bytes).unwrap();
            assert!(pool.is_multiple_of(extent) && extent.is_multiple_of(4096));
            assert!(EXTENT_RANGE_BYTES.contains(&extent) && pool / extent >= 4 && pool >= 1 << 20);
            let stored = page_bytes.max(512).next_multiple_of(64);
            let fit = (extent / stored) * (pool / extent);
            assert!(fit >= pages, "{fit} of {pages} pages");
            if pages * stored > 32 << 20 {
                assert!(
                    pool < pages * stored * 11 / 10,
                    "{pool} for {}",
                    pages * stored
                );
            }
        }
        assert!(fit_pool(4, 3 << 30).is_err());
    }
}
