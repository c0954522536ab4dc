//! What clients rely on: hits are sealed blocks, garbage is harmless, stable keys stay visible.

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::tests_util::{BOOT_ID, GROUP, NAMESPACE, hash, hashes, key, writer, writer_for};
use super::*;
use crate::BlockHash;

#[test]
fn only_sealed_blocks_are_hits() {
    let (memory, mut writer) = writer_for(100);
    let reader = IndexReader::open(memory).unwrap();
    assert_eq!(reader.boot_id(), &BOOT_ID);
    assert_eq!(reader.entry_capacity(), 100);
    assert!(!reader.contains(&key(1)));
    let id = writer.insert(&key(1)).unwrap();
    assert!(!reader.contains(&key(1)));
    writer.seal(id).unwrap();
    assert!(reader.contains(&key(1)));
    assert!(!reader.contains(&BlockKey::new(NAMESPACE + 1, GROUP, &hash(1))));
    assert!(!reader.contains(&BlockKey::new(NAMESPACE, GROUP + 1, &hash(1))));
    assert_eq!((reader.used_entries(), reader.sealed_entries()), (1, 1));
    writer.unseal(id).unwrap();
    assert!(!reader.contains(&key(1)));
    writer.seal(id).unwrap();
    writer.remove(id).unwrap();
    assert!(!reader.contains(&key(1)));
    assert_eq!((reader.used_entries(), reader.sealed_entries()), (0, 0));
}

#[test]
fn the_prefix_ends_at_the_first_block_that_is_not_sealed() {
    let (memory, mut writer) = writer_for(1000);
    let reader = IndexReader::open(memory).unwrap();
    for i in 0..500 {
        let id = writer.insert(&key(i)).unwrap();
        writer.seal(id).unwrap();
    }
    let asked = hashes(0..600);
    assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &asked), 500);
    assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &[]), 0);
    assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &asked[500..]), 0);
    for count in [1, 7, 8, 9, 39, 40, 41, 499] {
        assert_eq!(
            reader.prefix_len(NAMESPACE, GROUP, &asked[..count]),
            count as u32
        );
        let id = writer.find(&key(count as u64)).unwrap();
        writer.unseal(id).unwrap();
        assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &asked), count as u32);
        writer.seal(id).unwrap();
    }
}

#[test]
fn membership_sets_exactly_the_sealed_blocks_bits() {
    let (memory, mut writer) = writer_for(1000);
    let reader = IndexReader::open(memory).unwrap();
    for i in (0..300).filter(|i| i % 3 != 0) {
        let id = writer.insert(&key(i)).unwrap();
        if i % 5 != 0 {
            writer.seal(id).unwrap();
        }
    }
    for count in [0usize, 1, 31, 33, 63, 64, 65, 200, 320] {
        let mut bitmap = [u64::MAX; 6];
        let hits = reader.membership(NAMESPACE, GROUP, &hashes(0..count as u64), &mut bitmap);
        let is_hit = |i: usize| i < count.min(300) && ![0, 3, 5, 6, 9, 10, 12].contains(&(i % 15));
        for i in 0..bitmap.len() * 64 {
            assert_eq!(
                bitmap[i / 64] >> (i % 64) & 1 == 1,
                is_hit(i),
                "bit {i} of {count}"
            );
        }
        assert_eq!(hits as usize, (0..count).filter(|i| is_hit(*i)).count());
    }
    // A bitmap that is too short bounds the look-up.
    let mut short = [0];
    assert_eq!(
        reader.membership(NAMESPACE, GROUP, &hashes(1..300), &mut short),
        short[0].count_ones()
    );
}

#[test]
fn entries_beyond_the_reserved_ones_are_not_read() {
    let layout = IndexLayout::for_capacity(128).unwrap();
    let (memory, mut writer) = writer(layout);
    let id = writer.insert(&key(1)).unwrap();
    writer.seal(id).unwrap();
    let mut words = memory.snapshot(usize::MAX);
    assert!(
        IndexReader::open(HeapMemory::from_words(&words))
            .unwrap()
            .contains(&key(1))
    );
    words[32] = 0;
    assert!(
        !IndexReader::open(HeapMemory::from_words(&words))
            .unwrap()
            .contains(&key(1))
    );
}

/// A header that `open` accepts, followed by `rest` repeated.
fn with_valid_header(rest: &[u64], buckets: u32) -> Vec<u64> {
    let layout = IndexLayout::with_buckets(128, buckets).unwrap();
    let (memory, _writer) = writer(layout);
    let mut words = memory.snapshot(usize::MAX);
    for (i, word) in words[512..].iter_mut().enumerate() {
        *word = rest[i % rest.len()].rotate_left(i as u32);
    }
    words
}

