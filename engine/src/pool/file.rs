//! The pool's memory: a fully allocated file in shared memory that outlives the daemon.
//!
//! The file has no header: all that is known about its pages is in the catalog, which names the
//! pool file by [`PoolIdentity`]. A file whose creation was cut short has holes and is not used
//! again.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, StatxFlags, flock};
use rustix::io::Errno;

use super::mapping::PoolMapping;
use super::populate::{self, Stretch};
use super::{HugepageReport, PoolFileError, PoolUnusable, hugepages, nodes};
use crate::fault::{self, CrashPoint};

/// How long the pool of a daemon that has just died may stay locked: whoever looks at a dead
/// process's memory keeps its mappings for that moment, and drives may still be filling pages.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Bytes that are mapped at a time while others are served: the address space is locked that long.
const MAP_LATER_BYTES: u64 = 4 << 20;
/// Priority of that.
const MAP_LATER_NICE: i32 = 19;

/// How the pool's memory is brought into being.
#[derive(Clone, Debug)]
pub struct PopulateOptions {
    /// Threads that allocate and zero.
    pub threads: NonZeroUsize,
    /// Whether to try for hugepages; [`PoolFile::hugepages`] says what came of it.
    pub hugepages: bool,
    /// Which of the pool should lie near which processors: all of it, in order, or nothing.
    pub near: Vec<NearCpus>,
}

/// A stretch of the pool that should lie near some processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearCpus {
    /// Offsets into the pool.
    pub bytes: Range<u64>,
    /// The processors.
    pub cpus: Vec<usize>,
}

/// Which file this is: another file under the same name, even of the same size, differs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PoolIdentity {
    /// The inode number.
    pub inode: u64,
    /// The device that the inode number belongs to.
    pub device: u64,
    /// When the file was created, in nanoseconds since 1970; 0 where the kernel does not tell.
    pub created_ns: u64,
}

/// What was found under the pool's name.
pub enum OpenedPool {
    /// Nothing.
    Missing,
    /// A file that cannot be used again, and why.
    Unusable(PoolUnusable),
    /// The pool of a previous daemon.
    Ready(PoolFile),
}

/// The pool file, mapped.
pub struct PoolFile {
    mapping: PoolMapping,
    file: Arc<File>,
    identity: PoolIdentity,
}

impl PoolFile {
    /// Creates the file anew, whatever lies there, and brings all its memory into being.
    /// `progress` is told the bytes done so far, from several threads. On an error no file is left.
    pub fn create(
        path: &Path,
        bytes: u64,
        options: &PopulateOptions,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, PoolFileError> {
        let failed = |action| move |source| io_error(action, path, source);
        remove(path).map_err(failed("removing"))?;
        check_room(path, bytes)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed("creating"))?;
        lock(path, &file)?;
        let pool = file
            .set_len(bytes)
            .map_err(failed("sizing"))
            .inspect(|()| fault::point(CrashPoint::PoolSized))
            .and_then(|()| Self::map(path, file, bytes))
            .and_then(|pool| pool.populate(options, progress).map(|()| pool));
        if pool.is_err() {
            // The error that led here matters more than one of the removal.
            let _ = remove(path);
        }
        pool
    }

