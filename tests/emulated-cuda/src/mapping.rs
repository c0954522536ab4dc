//! Shared mappings, places in them, and copies between places.

use std::fs::File;
use std::io;
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Memory of this process that other processes may share; unmapped when dropped.
pub struct Mapping {
    address: usize,
    bytes: usize,
}

impl Mapping {
    /// The first `bytes` bytes of a file, shared.
    pub fn shared(file: &File, bytes: usize) -> io::Result<Mapping> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let address = unsafe { mmap(null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        Ok(Mapping {
            address: address.expose_provenance(),
            bytes,
        })
    }

    /// Addresses that nothing else gets, and that nobody can follow.
    pub fn reserved(bytes: usize) -> io::Result<Mapping> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as above.
        let address = unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::empty(), flags) }?;
        Ok(Mapping {
            address: address.expose_provenance(),
            bytes,
        })
    }

    /// Populated memory of this process, as `cuMemHostAlloc` gives it.
    pub fn private(bytes: usize) -> io::Result<Mapping> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as above.
        let address = unsafe { mmap_anonymous(null_mut(), bytes, access, MapFlags::PRIVATE) }?;
        Ok(Mapping {
            address: address.expose_provenance(),
            bytes,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.address
    }

    /// A shared mapping as words that any process may change at any time.
    pub fn words(&self) -> &[AtomicU64] {
        let first = with_exposed_provenance::<AtomicU64>(self.address);
        // SAFETY: a mapping is aligned to pages, readable and writable (reserved ones are never
        // asked for words), and lives as long as `self`; other processes use atomics as well.
        unsafe { std::slice::from_raw_parts(first, self.bytes / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let address = with_exposed_provenance_mut(self.address);
        // SAFETY: this is the mapping that was made, and places in it keep it alive.
        if let Err(error) = unsafe { munmap(address, self.bytes) } {
            eprintln!("emulated libcuda: munmap: {error}");
        }
    }
}

/// Bytes that can be copied: a range of a shared mapping, or host memory of the process that called
/// the driver.
#[derive(Clone)]
pub struct Place {
    address: usize,
    bytes: usize,
    // Both keep what lies there in use until the copy is done.
    _mapping: Option<Arc<Mapping>>,
    _user: Arc<()>,
}

impl Place {
    /// `bytes` bytes at `offset` of a shared mapping; `user` counts the places in use.
    pub fn in_mapping(
        mapping: &Arc<Mapping>,
        offset: usize,
        bytes: usize,
        user: &Arc<()>,
    ) -> Option<Place> {
        let end = offset.checked_add(bytes)?;
        (end <= mapping.bytes).then(|| Place {
            address: mapping.address + offset,
            bytes,
            _mapping: Some(mapping.clone()),
            _user: user.clone(),
        })
    }

    /// Host memory, for which the caller of the driver vouches as it does for the real driver.
    pub fn in_host(address: usize, bytes: usize, user: &Arc<()>) -> Place {
        Place {
            address,
            bytes,
            _mapping: None,
            _user: user.clone(),
        }
    }

    /// Its length.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies as many bytes as both have, from `skip_from` and to `skip_to`.
    pub fn copy_from(&self, skip_to: usize, from: &Place, skip_from: usize, bytes: usize) {
        assert!(skip_to + bytes <= self.bytes && skip_from + bytes <= from.bytes);
        let source = with_exposed_provenance::<u8>(from.address + skip_from);
        let target = with_exposed_provenance_mut::<u8>(self.address + skip_to);
        // SAFETY: both ranges lie inside their places (asserted), which are mapped for as long as
        // they exist; that nobody else uses the bytes meanwhile is what the driver's caller has to
        // see to by events, as on a GPU. The ranges may overlap.
        unsafe { std::ptr::copy(source, target, bytes) };
    }

    /// Copies out.
    pub fn read(&self, out: &mut [u8]) {
        assert!(out.len() <= self.bytes);
        let source = with_exposed_provenance::<u8>(self.address);
        // SAFETY: the place has as many bytes (asserted); `out` is borrowed mutably and is no part
        // of it.
        unsafe { std::ptr::copy_nonoverlapping(source, out.as_mut_ptr(), out.len()) };
    }

    /// Its first 32-bit word, which other processes may change at any time; `None` where there is
    /// none, or it is not aligned.
    pub fn word(&self) -> Option<u32> {
        if self.bytes < 4 || !self.address.is_multiple_of(4) {
            return None;
        }
        let word = with_exposed_provenance_mut::<u32>(self.address);
        // SAFETY: inside the place and aligned; others change it by atomic operations, too.
        Some(unsafe { AtomicU32::from_ptr(word) }.load(Ordering::Acquire))
    }

    /// Fills it with a pattern, which begins anew at its start.
    pub fn fill(&self, pattern: &[u8]) {
        let target = with_exposed_provenance_mut::<u8>(self.address);
        for at in 0..self.bytes {
            // SAFETY: inside the place.
            unsafe { target.wrapping_add(at).write(pattern[at % pattern.len()]) };
        }
    }
}

/// Copies between lists of places of equal length in all.
pub fn copy(to: &[Place], from: &[Place]) {
    let (mut to, mut from) = (to.iter(), from.iter());
    let (mut target, mut source) = (to.next(), from.next());
    let (mut written, mut read) = (0, 0);
    while let (Some(into), Some(out_of)) = (target, source) {
        let bytes = (into.bytes() - written).min(out_of.bytes() - read);
        into.copy_from(written, out_of, read, bytes);
        written += bytes;
        read += bytes;
        if written == into.bytes() {
            (target, written) = (to.next(), 0);
        }
        if read == out_of.bytes() {
            (source, read) = (from.next(), 0);
        }
    }
}
