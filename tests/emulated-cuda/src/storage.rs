//! Files that back memory and events of an emulated machine, and who has them open.
//!
//! Whoever uses a file holds a shared lock on it, which the kernel takes back when the process
//! dies: what nobody has locked is free, as memory of a GPU is free when the last process that has
//! it mapped is gone. All looks at locks happen under the device's own lock.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};

use crate::code::{Code, Outcome};
use crate::mapping::Mapping;

/// What a file backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cuMemAlloc`: can be shared by an IPC handle.
    Memory,
    /// `cuMemCreate`: can be shared by a descriptor.
    Physical,
    /// `cuMemAllocAsync`: cannot be shared.
    Pool,
    /// What a context takes.
    Context,
    /// An event.
    Event,
}

const KINDS: [(Kind, &str); 5] = [
    (Kind::Memory, "memory"),
    (Kind::Physical, "physical"),
    (Kind::Pool, "pool"),
    (Kind::Context, "context"),
    (Kind::Event, "event"),
];

/// Marks the file of memory that its owner has freed while others still have it open.
const FREED: &str = ".freed";
const LOCK: &str = "lock";
/// Files of the same process differ by this.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What names a file; travels in handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// What it backs.
    pub kind: Kind,
    /// Index of the device in the machine.
    pub device: usize,
    /// The process that made it.
    pub pid: u32,
    /// Its number in that process.
    pub number: u64,
}

impl Name {
    fn file_name(&self) -> String {
        let kind = KINDS[self.kind as usize].1;
        format!("{kind}-{}-{}", self.pid, self.number)
    }

    fn parse(device: usize, name: &str) -> Option<Name> {
        let mut words = name.split('-');
        let word = words.next()?;
        let (kind, _) = KINDS.into_iter().find(|(_, label)| *label == word)?;
        let pid = words.next()?.parse().ok()?;
        let number = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Name {
            kind,
            device,
            pid,
            number,
        })
    }

    /// As the 64 bytes of an IPC handle.
    pub fn to_handle(self) -> [u8; 64] {
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(MAGIC);
        handle[8..16].copy_from_slice(&(self.kind as u64).to_le_bytes());
        handle[16..24].copy_from_slice(&(self.device as u64).to_le_bytes());
        handle[24..32].copy_from_slice(&u64::from(self.pid).to_le_bytes());
        handle[32..40].copy_from_slice(&self.number.to_le_bytes());
        handle
    }

    /// From an IPC handle; anything else is none.
    pub fn from_handle(handle: &[u8; 64]) -> Option<Name> {
        let word = |at: usize| {
            let bytes = handle[at..at + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        let kind = KINDS.get(usize::try_from(word(8)).ok()?)?.0;
        (handle[..8] == *MAGIC && handle[40..] == [0; 24]).then_some(Name {
            kind,
            device: usize::try_from(word(16)).ok()?,
            pid: u32::try_from(word(24)).ok()?,
            number: word(32),
        })
    }
}

const MAGIC: &[u8; 8] = b"emulated";

/// A file that this process has open and locked, and its mapping.
pub struct Object {
    /// Its name.
    pub name: Name,
    /// Its length.
    pub bytes: usize,
    /// Its bytes.
    pub mapping: Arc<Mapping>,
    /// Places in use hold a clone.
    pub user: Arc<()>,
    file: File,
    path: PathBuf,
}

impl Object {
    /// True while a copy that was submitted uses it.
    pub fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.user) > 1
    }

    /// Another descriptor of it, which holds it as this one does.
    pub fn export(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        flock(&file, FlockOperation::LockShared)?;
        Ok(file.into())
    }
}

/// The files of a machine.
#[derive(Clone)]
pub struct Storage {
    folder: PathBuf,
}

impl Storage {
    /// Over the folder of a machine.
    pub fn new(folder: &Path) -> Storage {
        Storage {
            folder: folder.to_owned(),
        }
    }

    /// Makes the folders of a new machine.
    pub fn create_folders(folder: &Path, devices: usize) -> io::Result<()> {
        let storage = Storage::new(folder);
        for device in 0..devices {
            fs::create_dir_all(storage.device(device))?;
            File::create_new(storage.device(device).join(LOCK))?;
        }
        Ok(())
    }

