//! A client's reader over an index file in which anything may be written.

#![forbid(unsafe_code)]

use std::convert::Infallible;

use pegaflow_shm::BlockHash;
use pegaflow_shm::index::{
    BlockKey, HeapMemory, IndexLayout, IndexMemory, IndexReader, IndexWriter,
};
use pegaflow_shm::sync::{Arc, AtomicU64};

use super::input::Input;

/// Namespace and group of all keys.
const SCOPE: (u32, u16) = (3, 1);
/// Keys that are looked up.
const KEYS: u8 = 96;
const WORDS_PER_LINE: usize = 8;
/// State of a sealed entry: the lower byte of its first word.
const SEALED: u64 = 2;

fn hash(number: u8) -> BlockHash {
    let mut hash = [number; 32];
    hash[0] = 0xa5;
    hash
}

fn key(number: u8) -> BlockKey {
    BlockKey::new(SCOPE.0, SCOPE.1, &hash(number))
}

/// Memory that may have shrunk since the reader looked at it first.
struct Shrinking {
    memory: HeapMemory,
    words: std::cell::Cell<usize>,
}

impl IndexMemory for &Shrinking {
    fn words(&self) -> &[AtomicU64] {
        let words = self.memory.words();
        &words[..self.words.get().min(words.len())]
    }
}

/// A real index of the size and content that the first bytes say, then changes to its words.
pub fn index(data: &[u8]) {
    let mut input = Input::new(data);
    let entries = u32::from(input.below(64)) + 1;
    let buckets = u32::from(input.below(12)) + 1;
    let words = real_index(&mut input, entries, buckets);
    let memory = Shrinking {
        words: words.len().into(),
        memory: HeapMemory::from_words(&change(&mut input, words)),
    };
    if let Ok(reader) = IndexReader::open(&memory) {
        if input.u8() & 7 == 7 {
            memory.words.set(usize::from(input.u16()));
        }
        look(&reader, memory.memory.words());
    }
}

fn real_index(input: &mut Input<'_>, entries: u32, buckets: u32) -> Vec<u64> {
    let Ok(layout) = IndexLayout::with_buckets(entries, buckets) else {
        return Vec::new();
    };
    let memory = Arc::new(HeapMemory::for_layout(&layout));
    let Ok(mut writer) = IndexWriter::create(memory.clone(), layout, [9; 16], input.u64()) else {
        return Vec::new();
    };
    let reserved: Result<u32, Infallible> =
        writer.reserve(u32::from(input.u8()), |_| Ok::<_, Infallible>(()));
    debug_assert!(reserved.is_ok());
    for _ in 0..input.u8() {
        let number = input.below(KEYS);
        match (input.below(4), writer.find(&key(number))) {
            (0, Some(id)) => drop(writer.remove(id)),
            (1, Some(id)) => drop(writer.unseal(id)),
            (_, Some(id)) => drop(writer.seal(id)),
            (_, None) => drop(writer.insert(&key(number))),
        }
    }
    memory.snapshot(usize::MAX)
}

/// Overwrites words: of the header, of a line, of an entry, or all with what is left.
fn change(input: &mut Input<'_>, mut words: Vec<u64>) -> Vec<u64> {
    for _ in 0..input.below(64) {
        let place = usize::from(input.u16());
        let kind = input.u8();
        let at = match kind & 3 {
            0 => place % 128,
            // Words of lines and entries, without the header page.
            1 => 512 + place % 128,
            2 => 512 + place % 4096,
            _ => place,
        };
        let value = match kind >> 2 & 7 {
            0 => input.u64(),
            1 => u64::from(input.u8()),
            2 => u64::MAX,
            3 => words.get(usize::from(input.u16())).copied().unwrap_or(0),
            4 => words
                .get(at)
                .map_or(0, |word| word ^ 1 << (input.u8() & 63)),
            5 => words.get(at).map_or(0, |word| word.wrapping_add(1)),
            _ => 0,
        };
        if let Some(word) = words.get_mut(at) {
            *word = value;
        }
    }
    if input.u8() == 0xff {
        words.truncate(usize::from(input.u16()));
    }
    words
}

