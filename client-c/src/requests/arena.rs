//! The submission arena's free chunks, as a list threaded through an array of links.
//!
//! Taking and returning chunks happens under the client's lock. The links are atomics only so that
//! a submitting thread can walk its own chain after it let go of the lock; nobody changes the link
//! of a chunk that is taken.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// End of a chain.
const END: u32 = u32::MAX;

/// Links of all chunks; shared between the pool and whoever walks a chain.
pub(crate) type Links = Arc<[AtomicU32]>;

/// Chunks that one request holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    first: u32,
    last: u32,
    /// Chunks in the chain.
    pub(crate) count: u32,
}

impl Chain {
    /// No chunks.
    pub(crate) const EMPTY: Chain = Chain {
        first: END,
        last: END,
        count: 0,
    };

    /// The chunk numbers, in order. Only for the owner of the chain.
    pub(crate) fn chunks(self, links: &[AtomicU32]) -> impl Iterator<Item = u32> {
        let mut at = self.first;
        (0..self.count).map(move |_| {
            let chunk = at;
            at = links[chunk as usize].load(Ordering::Relaxed);
            chunk
        })
    }
}

/// The free chunks of one session's arena.
#[derive(Debug)]
pub(crate) struct ChunkPool {
    links: Links,
    head: u32,
    free: u32,
}

impl ChunkPool {
    /// All of `chunks` chunks, free.
    pub(crate) fn new(chunks: u32) -> ChunkPool {
        let link = |chunk| if chunk + 1 == chunks { END } else { chunk + 1 };
        let links = (0..chunks)
            .map(|chunk| AtomicU32::new(link(chunk)))
            .collect();
        ChunkPool {
            links,
            head: 0,
            free: chunks,
        }
    }

    /// For walking chains outside the lock.
    pub(crate) fn links(&self) -> Links {
        self.links.clone()
    }

    /// Takes `count` chunks, or none if there are not as many.
    pub(crate) fn take(&mut self, count: u32) -> Option<Chain> {
        if count > self.free {
            return None;
        }
        if count == 0 {
            return Some(Chain::EMPTY);
        }
        let first = self.head;
        let mut last = first;
        for _ in 1..count {
            last = self.links[last as usize].load(Ordering::Relaxed);
        }
        self.head = self.links[last as usize].load(Ordering::Relaxed);
        self.free -= count;
        Some(Chain { first, last, count })
    }

    /// Takes a chain back.
    pub(crate) fn put(&mut self, chain: Chain) {
        if chain.count == 0 {
            return;
        }
        self.links[chain.last as usize].store(self.head, Ordering::Relaxed);
        self.head = chain.first;
        self.free += chain.count;
        debug_assert!(self.free as usize <= self.links.len());
    }

    /// Chunks that nobody holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> u32 {
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_never_share_a_chunk_and_all_come_back() {
        let mut pool = ChunkPool::new(8);
        let links = pool.links();
        let a = pool.take(3).unwrap();
        let b = pool.take(4).unwrap();
        assert_eq!(
            pool.take(2),
            None,
            "nothing is taken when there is not enough"
        );
        let mut all: Vec<u32> = a.chunks(&links).chain(b.chunks(&links)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 7);
        pool.put(a);
        let c = pool.take(4).unwrap();
        assert!(
            c.chunks(&links)
                .all(|chunk| b.chunks(&links).all(|other| other != chunk))
        );
        pool.put(b);
        pool.put(c);
        assert_eq!(pool.free(), 8);
        assert_eq!(pool.take(8).unwrap().chunks(&links).count(), 8);
        assert_eq!(pool.take(0), Some(Chain::EMPTY));
    }
}
