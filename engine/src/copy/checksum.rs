//! Checksums of pages in the pool: taken after a save's copy, compared before a load's.

use clap::ValueEnum;
pub use pegaflow_ssd::NO_CHECKSUM;

use super::error::CopyError;
use super::memory::PoolMemory;
use super::task::PageCopy;
use crate::pool::round_page;

/// In the [`PageCopy::checksum`] of a save: take one.
pub const TAKE_CHECKSUM: u64 = 1;
/// Of how many saved pages one gets a checksum under [`ChecksumMode::Sampled`].
pub const SAMPLE: u32 = 16;

/// Which pages get a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ChecksumMode {
    /// None, and none is compared.
    #[default]
    Off,
    /// One of [`SAMPLE`] saved pages. Whatever has one is compared at each load.
    Sampled,
    /// Every one.
    Always,
}

/// Says which of the pages that are saved get a checksum.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    mode: ChecksumMode,
    /// Pages since the last one that got one.
    since: u32,
}

impl Sampler {
    /// The next page is the first.
    pub fn new(mode: ChecksumMode) -> Sampler {
        Sampler {
            mode,
            since: SAMPLE - 1,
        }
    }

    /// What to put into the next page's [`PageCopy::checksum`].
    #[inline]
    pub fn for_next_page(&mut self) -> u64 {
        match self.mode {
            ChecksumMode::Off => NO_CHECKSUM,
            ChecksumMode::Always => TAKE_CHECKSUM,
            ChecksumMode::Sampled => {
                self.since = (self.since + 1) % SAMPLE;
                if self.since == 0 {
                    TAKE_CHECKSUM
                } else {
                    NO_CHECKSUM
                }
            }
        }
    }
}

/// The checksum of the page at `offset` of the pool that holds `bytes` bytes: of all of it, as the
/// pool rounds it and as the tier below moves it, so that both mean the same by it.
///
/// # Safety
///
/// The bytes lie in the pool, and no thread of this process writes to the page meanwhile.
unsafe fn page_checksum(pool: &PoolMemory, offset: u64, bytes: u64) -> u64 {
    let bytes = round_page(bytes).min(pool.bytes() - offset);
    // SAFETY: mapped (caller, the line above, and `PoolMemory::new`). Only copy threads of this
    // process write to the pool, which no other process has open, and none writes here now
    // (caller). Memory that changes all the same is what the number is there to find: computing it
    // takes no decision and no address from the bytes.
    let page = unsafe {
        std::slice::from_raw_parts(pool.base().as_ptr().add(offset as usize), bytes as usize)
    };
    pegaflow_ssd::page_checksum(page)
}

/// Takes the checksums that the pages of a save ask for.
///
/// # Safety
///
/// As for [`verify`].
pub(crate) unsafe fn take(pool: &PoolMemory, page_bytes: u64, pages: &mut [PageCopy]) {
    for page in pages {
        if page.checksum != NO_CHECKSUM {
            // SAFETY: the caller's promise.
            page.checksum = unsafe { page_checksum(pool, page.pool_offset, page_bytes) };
        }
    }
}

/// How many pages from the first on are what their checksums say, and what is wrong with the next.
///
/// # Safety
///
/// Every page lies in the pool, and no thread of this process writes to it meanwhile.
pub(crate) unsafe fn verify(
    pool: &PoolMemory,
    page_bytes: u64,
    pages: &[PageCopy],
) -> (usize, Option<CopyError>) {
    for (number, page) in pages.iter().enumerate() {
        if page.checksum == NO_CHECKSUM {
            continue;
        }
        // SAFETY: the caller's promise.
        let found = unsafe { page_checksum(pool, page.pool_offset, page_bytes) };
        if found != page.checksum {
            let (offset, recorded) = (page.pool_offset, page.checksum);
            let error = CopyError::Checksum {
                offset,
                recorded,
                found,
            };
            return (number, Some(error));
        }
    }
    (pages.len(), None)
}
