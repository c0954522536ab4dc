//! What the fuzz target does: superblocks and tables of any bytes. `fuzz/` wraps it for libFuzzer;
//! the tests here run it over seeds and what mutation makes of them.
//!
//! The first chunk of an input is a superblock. Each further part is a byte that names a
//! segment, one that names a slot, and a chunk of its table. The highest bits of both bytes ask for
//! right checksums and for the right place, so that inputs get past those.

#![forbid(unsafe_code)]

use std::io;
use std::time::Instant;

use twox_hash::XxHash3_64;

use crate::format::{CHUNK_BYTES, Chunk, Geometry, Id, Place, Record, Superblock};
use crate::mover::{Command, Done};
use crate::open::take_in;
use crate::options::Options;
use crate::port::Port;
use crate::scan::{ReadAt, scan};
use crate::shard::{Parts, Shard};
use crate::stats::ShardStats;
use crate::tier::ShardReport;

const SHARD: Id = [5; 16];
const REPAIR: u8 = 0x80;

fn geometry() -> Geometry {
    Geometry {
        segments: 8,
        ..Geometry::for_file(0, Geometry::MIN_SEGMENT_BYTES)
    }
}

struct Image(Vec<u8>);

impl ReadAt for Image {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// A shard without a drive.
struct NoPort;

impl Port for NoPort {
    fn send(&mut self, _command: Command) {}

    fn receive(&mut self) -> Option<Done> {
        None
    }

    fn oldest(&self) -> Option<std::time::Instant> {
        None
    }

    fn stop(&mut self) {}

