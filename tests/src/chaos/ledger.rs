//! The blocks that were seen sealed: a file, so that a scheduler that is killed forgets none.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::content::Stream;

/// Numbers of sealed blocks.
#[derive(Debug)]
pub struct Ledger {
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    file: File,
    order: Vec<u64>,
    set: HashSet<u64>,
}

impl Ledger {
    /// Opens the ledger at `path`, with what an earlier process wrote.
    ///
    /// # Errors
    /// The file cannot be read or cut to whole numbers.
    pub fn open(path: &Path) -> io::Result<Ledger> {
        let mut options = File::options();
        let mut file = options.create(true).read(true).append(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.len() - bytes.len() % 8;
        file.set_len(whole as u64)?;
        let numbers = bytes[..whole].chunks_exact(8);
        let order: Vec<u64> = numbers
            .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
            .collect();
        let set = order.iter().copied().collect();
        Ok(Ledger {
            known: Mutex::new(Known { file, order, set }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes blocks that are sealed; returns how many were not known yet.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&self, numbers: &[u64]) -> io::Result<u64> {
        let mut known = self.lock();
        let mut bytes = Vec::new();
        for number in numbers {
            if known.set.insert(*number) {
                known.order.push(*number);
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        known.file.write_all(&bytes)?;
        Ok(bytes.len() as u64 / 8)
    }

    /// Blocks known.
    pub fn len(&self) -> usize {
        self.lock().order.len()
    }

    /// True before the first.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The highest number, 0 of none.
    pub fn highest(&self) -> u64 {
        self.lock().order.iter().copied().max().unwrap_or(0)
    }

    /// At most `count` different blocks, at random.
    pub fn sample(&self, random: &mut Stream, count: usize) -> Vec<u64> {
        let known = self.lock();
        if known.order.is_empty() {
            return Vec::new();
        }
        let mut taken = Vec::new();
        for _ in 0..count {
            let at = random.below(known.order.len() as u64) as usize;
            if !taken.contains(&known.order[at]) {
                taken.push(known.order[at]);
            }
        }
        taken
    }

    /// Blocks `first..first + count` in the order in which they came to be known.
    pub fn part(&self, first: usize, count: usize) -> Vec<u64> {
        let known = self.lock();
        known
            .order
            .iter()
            .skip(first)
            .take(count)
            .copied()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_outlives_its_process_but_for_half_a_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.add(&[5, 9, 5]).unwrap(), 2);
        drop(ledger);
        let mut torn = File::options().append(true).open(&path).unwrap();
        torn.write_all(&[1, 2, 3]).unwrap();
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!((ledger.len(), ledger.highest()), (2, 9));
        ledger.add(&[11]).unwrap();
        assert_eq!(Ledger::open(&path).unwrap().part(1, 9), [9, 11]);
        let sample = ledger.sample(&mut Stream::new(&[1]), 40);
        assert!(!sample.is_empty() && sample.len() <= 3);
    }
}
