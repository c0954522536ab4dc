//! Blocks on their way to the drive and back.

use std::time::Instant;

use super::commit::Unsettled;
use super::{Block, BlockState, Ending, Page, Request, Shard, Under, bytes_of, padded};
use crate::block::{BlockKey, NO_CHECKSUM, PageRef};
use crate::mover::{Done, Moved, Op};
use crate::outcome::{Completion, Outcome, Refused};
use crate::stats::ShardFault;

impl Shard {
    /// Whether the queue takes `pages` more pages. A block alone always fits.
    fn has_queue_room(&self, pages: usize) -> bool {
        self.pending == 0 || self.pending as usize + pages <= self.max_pending as usize
    }

    /// Queues a block for writing. Says under which number it is kept.
    pub fn write(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &BlockKey,
        write_id: u64,
        pages: &[PageRef],
    ) -> Result<u32, Refused> {
        self.look(now);
        if let Some(fault) = self.health.refuses_writes(now) {
            self.stats.refused_degraded += 1;
            return Err(Refused::Degraded(fault));
        }
        let segment_bytes = self.geometry.segment_bytes;
        if let Some(page) = pages.iter().find(|page| page.bytes > segment_bytes) {
            return Err(Refused::TooLarge {
                bytes: page.bytes,
                most: segment_bytes,
            });
        }
        let bytes: u64 = pages.iter().map(|page| padded(page.bytes)).sum();
        // A quarter of the shard, so that making room for one block does not empty it.
        let most = self.stats.capacity_bytes / 4;
        if bytes > most {
            return Err(Refused::BlockTooLarge { bytes, most });
        }
        if !self.has_queue_room(pages.len()) {
            return Err(Refused::QueueFull);
        }
        if !self.segments.have_room(pages.iter().map(|page| page.bytes)) {
            self.step(now);
            return Err(Refused::Reclaiming);
        }
        self.health.took_write(now);
        self.taken_bytes += bytes;
        Ok(self.queue_write(now, ticket, key, write_id, pages))
    }

    fn queue_write(
        &mut self,
        now: Instant,
        ticket: u64,
        key: &BlockKey,
        write_id: u64,
        pages: &[PageRef],
    ) -> u32 {
        let places: Box<[Page]> = pages
            .iter()
            .map(|page| {
                let (segment, offset) = self.segments.allocate(page.bytes);
                Page {
                    segment,
                    offset,
                    bytes: page.bytes,
                    checksum: 0,
                }
            })
            .collect();
        let block = self.blocks.insert(Block {
            key: *key,
            write_id,
            pages: places,
            state: BlockState::Writing,
            uncommitted: 0,
        });
        let request = self.requests.insert(Request {
            ticket,
            block,
            write_id,
            left: pages.len() as u16,
            ending: Ending::Fine,
            checksums: Vec::new(),
        });
        for (index, page) in pages.iter().enumerate() {
            let entry = self.blocks.get(block).expect("just made");
            let record = self.record(entry, index);
            let at = entry.pages[index];
            self.segments.holds(at.segment, block, write_id);
            let op = Op::Write {
                page: page.offset,
                bytes: page.bytes,
                seed: record.seed(&self.place_in(at.segment)),
                plain: page.checksum,
            };
            let under = Under::Write {
                request,
                page: index as u16,
            };
            let offset = self.geometry.data_offset(at.segment, at.offset);
            self.pending += 1;
            self.send(now, under, offset, op);
        }
        block
    }

    /// Queues a block for reading.
    pub fn read(
        &mut self,
        now: Instant,
        ticket: u64,
        block: u32,
        pages: &[PageRef],
    ) -> Result<(), Refused> {
        let entry = self.blocks.get(block).ok_or(Refused::Unknown)?;
        if entry.state != BlockState::Live {
            return Err(Refused::Unknown);
        }
        let write_id = entry.write_id;
        let same = |(page, at): (&PageRef, &Page)| page.bytes == at.bytes;
        if entry.pages.len() != pages.len() || !pages.iter().zip(&entry.pages).all(same) {
            return Err(Refused::OtherPages);
        }
        self.look(now);
        if let Some(fault) = self.health.refuses_reads(now) {
            self.stats.refused_degraded += 1;
            return Err(Refused::Degraded(fault));
        }
        if !self.has_queue_room(pages.len()) {
            return Err(Refused::QueueFull);
        }
        self.health.took_read(now);
        let asked = pages.iter().any(|page| page.checksum != NO_CHECKSUM);
        let request = self.requests.insert(Request {
            ticket,
            block,
            write_id,
            left: pages.len() as u16,
            ending: Ending::Fine,
            checksums: if asked {
                vec![NO_CHECKSUM; pages.len()]
            } else {
                Vec::new()
            },
        });
        for (index, page) in pages.iter().enumerate() {
            let entry = self.blocks.get(block).expect("looked at above");
            let record = self.record(entry, index);
            let at = entry.pages[index];
            let op = Op::Read {
                page: page.offset,
                bytes: page.bytes,
                seed: record.seed(&self.place_in(at.segment)),
                checksum: at.checksum,
                plain: page.checksum,
            };
            let under = Under::Read {
                request,
                page: index as u16,
                segment: at.segment,
                bytes: at.bytes,
            };
            let offset = self.geometry.data_offset(at.segment, at.offset);
            self.segments.reader_came(at.segment);
            self.segments.touch(at.segment);
            self.pending += 1;
            self.send(now, under, offset, op);
        }
        Ok(())
    }

