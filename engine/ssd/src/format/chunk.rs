//! A chunk of a segment's table: some records, in one write.

use bytemuck::{Pod, Zeroable};
use twox_hash::XxHash3_64;

use super::{CHUNK_BYTES, Geometry, Id, Place, Record};

const MAGIC: [u8; 8] = *b"PEGATBL\0";

/// How many records a chunk holds.
pub(crate) const RECORDS_PER_CHUNK: usize = 42;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    magic: [u8; 8],
    /// xxh3-64 of the chunk with this field zero.
    checksum: u64,
    shard: Id,
    generation: u64,
    segment: u32,
    slot: u32,
    count: u32,
    reserved: [u8; 12],
}

const _: () = assert!(size_of::<Header>() == 64);
const _: () = assert!(64 + RECORDS_PER_CHUNK * size_of::<Record>() == CHUNK_BYTES);

/// The content of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Shard, segment and generation that it belongs to.
    pub place: Place,
    /// Which chunk of the table it is.
    pub slot: u32,
    /// Its records; none in the chunk that opens a generation.
    pub records: Vec<Record>,
}

/// Why bytes are not the chunk that was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkError {
    /// Nothing was ever written there.
    Blank,
    /// It is another shard's, or of another place.
    Foreign,
    /// It was damaged, or only part of it was written.
    Damaged,
}

impl Chunk {
    /// The bytes to write.
    ///
    /// # Panics
    /// If there are more records than fit.
    pub fn encode(&self) -> Box<[u8]> {
        assert!(self.records.len() <= RECORDS_PER_CHUNK);
        let mut bytes = vec![0; CHUNK_BYTES].into_boxed_slice();
        let header = Header {
            magic: MAGIC,
            checksum: 0,
            shard: self.place.shard,
            generation: self.place.generation,
            segment: self.place.segment,
            slot: self.slot,
            count: self.records.len() as u32,
            reserved: [0; 12],
        };
        bytes[..64].copy_from_slice(bytemuck::bytes_of(&header));
        for (record, at) in self.records.iter().zip(bytes[64..].chunks_exact_mut(96)) {
            at.copy_from_slice(bytemuck::bytes_of(record));
        }
        let checksum = XxHash3_64::oneshot(&bytes);
        bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the chunk that belongs to `slot` of `segment`'s table.
    ///
    /// # Errors
    /// Why it is not that chunk.
    pub fn decode(
        bytes: &[u8],
        shard: Id,
        segment: u32,
        slot: u32,
        geometry: &Geometry,
    ) -> Result<Self, ChunkError> {
        let bytes: &[u8; CHUNK_BYTES] = bytes.try_into().map_err(|_| ChunkError::Damaged)?;
        if *bytes == [0; CHUNK_BYTES] {
            return Err(ChunkError::Blank);
        }
        let mut header: Header = bytemuck::pod_read_unaligned(&bytes[..64]);
        let mut bare = *bytes;
        bare[8..16].fill(0);
        if header.magic != MAGIC
            || std::mem::take(&mut header.checksum) != XxHash3_64::oneshot(&bare)
            || header.count as usize > RECORDS_PER_CHUNK
            || header.generation > Place::GENERATION_MAX
        {
            return Err(ChunkError::Damaged);
        }
        if (header.shard, header.segment, header.slot) != (shard, segment, slot) {
            return Err(ChunkError::Foreign);
        }
        let records: Vec<Record> = bytes[64..]
            .chunks_exact(96)
            .take(header.count as usize)
            .map(bytemuck::pod_read_unaligned)
            .collect();
        if !records.iter().all(|record| record.is_valid(geometry)) {
            return Err(ChunkError::Damaged);
        }
        Ok(Self {
            place: Place {
                shard,
                segment,
                generation: header.generation,
            },
            slot,
            records,
        })
    }
}
