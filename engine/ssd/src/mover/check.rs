//! Takes and compares the checksums of pages that were moved.

use std::time::Instant;

use super::{Done, Moved, Mover, Op, sums};
use crate::block::NO_CHECKSUM;
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
                // What changes before the plain one is taken is found by the other one, and what
                // changes after it is found by whoever compares it.
                let wanted = plain != NO_CHECKSUM;
                let sums = match self.pool.is_in_huge_pages {
                    true => sums::of_page(content, seed, wanted),
                    false => sums::of_read_page(content, seed, wanted),
                };
                if sums.seeded == checksum {
                    Ok(Moved::Fine {
                        checksum: sums.plain,
                    })
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
                // What changes between the two is wrong for the drive's checksum.
                let sums = sums::of_page(content, seed, plain != NO_CHECKSUM);
                if sums.plain == plain {
                    Ok(Moved::Fine {
                        checksum: sums.seeded,
                    })
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