/// All ways of asking agree, and a hit has a sealed entry of that very key somewhere in the file.
fn look(reader: &IndexReader<&Shrinking>, words: &[AtomicU64]) {
    let hashes: Vec<BlockHash> = (0..KEYS).map(hash).collect();
    let hits: Vec<bool> = (0..KEYS)
        .map(|number| reader.contains(&key(number)))
        .collect();
    for (number, hit) in (0..KEYS).zip(&hits) {
        assert!(!hit || is_sealed_somewhere(words, number), "key {number}");
    }
    let mut bitmap = [u64::MAX; 2];
    let count = reader.membership(SCOPE.0, SCOPE.1, &hashes, &mut bitmap);
    let bit = |at: usize| bitmap[at / 64] >> (at % 64) & 1 == 1;
    for (at, hit) in hits.iter().enumerate() {
        assert_eq!(bit(at), *hit, "key {at}");
    }
    assert_eq!(count as usize, hits.iter().filter(|hit| **hit).count());
    for from in [0, 7, 64] {
        let prefix = reader.prefix_len(SCOPE.0, SCOPE.1, &hashes[from..]);
        let run = hits[from..].iter().take_while(|hit| **hit).count();
        assert_eq!(prefix as usize, run);
    }
}

fn is_sealed_somewhere(words: &[AtomicU64], number: u8) -> bool {
    let load = |word: &AtomicU64| word.load(pegaflow_shm::sync::Ordering::Relaxed);
    let scope = u64::from(SCOPE.0) | u64::from(SCOPE.1) << 32;
    let expected: Vec<u64> = hash(number)
        .chunks_exact(8)
        .map(|part| u64::from_le_bytes(std::array::from_fn(|at| part[at])))
        .collect();
    words.chunks_exact(WORDS_PER_LINE).any(|entry| {
        load(&entry[0]) & 0xff == SEALED
            && load(&entry[1]) == scope
            && entry[2..6].iter().map(load).eq(expected.iter().copied())
    })
}

/// Indexes with keys sealed, withdrawn and removed; then one change each.
#[cfg(test)]
pub(super) fn seeds() -> Vec<Vec<u8>> {
    use super::input::Seed;
    let base = |entries: u8, buckets: u8, keys: u8| {
        let mut seed = Seed::default().u8(entries).u8(buckets).u64(42).u8(255);
        seed = seed.u8(2 * keys + 3);
        for round in 2..4u8 {
            for number in 0..keys {
                seed = seed.u8(number).u8(round);
            }
        }
        seed.u8(1).u8(0).u8(2).u8(1).u8(0).u8(3)
    };
    let mut seeds = vec![
        base(63, 11, 40).u8(0).0,
        base(63, 0, 60).u8(0).0,
        base(20, 2, 30).u8(0).0,
        base(0, 0, 1).u8(0).0,
    ];
    // Each field of the header, set to something else.
    for word in 0..16u16 {
        for kind in [2u8, 4, 5] {
            let seed = base(30, 5, 20).u8(1).u16(word).u8(kind << 2).u8(word as u8);
            seeds.push(seed.0);
        }
    }
    // Storage that is claimed and not there, hints to everywhere, torn entries.
    for (place, kind) in [(32, 2 << 2), (512, 4 << 2 | 1), (520, 3 << 2 | 1)] {
        seeds.push(base(30, 5, 20).u8(1).u16(place).u8(kind).u16(99).0);
    }
    seeds.push(base(30, 5, 20).u8(0).u8(0xff).u16(700).0);
    seeds.push(base(30, 5, 20).u8(0).u8(0).u8(7).u16(900).0);
    seeds
}
