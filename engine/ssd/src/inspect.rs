//! Looking at a shard's file from outside, while a daemon uses it or not. Nothing is changed and
//! nothing is locked.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::OpenError;
use crate::file::{Named, ShardFile, look};
use crate::format::{Geometry, Id, LAYOUT_VERSION, Place, Record};
use crate::scan::{ReadAt, scan, scan_segment};
use crate::shard::{Found, FoundSegment};

/// A shard's file, opened for reading.
#[derive(Debug)]
pub struct ShardView {
    file: ShardFile,
}

/// Whose a shard is, and its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardLayout {
    /// The version of the layout.
    pub layout_version: u32,
    /// The node's name.
    pub node: String,
    /// The set's random name.
    pub set: [u8; 16],
    /// The shard's random name.
    pub shard: [u8; 16],
    /// How many shards the set has, as far as this one knows.
    pub members: usize,
    /// When the file was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// The file's size in bytes.
    pub file_bytes: u64,
    /// What the superblock says it should be.
    pub expected_bytes: u64,
    /// How many segments there are.
    pub segments: u32,
    /// Bytes of pages that a segment holds.
    pub segment_bytes: u32,
    /// Bytes of a segment's table.
    pub table_bytes: u32,
    /// The process that has it locked, if one has.
    pub used_by: Option<u32>,
}

/// What the tables of a shard say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardFill {
    /// Segments that were never written.
    pub blank_segments: u32,
    /// Segments with pages.
    pub used_segments: u32,
    /// Segments that were written and have no pages now.
    pub empty_segments: u32,
    /// Blocks of which every page is recorded. A block that was replaced counts until its segment
    /// is used again.
    pub blocks: u64,
    /// Blocks of which a page is missing.
    pub broken_blocks: u64,
    /// Pages of whole blocks.
    pub pages: u64,
    /// Their bytes.
    pub page_bytes: u64,
    /// Table chunks that are damaged; a crash leaves one at most.
    pub bad_chunks: u64,
    /// The last generation: how often a segment was begun.
    pub generation: u64,
}

/// What reading every page found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Pages with the right checksum.
    pub good_pages: u64,
    /// Their bytes.
    pub good_bytes: u64,
    /// Pages that the daemon gave up meanwhile: not looked at.
    pub moved_pages: u64,
    /// Pages with another checksum, or that cannot be read.
    pub bad_pages: Vec<BadPage>,
}

/// A page that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// The block's scope.
    pub scope: [u8; 32],
    /// The block's group.
    pub group: u32,
    /// The block's hash.
    pub hash: [u8; 32],
    /// Which page of the block.
    pub page: u16,
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Its length in bytes.
    pub bytes: u32,
    /// Why it could not be read; none if its checksum differs.
    pub error: Option<String>,
}

