//! What `memcpy` reaches between a memfd and a tmpfs file, with several threads: the limit of a
//! save.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use pegaflow_shm::mapping::{Access, Mapping, NamedFile, create_kv_region};

use crate::children;
use crate::error::ToolError;

/// Both memories, populated.
pub struct Memcpy {
    source: Arc<Mapping>,
    target: Arc<Mapping>,
    bytes: usize,
    threads: usize,
    folder: PathBuf,
}

impl Memcpy {
    /// Memory of `bytes` bytes on each side; the file lies in a folder of its own under `shm_dir`.
    pub fn new(shm_dir: &Path, bytes: usize, threads: usize) -> Result<Memcpy, ToolError> {
        let name = format!("{}{}-memcpy", children::OWN_NODE_PREFIX, std::process::id());
        let folder = shm_dir.join(name);
        std::fs::create_dir_all(&folder).map_err(ToolError::io("making a folder for a bench"))?;
        children::remember_folder(&folder);
        let path = folder.join("target");
        let _ = std::fs::remove_file(&path);
        let file = NamedFile::create(&path, "memcpy target", bytes as u64)?;
        file.reserve(0, bytes as u64)?;
        let (_, source) = create_kv_region("memcpy-source", bytes as u64)?;
        let target = file.map(Access::ReadWrite)?;
        let memcpy = Memcpy {
            source: Arc::new(source),
            target: Arc::new(target),
            bytes,
            threads: threads.max(1),
            folder,
        };
        // The first round makes the page tables.
        memcpy.gbps()?;
        Ok(memcpy)
    }

    /// Copies everything once and gives the rate in GB/s.
    pub fn gbps(&self) -> Result<f64, ToolError> {
        let barrier = Barrier::new(self.threads + 1);
        let share = self.bytes.div_ceil(self.threads).next_multiple_of(64);
        std::thread::scope(|scope| {
            let mut workers = Vec::new();
            for thread in 0..self.threads {
                let from = (thread * share).min(self.bytes);
                let length = share.min(self.bytes - from);
                let source = self.source.ptr_at(from, length)?.expose_provenance();
                let target = self.target.ptr_at(from, length)?.expose_provenance();
                let barrier = &barrier;
                workers.push(scope.spawn(move || {
                    barrier.wait();
                    let source = std::ptr::with_exposed_provenance::<u8>(source);
                    let target = std::ptr::with_exposed_provenance_mut::<u8>(target);
                    // SAFETY: both ranges were checked against their mappings, which `self` keeps;
                    // the mappings do not overlap, no other process knows them, and threads copy
                    // disjoint parts.
                    unsafe { std::ptr::copy_nonoverlapping(source, target, length) };
                }));
            }
            barrier.wait();
            let start = Instant::now();
            for worker in workers {
                let _ = worker.join();
            }
            Ok(self.bytes as f64 / start.elapsed().as_nanos() as f64)
        })
    }
}

impl Drop for Memcpy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
        children::forget_folder(&self.folder);
    }
}
