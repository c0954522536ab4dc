//! A shard's file: found, locked, made, opened for direct I/O.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FlockOperation, RenameFlags, StatxFlags, fallocate, flock,
    renameat_with, statx,
};
use rustix::io::Errno;

use crate::error::OpenError;
use crate::format::{
    ALIGNMENT, CHUNK_BYTES, LAYOUT_VERSION, SUPERBLOCK_SLOTS, Superblock, SuperblockError,
};
use crate::mover::Alignment;

/// `STATX_DIOALIGN`, which rustix has no name for.
const DIO_ALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// How long a lock is waited for: the kernel takes a dead process's io_uring apart, and with it
/// what holds the lock, only after the process is gone.
pub(crate) const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Links that lead from one to another, as many as the kernel follows.
const LINKS_MAX: usize = 40;

/// A file that is ours: locked as long as it is open.
#[derive(Debug)]
pub(crate) struct ShardFile {
    pub path: PathBuf,
    /// For superblocks and tables at open; not direct.
    pub plain: Arc<File>,
    pub superblock: Superblock,
    /// The file's size when it was opened.
    pub bytes: u64,
}

/// What has a shard's name.
#[derive(Debug)]
pub(crate) enum Named {
    /// Nothing, or an empty file.
    Nothing,
    /// A shard.
    Shard(ShardFile),
}

fn failed(path: &Path, call: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { path, call, source }
}

/// Which file it is, whatever its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FileId {
    /// By device and inode.
    There(u64, u64),
    /// Still to be made, under that name in the folder of that device and inode.
    ToMake(u64, u64, OsString),
}

impl FileId {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self::There(metadata.dev(), metadata.ino()))
    }

    /// Of a file that is not there. None if it cannot be made, which is found when it is tried.
    fn to_make(path: &Path) -> io::Result<Option<Self>> {
        let target = target_of(path)?;
        let Some(name) = target.file_name() else {
            return Ok(None);
        };
        match folder_of(&target).metadata() {
            Ok(folder) => Ok(Some(Self::ToMake(folder.dev(), folder.ino(), name.into()))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent();
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Looks at what has the name; changes nothing and locks nothing.
pub(crate) fn look(path: &Path) -> Result<Named, OpenError> {
    look_and(path, None, |_| Ok(()))
}

/// Looks at what has the name and locks it if it is a file, but only if `mine` says that it is for
/// this one to lock; changes nothing. Tries to as long as `waits` says so of the time until then.
pub(crate) fn look_to_own(
    path: &Path,
    mine: impl FnOnce(FileId) -> Result<(), OpenError>,
    waits: &dyn Fn(Duration) -> bool,
) -> Result<Named, OpenError> {
    look_and(path, Some(waits), mine)
}

fn look_and(
    path: &Path,
    to_own: Option<&dyn Fn(Duration) -> bool>,
    mine: impl FnOnce(FileId) -> Result<(), OpenError>,
) -> Result<Named, OpenError> {
    // Not to wait for whoever may open a FIFO's other end.
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(to_own.is_some())
        .custom_flags(libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if let Some(id) = FileId::to_make(path).map_err(failed(path, "stat"))? {
                mine(id)?;
            }
            return Ok(Named::Nothing);
        }
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            return Err(OpenError::NotAFile { path: path.into() });
        }
        Err(error) => return Err(failed(path, "open")(error)),
    };
    let metadata = file.metadata().map_err(failed(path, "fstat"))?;
    if !metadata.is_file() {
        return Err(OpenError::NotAFile { path: path.into() });
    }
    mine(FileId::There(metadata.dev(), metadata.ino()))?;
    if let Some(waits) = to_own {
        lock(path, &file, waits)?;
    }
    let bytes = metadata.len();
    if bytes == 0 {
        return Ok(Named::Nothing);
    }
    let mut slots = vec![0; CHUNK_BYTES * SUPERBLOCK_SLOTS as usize];
    let got = read_up_to(&file, &mut slots, 0).map_err(failed(path, "read"))?;
    let superblock = Superblock::choose(&slots[..got]).map_err(|error| match error {
        SuperblockError::NoMagic => OpenError::Foreign {
            path: path.into(),
            bytes,
        },
        SuperblockError::Damaged => OpenError::Damaged { path: path.into() },
        SuperblockError::Version(found) => OpenError::OtherVersion {
            path: path.into(),
            found,
            expected: LAYOUT_VERSION,
        },
    })?;
    Ok(Named::Shard(ShardFile {
        path: path.into(),
        plain: Arc::new(file),
        superblock,
        bytes,
    }))
}

fn lock(path: &Path, file: &File, waits: &dyn Fn(Duration) -> bool) -> Result<(), OpenError> {
    let started = Instant::now();
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if waits(started.elapsed()) => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(OpenError::InUse { path: path.into() });
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(failed(path, "flock")(error.into())),
        }
    }
}

