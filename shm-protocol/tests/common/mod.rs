//! A ring over two sealed memfds, as one session has it: slots in the producer's segment,
//! `consumed` in the consumer's, and each side with a read-only mapping of the other's.

use std::os::fd::AsFd;
use std::sync::Arc;

use pegaflow_shm::mapping::{Mapping, create_segment, open_peer_segment};
use pegaflow_shm::ring::{RawRing, SLOT_BYTES};

/// Bytes in front of the slots, so that offsets matter.
pub const HEADER_BYTES: usize = 4096;

const CONSUMED_OFFSET: usize = 256;

pub struct RingPair {
    #[allow(dead_code, reason = "not every test that shares this file produces")]
    /// The producer's view.
    pub producing: RawRing,
    /// The consumer's view.
    pub consuming: RawRing,
    /// The producer's segment, writable.
    #[allow(dead_code, reason = "not every test that shares this file scribbles")]
    pub slots: Arc<Mapping>,
}

pub fn ring_pair(capacity: u32) -> RingPair {
    let slot_bytes = HEADER_BYTES + capacity as usize * SLOT_BYTES;
    let (slots_fd, slots) = create_segment("slots", slot_bytes as u64).unwrap();
    let (words_fd, words) = create_segment("words", 4096).unwrap();
    let slots_seen = open_peer_segment(slots_fd.as_fd(), "slots", slot_bytes as u64).unwrap();
    let words_seen = open_peer_segment(words_fd.as_fd(), "words", 4096).unwrap();
    let (slots, slots_seen) = (Arc::new(slots), Arc::new(slots_seen));
    let (words, words_seen) = (Arc::new(words), Arc::new(words_seen));

    assert!(
        RawRing::for_producer(&slots_seen, HEADER_BYTES, capacity, &words, CONSUMED_OFFSET)
            .is_err(),
        "nobody produces into a read-only mapping"
    );
    assert!(
        RawRing::for_consumer(&slots, HEADER_BYTES, capacity, &words_seen, CONSUMED_OFFSET)
            .is_err(),
        "nobody reports into a read-only mapping"
    );
    assert!(
        RawRing::for_producer(
            &slots,
            HEADER_BYTES,
            capacity * 2,
            &words_seen,
            CONSUMED_OFFSET
        )
        .is_err(),
        "a ring does not reach beyond its segment"
    );
    let producing =
        RawRing::for_producer(&slots, HEADER_BYTES, capacity, &words_seen, CONSUMED_OFFSET)
            .unwrap();
    let consuming =
        RawRing::for_consumer(&slots_seen, HEADER_BYTES, capacity, &words, CONSUMED_OFFSET)
            .unwrap();
    RingPair {
        producing,
        consuming,
        slots,
    }
}

/// xorshift64*: all the randomness a test needs, and the seed reproduces it.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
