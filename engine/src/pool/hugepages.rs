//! What became of the wish for hugepages.
//!
//! Whether shared memory is backed by hugepages depends on the mount's `huge=` option, on
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled`, on the kernel and on fragmentation, and no
//! call says so. The page tables do: `ShmemPmdMapped` in `/proc/self/smaps`.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// How much of the pool lies on hugepages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugepageReport {
    /// The pool's size, in bytes.
    pub wanted_bytes: u64,
    /// Bytes mapped by hugepages, as the kernel counts them.
    pub mapped_bytes: u64,
}

impl fmt::Display for HugepageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            wanted_bytes,
            mapped_bytes,
        } = self;
        let percent = 100.0 * *mapped_bytes as f64 / (*wanted_bytes).max(1) as f64;
        write!(
            f,
            "{mapped_bytes} of {wanted_bytes} bytes on hugepages ({percent:.0} %)"
        )
    }
}

/// Reads how much of the address range is mapped by shared-memory hugepages, in bytes.
pub(super) fn mapped_bytes(range: Range<u64>) -> io::Result<u64> {
    count(BufReader::new(File::open("/proc/self/smaps")?), range)
}

fn count(smaps: impl BufRead, range: Range<u64>) -> io::Result<u64> {
    let mut inside = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        let line = line?;
        if let Some(start) = mapping_start(&line) {
            inside = range.contains(&start);
        } else if let Some(rest) = line.strip_prefix("ShmemPmdMapped:").filter(|_| inside) {
            let kib: u64 = rest
                .trim()
                .trim_end_matches("kB")
                .trim()
                .parse()
                .unwrap_or(0);
            bytes += kib * 1024;
        }
    }
    Ok(bytes)
}

/// The start address, if the line is the first of a mapping.
fn mapping_start(line: &str) -> Option<u64> {
    let (start, _) = line.split_once(' ')?.0.split_once('-')?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mappings_inside_the_range_count() {
        let smaps = "1000-2000 rw-s 00000000 00:1a 7 /dev/shm/a b\n\
                     Rss: 4 kB\nShmemPmdMapped:        8 kB\n\
                     2000-3000 rw-s 00000000 00:1a 7 /dev/shm/pool\n\
                     ShmemPmdMapped:     4096 kB\nVmFlags: rd wr\n\
                     3000-4000 rw-s 00001000 00:1a 7 /dev/shm/pool\n\
                     ShmemPmdMapped:     2048 kB\n\
                     4000-5000 rw-p 00000000 00:00 0\n\
                     ShmemPmdMapped:     1024 kB\n";
        let bytes = count(smaps.as_bytes(), 0x2000..0x4000).expect("reading memory");
        assert_eq!(bytes, 6144 * 1024);
    }

    #[test]
    fn the_report_names_both_sizes() {
        let report = HugepageReport {
            wanted_bytes: 4096,
            mapped_bytes: 1024,
        };
        assert_eq!(report.to_string(), "1024 of 4096 bytes on hugepages (25 %)");
    }
}
