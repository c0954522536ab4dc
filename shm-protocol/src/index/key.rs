//! Keys, entry ids, and where a key's probe starts.

#![forbid(unsafe_code)]

use core::fmt;

use twox_hash::XxHash3_64;

use super::entry::KeyWords;
use crate::BlockHash;

/// Number of an index entry; the same number names the block in the daemon's own tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct EntryId(pub u32);

impl EntryId {
    /// The id as an array index.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {}", self.0)
    }
}

/// What names a block inside one isolation domain: hash, namespace and cache group, compared in
/// full on every look-up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey {
    hash: [u64; 4],
    /// Namespace index, given by the daemon at registration.
    pub namespace: u32,
    /// Cache group of a hybrid model.
    pub group: u16,
}

impl BlockKey {
    /// Key of block `hash` in `namespace` and `group`.
    #[inline]
    pub fn new(namespace: u32, group: u16, hash: &BlockHash) -> Self {
        Self {
            hash: hash_to_words(hash),
            namespace,
            group,
        }
    }

    /// The 32 bytes of the hash.
    pub fn hash(&self) -> BlockHash {
        let mut bytes = [0; 32];
        for (target, word) in bytes.chunks_exact_mut(8).zip(self.hash) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[inline]
    pub(super) fn words(&self) -> KeyWords {
        KeyWords {
            scope: pack_scope(self.namespace, self.group),
            hash: self.hash,
        }
    }

    pub(super) fn from_words(words: &KeyWords) -> Self {
        Self {
            hash: words.hash,
            namespace: words.scope as u32,
            group: (words.scope >> 32) as u16,
        }
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockKey({}/{}/", self.namespace, self.group)?;
        for byte in self.hash() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}

/// Namespace in bits 0..32, group in bits 32..48, zero above.
#[inline]
pub(super) fn pack_scope(namespace: u32, group: u16) -> u64 {
    u64::from(namespace) | u64::from(group) << 32
}

#[inline]
pub(super) fn hash_to_words(hash: &BlockHash) -> [u64; 4] {
    let (words, _) = hash.as_chunks::<8>();
    [0, 1, 2, 3].map(|i| u64::from_le_bytes(words[i]))
}

/// Where a key's probe starts and what its slot carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Home {
    /// First line to look at.
    pub(super) line: u32,
    /// Never zero, so that it differs from an empty slot's.
    pub(super) tag: u32,
}

/// The seeded hash function of one index.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyHasher {
    seed: u64,
    bucket_count: u64,
}

impl KeyHasher {
    pub(super) fn new(seed: u64, bucket_count: u32) -> Self {
        Self {
            seed,
            bucket_count: u64::from(bucket_count),
        }
    }

    /// Home of a key. The seed keeps engine-chosen hashes (sequential ones, say) from crowding.
    #[inline]
    pub(super) fn home(&self, words: &KeyWords) -> Home {
        // The packed key: 32 bytes of hash, then the scope word, all little-endian.
        let mut packed = [0u8; 40];
        let (targets, _) = packed.as_chunks_mut::<8>();
        for (target, word) in targets.iter_mut().zip(words.hash) {
            *target = word.to_le_bytes();
        }
        targets[4] = words.scope.to_le_bytes();
        let mixed = XxHash3_64::oneshot_with_seed(self.seed, &packed);
        // Fast range reduction uses the upper bits, the tag the lower ones: independent.
        let line = ((u128::from(mixed) * u128::from(self.bucket_count)) >> 64) as u32;
        Home {
            line,
            tag: (mixed as u32).max(1),
        }
    }
}
