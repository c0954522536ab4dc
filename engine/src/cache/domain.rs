//! An isolation domain's blocks: its index and the records behind it.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use pegaflow_shm::BootId;
use pegaflow_shm::index::{BlockKey, EntryId, IndexLayout, InsertError, prefetch_read};
use pegaflow_shm::mapping::{Access, NamedFile};

use crate::cache::block::{Block, ShardRuns};
use crate::cache::index_file::{IndexFile, IndexFileError};
use crate::fault::{self, CrashPoint};
use crate::isolation::IsolationDomain;
use crate::policy::EvictionPolicy;

/// Position of a domain in the cache's list.
pub type DomainId = usize;

/// Entries that get storage at a time: 16,384 entries are 1 MiB.
const RESERVE_STEP: u32 = 16 * 1024;
/// Victims whose memory is asked for at a time: with entry and record of each about as many lines
/// as a core can have on their way.
const ROW: u32 = 8;

/// One domain's blocks.
pub struct Domain {
    /// Whose they are.
    pub identity: Arc<IsolationDomain>,
    /// Index, in shared memory.
    pub index: IndexFile,
    /// Records by entry id.
    pub blocks: Vec<Block>,
    /// Shards of blocks that have more than one.
    pub runs: ShardRuns,
    /// Order of eviction of the sealed blocks.
    pub policy: Box<dyn EvictionPolicy>,
    /// Bytes of the pages of its blocks, finished or not.
    pub bytes: u64,
    /// Blocks that at least one lease or unfinished query holds.
    pub pinned: u32,
    /// Pins of all of them.
    pub pins: u64,
    /// Evictions whose memory has been asked for.
    asked_for: u32,
    path: PathBuf,
}

impl Domain {
    /// Creates the domain's index file.
    ///
    /// # Errors
    /// The file cannot be made or has no room in its tmpfs.
    pub fn create(
        identity: Arc<IsolationDomain>,
        path: PathBuf,
        max_blocks: u32,
        boot_id: BootId,
        seed: u64,
        policy: Box<dyn EvictionPolicy>,
    ) -> Result<Domain, IndexFileError> {
        let layout = IndexLayout::for_capacity(max_blocks)?;
        let index = IndexFile::create(&path, layout, boot_id, seed)?;
        fault::point(CrashPoint::IndexMade);
        Ok(Domain {
            identity,
            index,
            blocks: bytemuck::allocation::zeroed_vec(max_blocks as usize),
            runs: ShardRuns::default(),
            policy,
            bytes: 0,
            pinned: 0,
            pins: 0,
            asked_for: 0,
            path,
        })
    }

    /// Brings closer what the next evictions will read, a row of blocks at a time: evictions come
    /// one after the other, and most of what one takes is waiting for memory.
    pub fn prefetch_victims(&mut self) {
        if let Some(left) = self.asked_for.checked_sub(1) {
            self.asked_for = left;
            return;
        }
        self.asked_for = ROW - 1;
        let (writer, blocks, mut place) = (&self.index.writer, &self.blocks, 0);
        self.policy.upcoming(&mut |id| {
            if place < ROW {
                // The row before has asked for its entry, which names its bucket line.
                writer.prefetch_line(EntryId(id));
            } else {
                writer.prefetch_entry(EntryId(id));
                if let Some(block) = blocks.get(id as usize) {
                    prefetch_read(block);
                }
            }
            place += 1;
            place < 2 * ROW
        });
    }

    /// A read-only descriptor of the index for a client, and the file's size.
    ///
    /// # Errors
    /// The file cannot be opened any more.
    pub fn client_index(&self) -> Result<(OwnedFd, u64), IndexFileError> {
        let file = NamedFile::open(&self.path, "index", Access::ReadOnly)?;
        let bytes = file.bytes();
        Ok((file.into_fd(), bytes))
    }

    /// Inserts a key, giving the index storage when it needs some.
    ///
    /// # Errors
    /// As [`pegaflow_shm::index::IndexWriter::insert`]; `NeedReserve` only when the tmpfs is full.
    pub fn insert(&mut self, key: &BlockKey) -> Result<EntryId, InsertError> {
        match self.index.writer.insert(key) {
            Err(InsertError::NeedReserve { reserved }) => {
                if let Err(error) = self.index.reserve(RESERVE_STEP) {
                    tracing::warn!(%error, reserved, "the index cannot grow: evicting instead");
                    return Err(InsertError::NeedReserve { reserved });
                }
                self.index.writer.insert(key)
            }
            other => other,
        }
    }

    /// The record of an entry.
    #[inline]
    pub fn block(&self, entry: EntryId) -> &Block {
        &self.blocks[entry.0 as usize]
    }

    /// The record of an entry, to change.
    #[inline]
    pub fn block_mut(&mut self, entry: EntryId) -> &mut Block {
        &mut self.blocks[entry.0 as usize]
    }
}
