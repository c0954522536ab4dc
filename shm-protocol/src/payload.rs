//! How hash and block-id lists lie in an arena chunk.
//!
//! | operation | chunk content |
//! | --- | --- |
//! | query | `count` hashes of 32 bytes |
//! | save | `count` hashes, then their block ids |
//! | load | block ids |
//!
//! Block ids are `count` little-endian `u32`, or, with [`flags::BLOCK_RUNS`], pairs
//! `(start: u32, length: u32)` whose lengths add up to `count`. Engines hand out blocks in runs,
//! and bytes are what a list costs, so the writer takes whichever form is shorter.

#![forbid(unsafe_code)]

use crate::BlockHash;
use crate::desc::{DescriptorFault, flags};

/// Bytes of one arena chunk: what the daemon copies out and handles in one go.
pub const CHUNK_BYTES: usize = 16 * 1024;
/// Hashes in a full query chunk.
pub const QUERY_CHUNK_HASHES: usize = CHUNK_BYTES / 32;
/// Blocks in a full save chunk (32 bytes of hash and 4 of block id each), kept even so that ids
/// stay 8-byte aligned.
pub const SAVE_CHUNK_BLOCKS: usize = (CHUNK_BYTES / 36) & !1;
/// Blocks in a full load chunk.
pub const LOAD_CHUNK_BLOCKS: usize = CHUNK_BYTES / 4;

/// Blocks a chunk of this operation can hold.
pub fn items_per_chunk(op: crate::desc::Op) -> usize {
    match op {
        crate::desc::Op::Query => QUERY_CHUNK_HASHES,
        crate::desc::Op::Save => SAVE_CHUNK_BLOCKS,
        crate::desc::Op::Load => LOAD_CHUNK_BLOCKS,
        _ => 0,
    }
}

/// Encodes block ids behind `out`'s present content; returns the flags to set.
pub fn encode_blocks(blocks: &[u32], out: &mut Vec<u8>) -> u8 {
    let runs = count_runs(blocks);
    if runs * 8 < blocks.len() * 4 {
        let mut rest = blocks;
        for run in 1..=runs {
            let start = rest[0];
            let length = if run < runs {
                run_length(rest)
            } else {
                rest.len()
            };
            out.extend_from_slice(&start.to_le_bytes());
            out.extend_from_slice(&(length as u32).to_le_bytes());
            rest = &rest[length..];
        }
        flags::BLOCK_RUNS
    } else {
        out.extend_from_slice(bytemuck::cast_slice(blocks));
        0
    }
}

fn run_length(blocks: &[u32]) -> usize {
    let consecutive = blocks
        .windows(2)
        .take_while(|pair| pair[0].checked_add(1) == Some(pair[1]))
        .count();
    consecutive + 1
}

fn count_runs(blocks: &[u32]) -> usize {
    let breaks = blocks
        .windows(2)
        .filter(|pair| pair[0].checked_add(1) != Some(pair[1]))
        .count();
    if blocks.is_empty() { 0 } else { breaks + 1 }
}

/// Splits a save chunk into its hash bytes and its block bytes.
///
/// # Errors
/// The chunk is shorter than its hashes.
pub fn split_save(bytes: &[u8], count: u32) -> Result<(&[BlockHash], &[u8]), DescriptorFault> {
    let hash_bytes = count as usize * 32;
    if bytes.len() < hash_bytes || count as usize > SAVE_CHUNK_BLOCKS {
        return Err(size_fault(bytes, count));
    }
    let (hashes, blocks) = bytes.split_at(hash_bytes);
    Ok((bytemuck::cast_slice(hashes), blocks))
}

/// Reads a query chunk.
///
/// # Errors
/// The chunk's length is not `count` hashes.
pub fn query_hashes(bytes: &[u8], count: u32) -> Result<&[BlockHash], DescriptorFault> {
    if bytes.len() != count as usize * 32 || count as usize > QUERY_CHUNK_HASHES {
        return Err(size_fault(bytes, count));
    }
    Ok(bytemuck::cast_slice(bytes))
}

/// Appends the `count` block ids of a chunk to `out`.
///
/// # Errors
/// The bytes are not exactly `count` ids, or a run is empty, wraps, or exceeds `count`.
pub fn decode_blocks(
    bytes: &[u8],
    runs: bool,
    count: u32,
    out: &mut Vec<u32>,
) -> Result<(), DescriptorFault> {
    if count as usize > LOAD_CHUNK_BLOCKS {
        return Err(size_fault(bytes, count));
    }
    let word = |at: &[u8]| u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
    if !runs {
        if bytes.len() != count as usize * 4 {
            return Err(size_fault(bytes, count));
        }
        out.extend(bytes.chunks_exact(4).map(word));
        return Ok(());
    }
    if !bytes.len().is_multiple_of(8) {
        return Err(size_fault(bytes, count));
    }
    let mut left = count;
    for run in bytes.chunks_exact(8) {
        let (start, length) = (word(&run[..4]), word(&run[4..]));
        // The last id, not the end: a list may hold every number, also one that no layout has.
        let last = length
            .checked_sub(1)
            .and_then(|more| start.checked_add(more));
        let Some(last) = last.filter(|_| length <= left) else {
            return Err(size_fault(bytes, count));
        };
        left -= length;
        out.extend(start..=last);
    }
    if left != 0 {
        return Err(size_fault(bytes, count));
    }
    Ok(())
}

fn size_fault(bytes: &[u8], count: u32) -> DescriptorFault {
    DescriptorFault::PayloadSize {
        bytes: bytes.len() as u32,
        count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_round_trip(blocks in proptest::collection::vec(0u32..64, 0..200)) {
            let mut bytes = Vec::new();
            let flag = encode_blocks(&blocks, &mut bytes);
            prop_assert!(bytes.len() <= blocks.len() * 4);
            let mut back = Vec::new();
            decode_blocks(&bytes, flag & flags::BLOCK_RUNS != 0, blocks.len() as u32, &mut back)
                .unwrap();
            prop_assert_eq!(back, blocks);
        }

        #[test]
        fn garbage_is_refused_or_has_the_right_count(
            bytes in proptest::collection::vec(any::<u8>(), 0..256), count in 0u32..9000,
            runs: bool,
        ) {
            let mut out = Vec::new();
            if decode_blocks(&bytes, runs, count, &mut out).is_ok() {
                prop_assert_eq!(out.len(), count as usize);
            }
        }
    }

    #[test]
    fn a_long_run_takes_eight_bytes() {
        let blocks: Vec<u32> = (100..1100).collect();
        let mut bytes = Vec::new();
        assert_eq!(encode_blocks(&blocks, &mut bytes), flags::BLOCK_RUNS);
        assert_eq!(bytes.len(), 8);
    }

    #[test]
    fn a_run_that_wraps_is_refused() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        bytes.extend_from_slice(&2u32.to_le_bytes());
        assert!(decode_blocks(&bytes, true, 2, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_save_chunk_fits_the_chunk_size() {
        const { assert!(SAVE_CHUNK_BLOCKS * 36 <= CHUNK_BYTES) };
        assert!(split_save(&[0; 31], 1).is_err());
        assert!(query_hashes(&[0; 33], 1).is_err());
    }
}
