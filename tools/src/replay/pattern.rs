//! The bytes a block "computes" to: a function of namespace, group, rank and hash.
//!
//! Any byte that comes from another block, another rank's shard, another page offset or an older
//! content differs. The seed of a page is a BLAKE3 hash; its words are a counter through a
//! bijective mixer, several GB/s on one core, so that checking every loaded byte does not dominate
//! a replay.

#![forbid(unsafe_code)]

use pegaflow_shm::BlockHash;

/// Step of the counter: odd, with bits all over (2^64 divided by the golden ratio).
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Multiplier of the mixer, from MurmurHash3's finaliser.
const MIX: u64 = 0xFF51_AFD7_ED55_8CCD;

/// Makes the pages of one rank's group.
#[derive(Clone, Debug)]
pub struct Pattern {
    key: [u8; 32],
}

/// Where a page differs from what it should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// First byte that differs, counted from the start of the page.
    pub offset: usize,
    /// What lies there.
    pub found: u8,
    /// What should.
    pub expected: u8,
    /// Bytes that differ in the part that was checked.
    pub bytes: usize,
}

impl Pattern {
    /// Pages of `rank`'s shard of `group` in a namespace.
    pub fn new(namespace: &str, group: u16, rank: u32) -> Pattern {
        let mut hasher = blake3::Hasher::new_derive_key("pegactl replay pattern v1");
        hasher.update(&(namespace.len() as u64).to_le_bytes());
        hasher.update(namespace.as_bytes());
        hasher.update(&group.to_le_bytes());
        hasher.update(&rank.to_le_bytes());
        Pattern {
            key: *hasher.finalize().as_bytes(),
        }
    }

    /// Seed of one block's page.
    pub fn seed(&self, hash: &BlockHash) -> u64 {
        let digest = blake3::keyed_hash(&self.key, hash);
        let (head, _) = digest
            .as_bytes()
            .split_first_chunk::<8>()
            .expect("a digest has 32 bytes");
        u64::from_le_bytes(*head)
    }
}

#[inline(always)]
fn word(seed: u64, at: u64) -> u64 {
    let counter = seed.wrapping_add(at.wrapping_mul(STEP));
    let mixed = (counter ^ (counter >> 32)).wrapping_mul(MIX);
    mixed ^ (mixed >> 29)
}

/// Fills a part of a page that begins at byte `offset` of it, a multiple of 8.
pub fn fill(seed: u64, offset: usize, out: &mut [u8]) {
    debug_assert!(offset.is_multiple_of(8));
    let first = offset as u64 / 8;
    let mut chunks = out.chunks_exact_mut(8);
    let mut at = first;
    for chunk in &mut chunks {
        chunk.copy_from_slice(&word(seed, at).to_le_bytes());
        at += 1;
    }
    let rest = chunks.into_remainder();
    let last = word(seed, at).to_le_bytes();
    rest.copy_from_slice(&last[..rest.len()]);
}

/// Checks every byte of a part of a page that begins at byte `offset` of it, a multiple of 8.
///
/// # Errors
/// The first difference.
pub fn verify(seed: u64, offset: usize, found: &[u8]) -> Result<(), Mismatch> {
    debug_assert!(offset.is_multiple_of(8));
    let first = offset as u64 / 8;
    let (chunks, rest) = found.as_chunks::<8>();
    // One flag for the whole part keeps the loop free of branches.
    let mut difference = 0;
    for (at, chunk) in (first..).zip(chunks) {
        difference |= u64::from_le_bytes(*chunk) ^ word(seed, at);
    }
    let last = word(seed, first + chunks.len() as u64).to_le_bytes();
    if difference == 0 && *rest == last[..rest.len()] {
        return Ok(());
    }
    Err(describe(seed, offset, found))
}

#[cold]
fn describe(seed: u64, offset: usize, found: &[u8]) -> Mismatch {
    let mut expected = vec![0; found.len()];
    fill(seed, offset, &mut expected);
    let differs = |at: &usize| found[*at] != expected[*at];
    let bytes = (0..found.len()).filter(differs).count();
    let at = (0..found.len()).find(differs).unwrap_or(0);
    Mismatch {
        offset: offset + at,
        found: found[at],
        expected: expected[at],
        bytes,
    }
}

/// Overwrites a page with what no block holds, so that bytes left from before cannot pass as
/// loaded.
pub fn poison(round: u64, out: &mut [u8]) {
    out.fill(0xA5 ^ (round as u8));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(pattern: &Pattern, hash: u8, bytes: usize) -> Vec<u8> {
        let mut page = vec![0; bytes];
        fill(pattern.seed(&[hash; 32]), 0, &mut page);
        page
    }

    #[test]
    fn every_coordinate_changes_the_bytes() {
        let base = Pattern::new("ns", 0, 0);
        let reference = page(&base, 1, 4096);
        for other in [
            page(&base, 2, 4096),
            page(&Pattern::new("ns", 1, 0), 1, 4096),
            page(&Pattern::new("ns", 0, 1), 1, 4096),
            page(&Pattern::new("sn", 0, 0), 1, 4096),
        ] {
            let same = reference.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 64, "{same} of 4096 bytes are equal by chance");
        }
    }

    #[test]
    fn each_single_byte_that_differs_is_found() {
        let pattern = Pattern::new("ns", 0, 3);
        let seed = pattern.seed(&[9; 32]);
        let good = page(&pattern, 9, 77);
        assert_eq!(verify(seed, 0, &good), Ok(()));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let mismatch = verify(seed, 0, &bad).unwrap_err();
            assert_eq!((mismatch.offset, mismatch.bytes), (at, 1));
        }
    }

    #[test]
    fn parts_make_the_same_page_as_the_whole() {
        let pattern = Pattern::new("ns", 0, 0);
        let seed = pattern.seed(&[5; 32]);
        let whole = page(&pattern, 5, 4096);
        let mut part = vec![0; 1000];
        fill(seed, 1024, &mut part);
        assert_eq!(part, whole[1024..2024]);
        assert_eq!(verify(seed, 2048, &whole[2048..]), Ok(()));
        assert!(
            verify(seed, 2040, &whole[2048..]).is_err(),
            "a shifted page is wrong"
        );
    }

    #[test]
    fn poison_is_no_block() {
        let mut page = [0; 64];
        poison(3, &mut page);
        assert!(verify(Pattern::new("ns", 0, 0).seed(&[0; 32]), 0, &page).is_err());
    }
}
