//! The fake's cache: blocks, leases, the index file, and copies to and from a client's memory.

use std::collections::HashMap;
use std::sync::Arc;

use pegaflow_shm::control::{MemoryRef, RegisterSpec};
use pegaflow_shm::index::{BlockKey, IndexLayout, IndexWriter, RawMemory};
use pegaflow_shm::mapping::{Access, Mapping, NamedFile};
use pegaflow_shm::{BlockHash, BootId};

/// Key of the one namespace.
pub const NAMESPACE: u32 = 7;

/// Blocks of the one namespace.
pub struct Store {
    pub blocks: HashMap<(u16, BlockHash), Vec<u8>>,
    pub leases: HashMap<u64, Vec<BlockHash>>,
    pub next_lease: u64,
    writer: IndexWriter<RawMemory<Arc<Mapping>>>,
    pub index: NamedFile,
}

impl Store {
    pub fn new(boot_id: BootId) -> Store {
        let layout = IndexLayout::for_capacity(262_144).unwrap();
        let name = format!(
            "/dev/shm/pegaflow-fake-{}-{}",
            std::process::id(),
            boot_id[0]
        );
        let index = NamedFile::create(name.as_ref(), "fake index", layout.total_bytes()).unwrap();
        std::fs::remove_file(&name).unwrap();
        index.reserve(0, layout.total_bytes()).unwrap();
        let mapping = Arc::new(index.map(Access::ReadWrite).unwrap());
        let base = mapping.ptr_at(0, mapping.len()).unwrap();
        let base = std::ptr::NonNull::new(base).unwrap();
        // SAFETY: the whole mapping, kept alive by the memory's owner, written by nobody else.
        let memory = unsafe { RawMemory::new(base, mapping.len(), mapping.clone()) };
        let mut writer = IndexWriter::create(memory, layout, boot_id, 42).unwrap();
        writer
            .reserve(262_144, |_| Ok::<(), std::io::Error>(()))
            .unwrap();
        Store {
            blocks: HashMap::new(),
            leases: HashMap::new(),
            next_lease: 1,
            writer,
            index,
        }
    }

    /// Holds a block; false if it was held already.
    pub fn put(&mut self, group: u16, hash: BlockHash, bytes: Vec<u8>) -> bool {
        if self.blocks.contains_key(&(group, hash)) {
            return false;
        }
        self.blocks.insert((group, hash), bytes);
        let id = self
            .writer
            .insert(&BlockKey::new(NAMESPACE, group, &hash))
            .unwrap();
        self.writer.seal(id).unwrap();
        true
    }

    pub fn holds(&self, group: u16, hash: &BlockHash) -> bool {
        self.blocks.contains_key(&(group, *hash))
    }
}

/// One client's memory.
pub struct ClientMemory {
    pub pid: i32,
    pub regions: HashMap<u32, Mapping>,
}

impl ClientMemory {
    /// Reads block `block` of a group: its segments one after the other.
    pub fn gather(&self, spec: &RegisterSpec, group: u16, block: u32) -> Option<Vec<u8>> {
        let group = spec.groups.iter().find(|layout| layout.group == group)?;
        let mut page = Vec::new();
        for segment in &group.segments {
            let at = segment.base + u64::from(block) * segment.block_stride;
            let mut part = vec![0; segment.bytes as usize];
            match segment.memory {
                MemoryRef::Region(id) => {
                    self.regions
                        .get(&id)?
                        .copy_out(at as usize, &mut part)
                        .ok()?;
                }
                MemoryRef::Process => self.process(at, &mut part, libc::process_vm_readv)?,
            }
            page.extend(part);
        }
        Some(page)
    }

    /// Writes a page into block `block` of a group.
    pub fn scatter(&self, spec: &RegisterSpec, group: u16, block: u32, page: &[u8]) -> Option<()> {
        let group = spec.groups.iter().find(|layout| layout.group == group)?;
        let mut rest = page;
        for segment in &group.segments {
            let at = segment.base + u64::from(block) * segment.block_stride;
            let (part, tail) = rest.split_at_checked(segment.bytes as usize)?;
            rest = tail;
            match segment.memory {
                MemoryRef::Region(id) => self.regions.get(&id)?.copy_in(at as usize, part).ok()?,
                MemoryRef::Process => {
                    self.process(at, &mut part.to_vec(), libc::process_vm_writev)?;
                }
            }
        }
        Some(())
    }

    fn process(&self, at: u64, part: &mut [u8], copy: Copier) -> Option<()> {
        let local = libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        };
        let remote = libc::iovec {
            iov_base: at as *mut _,
            iov_len: part.len(),
        };
        // SAFETY: the local range is `part`; the kernel checks the remote one.
        let done = unsafe { copy(self.pid, &local, 1, &remote, 1, 0) };
        (done == part.len() as isize).then_some(())
    }
}

type Copier = unsafe extern "C" fn(
    libc::pid_t,
    *const libc::iovec,
    libc::c_ulong,
    *const libc::iovec,
    libc::c_ulong,
    libc::c_ulong,
) -> isize;
