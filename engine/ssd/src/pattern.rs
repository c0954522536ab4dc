//! Writes in an order that the caller chooses, through the engine that moves the pages of shards:
//! for comparing layouts that a shard could have had.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::io::{Engine, Kind, Piece, Uring};
use crate::memory::PoolMemory;

/// A step of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatternStep {
    /// Writes so many bytes at an offset of the file, both multiples of the drive's alignment.
    Write {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u32,
    },
    /// Makes durable what has ended. Steps behind it do not wait for it, as in a shard.
    Sync,
}

/// Carries out the steps on a file with io_uring and direct I/O, `depth` at a time, and says how
/// long it took. What is written comes from the pool.
///
/// # Errors
/// The file cannot be opened, io_uring is not there, or a step fails or is cut short.
///
/// # Panics
/// If a write is larger than the pool.
pub fn run_pattern(
    path: &Path,
    pool: &PoolMemory,
    depth: u32,
    steps: &[PatternStep],
) -> io::Result<Duration> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let area = pool.area();
    let (mut engine, shortfall) = Uring::new(Arc::new(file), depth, None, vec![area.clone()])?;
    if let Some(why) = shortfall {
        return Err(io::Error::other(why));
    }
    let started = Instant::now();
    let mut next = steps.iter().enumerate();
    let mut waiting: VecDeque<Piece> = VecDeque::new();
    let (mut ended, mut out, mut from) = (0, Vec::new(), 0);
    while ended < steps.len() {
        while waiting.is_empty()
            && let Some((id, step)) = next.next()
        {
            let (kind, offset, bytes) = match *step {
                PatternStep::Write { offset, bytes } => (Kind::Write, offset, bytes),
                PatternStep::Sync => (Kind::Sync, 0, 0),
            };
            if from + u64::from(bytes) > pool.bytes() {
                from = 0;
            }
            let piece = Piece {
                id: id as u64,
                kind,
                offset,
                address: area.at(from, u64::from(bytes)),
                bytes,
            };
            from += u64::from(bytes);
            if let Err(piece) = engine.submit(piece) {
                waiting.push_back(piece);
            }
        }
        engine.wait(Some(Duration::from_secs(1)), &mut out)?;
        for end in out.drain(..) {
            ended += 1;
            let moved = end.result.map_err(io::Error::from_raw_os_error)?;
            match steps[end.id as usize] {
                PatternStep::Write { bytes, .. } if moved != bytes => {
                    return Err(io::Error::new(
                        io::ErrorKind::WriteZero,
                        format!("{moved} of {bytes} bytes were written"),
                    ));
                }
                PatternStep::Write { .. } | PatternStep::Sync => {}
            }
        }
        if let Some(piece) = waiting.pop_front()
            && let Err(piece) = engine.submit(piece)
        {
            waiting.push_front(piece);
        }
    }
    Ok(started.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_carried_out_where_it_says() {
        const PAGE: u32 = 4096;
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, vec![0; 64 * PAGE as usize]).expect("written");
        let pool = PoolMemory::with_content(&[7; 2 * PAGE as usize]);
        let mut steps = Vec::new();
        for place in (1..64).step_by(2) {
            steps.push(PatternStep::Write {
                offset: place * u64::from(PAGE),
                bytes: PAGE,
            });
            steps.push(PatternStep::Sync);
        }
        match run_pattern(&path, &pool, 4, &steps) {
            Ok(_) => {}
            // Where the folder's file system has no direct I/O there is nothing to try.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => panic!("{error}"),
        }
        let found = std::fs::read(&path).expect("there");
        assert_eq!(found.len(), 64 * PAGE as usize);
        for (place, page) in found.chunks(PAGE as usize).enumerate() {
            let expected = if place % 2 == 1 { 7 } else { 0 };
            assert!(page.iter().all(|&byte| byte == expected), "page {place}");
        }
    }
}
