//! Checksums of a page that has come from the drive or gone to it.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

use crate::block::{NO_CHECKSUM, known, page_checksum};
use crate::format::Record;

/// Bytes that are asked for at a time: they fit the smallest cache, and none of the CPU's own
/// guesses reaches beyond a page of memory.
const PIECE: usize = 4 << 10;
/// Bytes that come closer at a time.
const LINE: usize = 64;
/// Pages of this size and more are so many requests for the drive's host that what it pays for each
/// is of no weight.
const LARGE: usize = 1 << 20;

/// What a page's bytes are, by both of its checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sums {
    /// As [`page_checksum`] says, or [`NO_CHECKSUM`] if it was not asked for.
    pub(super) plain: u64,
    /// The drive's: as [`Record::checksum_of`] says.
    pub(super) seeded: u64,
}

/// Takes them, the plain one first.
pub(super) fn of_page(bytes: &[u8], seed: u64, is_plain_wanted: bool) -> Sums {
    Sums {
        plain: match is_plain_wanted {
            true => page_checksum(bytes),
            false => NO_CHECKSUM,
        },
        seeded: Record::checksum_of(seed, bytes),
    }
}

/// Takes them of a page that was read into small pages of memory; of each piece the plain one
/// first.
///
/// The bytes are asked for past the larger caches: what this thread has in its own, whoever writes
/// there next has to take away first. A host that copies pages of 64 KiB by itself does 1.1 times
/// as many a second. In huge pages, where the CPU asks by itself, that showed nothing but a price.
pub(super) fn of_read_page(bytes: &[u8], seed: u64, is_plain_wanted: bool) -> Sums {
    if bytes.len() <= PIECE || bytes.len() >= LARGE || !cfg!(target_arch = "x86_64") {
        return of_page(bytes, seed, is_plain_wanted);
    }
    let mut plain = is_plain_wanted.then(XxHash3_64::new);
    let mut seeded = XxHash3_64::with_seed(seed);
    for piece in bytes.chunks(PIECE) {
        ask_for(piece);
        if let Some(plain) = &mut plain {
            plain.write(piece);
        }
        seeded.write(piece);
    }
    Sums {
        plain: plain.map_or(NO_CHECKSUM, |plain| known(plain.finish())),
        seeded: seeded.finish(),
    }
}

/// Asks the CPU to bring these bytes closer, for one use; touches nothing, changes nothing.
fn ask_for(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(LINE) {
        use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
        // SAFETY: a live slice's address; a prefetch is a hint that never faults, and SSE is part
        // of every x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, LINE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_by_pieces_they_are_the_same_as_at_once() {
        let content: Vec<u8> = (0..70_001_u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        for bytes in [
            1,
            240,
            241,
            512,
            PIECE - 1,
            PIECE,
            PIECE + 1,
            65_536,
            content.len(),
        ] {
            let page = &content[..bytes];
            for is_plain_wanted in [true, false] {
                let once = of_page(page, 77, is_plain_wanted);
                let by_pieces = of_read_page(page, 77, is_plain_wanted);
                assert_eq!(once, by_pieces, "{bytes} bytes");
            }
            let sums = of_read_page(page, 77, true);
            assert_eq!(sums.plain, page_checksum(page), "{bytes} bytes");
            assert_eq!(sums.seeded, Record::checksum_of(77, page), "{bytes} bytes");
        }
    }
}