    /// Opens the pool of a previous daemon. Its memory is there; this process's page tables are
    /// empty until [`map_pages_later`](Self::map_pages_later) or a first touch fills them.
    pub fn open(path: &Path, bytes: u64) -> Result<OpenedPool, PoolFileError> {
        let failed = |action| move |source| io_error(action, path, source);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(OpenedPool::Missing);
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::EISDIR)) => {
                return Ok(OpenedPool::Unusable(PoolUnusable::NotOurFile));
            }
            Err(error) => return Err(failed("opening")(error)),
        };
        lock(path, &file)?;
        let found = file.metadata().map_err(failed("examining"))?;
        let unusable = if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
            Some(PoolUnusable::NotOurFile)
        } else if found.len() != bytes {
            Some(PoolUnusable::Size {
                found_bytes: found.len(),
                wanted_bytes: bytes,
            })
        } else if found.blocks() * 512 < bytes {
            let allocated_bytes = found.blocks() * 512;
            Some(PoolUnusable::Holes {
                allocated_bytes,
                wanted_bytes: bytes,
            })
        } else {
            None
        };
        if let Some(reason) = unusable {
            return Ok(OpenedPool::Unusable(reason));
        }
        Ok(OpenedPool::Ready(Self::map(path, file, bytes)?))
    }

    /// Starts a thread that fills this process's page tables and ends with the pool; `done` hears
    /// how that went, unless the pool went first. Until then copies take the faults, which costs
    /// them time and nothing else: the file has no holes.
    pub fn map_pages_later(
        self: &Arc<Self>,
        hugepages: bool,
        done: impl FnOnce(&Self, Result<(), PoolFileError>) + Send + 'static,
    ) -> io::Result<()> {
        let weak = Arc::downgrade(self);
        let thread = std::thread::Builder::new().name("map-pages".into());
        thread.spawn(move || {
            // Whoever is served comes first. Refused nowhere: it is less priority, not more.
            let _ = rustix::process::nice(MAP_LATER_NICE);
            let Some(bytes) = weak.upgrade().map(|pool| pool.bytes()) else {
                return;
            };
            let mut outcome = Ok(());
            for offset in (0..bytes).step_by(MAP_LATER_BYTES as usize) {
                // The pool may end in between: not by this thread's doing.
                let Some(pool) = weak.upgrade() else { return };
                let len_bytes = MAP_LATER_BYTES.min(bytes - offset);
                let hugepages = hugepages && pool.mapping.advise_hugepages().is_ok();
                let filled = pool.fill(hugepages, offset, len_bytes);
                if let Err(source) = filled {
                    outcome = Err(PoolFileError::Populate {
                        offset,
                        len_bytes,
                        source,
                    });
                    break;
                }
            }
            if let Some(pool) = weak.upgrade() {
                done(&pool, outcome);
            }
        })?;
        Ok(())
    }

    /// The pool's size, in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// The file's identity, for the catalog.
    pub fn identity(&self) -> PoolIdentity {
        self.identity
    }

    /// Where the pool begins in this process. Valid while this value lives; the memory behind it is
    /// shared with the kernel, devices and copy threads, so no reference into it may be made.
    pub fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    /// The address of a range that lies inside the pool.
    pub fn range(&self, offset: u64, len_bytes: u64) -> Result<NonNull<u8>, PoolFileError> {
        let pool_bytes = self.bytes();
        if offset
            .checked_add(len_bytes)
            .is_none_or(|end| end > pool_bytes)
        {
            return Err(PoolFileError::OutOfRange {
                offset,
                len_bytes,
                pool_bytes,
            });
        }
        // A wrapped address cannot be zero: the offset is inside the mapping.
        NonNull::new(self.base().as_ptr().wrapping_add(offset as usize)).ok_or(
            PoolFileError::OutOfRange {
                offset,
                len_bytes,
                pool_bytes,
            },
        )
    }

    /// How much of the pool lies on hugepages now.
    pub fn hugepages(&self) -> io::Result<HugepageReport> {
        let start = self.base().as_ptr().addr() as u64;
        let mapped_bytes = hugepages::mapped_bytes(start..start + self.bytes())?;
        Ok(HugepageReport {
            wanted_bytes: self.bytes(),
            mapped_bytes,
        })
    }

    /// The file whose lock says that the pool is in use.
    pub fn lock_file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// How much of the pool lies on which memory node, in bytes.
    pub fn bytes_by_node(&self) -> io::Result<BTreeMap<u32, u64>> {
        let start = self.base().as_ptr().addr() as u64;
        nodes::bytes_by_node(start..start + self.bytes())
    }

    fn map(path: &Path, file: File, bytes: u64) -> Result<Self, PoolFileError> {
        let failed = |action| move |source| io_error(action, path, source);
        let len = usize::try_from(bytes)
            .map_err(|_| failed("mapping")(io::ErrorKind::OutOfMemory.into()))?;
        let identity = identity_of(&file).map_err(failed("examining"))?;
        let mapping = PoolMapping::new(file.as_fd(), len).map_err(failed("mapping"))?;
        Ok(Self {
            mapping,
            file: Arc::new(file),
            identity,
        })
    }

    fn populate(
        &self,
        options: &PopulateOptions,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), PoolFileError> {
        let hugepages = options.hugepages && self.mapping.advise_hugepages().is_ok();
        let work = |offset: u64, len: u64| {
            if hugepages {
                // Allocating first would settle the file on small pages.
                self.fill(hugepages, offset, len)?;
                return self.allocate(offset, len);
            }
            self.allocate(offset, len)?;
            self.fill(hugepages, offset, len)
        };
        if options.near.is_empty() {
            let all = Stretch {
                bytes: 0..self.bytes(),
                threads: options.threads,
                begin: None,
            };
            return populate::in_stretches(&[all], &work, progress);
        }
        let threads = options.threads.get().div_ceil(options.near.len());
        let threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
        let move_near = |near: &NearCpus| {
            if let Err(error) = nodes::run_on(&near.cpus) {
                let cpus = &near.cpus;
                tracing::warn!(
                    %error,
                    ?cpus,
                    "a thread that brings the pool's memory into being cannot run near its GPUs: \
                     the memory may lie elsewhere"
                );
            }
        };
        let begins: Vec<_> = options.near.iter().map(|near| || move_near(near)).collect();
        let stretches = options.near.iter().zip(&begins);
        let stretches = stretches.map(|(near, begin)| Stretch {
            bytes: near.bytes.clone(),
            threads,
            begin: Some(begin),
        });
        populate::in_stretches(&stretches.collect::<Vec<_>>(), &work, progress)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            &self.file,
            FallocateFlags::empty(),
            offset,
            len,
        )?)
    }

    /// Brings a range into the page tables, on hugepages if wished.
    fn fill(&self, hugepages: bool, offset: u64, len: u64) -> io::Result<()> {
        let (at, count) = (offset as usize, len as usize);
        match self.mapping.populate(at, count) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.allocate(offset, len)?;
                self.mapping.touch(at, count)?;
            }
            result => result?,
        }
        if hugepages {
            // A wish: what came of it is counted afterwards.
            let _ = self.mapping.collapse(at, count);
        }
        Ok(())
    }
}

