//! Bringing the pool's memory into being with several threads.
//!
//! The kernel zeroes each page at its first touch, which one thread does at a few GiB a second;
//! threads that take ranges one after the other share that work. Space is allocated in the file
//! before it is touched, so a file system that fills up is an error and not a SIGBUS.

#![forbid(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::PoolFileError;
use crate::fault::{self, CrashPoint};

/// The threads take ranges of this many bytes: long enough to cost nothing, short enough to show
/// progress.
const RANGE_BYTES: u64 = 64 << 20;

/// A stretch of the pool, and who brings it into being.
pub(super) struct Stretch<'a> {
    pub(super) bytes: Range<u64>,
    pub(super) threads: NonZeroUsize,
    /// Each of the threads calls it first; none of them is the caller's then.
    pub(super) begin: Option<&'a (dyn Fn() + Sync)>,
}

/// Calls `work(offset, len)` for all ranges of `bytes` from `threads` threads, and `progress` with
/// the bytes done so far (from those threads, in no particular order). The first error ends it.
#[cfg(test)]
fn in_ranges(
    bytes: u64,
    threads: NonZeroUsize,
    work: &(dyn Fn(u64, u64) -> io::Result<()> + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), PoolFileError> {
    let stretch = Stretch {
        bytes: 0..bytes,
        threads,
        begin: None,
    };
    in_stretches(&[stretch], work, progress)
}

/// As many ranges of each stretch at once as it has threads. `progress` is told the bytes done so
/// far of all.
pub(super) fn in_stretches(
    stretches: &[Stretch<'_>],
    work: &(dyn Fn(u64, u64) -> io::Result<()> + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), PoolFileError> {
    let done = AtomicU64::new(0);
    let count = |len_bytes| progress(done.fetch_add(len_bytes, Ordering::Relaxed) + len_bytes);
    if let [only @ Stretch { begin: None, .. }] = stretches {
        return in_stretch(only, work, &count);
    }
    let count = &count;
    std::thread::scope(|scope| {
        let run = |stretch| {
            let thread = std::thread::Builder::new();
            thread.spawn_scoped(scope, move || in_stretch(stretch, work, count))
        };
        let running: Vec<_> = stretches.iter().map(run).collect();
        let ends = running
            .into_iter()
            .zip(stretches)
            .map(|(running, stretch)| {
                let running = running.map_err(|source| PoolFileError::Populate {
                    offset: stretch.bytes.start,
                    len_bytes: stretch.bytes.end - stretch.bytes.start,
                    source,
                })?;
                match running.join() {
                    Ok(end) => end,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            });
        // The scope waits for those behind the first error.
        ends.collect()
    })
}

fn in_stretch(
    Stretch {
        bytes,
        threads,
        begin,
    }: &Stretch<'_>,
    work: &(dyn Fn(u64, u64) -> io::Result<()> + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), PoolFileError> {
    let next = AtomicU64::new(bytes.start);
    let bytes_end = bytes.end;
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let worker = || {
        if let Some(begin) = begin {
            begin();
        }
        while !failed.load(Ordering::Relaxed) {
            let offset = next.fetch_add(RANGE_BYTES, Ordering::Relaxed);
            if offset >= bytes_end {
                return;
            }
            let len_bytes = RANGE_BYTES.min(bytes_end - offset);
            if let Err(source) = work(offset, len_bytes) {
                failed.store(true, Ordering::Relaxed);
                let error = PoolFileError::Populate {
                    offset,
                    len_bytes,
                    source,
                };
                if let Ok(mut first) = first_error.lock() {
                    first.get_or_insert(error);
                }
                return;
            }
            fault::point(CrashPoint::PoolRangeFilled);
            progress(len_bytes);
        }
    };
    let ranges = (bytes_end - bytes.start).div_ceil(RANGE_BYTES);
    let ranges = usize::try_from(ranges).unwrap_or(usize::MAX);
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(ranges) {
            // Fewer threads than asked for only take longer.
            if std::thread::Builder::new()
                .spawn_scoped(scope, worker)
                .is_err()
            {
                break;
            }
        }
        worker();
    });
    match first_error.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_all_bytes_once_and_progress_ends_at_the_total() {
        let bytes = 5 * RANGE_BYTES + 4096;
        let seen = Mutex::new(Vec::new());
        let most = AtomicU64::new(0);
        let work = |offset, len| {
            seen.lock().expect("no thread panics").push((offset, len));
            Ok(())
        };
        let progress = |done| {
            most.fetch_max(done, Ordering::Relaxed);
        };
        in_ranges(bytes, NonZeroUsize::MIN.saturating_add(3), &work, &progress).expect("no error");
        let mut seen = seen.into_inner().expect("no thread panics");
        seen.sort_unstable();
        let end = seen.iter().fold(0, |end, (offset, len)| {
            assert_eq!(*offset, end);
            end + len
        });
        assert_eq!((end, most.into_inner()), (bytes, bytes));
    }

    #[test]
    fn several_stretches_are_filled_by_threads_of_their_own() {
        let bytes = [3 * RANGE_BYTES, 2 * RANGE_BYTES + 4096];
        let here = std::thread::current().id();
        let begins = [AtomicU64::new(0), AtomicU64::new(0)];
        let begin = |number: usize| {
            assert_ne!(
                std::thread::current().id(),
                here,
                "the caller stays where it is"
            );
            begins[number].fetch_add(1, Ordering::Relaxed);
        };
        let (first, second) = (|| begin(0), || begin(1));
        let stretches = [
            Stretch {
                bytes: 0..bytes[0],
                threads: NonZeroUsize::MIN,
                begin: Some(&first),
            },
            Stretch {
                bytes: bytes[0]..bytes[0] + bytes[1],
                threads: NonZeroUsize::MIN.saturating_add(1),
                begin: Some(&second),
            },
        ];
        let (seen, most) = (Mutex::new(Vec::new()), AtomicU64::new(0));
        let work = |offset, len| {
            seen.lock().expect("no thread panics").push((offset, len));
            Ok(())
        };
        let progress = |done| {
            most.fetch_max(done, Ordering::Relaxed);
        };
        in_stretches(&stretches, &work, &progress).expect("no error");
        let mut seen = seen.into_inner().expect("no thread panics");
        seen.sort_unstable();
        let end = seen.iter().fold(0, |end, (offset, len)| {
            assert_eq!(*offset, end);
            end + len
        });
        assert_eq!((end, most.into_inner()), (bytes[0] + bytes[1], end));
        assert_eq!(begins.map(AtomicU64::into_inner), [1, 2]);
    }

    #[test]
    fn the_first_error_ends_it_and_names_the_range() {
        let work = |offset, _| match offset {
            RANGE_BYTES => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        };
        let error = in_ranges(1 << 40, NonZeroUsize::MIN, &work, &|_| {}).expect_err("full");
        assert!(
            matches!(
                error,
                PoolFileError::Populate {
                    offset: RANGE_BYTES,
                    ..
                }
            ),
            "{error}"
        );
    }
}
