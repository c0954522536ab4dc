//! Reading the tables of a shard.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::io;

use crate::format::{CHUNK_BYTES, Chunk, ChunkError, Geometry, Id, Record};
use crate::shard::{Found, FoundSegment};

/// Chunks are written to the lowest free slots and at most one lower slot is not current: behind so
/// many that are not current there is none.
const GAP: u32 = 4;
/// Chunks read at a time.
const BATCH: u32 = 8;

/// Reads bytes of a shard's file; what lies behind the file's end is zero.
pub(crate) trait ReadAt {
    /// Fills the buffer.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let got = crate::file::read_up_to(self, buffer, offset)?;
        buffer[got..].fill(0);
        Ok(())
    }
}

/// Reads the tables of all segments.
pub(crate) fn scan(file: &dyn ReadAt, shard: Id, geometry: &Geometry) -> io::Result<Found> {
    let mut found = Found::default();
    for segment in 0..geometry.segments {
        let (table, bad) = scan_segment(file, shard, segment, geometry)?;
        found.segments.extend(table);
        found.bad_chunks += bad;
    }
    Ok(found)
}

/// Reads the table of one segment. None if it is blank. Says how many chunks are damaged.
pub(crate) fn scan_segment(
    file: &dyn ReadAt,
    shard: Id,
    segment: u32,
    geometry: &Geometry,
) -> io::Result<(Option<FoundSegment>, u64)> {
    let mut table = FoundSegment {
        segment,
        ..FoundSegment::default()
    };
    let mut seen = HashSet::new();
    let (mut blank, mut bad, mut gap, mut slot) = (true, 0, 0, 0);
    let mut buffer = vec![0; CHUNK_BYTES * BATCH as usize];
    while slot < geometry.slots() && gap < GAP {
        let count = BATCH.min(geometry.slots() - slot);
        let batch = &mut buffer[..CHUNK_BYTES * count as usize];
        file.read_at(batch, geometry.chunk_offset(segment, slot))?;
        for bytes in batch.chunks_exact(CHUNK_BYTES) {
            let chunk = Chunk::decode(bytes, shard, segment, slot, geometry);
            slot += 1;
            blank &= chunk == Err(ChunkError::Blank);
            match chunk {
                Ok(chunk) if chunk.place.generation >= table.generation => {
                    if chunk.place.generation > table.generation {
                        // What was read so far is from an earlier use of the segment.
                        table.records.clear();
                        seen.clear();
                        table.generation = chunk.place.generation;
                    }
                    gap = 0;
                    let fresh = |record: &&Record| seen.insert((record.write_id, record.page));
                    table.records.extend(chunk.records.iter().filter(fresh));
                }
                Ok(_) | Err(ChunkError::Blank) => gap += 1,
                Err(ChunkError::Damaged | ChunkError::Foreign) => {
                    bad += 1;
                    gap += 1;
                }
            }
            if gap >= GAP {
                break;
            }
        }
    }
    Ok(((!blank).then_some(table), bad))
}