/// Reads until the buffer is full or the file ends; says how much it was.
pub(crate) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Where a shard is made before it has its name: a crash leaves no half of one under the name.
fn unfinished(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    Some(path.with_file_name(format!(".{name}.pegaflow-new")))
}

/// Makes a shard of this superblock's geometry. Says what is not as wished.
pub(crate) fn make(
    path: &Path,
    superblock: Superblock,
    preallocate: bool,
) -> Result<(ShardFile, Option<String>), OpenError> {
    let target = target_of(path).map_err(failed(path, "readlink"))?;
    let Some(draft) = unfinished(&target) else {
        return Err(OpenError::NotAFile { path: path.into() });
    };
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    let file = options.open(&draft).map_err(failed(&draft, "open"))?;
    lock(&draft, &file, &|so_far| so_far < LOCK_WAIT)?;
    let made = fill(path, file, superblock, preallocate).and_then(|made| {
        give_name(&draft, &target).map_err(failed(&target, "rename"))?;
        Ok(made)
    });
    let (shard, shortfall) = made.inspect_err(|_| {
        // The space is given back; the error is what matters.
        let _ = std::fs::remove_file(&draft);
    })?;
    let folder = folder_of(&target);
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed(folder, "fsync"))?;
    Ok((shard, shortfall))
}

/// Makes a file that is locked and not a shard yet one.
fn fill(
    path: &Path,
    file: File,
    superblock: Superblock,
    preallocate: bool,
) -> Result<(ShardFile, Option<String>), OpenError> {
    // Whatever an earlier try left is no shard.
    file.set_len(0).map_err(failed(path, "ftruncate"))?;
    let bytes = superblock.geometry.file_bytes();
    let shortfall = reserve(&file, bytes, preallocate).map_err(failed(path, "fallocate"))?;
    let shard = ShardFile {
        path: path.into(),
        plain: Arc::new(file),
        superblock,
        bytes,
    };
    shard.rewrite_superblock(&shard.superblock)?;
    Ok((shard, shortfall))
}

/// Gives a draft its name, unless something has that by now. An empty file is nothing.
fn give_name(draft: &Path, target: &Path) -> io::Result<()> {
    match renameat_with(CWD, draft, CWD, target, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) if target.metadata()?.len() > 0 => Err(Errno::EXIST.into()),
        // Some file systems cannot promise it.
        Err(Errno::EXIST | Errno::INVAL | Errno::NOSYS) => std::fs::rename(draft, target),
        Err(error) => Err(error.into()),
    }
}

