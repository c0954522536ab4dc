//! Bringing the pool's memory into being with several threads.
//!
//! The kernel zeroes each page at its first touch, which one thread does at a few GiB a second;
//! threads that take ranges one after the other share that work. Space is allocated in the file
//! before it is touched, so a file system that fills up is an error and not a SIGBUS.

#![forbid(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::PoolFileError;
use crate::fault::{self, CrashPoint};

/// The threads take ranges of this many bytes: long enough to cost nothing, short enough to show
/// progress.
const RANGE_BYTES: u64 = 64 << 20;

/// Calls `work(offset, len)` for all ranges of `bytes` from `threads` threads, and `progress` with
/// the bytes done so far (from those threads, in no particular order). The first error ends it.
pub(super) fn in_ranges(
    bytes: u64,
    threads: NonZeroUsize,
    work: &(dyn Fn(u64, u64) -> io::Result<()> + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), PoolFileError> {
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let worker = || {
        while !failed.load(Ordering::Relaxed) {
            let offset = next.fetch_add(RANGE_BYTES, Ordering::Relaxed);
            if offset >= bytes {
                return;
            }
            let len_bytes = RANGE_BYTES.min(bytes - offset);
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
            progress(done.fetch_add(len_bytes, Ordering::Relaxed) + len_bytes);
        }
    };
    let ranges = usize::try_from(bytes.div_ceil(RANGE_BYTES)).unwrap_or(usize::MAX);
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
