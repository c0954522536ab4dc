//! The index writer over its tmpfs file.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use pegaflow_shm::BootId;
use pegaflow_shm::index::{
    CreateError, HEADER_BYTES, IndexLayout, IndexWriter, LayoutError, RawMemory,
};
use pegaflow_shm::mapping::{Access, Mapping, MappingError, NamedFile};
use rustix::fs::{Mode, fchmod};

/// An index file that cannot be made or handed out.
#[derive(Debug, thiserror::Error)]
pub enum IndexFileError {
    /// The number of blocks is out of range.
    #[error("index: {0}: change --max-blocks")]
    Layout(#[from] LayoutError),
    /// The file cannot be made, mapped or given room.
    #[error("index file: {0}")]
    File(#[from] MappingError),
    /// The file does not hold an empty index.
    #[error("index file: {0}")]
    Create(#[from] CreateError),
    /// The file system has no room for more entries, or the file's mode cannot be set.
    #[error("index file: {0}")]
    Reserve(#[from] std::io::Error),
}

/// An index in its file.
pub struct IndexFile {
    /// The writer.
    pub writer: IndexWriter<RawMemory<Arc<Mapping>>>,
    file: NamedFile,
}

impl IndexFile {
    /// Creates the file; only its fixed part gets storage. On an error no file is left, so that
    /// a tmpfs that was full for a moment does not keep its user out for good.
    ///
    /// # Errors
    /// The file exists, or its tmpfs is full.
    pub fn create(
        path: &Path,
        layout: IndexLayout,
        boot_id: BootId,
        seed: u64,
    ) -> Result<IndexFile, IndexFileError> {
        let file = NamedFile::create(path, "index", layout.total_bytes())?;
        let made = Self::make(file, layout, boot_id, seed);
        if made.is_err() {
            // The error that led here matters more than one of the removal.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn make(
        file: NamedFile,
        layout: IndexLayout,
        boot_id: BootId,
        seed: u64,
    ) -> Result<IndexFile, IndexFileError> {
        // Who has a descriptor of it cannot open it again for writing, not even as this user.
        fchmod(file.as_fd(), Mode::RUSR).map_err(std::io::Error::from)?;
        file.reserve(0, layout.fixed_bytes().max(HEADER_BYTES as u64))?;
        let mapping = Arc::new(file.map(Access::ReadWrite)?);
        let memory = RawMemory::from_mapping(mapping)?;
        let writer = IndexWriter::create(memory, layout, boot_id, seed)?;
        Ok(IndexFile { writer, file })
    }

    /// Gives storage to more entries.
    ///
    /// # Errors
    /// The tmpfs is full.
    pub fn reserve(&mut self, step: u32) -> Result<(), IndexFileError> {
        let file = &self.file;
        self.writer.reserve(step, |range| {
            file.reserve(range.start, range.end - range.start)
                .map_err(std::io::Error::other)
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_finds_no_room_leaves_no_file() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in /dev/shm");
        let layout = IndexLayout::for_capacity(1 << 31).expect("the largest index");
        let room = rustix::fs::statvfs(dir.path()).expect("the size of /dev/shm");
        if room.f_blocks == 0 || room.f_blocks * room.f_frsize >= layout.fixed_bytes() {
            // It would fit: nothing here fails without taking all that memory.
            return;
        }
        let path = dir.path().join("index-0");
        assert!(IndexFile::create(&path, layout, [1; 16], 1).is_err());
        assert!(!path.exists());
        let small = IndexLayout::for_capacity(64).expect("a small index");
        assert!(IndexFile::create(&path, small, [1; 16], 1).is_ok());
    }
}
