//! Opening a full set of 20 GiB (without optimization: 2 GiB) of small pages: only tables are read.

#![forbid(unsafe_code)]

use std::os::unix::fs::FileExt;

use crate::block::BlockKey;
use crate::file::{Named, ShardFile, look, make};
use crate::format::{Chunk, Geometry, Place, RECORDS_PER_CHUNK, Record, Superblock};
use crate::memory::PoolMemory;
use crate::options::{Options, ShardSpec};
use crate::tier::Tier;

const SHARDS: u64 = 2;
const SHARD_BYTES: u64 = if cfg!(debug_assertions) {
    1 << 30
} else {
    10 << 30
};
const PAGE: u32 = 64 << 10;

fn key(shard: u64, segment: u32, page: u32) -> BlockKey {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&page.to_le_bytes());
    hash[4..8].copy_from_slice(&segment.to_le_bytes());
    hash[8] = shard as u8;
    BlockKey {
        scope: [3; 32],
        group: 0,
        hash,
    }
}

/// Writes the tables of a shard all of whose segments are full of pages. The pages are holes.
fn fill(file: &ShardFile, shard: u64) -> u64 {
    let geometry = file.superblock.geometry;
    let mut blocks = 0;
    for segment in 0..geometry.segments {
        let records: Vec<Record> = (0..geometry.segment_bytes / PAGE)
            .map(|page| Record {
                scope: key(shard, segment, page).scope,
                hash: key(shard, segment, page).hash,
                write_id: u64::from(segment) << 32 | u64::from(page) << 8 | shard,
                checksum: 1,
                group: 0,
                page: 0,
                pages: 1,
                offset: page * PAGE,
                bytes: PAGE,
            })
            .collect();
        for (slot, records) in (0..).zip(records.chunks(RECORDS_PER_CHUNK)) {
            let chunk = Chunk {
                place: Place {
                    shard: file.superblock.shard,
                    segment,
                    generation: u64::from(segment) + 1,
                },
                slot,
                records: records.to_vec(),
            };
            file.plain
                .write_all_at(&chunk.encode(), geometry.chunk_offset(segment, slot))
                .expect("written");
        }
        blocks += records.len() as u64;
    }
    blocks
}

#[test]
fn a_full_set_opens_by_its_tables() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut blocks = 0;
    let mut specs = Vec::new();
    for shard in 0..SHARDS {
        let path = folder.path().join(format!("shard{shard}"));
        let superblock = Superblock {
            sequence: 1,
            created_unix_s: 0,
            geometry: Geometry::for_file(SHARD_BYTES, 64 << 20),
            set: [1; 16],
            shard: [shard as u8 + 1; 16],
            node: "test".to_owned(),
            members: Vec::new(),
        };
        let (file, _) = make(&path, superblock, false).expect("made");
        blocks += fill(&file, shard);
        // What opening writes must not wait for what this test wrote.
        file.plain.sync_all().expect("synced");
        specs.push(ShardSpec { path, bytes: None });
    }
    assert!(matches!(look(&specs[0].path), Ok(Named::Shard(_))));
    let pool = PoolMemory::with_content(&[0; 4096]);
    let (mut tier, report) = Tier::open(Options::new("test", specs), pool, || ()).expect("opens");
    eprintln!(
        "{blocks} blocks of {SHARDS} shards of {} GiB opened in {:?}",
        SHARD_BYTES >> 30,
        report.took
    );
    assert!(blocks > 30_000);
    assert_eq!(
        report.shards.iter().map(|shard| shard.blocks).sum::<u64>(),
        blocks
    );
    assert!(tier.lookup(&key(1, 7, 9)).is_some());
    assert_eq!(tier.blocks().count() as u64, blocks);
    tier.remove(&key(1, 7, 9));
    assert!(tier.lookup(&key(1, 7, 9)).is_none());
}