    fn has_stopped(&self) -> bool {
        true
    }
}

fn repair(chunk: &mut [u8], checksum_at: usize, covered: usize) {
    chunk[checksum_at..checksum_at + 8].fill(0);
    let checksum = XxHash3_64::oneshot(&chunk[..covered]);
    chunk[checksum_at..checksum_at + 8].copy_from_slice(&checksum.to_le_bytes());
}

/// The target.
pub fn shard(data: &[u8]) {
    let (superblock, tables) = data.split_at(data.len().min(CHUNK_BYTES));
    if let Ok(superblock) = Superblock::choose(superblock) {
        assert!(superblock.geometry.is_valid());
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }
    let geometry = geometry();
    let mut image = Image(vec![0; geometry.file_bytes() as usize]);
    for part in tables.chunks_exact(CHUNK_BYTES + 2) {
        let (segment, slot) = (
            u32::from(part[0] & 7),
            u32::from(part[1]) % geometry.slots(),
        );
        let offset = geometry.chunk_offset(segment, slot) as usize;
        let chunk = &mut image.0[offset..offset + CHUNK_BYTES];
        chunk.copy_from_slice(&part[2..]);
        if part[1] & REPAIR != 0 {
            chunk[..8].copy_from_slice(b"PEGATBL\0");
            chunk[16..32].copy_from_slice(&SHARD);
            chunk[40..44].copy_from_slice(&segment.to_le_bytes());
            chunk[44..48].copy_from_slice(&slot.to_le_bytes());
        }
        if part[0] & REPAIR != 0 {
            repair(chunk, 8, CHUNK_BYTES);
        }
    }
    open(&image, &geometry);
}

fn open(image: &Image, geometry: &Geometry) {
    let found = scan(image, SHARD, geometry).expect("memory can be read");
    for segment in &found.segments {
        assert!(segment.generation <= Place::GENERATION_MAX);
        assert!(
            segment
                .records
                .iter()
                .all(|record| record.is_valid(geometry))
        );
    }
    assert!(found.last_write_id() <= Record::WRITE_ID_MAX);
    let options = Options::new("fuzz", Vec::new());
    let parts = Parts {
        index: 0,
        id: SHARD,
        geometry: *geometry,
        port: Box::new(NoPort),
        policy: pegaflow_policy::build(options.policy, geometry.segments),
        stats: ShardStats::default(),
    };
    let now = Instant::now();
    let mut shards = [Shard::new(now, &options, parts)];
    let mut reports = [ShardReport::default()];
    let index = take_in(&mut shards, std::slice::from_ref(&found), &mut reports);
    assert_eq!(reports[0].blocks, index.len() as u64);
    for &(_, block) in index.values() {
        let pages = shards[0]
            .live(block)
            .expect("what is in the index is there");
        for page in pages {
            let end = u64::from(page.offset) + u64::from(page.bytes);
            assert!(end <= u64::from(geometry.segment_bytes) && page.segment < geometry.segments);
        }
    }
    // Whatever was found, the shard goes on: everything can leave again.
    shards[0].poll(now);
    for &(_, block) in index.values() {
        shards[0].forget(block);
    }
    let stats = shards[0].stats();
    assert_eq!((stats.blocks, stats.live_bytes), (0, 0));
}

/// Inputs that get far.
pub fn seeds() -> Vec<Vec<u8>> {
    let superblock = Superblock {
        sequence: 2,
        created_unix_s: 1,
        geometry: geometry(),
        set: [1; 16],
        shard: SHARD,
        node: "fuzz".to_owned(),
        members: vec![SHARD],
    };
    let record = |block: u8, page: u16, pages: u16, offset: u32| Record {
        scope: [1; 32],
        hash: [block; 32],
        write_id: u64::from(block),
        checksum: 7,
        group: 0,
        page,
        pages,
        offset,
        bytes: 4000,
    };
    let chunk = |segment: u32, slot: u32, generation: u64, records: Vec<Record>| {
        let place = Place {
            shard: SHARD,
            segment,
            generation,
        };
        let mut part = vec![segment as u8 | REPAIR, slot as u8 | REPAIR];
        let chunk = Chunk {
            place,
            slot,
            records,
        };
        part.extend(&chunk.encode()[..]);
        part
    };
    let head = superblock.encode();
    let one = chunk(0, 0, 1, vec![record(1, 0, 1, 0)]);
    let two = [
        chunk(1, 0, 4, Vec::new()),
        chunk(1, 1, 4, vec![record(2, 0, 2, 0), record(2, 1, 2, 4096)]),
    ]
    .concat();
    let split = [
        chunk(2, 0, 2, vec![record(3, 0, 2, 61_440)]),
        chunk(3, 0, 3, vec![record(3, 1, 2, 0), record(1, 0, 1, 4096)]),
    ]
    .concat();
    let later = [
        chunk(4, 0, 9, vec![record(5, 0, 1, 0)]),
        chunk(4, 1, 8, vec![record(6, 0, 1, 4096)]),
    ]
    .concat();
    [one, two, split, later]
        .into_iter()
        .map(|tables| [head.to_vec(), tables].concat())
        .chain([Vec::new(), head.to_vec()])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::disk::Dice;

    /// `PEGAFLOW_FUZZ_CASES` asks for another number.
    const CASES: u64 = 2000;

    #[test]
    fn seeds_get_where_they_are_meant_to() {
        for (seed, blocks) in seeds().iter().zip([1, 1, 2, 1, 0, 0]) {
            let mut image = Image(vec![0; geometry().file_bytes() as usize]);
            for part in seed
                .get(CHUNK_BYTES..)
                .unwrap_or(&[])
                .chunks(CHUNK_BYTES + 2)
            {
                let (segment, slot) = (u32::from(part[0] & 7), u32::from(part[1] & 3));
                let offset = geometry().chunk_offset(segment, slot) as usize;
                image.0[offset..offset + CHUNK_BYTES].copy_from_slice(&part[2..]);
            }
            let found = scan(&image, SHARD, &geometry()).expect("memory can be read");
            assert_eq!(found.blocks().0.len(), blocks);
            assert_eq!(found.bad_chunks, 0);
            shard(seed);
        }
    }

    fn committed(kind: &str) -> std::path::PathBuf {
        let fuzz = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");
        std::path::Path::new(fuzz).join(kind).join("ssd")
    }

    #[test]
    fn what_is_in_the_corpus_and_what_once_was_found_does_no_harm() {
        if std::env::var_os("PEGAFLOW_FUZZ_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(committed("corpus")).expect("a folder");
            for (at, seed) in seeds().iter().enumerate() {
                let path = committed("corpus").join(format!("{at:02}"));
                std::fs::write(path, seed).expect("written");
            }
        }
        let read = |kind| {
            let files = std::fs::read_dir(committed(kind)).into_iter().flatten();
            files.map(|file| std::fs::read(file.expect("an entry").path()).expect("a file"))
        };
        let corpus: Vec<Vec<u8>> = read("corpus").collect();
        assert!(
            corpus.len() >= seeds().len(),
            "the corpus is committed (make fuzz-seeds)"
        );
        for input in corpus.into_iter().chain(read("regressions")) {
            shard(&input);
        }
    }

    #[test]
    fn no_superblock_and_no_table_does_harm() {
        let cases = std::env::var("PEGAFLOW_FUZZ_CASES")
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(CASES);
        let seeds = seeds();
        for case in 0..cases {
            let mut dice = Dice::new(case);
            let mut input = seeds[dice.below(seeds.len() as u64) as usize].clone();
            let other = &seeds[dice.below(seeds.len() as u64) as usize];
            input.extend(other.get(CHUNK_BYTES..).unwrap_or(&[]));
            if input.is_empty() {
                continue;
            }
            for _ in 0..dice.below(12) {
                // Mostly where something stands: headers and the first records.
                let chunk = dice.below(input.len() as u64 / CHUNK_BYTES as u64 + 1);
                let at = chunk * (CHUNK_BYTES as u64 + 2) + dice.below(270);
                if let Some(byte) = input.get_mut(at as usize) {
                    *byte = match dice.below(4) {
                        0 => 0,
                        1 => 0xff,
                        2 => *byte ^ 1 << dice.below(8),
                        _ => dice.below(256) as u8,
                    };
                }
            }
            shard(&input);
        }
    }
}