/// Where a file of that name is made: where links point, which stay.
fn target_of(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&target) {
            Ok(next) => target = target.parent().unwrap_or(Path::new("/")).join(next),
            // Nothing, or no link.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                return Ok(target);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}

/// Gives a file its size, with space on the drive if that can be had.
fn reserve(file: &File, bytes: u64, preallocate: bool) -> io::Result<Option<String>> {
    if preallocate {
        match fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(None),
            Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if file.metadata()?.len() < bytes {
        file.set_len(bytes)?;
    }
    Ok(preallocate.then(|| {
        "space is not reserved: the file system cannot (fallocate); it may run full".to_owned()
    }))
}

impl Named {
    /// The shard, if it is one.
    pub fn shard(&self) -> Option<&ShardFile> {
        match self {
            Self::Nothing => None,
            Self::Shard(file) => Some(file),
        }
    }
}

impl ShardFile {
    /// Which file it is.
    pub fn id(&self) -> Result<FileId, OpenError> {
        FileId::of(&self.plain).map_err(failed(&self.path, "fstat"))
    }

    /// Replaces the superblock by a later one and makes it durable.
    pub fn rewrite_superblock(&self, superblock: &Superblock) -> Result<(), OpenError> {
        let bytes = superblock.encode();
        self.plain
            .write_all_at(&bytes, superblock.offset())
            .map_err(failed(&self.path, "write"))?;
        self.plain.sync_all().map_err(failed(&self.path, "fsync"))
    }

    /// Makes the file as large as another number of segments asks, and says so in the superblock.
    /// Segments at the end come or go; a crash in between leaves the smaller of both.
    pub fn resize(
        &mut self,
        segments: u32,
        preallocate: bool,
    ) -> Result<Option<String>, OpenError> {
        let grows = segments > self.superblock.geometry.segments;
        let mut shortfall = None;
        if grows {
            // What lies behind the end of the shard must not pass for tables.
            let end = self.superblock.geometry.file_bytes();
            self.plain
                .set_len(end)
                .map_err(failed(&self.path, "ftruncate"))?;
            self.superblock.geometry.segments = segments;
            let bytes = self.superblock.geometry.file_bytes();
            shortfall = reserve(&self.plain, bytes, preallocate).map_err(|error| {
                // What there was space for is given back; the error is what matters.
                let _ = self.plain.set_len(end);
                failed(&self.path, "fallocate")(error)
            })?;
        }
        self.superblock.geometry.segments = segments;
        self.superblock.sequence += 1;
        self.rewrite_superblock(&self.superblock)?;
        self.bytes = self.superblock.geometry.file_bytes();
        if !grows {
            self.plain
                .set_len(self.bytes)
                .map_err(failed(&self.path, "ftruncate"))?;
        }
        Ok(shortfall)
    }

    /// Opens the file once more, for pages: direct if that is possible. Says what is not as wished.
    pub fn open_for_pages(&self) -> Result<(Arc<File>, Alignment, Option<String>), OpenError> {
        const BUFFERED: Alignment = Alignment {
            memory: 1,
            offset: 1,
        };
        let plain = |why: String| {
            let note = format!("no direct I/O ({why}): pages go through the page cache");
            (Arc::clone(&self.plain), BUFFERED, Some(note))
        };
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path);
        let file = match direct {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(plain("the file system has none".into()));
            }
            Err(error) => return Err(failed(&self.path, "open")(error)),
        };
        let same = |a: &File, b: &File| -> io::Result<bool> {
            let (a, b) = (a.metadata()?, b.metadata()?);
            Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        if !same(&file, &self.plain).map_err(failed(&self.path, "fstat"))? {
            return Err(OpenError::InUse {
                path: self.path.clone(),
            });
        }
        let known = statx(&file, "", AtFlags::EMPTY_PATH, DIO_ALIGN)
            .ok()
            .filter(|known| StatxFlags::from_bits_retain(known.stx_mask).contains(DIO_ALIGN));
        let alignment = match known {
            Some(known) if known.stx_dio_mem_align == 0 || known.stx_dio_offset_align == 0 => {
                return Ok(plain("this file has none".into()));
            }
            Some(known) => Alignment {
                memory: known.stx_dio_mem_align,
                offset: known.stx_dio_offset_align,
            },
            // Kernels before 6.1 do not say; no drive asks for more.
            None => Alignment {
                memory: ALIGNMENT,
                offset: ALIGNMENT,
            },
        };
        if alignment.memory > ALIGNMENT || alignment.offset > ALIGNMENT {
            return Ok(plain(format!(
                "the device asks for {} bytes of alignment, pages have {ALIGNMENT}",
                alignment.memory.max(alignment.offset)
            )));
        }
        Ok((Arc::new(file), alignment, None))
    }
}
