//! Taking over what a previous daemon recorded.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pegaflow_shm::BlockHash;

use super::record::{RECORD_BYTES, RECORD_SEALED, Record};
use super::{Catalog, CatalogError, PageRecord};
use crate::fault::{self, CrashPoint};
use crate::pool::{ExtentId, PageAddr};

/// Bytes read at once: a multiple of the record size.
const READ_BYTES: usize = 256 << 10;

/// A page whose record is complete and believable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdoptedPage {
    /// Where it begins in the pool.
    pub addr: PageAddr,
    /// What it holds.
    pub page: PageRecord,
}

/// Records that were thrown away, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Neither empty nor sealed, or with a wrong checksum: torn, strayed from another page's place,
    /// or of a namespace that gave up its row.
    pub bad_checksum: u64,
    /// Of a namespace that is not in the catalog.
    pub unknown_namespace: u64,
    /// With another page size than its extent's.
    pub wrong_page_size: u64,
    /// Of a shard that the block, or of more shards than the namespace has ranks.
    pub bad_rank: u64,
    /// Of a shard that another record holds already.
    pub duplicate: u64,
    /// Rows of the extent table (each with all its records) that name no possible page size.
    pub bad_extents: u64,
}

impl Discarded {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.bad_checksum
            + self.unknown_namespace
            + self.wrong_page_size
            + self.bad_rank
            + self.duplicate
            + self.bad_extents
    }
}

/// What a scan of the catalog found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdoptReport {
    /// The pages to adopt, by address. Single shards: which of them make whole blocks, is for the
    /// caller to find out.
    pub pages: Vec<AdoptedPage>,
    /// What was thrown away.
    pub discarded: Discarded,
}

type ShardKey = (BlockHash, u32, u16, u8);

/// A record's place in the file.
struct Place {
    extent: ExtentId,
    slot: u64,
    page_bytes: u32,
}

impl Catalog {
    /// Reads all records of the previous daemon. Those thrown away are cleared, so that they stay
    /// away. The caller clears each page that it does not keep, and then calls
    /// [`retain_extents`](Self::retain_extents).
    pub fn adopt(&self) -> Result<AdoptReport, CatalogError> {
        let mut report = AdoptReport::default();
        let mut shards = HashMap::new();
        for (extent, page_bytes) in (0..).zip(self.extents.iter().copied()) {
            if page_bytes != 0 {
                self.adopt_extent(extent, page_bytes, &mut report, &mut shards)?;
            } else if self.extent_row(extent)?.is_none() {
                report.discarded.bad_extents += 1;
            }
        }
        if report.discarded.duplicate > 0 {
            report.pages.retain(|adopted| {
                let key = shard_key(&adopted.page);
                shards
                    .get(&key)
                    .is_some_and(|(addr, _)| *addr == adopted.addr)
            });
        }
        Ok(report)
    }

    /// Keeps the records of the extents for which `in_use` answers true and gives all other memory
    /// back, also what a daemon that died in the middle of it left behind.
    pub fn retain_extents(
        &mut self,
        mut in_use: impl FnMut(ExtentId) -> bool,
    ) -> Result<(), CatalogError> {
        // Neighbouring areas go back in one call: most of a large pool may be unused.
        let mut gap_from = None;
        for extent in 0..self.layout.extents {
            if self.extents[extent as usize] != 0 && in_use(extent) {
                self.release_areas(gap_from.take(), extent)?;
                continue;
            }
            self.store(super::Layout::extent_row(extent), 0)?;
            self.extents[extent as usize] = 0;
            gap_from.get_or_insert(extent);
        }
        self.release_areas(gap_from, self.layout.extents)
    }

    fn release_areas(&self, from: Option<ExtentId>, to: ExtentId) -> Result<(), CatalogError> {
        if let Some(from) = from {
            let start = self.layout.area(from);
            self.release_bytes(start, self.layout.area(to) - start)?;
        }
        Ok(())
    }

    fn adopt_extent(
        &self,
        extent: ExtentId,
        page_bytes: u32,
        report: &mut AdoptReport,
        shards: &mut HashMap<ShardKey, (PageAddr, u32)>,
    ) -> Result<(), CatalogError> {
        let bytes = self.layout.slots(page_bytes) * RECORD_BYTES;
        let mut buffer = vec![0; READ_BYTES.min(bytes as usize)];
        let mut done = 0;
        while done < bytes {
            let chunk_bytes = (bytes - done).min(READ_BYTES as u64) as usize;
            let chunk = &mut buffer[..chunk_bytes];
            self.read(self.layout.area(extent) + done, chunk)?;
            let first = done / RECORD_BYTES;
            for (record, slot) in chunk.chunks_exact(RECORD_BYTES as usize).zip(first..) {
                let record: Record = bytemuck::pod_read_unaligned(record);
                if record.state == super::EMPTY {
                    continue;
                }
                let place = Place {
                    extent,
                    slot,
                    page_bytes,
                };
                self.adopt_record(&record, &place, report, shards)?;
            }
            done += chunk_bytes as u64;
        }
        Ok(())
    }

    fn adopt_record(
        &self,
        record: &Record,
        place: &Place,
        report: &mut AdoptReport,
        shards: &mut HashMap<ShardKey, (PageAddr, u32)>,
    ) -> Result<(), CatalogError> {
        let addr = self.layout.page(place.extent, place.slot, place.page_bytes);
        if let Some(counter) = self.refuse(record, addr, place.page_bytes, &mut report.discarded) {
            *counter += 1;
            self.clear(addr)?;
            fault::point(CrashPoint::RecordDiscarded);
            return Ok(());
        }
        let page = record.page();
        match shards.entry(shard_key(&page)) {
            Entry::Vacant(entry) => {
                entry.insert((addr, page.generation));
            }
            Entry::Occupied(mut entry) => {
                report.discarded.duplicate += 1;
                let (older, generation) = *entry.get();
                if page.generation <= generation {
                    return self.clear(addr);
                }
                self.clear(older)?;
                entry.insert((addr, page.generation));
            }
        }
        report.pages.push(AdoptedPage { addr, page });
        Ok(())
    }

    /// The counter of the reason for which a record is not believed.
    fn refuse<'a>(
        &self,
        record: &Record,
        addr: PageAddr,
        page_bytes: u32,
        discarded: &'a mut Discarded,
    ) -> Option<&'a mut u64> {
        if record.state != RECORD_SEALED {
            return Some(&mut discarded.bad_checksum);
        }
        let Ok(namespace) = self.namespace(record.namespace) else {
            return Some(&mut discarded.unknown_namespace);
        };
        if record.crc != record.computed_crc(namespace.seed, addr) {
            Some(&mut discarded.bad_checksum)
        } else if record.page_bytes != page_bytes {
            Some(&mut discarded.wrong_page_size)
        } else if record.rank >= record.shards
            || u32::from(record.shards) > namespace.row.world_size
        {
            Some(&mut discarded.bad_rank)
        } else {
            None
        }
    }

    /// Reads through the descriptor: a hole then costs no memory and cannot fault.
    pub(super) fn read(&self, mut at: u64, mut bytes: &mut [u8]) -> Result<(), CatalogError> {
        while !bytes.is_empty() {
            match rustix::io::pread(self.file.as_fd(), &mut *bytes, at) {
                Ok(0) => return Err(CatalogError::Read(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    at += count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(CatalogError::Read(errno.into())),
            }
        }
        Ok(())
    }
}

fn shard_key(page: &PageRecord) -> ShardKey {
    (page.hash, page.namespace, page.group, page.rank)
}
