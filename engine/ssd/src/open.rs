//! The steps of opening shards: first everything is looked at, then what has to be changed is
//! changed. Who takes which step when is [`crate::opening`]'s business.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::block::BlockKey;
use crate::error::OpenError;
use crate::file::{Named, ShardFile, make};
use crate::format::{Geometry, Id, MEMBERS_MAX, Superblock};
use crate::io::{Engine, Threads, Uring};
use crate::memory::PoolMemory;
use crate::mover::{Alignment, Mover, bounce_area};
use crate::options::{IoChoice, Options, ShardSpec};
use crate::port::{Port, ThreadPort};
use crate::scan::scan;
use crate::shard::{Found, OWN_COMMANDS, Page, Parts, Shard};
use crate::stats::ShardStats;
use crate::tier::ShardReport;

/// The longest node name.
const NODE_BYTES_MAX: usize = 64;
/// The deepest queue at a drive.
const DEPTH_MAX: u32 = 1024;

/// What is called when something has ended.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// What can be said of options without looking at a file.
pub(crate) fn check(options: &Options) -> Result<(), OpenError> {
    if options.shards.len() > Options::MAX_SHARDS {
        return Err(OpenError::TooManyShards {
            count: options.shards.len(),
            most: Options::MAX_SHARDS,
        });
    }
    if options.node.len() > NODE_BYTES_MAX {
        return Err(OpenError::NodeName {
            node: options.node.clone(),
            most: NODE_BYTES_MAX,
        });
    }
    let mut paths = BTreeSet::new();
    for spec in &options.shards {
        if !paths.insert(&spec.path) {
            return Err(OpenError::NamedTwice {
                path: spec.path.clone(),
            });
        }
    }
    Ok(())
}

/// The geometry that a shard is to have.
pub(crate) fn plan_size(
    options: &Options,
    spec: &ShardSpec,
    named: &Named,
) -> Result<Geometry, OpenError> {
    let path = || spec.path.clone();
    let (mut geometry, bytes) = match named {
        Named::Nothing => {
            let bytes = spec.bytes.ok_or(OpenError::SizeMissing { path: path() })?;
            let geometry = Geometry::for_file(bytes, options.segment_bytes);
            (geometry, bytes)
        }
        Named::Shard(file) => {
            let mut geometry = file.superblock.geometry;
            // A file that was cut has lost the segments at its end.
            geometry.segments = geometry.segments.min(geometry.segments_in(file.bytes));
            if let Some(bytes) = spec.bytes {
                geometry.segments = geometry.segments_in(bytes);
            }
            (geometry, spec.bytes.unwrap_or(file.bytes))
        }
    };
    if geometry.segments < Geometry::MIN_SEGMENTS {
        geometry.segments = Geometry::MIN_SEGMENTS;
        return Err(OpenError::TooSmall {
            path: path(),
            bytes,
            least: geometry.file_bytes(),
        });
    }
    Ok(geometry)
}

/// Whose a shard is: its set, and its own name in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub set: Id,
    pub shard: Id,
}

/// Makes or resizes a shard's file.
pub(crate) fn prepare(
    options: &Options,
    spec: &ShardSpec,
    named: Named,
    geometry: Geometry,
    identity: Identity,
) -> Result<(ShardFile, ShardReport), OpenError> {
    let mut report = ShardReport {
        path: spec.path.clone(),
        ..ShardReport::default()
    };
    let file = match named {
        Named::Nothing => {
            report.created = true;
            let superblock = Superblock {
                sequence: 1,
                created_unix_s: unix_s(),
                geometry,
                set: identity.set,
                shard: identity.shard,
                node: options.node.clone(),
                members: Vec::new(),
            };
            let (file, note) = make(&spec.path, superblock, options.preallocate)?;
            report.notes.extend(note);
            file
        }
        Named::Shard(mut file) => {
            let had = file.superblock.geometry;
            if file.bytes < had.file_bytes() {
                report.notes.push(format!(
                    "the file was cut from {} to {} bytes: what was at its end is lost",
                    had.file_bytes(),
                    file.bytes
                ));
            }
            if had.segments != geometry.segments {
                report.notes.push(format!(
                    "resized from {} to {} segments",
                    had.segments, geometry.segments
                ));
                let note = file.resize(geometry.segments, options.preallocate)?;
                report.notes.extend(note);
            }
            file
        }
    };
    let geometry = &file.superblock.geometry;
    report.segments = geometry.segments;
    report.segment_bytes = geometry.segment_bytes;
    report.segment_pages = geometry.records_max();
    Ok((file, report))
}

pub(crate) fn random_id() -> Id {
    let mut id = [0; 16];
    // The kernel's generator is seeded long before anything opens a drive; what it does not give
    // stays zero, and the shard is refused as a copy of another one.
    let _ = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    id
}

fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Lets a shard know of its set: `here` are the shards that are open, `known` all that there are.
pub(crate) fn write_members(
    file: &mut ShardFile,
    here: &BTreeSet<Id>,
    known: &BTreeSet<Id>,
) -> Result<(), OpenError> {
    let missing = known.difference(here);
    let members: Vec<Id> = here
        .iter()
        .chain(missing)
        .copied()
        .take(MEMBERS_MAX)
        .collect();
    if file.superblock.members != members {
        file.superblock.members = members;
        file.superblock.sequence += 1;
        file.rewrite_superblock(&file.superblock)?;
    }
    Ok(())
}

/// Reads all tables.
pub(crate) fn read_tables(file: &ShardFile) -> Result<Found, OpenError> {
    let superblock = &file.superblock;
    scan(&*file.plain, superblock.shard, &superblock.geometry).map_err(|source| OpenError::Io {
        path: file.path.clone(),
        call: "read",
        source,
    })
}

/// Starts a shard's thread.
pub(crate) fn start(
    options: &Options,
    index: u16,
    file: &ShardFile,
    pool: &PoolMemory,
    wake: &Wake,
    report: &mut ShardReport,
) -> Result<Shard, OpenError> {
    let failed = |call| {
        let path = file.path.clone();
        move |source| OpenError::Io { path, call, source }
    };
    let (pages, alignment, note) = file.open_for_pages()?;
    report.notes.extend(note);
    let depth = options.queue_depth.clamp(1, DEPTH_MAX);
    let bounce = bounce_area(depth);
    let areas = vec![pool.area(), bounce.clone()];
    let locks: Vec<&File> = std::iter::once(&file.plain)
        .chain(pool.lock())
        .map(AsRef::as_ref)
        .collect();
    let uring = match options.io {
        IoChoice::Threads => Err(None),
        IoChoice::Auto | IoChoice::Uring => Uring::new(
            Arc::clone(&pages),
            depth,
            options.sqpoll_idle,
            areas.clone(),
        )
        .and_then(|(engine, shortfall)| {
            engine.keep_open(&locks)?;
            Ok((engine, shortfall))
        })
        .map_err(Some),
    };
    let commands = (options.max_pending as usize).max(Options::MAX_PAGES) + OWN_COMMANDS;
    let name = format!("ssd-{index}");
    let lock = Arc::clone(&file.plain);
    let port: Box<dyn Port> = match uring {
        Ok((engine, shortfall)) => {
            report.notes.extend(shortfall);
            report.io = engine.name();
            let mover = Mover::new(engine, pool.area(), bounce, alignment);
            let port = ThreadPort::start(name, mover, lock, commands, Arc::clone(wake));
            Box::new(port.map_err(failed("start of a thread"))?)
        }
        Err(Some(source)) if options.io == IoChoice::Uring => {
            return Err(OpenError::NoUring {
                path: file.path.clone(),
                source,
            });
        }
        Err(error) => {
            if let Some(error) = error {
                report.notes.push(format!(
                    "no io_uring ({error}): threads move the pages, at a greater cost"
                ));
            }
            let engine = Threads::new(pages, depth, areas).map_err(failed("start of a thread"))?;
            report.io = engine.name();
            let mover = Mover::new(engine, pool.area(), bounce, alignment);
            let port = ThreadPort::start(name, mover, lock, commands, Arc::clone(wake));
            Box::new(port.map_err(failed("start of a thread"))?)
        }
    };
    report.direct = alignment
        != Alignment {
            memory: 1,
            offset: 1,
        };
    Ok(Shard::new(
        Instant::now(),
        options,
        Parts {
            index,
            id: file.superblock.shard,
            geometry: file.superblock.geometry,
            port,
            policy: pegaflow_policy::build(options.policy, file.superblock.geometry.segments),
            stats: ShardStats {
                path: file.path.clone(),
                ..ShardStats::default()
            },
        },
    ))
}

/// Which block is where: shard and number.
pub(crate) type Index = HashMap<BlockKey, (u16, u32)>;

/// Gives each shard the blocks that its file has. Of several with one key the newest counts.
pub(crate) fn take_in(shards: &mut [Shard], found: &[Found], reports: &mut [ShardReport]) -> Index {
    let mut newest: HashMap<BlockKey, (u64, usize, Box<[Page]>)> = HashMap::new();
    for (at, found) in found.iter().enumerate() {
        let (blocks, broken) = found.blocks();
        reports[at].dropped_blocks += broken;
        reports[at].bad_chunks = found.bad_chunks;
        shards[at].found(found);
        newest.reserve(blocks.len());
        for (key, write_id, pages) in blocks {
            match newest.get(&key) {
                Some(&(other, _, _)) if other >= write_id => reports[at].dropped_blocks += 1,
                Some(&(_, old, _)) => {
                    reports[old].dropped_blocks += 1;
                    newest.insert(key, (write_id, at, pages));
                }
                None => {
                    newest.insert(key, (write_id, at, pages));
                }
            }
        }
    }
    let mut index = Index::with_capacity(newest.len());
    for (key, (write_id, at, pages)) in newest {
        reports[at].blocks += 1;
        let block = shards[at].adopt(key, write_id, pages);
        index.insert(key, (at as u16, block));
    }
    for shard in shards {
        shard.adopted();
    }
    index
}
