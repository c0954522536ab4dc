//! Opening a set of shards: first everything is looked at, then what has to be changed is changed.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::block::BlockKey;
use crate::error::OpenError;
use crate::file::{Named, ShardFile, look, make};
use crate::format::{Geometry, Id, MEMBERS_MAX, Record, Superblock};
use crate::io::{Engine, Threads, Uring};
use crate::memory::PoolMemory;
use crate::mover::{Alignment, Mover, bounce_area};
use crate::options::{IoChoice, Options, ShardSpec};
use crate::port::{Port, ThreadPort};
use crate::scan::scan;
use crate::shard::{Found, OWN_COMMANDS, Page, Parts, Shard};
use crate::stats::ShardStats;
use crate::tier::{OpenReport, ShardReport, Tier};

/// The longest node name.
const NODE_BYTES_MAX: usize = 64;
/// The deepest queue at a drive.
const DEPTH_MAX: u32 = 1024;

/// What is called when something has ended.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// Opens the shards of `options`.
pub(crate) fn open(
    options: &Options,
    pool: &PoolMemory,
    wake: &Wake,
) -> Result<(Tier, OpenReport), OpenError> {
    let started = Instant::now();
    check(options)?;
    let named: Vec<Named> = options
        .shards
        .iter()
        .map(|spec| look(&spec.path, true))
        .collect::<Result<_, _>>()?;
    check_set(options, &named)?;
    let sizes = plan_sizes(options, &named)?;
    let (files, mut reports) = apply(options, named, &sizes)?;
    let missing_shards = write_members(&files)?;
    let found = scan_all(&files)?;
    let mut shards = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let report = &mut reports[index];
        let shard = start(options, index as u16, file, pool, wake, report)?;
        shards.push(shard);
    }
    let last_write_id = found.iter().map(Found::last_write_id).max().unwrap_or(0);
    let index = take_in(&mut shards, &found, &mut reports);
    // Newer than all there is, and than what a shard that is missing has.
    let unix_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let next_write_id = last_write_id.max(unix_ns).min(Record::WRITE_ID_MAX) + 1;
    let tier = Tier::assemble(started, options, pool, shards, index, next_write_id);
    let report = OpenReport {
        shards: reports,
        missing_shards,
        took: started.elapsed(),
    };
    Ok((tier, report))
}

fn check(options: &Options) -> Result<(), OpenError> {
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

/// All shards that are there are this node's, of one set, and different ones.
fn check_set(options: &Options, named: &[Named]) -> Result<(), OpenError> {
    let mut first: Option<&ShardFile> = None;
    let mut seen: HashMap<Id, &Path> = HashMap::new();
    for file in named.iter().filter_map(Named::shard) {
        let superblock = &file.superblock;
        if superblock.node != options.node {
            return Err(OpenError::OtherNode {
                path: file.path.clone(),
                found: superblock.node.clone(),
                expected: options.node.clone(),
            });
        }
        let first = *first.get_or_insert(file);
        if superblock.set != first.superblock.set {
            return Err(OpenError::OtherSet {
                path: file.path.clone(),
                other: first.path.clone(),
            });
        }
        if let Some(other) = seen.insert(superblock.shard, &file.path) {
            return Err(OpenError::SameShard {
                path: file.path.clone(),
                other: other.into(),
            });
        }
    }
    Ok(())
}

/// The geometry that each shard is to have.
fn plan_sizes(options: &Options, named: &[Named]) -> Result<Vec<Geometry>, OpenError> {
    let plan = |spec: &ShardSpec, named: &Named| {
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
    };
    let both = options.shards.iter().zip(named);
    both.map(|(spec, named)| plan(spec, named)).collect()
}

/// Makes and resizes the files.
fn apply(
    options: &Options,
    named: Vec<Named>,
    sizes: &[Geometry],
) -> Result<(Vec<ShardFile>, Vec<ShardReport>), OpenError> {
    let set = named
        .iter()
        .find_map(Named::shard)
        .map_or_else(random_id, |file| file.superblock.set);
    let mut files = Vec::new();
    let mut reports = Vec::new();
    for ((spec, named), geometry) in options.shards.iter().zip(named).zip(sizes) {
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
                    geometry: *geometry,
                    set,
                    shard: random_id(),
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
        files.push(file);
        reports.push(report);
    }
    for (file, report) in files.iter().zip(&mut reports) {
        let geometry = &file.superblock.geometry;
        report.segments = geometry.segments;
        report.segment_bytes = geometry.segment_bytes;
        report.segment_pages = geometry.records_max();
    }
    Ok((files, reports))
}

fn random_id() -> Id {
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

/// Lets every shard know of the others. Says how many of the set were not named.
fn write_members(files: &[ShardFile]) -> Result<u32, OpenError> {
    let here: BTreeSet<Id> = files.iter().map(|file| file.superblock.shard).collect();
    let known: BTreeSet<Id> = files
        .iter()
        .flat_map(|file| file.superblock.members.iter().copied())
        .collect();
    let missing: Vec<Id> = known.difference(&here).copied().collect();
    let members: Vec<Id> = here
        .iter()
        .chain(&missing)
        .copied()
        .take(MEMBERS_MAX)
        .collect();
    for file in files {
        if file.superblock.members != members {
            let mut superblock = file.superblock.clone();
            superblock.members = members.clone();
            superblock.sequence += 1;
            file.rewrite_superblock(&superblock)?;
        }
    }
    Ok(missing.len() as u32)
}

/// Reads all tables, each shard's in a thread of its own.
fn scan_all(files: &[ShardFile]) -> Result<Vec<Found>, OpenError> {
    let scan_one = |file: &ShardFile| {
        scan(
            &*file.plain,
            file.superblock.shard,
            &file.superblock.geometry,
        )
    };
    let results: Vec<io::Result<Found>> = std::thread::scope(|scope| {
        let scans: Vec<_> = files
            .iter()
            .map(|file| scope.spawn(move || scan_one(file)))
            .collect();
        scans
            .into_iter()
            .map(|scan| {
                scan.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    let both = files.iter().zip(results);
    both.map(|(file, result)| {
        result.map_err(|source| OpenError::Io {
            path: file.path.clone(),
            call: "read",
            source,
        })
    })
    .collect()
}

/// Starts a shard's thread.
fn start(
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
