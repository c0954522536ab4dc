//! Block hashes, and the bytes that belong to them.
//!
//! The bytes of a shard follow from the namespace's salt, group, rank and hash, so that a byte from
//! any other shard shows.

#![forbid(unsafe_code)]

use pegaflow::BlockHash;

/// The hash with this number.
pub fn hash(number: u64) -> BlockHash {
    let mut state = Stream::new(&[0x6861_7368, number]);
    let mut hash = [0; 32];
    for word in hash.chunks_exact_mut(8) {
        word.copy_from_slice(&state.next().to_le_bytes());
    }
    hash
}

/// Hashes of the numbers `first..first + count`.
pub fn hashes(first: u64, count: usize) -> Vec<BlockHash> {
    (first..first + count as u64).map(hash).collect()
}

/// Where a shard belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard<'a> {
    /// Salt of the namespace.
    pub salt: &'a str,
    /// Cache group.
    pub group: u16,
    /// Rank.
    pub rank: u32,
    /// Block.
    pub hash: &'a BlockHash,
}

impl Shard<'_> {
    /// The first `bytes` bytes of the shard.
    pub fn bytes(&self, bytes: usize) -> Vec<u8> {
        let mut seed = vec![u64::from(self.group), u64::from(self.rank)];
        seed.extend(self.salt.bytes().map(u64::from));
        for word in self.hash.chunks_exact(8) {
            seed.push(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        }
        let mut state = Stream::new(&seed);
        let mut content = Vec::with_capacity(bytes + 8);
        while content.len() < bytes {
            content.extend_from_slice(&state.next().to_le_bytes());
        }
        content.truncate(bytes);
        content
    }
}

/// SplitMix64 (public domain, Sebastiano Vigna), seeded by several words.
#[derive(Clone, Debug)]
pub struct Stream(u64);

impl Stream {
    /// A stream that differs for every list of words.
    pub fn new(words: &[u64]) -> Stream {
        let mut stream = Stream(0x9E37_79B9_7F4A_7C15);
        for word in words {
            stream.0 ^= *word;
            stream.0 = stream.next();
        }
        stream
    }

    /// The next word.
    #[expect(clippy::should_implement_trait, reason = "it has no end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0; the small bias does not matter here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_place_changes_the_bytes() {
        let (one, two) = (hash(1), hash(2));
        let base = Shard {
            salt: "",
            group: 0,
            rank: 0,
            hash: &one,
        };
        let others = [
            Shard { salt: "x", ..base },
            Shard { group: 1, ..base },
            Shard { rank: 1, ..base },
            Shard { hash: &two, ..base },
        ];
        for other in others {
            assert_ne!(other.bytes(16), base.bytes(16));
        }
        assert_eq!(base.bytes(100)[..16], base.bytes(16));
    }
}