impl AsFd for PoolFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> PoolFileError {
    PoolFileError::Io {
        action,
        name: path.display().to_string(),
        source,
    }
}

/// Makes the pool this process's own until it ends, whatever becomes of the lock file beside it.
fn lock(path: &Path, file: &File) -> Result<(), PoolFileError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(Errno::WOULDBLOCK) => {
                let name = path.display().to_string();
                return Err(PoolFileError::InUse { name });
            }
            Err(errno) => return Err(io_error("locking", path, errno.into())),
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn identity_of(file: &File) -> io::Result<PoolIdentity> {
    let metadata = file.metadata()?;
    let created_ns = match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
        Ok(stat) if stat.stx_mask & StatxFlags::BTIME.bits() != 0 => {
            let time = stat.stx_btime;
            (time.tv_sec as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(u64::from(time.tv_nsec))
        }
        _ => 0,
    };
    Ok(PoolIdentity {
        inode: metadata.ino(),
        device: metadata.dev(),
        created_ns,
    })
}

/// Refuses a pool that the file system or the machine cannot hold, before anything is allocated.
fn check_room(path: &Path, wanted_bytes: u64) -> Result<(), PoolFileError> {
    let place = path.parent().unwrap_or(Path::new("."));
    let stat = rustix::fs::statvfs(place)
        .map_err(|errno| io_error("finding room for", path, errno.into()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if wanted_bytes > free_bytes {
        return Err(PoolFileError::NoSpace {
            wanted_bytes,
            place: place.display().to_string(),
            free_bytes,
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        });
    }
    match available_memory_bytes() {
        Some(available_bytes) if wanted_bytes > available_bytes => Err(PoolFileError::NoMemory {
            wanted_bytes,
            available_bytes,
        }),
        _ => Ok(()),
    }
}

/// `MemAvailable` of the machine; `None` where it is not told.
fn available_memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const BYTES: u64 = 8 << 20;
    const OPTIONS: PopulateOptions = PopulateOptions {
        threads: NonZeroUsize::MIN,
        hugepages: false,
        near: Vec::new(),
    };

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").expect("shared memory is writable")
    }

    fn create(path: &Path) -> PoolFile {
        PoolFile::create(path, BYTES, &OPTIONS, &|_| {}).expect("there is room")
    }

    fn reason(path: &Path) -> PoolUnusable {
        match PoolFile::open(path, BYTES).expect("no system error") {
            OpenedPool::Unusable(reason) => reason,
            _ => panic!("the file must be refused"),
        }
    }

    #[test]
    fn a_created_pool_is_fully_allocated_and_keeps_its_bytes_for_the_next_daemon() {
        let directory = directory();
        let path = directory.path().join("pool");
        let done = AtomicU64::new(0);
        let progress = |bytes| {
            done.fetch_max(bytes, Ordering::Relaxed);
        };
        let pool = PoolFile::create(&path, BYTES, &OPTIONS, &progress).expect("there is room");
        assert_eq!(done.into_inner(), BYTES);
        assert_eq!(pool.file.metadata().expect("open").blocks() * 512, BYTES);
        let identity = pool.identity();
        use std::os::unix::fs::FileExt;
        pool.file
            .write_all_at(b"kept", BYTES - 4)
            .expect("allocated");
        drop(pool);
        let opened = PoolFile::open(&path, BYTES).expect("no system error");
        let OpenedPool::Ready(pool) = opened else {
            panic!("the pool can be used again")
        };
        assert_eq!(pool.identity(), identity);
        let mut bytes = [0; 4];
        pool.file
            .read_exact_at(&mut bytes, BYTES - 4)
            .expect("allocated");
        assert_eq!(&bytes, b"kept");
    }

    #[test]
    fn a_pool_created_over_another_is_another_file() {
        let directory = directory();
        let path = directory.path().join("pool");
        let first = create(&path).identity();
        assert_ne!(create(&path).identity(), first);
    }

    #[test]
    fn pages_mapped_later_keep_their_bytes_and_do_not_keep_the_pool() {
        let directory = directory();
        let path = directory.path().join("pool");
        use std::os::unix::fs::FileExt;
        let pool = create(&path);
        let pattern: Vec<u8> = (0..BYTES).map(|at| (at / 4096) as u8).collect();
        pool.file.write_all_at(&pattern, 0).expect("allocated");
        drop(pool);
        let OpenedPool::Ready(pool) = PoolFile::open(&path, BYTES).expect("no system error") else {
            panic!("the pool can be used again")
        };
        let pool = Arc::new(pool);
        let (sender, mapped) = std::sync::mpsc::channel();
        let done = move |_: &PoolFile, outcome: Result<(), PoolFileError>| {
            sender.send(outcome.is_ok()).expect("the test waits");
        };
        pool.map_pages_later(false, done).expect("a thread");
        assert_eq!(mapped.recv(), Ok(true));
        let mut bytes = vec![0; BYTES as usize];
        pool.file.read_exact_at(&mut bytes, 0).expect("allocated");
        assert!(bytes == pattern);
        pool.map_pages_later(false, |_, _| {}).expect("a thread");
        drop(pool);
        let again = PoolFile::open(&path, BYTES);
        assert!(
            matches!(again, Ok(OpenedPool::Ready(_))),
            "the thread lets go"
        );
    }

    #[test]
    fn two_never_have_one_pool_even_without_a_lock_file() {
        let directory = directory();
        let path = directory.path().join("pool");
        let first = create(&path);
        let second = PoolFile::open(&path, BYTES);
        assert!(matches!(second, Err(PoolFileError::InUse { .. })));
        drop(first);
        let second = PoolFile::open(&path, BYTES);
        assert!(matches!(second, Ok(OpenedPool::Ready(_))));
    }

    #[test]
    fn files_that_are_not_a_whole_pool_are_refused_with_the_reason() {
        let directory = directory();
        let path = directory.path().join("pool");
        let opened = PoolFile::open(&path, BYTES);
        assert!(matches!(opened, Ok(OpenedPool::Missing)));
        fs::write(&path, b"short").expect("writable");
        assert_eq!(
            reason(&path),
            PoolUnusable::Size {
                found_bytes: 5,
                wanted_bytes: BYTES
            }
        );
        File::options()
            .write(true)
            .open(&path)
            .and_then(|f| f.set_len(BYTES))
            .expect("writable");
        assert!(matches!(reason(&path), PoolUnusable::Holes { .. }));
        fs::remove_file(&path).expect("ours");
        std::os::unix::fs::symlink("elsewhere", &path).expect("writable");
        assert_eq!(reason(&path), PoolUnusable::NotOurFile);
        fs::remove_file(&path).expect("ours");
        fs::create_dir(&path).expect("writable");
        assert_eq!(reason(&path), PoolUnusable::NotOurFile);
    }

    #[test]
    fn a_pool_too_large_for_the_file_system_is_refused_before_anything_is_made() {
        let directory = directory();
        let path = directory.path().join("pool");
        let error = match PoolFile::create(&path, 1 << 60, &OPTIONS, &|_| {}) {
            Err(error) => error,
            Ok(_) => panic!("no machine has that much"),
        };
        assert!(
            matches!(error, PoolFileError::NoSpace { wanted_bytes, .. } if wanted_bytes == 1 << 60)
        );
        let text = error.to_string();
        assert!(
            text.contains("--pool-size") && text.contains("/dev/shm"),
            "{text}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn ranges_outside_the_pool_are_refused() {
        let directory = directory();
        let pool = create(&directory.path().join("pool"));
        let base = pool.base().as_ptr().addr();
        assert_eq!(base % (2 << 20), 0, "the mapping suits hugepages");
        assert_eq!(
            pool.range(4096, BYTES - 4096)
                .expect("inside")
                .as_ptr()
                .addr(),
            base + 4096
        );
        assert!(pool.range(4096, BYTES).is_err());
        assert!(pool.range(u64::MAX, 2).is_err());
        assert!(pool.range(BYTES, 0).is_ok());
    }

    #[test]
    fn the_wish_for_hugepages_is_answered_by_what_the_kernel_counts() {
        let directory = directory();
        let options = PopulateOptions {
            hugepages: true,
            ..OPTIONS
        };
        let pool = PoolFile::create(&directory.path().join("pool"), BYTES, &options, &|_| {})
            .expect("hugepages are a wish, not a condition");
        let report = pool.hugepages().expect("smaps can be read");
        assert_eq!(report.wanted_bytes, BYTES);
        assert!(report.mapped_bytes <= BYTES);
        eprintln!("{report}");
    }
}
