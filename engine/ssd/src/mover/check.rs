//! Takes and compares the checksums of pages that were moved.

use std::time::Instant;

use super::{Done, Moved, Mover, Op};
use crate::block::{NO_CHECKSUM, page_checksum};
use crate::format::Record;
use crate::io::Engine;

impl<E: Engine> Mover<E> {
    /// Takes or compares the checksum of what was moved. Says how many bytes that were.
    pub(super) fn finish(&mut self, index: u32, out: &mut Vec<Done>) -> u64 {
        let task = self.tasks[index as usize]
            .take()
            .expect("all of it is moved");
        self.tasks_free.push(index);
        let started = Instant::now();
        let result = match (task.fault, &task.command.op) {
            (Some(fault), _) => Err(fault),
            (
                None,
                &Op::Read {
                    page,
                    bytes,
                    seed,
                    checksum,
                    plain,
                },
            ) => {
                // SAFETY: until the command has ended the page is nobody else's.
                let content = unsafe { self.pool.bytes_at(page, bytes) };
                // The plain one first: what changes before it is found by the one below, and what
                // changes after it is found by whoever compares it.
                let plain = match plain {
                    NO_CHECKSUM => NO_CHECKSUM,
                    _ => page_checksum(content),
                };
                if Record::checksum_of(seed, content) == checksum {
                    Ok(Moved::Fine { checksum: plain })
                } else {
                    Ok(Moved::Different)
                }
            }
            (
                None,
                &Op::Write {
                    page,
                    bytes,
                    seed,
                    plain,
                },
            ) => {
                // SAFETY: until the command has ended nobody writes to the page
                // (`PoolMemory::new`), so these are the bytes that were written.
                let content = unsafe { self.pool.bytes_at(page, bytes) };
                // In this order: what changes in between is wrong for the drive's checksum.
                if plain == NO_CHECKSUM || page_checksum(content) == plain {
                    let checksum = Record::checksum_of(seed, content);
                    Ok(Moved::Fine { checksum })
                } else {
                    Ok(Moved::Different)
                }
            }
            (None, Op::Table(_) | Op::Sync) => Ok(Moved::Fine { checksum: 0 }),
        };
        let ended = Instant::now();
        out.push(Done {
            id: task.command.id,
            result,
            took: ended.saturating_duration_since(task.command.at),
            checksums: ended.saturating_duration_since(started),
        });
        match task.command.op {
            Op::Write { bytes, .. } | Op::Read { bytes, .. } => u64::from(bytes),
            Op::Table(_) | Op::Sync => 0,
        }
    }
}