fn ask_everything(words: &[u64], asked: &[BlockHash]) {
    let Ok(reader) = IndexReader::open(HeapMemory::from_words(words)) else {
        return;
    };
    let mut bitmap = [0; 2];
    let hits = reader.membership(NAMESPACE, GROUP, asked, &mut bitmap);
    assert!(hits as usize <= asked.len());
    assert!(reader.prefix_len(NAMESPACE, GROUP, asked) as usize <= asked.len());
    for hash in asked {
        reader.contains(&BlockKey::new(NAMESPACE, GROUP, hash));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_never_panics(
        rest in prop::collection::vec(any::<u64>(), 1..64),
        small in prop::collection::vec(0u64..300, 1..16),
        buckets in 1u32..200,
        header in prop::collection::vec((0usize..64, any::<u64>()), 0..3),
    ) {
        let asked = hashes(0..100);
        ask_everything(&rest, &asked);
        for filling in [&rest, &small] {
            let mut words = with_valid_header(filling, buckets);
            ask_everything(&words, &asked);
            for (index, value) in &header {
                words[*index] = *value;
            }
            ask_everything(&words, &asked);
        }
    }

    #[test]
    fn a_header_of_small_numbers_never_panics(
        fields in prop::collection::vec(0u64..20_000, 5..6),
        filling in any::<u64>(),
    ) {
        let mut words = with_valid_header(&[filling], 30);
        words[5..10].copy_from_slice(&fields);
        ask_everything(&words, &hashes(0..100));
    }
}

#[test]
fn slots_that_all_carry_the_wanted_tag_end_at_the_probe_bound() {
    let (memory, mut writer) = writer(IndexLayout::with_buckets(500, 100).unwrap());
    let id = writer.insert(&key(1)).unwrap();
    writer.seal(id).unwrap();
    let mut words = memory.snapshot(usize::MAX);
    let slot = *words[512..].iter().find(|word| **word != 0).unwrap();
    let entry = 512 + 100 * 8 + 4096;
    words[512..entry.min(512 + 800)].fill(slot | 0xffff_ffff);
    ask_everything(&words, &hashes(0..100));
    assert!(
        !IndexReader::open(HeapMemory::from_words(&words))
            .unwrap()
            .contains(&key(1))
    );
}

/// One thread churns keys through few entries while another looks them up.
#[test]
fn a_reader_beside_a_busy_writer_sees_no_ghost_and_misses_no_stable_block() {
    const STABLE: u64 = 40;
    const CHURNING: u64 = 24;
    const ROUNDS: u64 = 20_000;
    // 64 keys in 70 slots, so probes are long and lines are shared.
    let (memory, mut writer) = writer(IndexLayout::with_buckets(64, 10).unwrap());
    let reader = IndexReader::open(memory).unwrap();
    for i in 0..STABLE {
        let id = writer.insert(&key(i)).unwrap();
        writer.seal(id).unwrap();
    }
    // Key number of the oldest generation that may still be sealed, and of the newest.
    let oldest = AtomicU64::new(1000);
    let newest = AtomicU64::new(1000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut ids = std::collections::VecDeque::new();
            for number in 1000..1000 + ROUNDS {
                newest.store(number + 1, Ordering::SeqCst);
                let id = writer.insert(&key(number)).unwrap();
                writer.seal(id).unwrap();
                ids.push_back(id);
                if ids.len() as u64 == CHURNING {
                    let id = ids.pop_front().unwrap();
                    if number % 2 == 0 {
                        writer.unseal(id).unwrap();
                    }
                    writer.remove(id).unwrap();
                    oldest.store(number + 2 - CHURNING, Ordering::SeqCst);
                }
            }
            done.store(true, Ordering::SeqCst);
        });
        let stable = hashes(0..STABLE);
        while !done.load(Ordering::SeqCst) {
            let gone_before = oldest.load(Ordering::SeqCst);
            let around = gone_before.saturating_sub(8)..gone_before + 40;
            let mut bitmap = [0];
            let asked = hashes(around.clone());
            reader.membership(NAMESPACE, GROUP, &asked, &mut bitmap);
            let not_yet = newest.load(Ordering::SeqCst);
            for (i, number) in around.enumerate().filter(|(i, _)| bitmap[0] >> i & 1 == 1) {
                assert!(
                    number >= gone_before,
                    "block {number} (bit {i}) was removed before"
                );
                assert!(
                    number < not_yet,
                    "block {number} (bit {i}) was sealed later"
                );
            }
            assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &stable), STABLE as u32);
        }
    });
    assert_eq!(reader.sealed_entries(), STABLE + CHURNING - 1);
}