impl ShardView {
    /// Opens a shard's file.
    ///
    /// # Errors
    /// It is not there, cannot be read, or is not a shard that this program knows.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        match look(path)? {
            Named::Shard(file) => Ok(Self { file }),
            Named::Nothing => Err(OpenError::Io {
                path: path.into(),
                call: "open",
                source: io::Error::new(io::ErrorKind::NotFound, "no shard has this name"),
            }),
        }
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.file.superblock.geometry;
        geometry.segments = geometry.segments.min(geometry.segments_in(self.file.bytes));
        geometry
    }

    fn id(&self) -> Id {
        self.file.superblock.shard
    }

    /// Whose it is, and its sizes.
    pub fn layout(&self) -> ShardLayout {
        let superblock = &self.file.superblock;
        ShardLayout {
            layout_version: LAYOUT_VERSION,
            node: superblock.node.clone(),
            set: superblock.set,
            shard: superblock.shard,
            members: superblock.members.len(),
            created_unix_s: superblock.created_unix_s,
            file_bytes: self.file.bytes,
            expected_bytes: superblock.geometry.file_bytes(),
            segments: superblock.geometry.segments,
            segment_bytes: superblock.geometry.segment_bytes,
            table_bytes: superblock.geometry.table_bytes,
            used_by: self.used_by(),
        }
    }

    /// Who holds the lock, by the kernel's list: trying the lock would keep a daemon from starting.
    fn used_by(&self) -> Option<u32> {
        let inode = self.file.plain.metadata().ok()?.ino();
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        locks.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, "FLOCK", _, "WRITE", process, file, ..] = fields[..] else {
                return None;
            };
            let number = file.rsplit(':').next()?.parse::<u64>().ok()?;
            (number == inode).then(|| process.parse().ok())?
        })
    }

    /// Reads all tables.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn fill(&self) -> io::Result<ShardFill> {
        let geometry = self.geometry();
        let found = scan(&*self.file.plain, self.id(), &geometry)?;
        Ok(summary(&found, &geometry))
    }

    /// Reads every page that a table names and compares its checksum. `progress` hears of the bytes
    /// done and of all.
    ///
    /// # Errors
    /// A table cannot be read.
    pub fn verify(&self, mut progress: impl FnMut(u64, u64)) -> io::Result<Verified> {
        let geometry = self.geometry();
        let found = scan(&*self.file.plain, self.id(), &geometry)?;
        let all = found.segments.iter().flat_map(|segment| &segment.records);
        let total = all.map(|record| u64::from(record.bytes)).sum();
        let (mut done, mut verified) = (0, Verified::default());
        for segment in &found.segments {
            for record in &segment.records {
                self.verify_page(&geometry, segment, record, &mut verified)?;
                done += u64::from(record.bytes);
                progress(done, total);
            }
        }
        Ok(verified)
    }

    fn verify_page(
        &self,
        geometry: &Geometry,
        segment: &FoundSegment,
        record: &Record,
        verified: &mut Verified,
    ) -> io::Result<()> {
        let place = Place {
            shard: self.id(),
            segment: segment.segment,
            generation: segment.generation,
        };
        let file_offset = geometry.data_offset(segment.segment, record.offset);
        let mut bytes = vec![0; record.bytes as usize];
        let read = ReadAt::read_at(&*self.file.plain, &mut bytes, file_offset);
        if read.is_ok() && Record::checksum_of(record.seed(&place), &bytes) == record.checksum {
            verified.good_pages += 1;
            verified.good_bytes += u64::from(record.bytes);
            return Ok(());
        }
        // A daemon that gave the segment up has said so in its table before it wrote there.
        let now = scan_segment(&*self.file.plain, self.id(), segment.segment, geometry)?;
        if now.0.is_none_or(|now| now.generation != segment.generation) {
            verified.moved_pages += 1;
            return Ok(());
        }
        verified.bad_pages.push(BadPage {
            scope: record.scope,
            group: record.group,
            hash: record.hash,
            page: record.page,
            file_offset,
            bytes: record.bytes,
            error: read.err().map(|error| error.to_string()),
        });
        Ok(())
    }
}

fn summary(found: &Found, geometry: &Geometry) -> ShardFill {
    let (blocks, broken_blocks) = found.blocks();
    let pages = || blocks.iter().flat_map(|(_, _, pages)| pages.iter());
    let used = found
        .segments
        .iter()
        .filter(|segment| !segment.records.is_empty())
        .count() as u32;
    let touched = found.segments.len() as u32;
    ShardFill {
        blank_segments: geometry.segments - touched,
        used_segments: used,
        empty_segments: touched - used,
        blocks: blocks.len() as u64,
        broken_blocks,
        pages: pages().count() as u64,
        page_bytes: pages().map(|page| u64::from(page.bytes)).sum(),
        bad_chunks: found.bad_chunks,
        generation: found
            .segments
            .iter()
            .map(|segment| segment.generation)
            .max()
            .unwrap_or(0),
    }
}