    fn device(&self, device: usize) -> PathBuf {
        self.folder.join(format!("device-{device}"))
    }

    /// Until dropped, nobody else makes, opens or counts files of the device.
    fn lock(&self, device: usize) -> io::Result<File> {
        let file = OpenOptions::new()
            .write(true)
            .open(self.device(device).join(LOCK))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// Makes a file of zeros, if the device has `limit` bytes in all.
    pub fn create(&self, kind: Kind, device: usize, bytes: usize, limit: u64) -> Outcome<Object> {
        let name = Name {
            kind,
            device,
            pid: std::process::id(),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        };
        let os = |error: io::Error| {
            eprintln!("emulated libcuda: making {name:?}: {error}");
            Code::OPERATING_SYSTEM
        };
        let _lock = self.lock(device).map_err(os)?;
        let used = self.count(device).map_err(os)?;
        if kind != Kind::Event && used + bytes as u64 > limit {
            return Err(Code::OUT_OF_MEMORY);
        }
        let path = self.device(device).join(name.file_name());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(os)?;
        file.set_len(bytes as u64).map_err(os)?;
        Storage::hold(name, file, path).map_err(os)
    }

    /// From now on nobody can open it by its name; those who have it open keep it.
    pub fn free(&self, object: &Object) {
        let mut freed = object.path.clone().into_os_string();
        freed.push(FREED);
        let lock = self.lock(object.name.device);
        if let Err(error) = lock.and_then(|_lock| fs::rename(&object.path, freed)) {
            eprintln!("emulated libcuda: {}: {error}", object.path.display());
        }
    }

    /// Opens a file of another process. `None` if its owner has freed it or is gone.
    pub fn open(&self, name: Name) -> Option<Object> {
        let _lock = self.lock(name.device).ok()?;
        if !is_alive(name.pid) {
            return None;
        }
        let path = self.device(name.device).join(name.file_name());
        let file = OpenOptions::new().read(true).write(true).open(&path).ok()?;
        Storage::hold(name, file, path).ok()
    }

    /// The file behind a descriptor that another process exported.
    pub fn open_descriptor(&self, descriptor: BorrowedFd<'_>) -> Option<Object> {
        let link = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
        let path = fs::read_link(&link).ok()?;
        let file_name = path.file_name()?.to_str()?.trim_end_matches(FREED);
        let device = path.parent()?.file_name()?.to_str()?;
        let device = device.strip_prefix("device-")?.parse().ok()?;
        if path.parent() != Some(&self.device(device)) {
            return None;
        }
        let name = Name::parse(device, file_name)?;
        let _lock = self.lock(device).ok()?;
        let file = OpenOptions::new().read(true).write(true).open(link).ok()?;
        Storage::hold(name, file, path).ok()
    }

    fn hold(name: Name, file: File, path: PathBuf) -> io::Result<Object> {
        flock(&file, FlockOperation::LockShared)?;
        let bytes = file.metadata()?.len() as usize;
        let mapping = Arc::new(Mapping::shared(&file, bytes)?);
        Ok(Object {
            name,
            bytes,
            mapping,
            user: Arc::new(()),
            file,
            path,
        })
    }

    /// Memory of a device that any living process holds.
    pub fn used_bytes(&self, device: usize) -> io::Result<u64> {
        let _lock = self.lock(device)?;
        self.count(device)
    }

    /// Under the device's lock: the bytes in use; files that nobody uses any more are removed.
    fn count(&self, device: usize) -> io::Result<u64> {
        let mut used = 0;
        for entry in fs::read_dir(self.device(device))? {
            let entry = entry?;
            let file_name = entry.file_name();
            let Some(text) = file_name.to_str().filter(|name| *name != LOCK) else {
                continue;
            };
            let file = match File::open(entry.path()) {
                Ok(file) => file,
                // Freed in this moment, under its other name now or gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_file(entry.path());
            } else if !text.starts_with(KINDS[Kind::Event as usize].1) {
                used += file.metadata()?.size();
            }
        }
        Ok(used)
    }
}

/// True while a process runs; one that was killed and is not yet waited for does not.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim().chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}
