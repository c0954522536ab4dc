//! KV memory of both kinds: shared with the daemon, or plain memory of this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pegaflow::{Client, HostMemory, SegmentMemory};
use serde::{Deserialize, Serialize};

use crate::withheld::Withheld;

/// Kind of KV memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// Allocated through the library; the daemon maps it.
    Shared,
    /// This process's own; the daemon uses `process_vm_readv` and `process_vm_writev`.
    Process,
    /// This process's own, which nobody ever gets to read or write, this process included.
    Withheld,
}

impl MemoryKind {
    /// Those that work.
    pub const ALL: [MemoryKind; 2] = [MemoryKind::Shared, MemoryKind::Process];
}

/// One piece of KV memory. The daemon writes it behind the compiler's back, so it is words.
#[derive(Clone)]
pub enum KvMemory {
    /// See [`MemoryKind::Shared`].
    Shared(HostMemory),
    /// See [`MemoryKind::Process`].
    Process(Arc<[AtomicU64]>),
    /// See [`MemoryKind::Withheld`].
    Withheld(Withheld),
}

impl KvMemory {
    /// Allocates `bytes` bytes of zeros, rounded up to whole words.
    ///
    /// # Errors
    /// The library has no memory to share.
    ///
    /// # Panics
    /// This machine has no memory that can be withheld: see [`Withheld::refused`].
    pub fn allocate(
        client: &Client,
        kind: MemoryKind,
        bytes: usize,
    ) -> Result<KvMemory, pegaflow::Error> {
        Ok(match kind {
            MemoryKind::Shared => KvMemory::Shared(client.alloc_host(bytes)?),
            MemoryKind::Process => {
                KvMemory::Process((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
            }
            MemoryKind::Withheld => {
                KvMemory::Withheld(Withheld::map(bytes).expect("asked before with `refused`"))
            }
        })
    }

    /// The array of one segment, to be registered.
    pub fn segment(&self, base: usize, stride: u64, bytes: u64) -> SegmentMemory {
        match self {
            KvMemory::Shared(memory) => SegmentMemory::in_host(memory, base, stride, bytes),
            KvMemory::Process(words) => {
                let address = words.as_ptr().cast::<u8>().cast_mut().wrapping_add(base);
                // SAFETY: the words are atomics, which anybody may change at any time, and the
                // worker that registers them keeps them until its client is gone. Layouts that
                // reach beyond them are what the daemon has to refuse or to fail on.
                unsafe { SegmentMemory::at(address, stride, bytes) }
            }
            KvMemory::Withheld(memory) => {
                assert!(base <= memory.bytes(), "inside the memory");
                // SAFETY: the memory stays until the process ends, and this process never touches
                // it.
                unsafe { SegmentMemory::at(memory.address().wrapping_add(base), stride, bytes) }
            }
        }
    }

    /// Copies out; `offset` and the length are whole words.
    ///
    /// # Panics
    /// They are not, or reach beyond the memory.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        match self {
            KvMemory::Shared(memory) => memory.read(offset, out).expect("inside the memory"),
            KvMemory::Process(words) => {
                let words = &words[whole(offset)..][..whole(out.len())];
                for (word, bytes) in words.iter().zip(out.chunks_exact_mut(8)) {
                    bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
                }
            }
            KvMemory::Withheld(_) => panic!("would wait for ever"),
        }
    }

    /// Copies in; `offset` and the length are whole words.
    ///
    /// # Panics
    /// They are not, or reach beyond the memory.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        match self {
            KvMemory::Shared(memory) => memory.write(offset, bytes).expect("inside the memory"),
            KvMemory::Process(words) => {
                let words = &words[whole(offset)..][..whole(bytes.len())];
                for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
                    let value = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
                    word.store(value, Ordering::Relaxed);
                }
            }
            KvMemory::Withheld(_) => panic!("would wait for ever"),
        }
    }
}

/// An array of this process at an address where nothing is mapped.
pub fn unmapped_segment(stride: u64, bytes: u64) -> SegmentMemory {
    // The first pages of an address space are never mapped; the daemon's limit is 64 KiB.
    let address = std::ptr::without_provenance_mut::<u8>(0x2_0000);
    // SAFETY: nobody has memory there; every copy to or from it fails in the kernel.
    unsafe { SegmentMemory::at(address, stride, bytes) }
}

fn whole(bytes: usize) -> usize {
    assert!(bytes.is_multiple_of(8), "{bytes} bytes are not whole words");
    bytes / 8
}