    /// Takes in the end of a command.
    pub(super) fn end(&mut self, now: Instant, done: Done) {
        let under = self
            .commands
            .remove(done.id)
            .expect("a command ends once, under its own number");
        match under {
            Under::Write { request, page } => self.page_written(now, request, page, done),
            Under::Read {
                request,
                page,
                segment,
                bytes,
            } => {
                self.segments.reader_left(segment);
                self.page_read(now, (request, page), bytes, done);
            }
            Under::Chunk => self.table_ended(now, None, &done),
            Under::Opener { segment } => self.table_ended(now, Some(segment), &done),
            Under::Sync => self.sync_ended(now, &done),
        }
    }

    fn page_written(&mut self, now: Instant, index: u32, page: u16, done: Done) {
        self.pending -= 1;
        let request = self
            .requests
            .get_mut(index)
            .expect("it waits for this page");
        let block = self
            .blocks
            .get_mut(request.block)
            .expect("it is being written");
        let at = &mut block.pages[usize::from(page)];
        let bytes = at.bytes;
        match done.result {
            Ok(Moved::Fine { checksum }) => {
                at.checksum = checksum;
                self.stats.write_latency.record(done.took);
                self.stats.page_bytes_written += u64::from(bytes);
                self.stats.device_bytes_written += padded(bytes);
                self.health.write_fine();
            }
            // The pool's memory is wrong, not the drive: it is not counted here.
            Ok(Moved::Different) => {
                if request.ending == Ending::Fine {
                    request.ending = Ending::Bad;
                }
            }
            Err(fault) => {
                request.ending = Ending::Failed(fault.clone());
                self.stats.write_errors += 1;
                self.health.write_failed(now, fault);
            }
        }
        request.left -= 1;
        if request.left == 0 {
            self.block_written(now, index);
        }
    }

    fn block_written(&mut self, now: Instant, index: u32) {
        let request = self.requests.remove(index).expect("its last page ended");
        let number = request.block;
        let block = self.blocks.get_mut(number).expect("it is being written");
        let wanted = block.state == BlockState::Writing;
        let pages = block.pages.clone();
        let outcome = match request.ending {
            Ending::Fine => Outcome::Written,
            Ending::Bad => Outcome::Bad,
            Ending::Failed(fault) => Outcome::Failed(fault),
        };
        if outcome == Outcome::Written && wanted {
            block.state = BlockState::Live;
            block.uncommitted = pages.len() as u16;
            self.stats.blocks += 1;
            self.stats.uncommitted_blocks += 1;
            self.stats.live_bytes += bytes_of(&pages);
            let block = self.blocks.get(number).expect("as above");
            for (page, at) in pages.iter().enumerate() {
                self.commit.add(
                    now,
                    Unsettled {
                        segment: at.segment,
                        block: number,
                        write_id: request.write_id,
                        record: self.record(block, page),
                    },
                );
            }
        } else {
            if wanted {
                self.gone.push((block.key, number));
            }
            self.drop_block(number);
            for at in &pages {
                self.segments.settle(at.segment);
            }
        }
        self.complete(request.ticket, outcome, Vec::new());
    }

    fn page_read(&mut self, now: Instant, (index, page): (u32, u16), bytes: u32, done: Done) {
        self.pending -= 1;
        let request = self
            .requests
            .get_mut(index)
            .expect("it waits for this page");
        match done.result {
            Ok(Moved::Fine { checksum }) => {
                if let Some(place) = request.checksums.get_mut(usize::from(page)) {
                    *place = checksum;
                }
                self.stats.read_latency.record(done.took);
                self.stats.page_bytes_read += u64::from(bytes);
                self.health.read_fine();
            }
            Ok(Moved::Different) => {
                self.stats.bad_pages += 1;
                request.ending = Ending::Bad;
            }
            Err(ShardFault::Truncated) => {
                self.stats.bad_pages += 1;
                self.stats.read_errors += 1;
                request.ending = Ending::Failed(ShardFault::Truncated);
            }
            Err(fault) => {
                self.stats.read_errors += 1;
                request.ending = Ending::Failed(fault.clone());
                self.health.read_failed(now, fault);
            }
        }
        request.left -= 1;
        if request.left > 0 {
            return;
        }
        let request = self.requests.remove(index).expect("its last page ended");
        let outcome = match request.ending {
            Ending::Fine => Outcome::Read,
            Ending::Bad => Outcome::Bad,
            Ending::Failed(fault) => Outcome::Failed(fault),
        };
        if outcome != Outcome::Read && self.is_current(request.block, request.write_id) {
            let key = self.blocks.get(request.block).expect("current").key;
            self.gone.push((key, request.block));
            self.drop_block(request.block);
        }
        self.complete(request.ticket, outcome, request.checksums);
    }

    fn complete(&mut self, ticket: u64, outcome: Outcome, checksums: Vec<u64>) {
        self.completions.push_back(Completion {
            ticket,
            shard: self.index,
            outcome,
            checksums,
        });
    }
}
