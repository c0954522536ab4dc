//! Taking in what a shard's file has.

use std::collections::HashMap;

use super::{Block, BlockState, Page, Shard, bytes_of};
use crate::block::BlockKey;
use crate::format::Record;

/// What the table of a segment says.
#[derive(Clone, Debug, Default)]
pub(crate) struct FoundSegment {
    /// Which segment.
    pub segment: u32,
    /// Its last generation; zero if no chunk is valid.
    pub generation: u64,
    /// The records of that generation, each once.
    pub records: Vec<Record>,
}

/// What the tables of a shard say: every segment whose table is not blank.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub segments: Vec<FoundSegment>,
    /// Chunks that should be there but are not valid.
    pub bad_chunks: u64,
}

/// A block of which every page is recorded: its key, its write id, its pages in order.
pub(crate) type FoundBlock = (BlockKey, u64, Box<[Page]>);

impl Found {
    /// The greatest write id.
    pub fn last_write_id(&self) -> u64 {
        let records = self.segments.iter().flat_map(|found| &found.records);
        records.map(|record| record.write_id).max().unwrap_or(0)
    }

    /// The blocks of which every page is recorded, with their pages in order, and how many are not
    /// whole.
    pub fn blocks(&self) -> (Vec<FoundBlock>, u64) {
        let mut parts: HashMap<(BlockKey, u64), Vec<Option<Page>>> = HashMap::new();
        let mut whole = Vec::new();
        for found in &self.segments {
            for record in &found.records {
                let page = Page {
                    segment: found.segment,
                    offset: record.offset,
                    bytes: record.bytes,
                    checksum: record.checksum,
                };
                if record.pages == 1 {
                    whole.push((record.key(), record.write_id, Box::from([page])));
                    continue;
                }
                let pages = parts
                    .entry((record.key(), record.write_id))
                    .or_insert_with(|| vec![None; usize::from(record.pages)]);
                // A table that contradicts itself describes no block that can be whole.
                match pages.get_mut(usize::from(record.page)) {
                    Some(place) if place.is_none() => *place = Some(page),
                    _ => pages.push(None),
                }
            }
        }
        let mut broken = 0;
        for ((key, write_id), pages) in parts {
            match pages.into_iter().collect::<Option<Box<[Page]>>>() {
                Some(pages) => whole.push((key, write_id, pages)),
                None => broken += 1,
            }
        }
        (whole, broken)
    }
}

impl Shard {
    /// Takes in the segments that the file has, before their blocks.
    pub fn found(&mut self, found: &Found) {
        for segment in &found.segments {
            self.segments.found(segment.segment, segment.generation);
        }
    }

    /// Takes in a block. Says under which number it is kept.
    pub fn adopt(&mut self, key: BlockKey, write_id: u64, pages: Box<[Page]>) -> u32 {
        self.stats.blocks += 1;
        self.stats.live_bytes += bytes_of(&pages);
        let block = self.blocks.insert(Block {
            key,
            write_id,
            pages: pages.clone(),
            state: BlockState::Live,
            uncommitted: 0,
        });
        for page in &pages {
            self.segments
                .adopt(page.segment, page.bytes, block, write_id);
        }
        block
    }

    /// All blocks are taken in.
    pub fn adopted(&mut self) {
        self.segments.adopted();
    }
}
