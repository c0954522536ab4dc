//! Sizes, the bytes on file, and what `open` refuses.

#![forbid(unsafe_code)]

use super::tests_util::{BOOT_ID, key, writer, writer_for};
use super::*;

fn open_words(words: &[u64]) -> Result<(), OpenError> {
    IndexReader::open(HeapMemory::from_words(words)).map(|_| ())
}

#[test]
fn sizes_follow_the_capacity() {
    let layout = IndexLayout::for_capacity(65_536).unwrap();
    assert_eq!(layout.bucket_count(), 13_108);
    assert_eq!(layout.fixed_bytes(), 4096 + 13_108u64.div_ceil(64) * 4096);
    assert_eq!(layout.total_bytes(), layout.fixed_bytes() + 65_536 * 64);
    assert_eq!(
        layout.entry_byte_range(64..100).start,
        layout.fixed_bytes() + 4096
    );
    assert_eq!(
        layout.entry_byte_range(64..100).end,
        layout.fixed_bytes() + 2 * 4096
    );

    let largest = IndexLayout::for_capacity(MAX_ENTRIES).unwrap();
    assert_eq!(largest.total_bytes() - largest.fixed_bytes(), 64 << 31);
}

#[test]
fn impossible_capacities_have_no_layout() {
    for requested in [0, MAX_ENTRIES + 1, u32::MAX] {
        let max = MAX_ENTRIES;
        let expected = LayoutError::EntryCapacity { requested, max };
        assert_eq!(IndexLayout::for_capacity(requested), Err(expected));
    }
    assert_eq!(IndexLayout::with_buckets(1, 0), Err(LayoutError::NoBuckets));
}

#[test]
fn the_file_has_these_bytes() {
    let (memory, mut writer) = writer(IndexLayout::with_buckets(64, 1).unwrap());
    let id = writer.insert(&key(1)).unwrap();
    writer.seal(id).unwrap();
    let words = memory.snapshot(usize::MAX);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();

    let mut header = Vec::new();
    header.extend(b"PEGAINDX");
    header.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    header.extend(BOOT_ID);
    header.extend(42u64.to_le_bytes());
    for word in [1u64, 64, 4096, 8192, 8192 + 4096] {
        header.extend(word.to_le_bytes());
    }
    for half in [64u32, 64, 7, 1] {
        header.extend(half.to_le_bytes());
    }
    header.resize(256, 0);
    header.extend(64u64.to_le_bytes());
    header.resize(384, 0);
    header.extend([1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
    header.resize(4096, 0);
    assert_eq!(bytes[..4096], header);

    // One slot: tag from the hash function with seed 42, id 0 stored as 1.
    let mut line = vec![1, 0, 0, 0, 0x67, 0x3b, 0x8b, 0x0b];
    line.resize(64, 0);
    assert_eq!(bytes[4096..4160], line);

    // Version 2 (published, sealed), state sealed, scope, hash.
    let mut entry = vec![2, 2, 0, 0, 0, 0, 0, 0];
    entry.extend([7, 0, 0, 0, 2, 0, 0, 0]);
    entry.extend(key(1).hash());
    entry.resize(64, 0);
    assert_eq!(bytes[8192..8256], entry);
    assert!(bytes[8256..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_header_that_contradicts_itself_is_refused_by_name() {
    let (memory, _writer) = writer_for(640);
    let good = memory.snapshot(usize::MAX);
    assert_eq!(open_words(&good), Ok(()));

    let total = good.len() as u64 * 8;
    let refused = |word: usize, value: u64| {
        let mut words = good.clone();
        words[word] = value;
        open_words(&words).unwrap_err()
    };
    assert_eq!(refused(0, 5), OpenError::Magic(5));
    assert_eq!(refused(1, 2), OpenError::Version { major: 2, minor: 0 });
    assert_eq!(refused(12, 1), OpenError::Features(1));
    let fields: [(usize, &str, &[u64]); 8] = [
        (5, "bucket_count", &[0, 1 << 32, u64::MAX]),
        (
            6,
            "entry_capacity",
            &[0, u64::from(MAX_ENTRIES) + 1, u64::MAX],
        ),
        (7, "buckets_offset", &[0, 4095, 4100, u64::MAX]),
        (8, "entries_offset", &[0, 4096, 12_289, u64::MAX]),
        (9, "total_bytes", &[0, 8192]),
        (10, "line_bytes", &[0, 128 | 64 << 32]),
        (10, "entry_bytes", &[64, 64 | 128 << 32]),
        (11, "max_probe_lines", &[7, 7 | 65 << 32]),
    ];
    for (word, name, values) in fields {
        for &value in values {
            let OpenError::Field { field, .. } = refused(word, value) else {
                panic!("{name} = {value} gave {}", refused(word, value));
            };
            assert_eq!(field, name, "word {word} = {value}");
        }
    }
    let needed = total + 4096;
    assert_eq!(
        refused(9, needed),
        OpenError::TooShort {
            actual: total,
            needed
        }
    );
    // A plausible but larger entry count no longer fits the file.
    assert!(matches!(
        refused(6, 641),
        OpenError::Field {
            field: "total_bytes",
            ..
        }
    ));
}

#[test]
fn a_mapping_that_ends_early_is_refused() {
    let (memory, _writer) = writer_for(64);
    let words = memory.snapshot(usize::MAX);
    let needed = words.len() as u64 * 8;
    for count in [0, 1, 511] {
        let actual = count as u64 * 8;
        let expected = OpenError::TooShort {
            actual,
            needed: 4096,
        };
        assert_eq!(open_words(&words[..count]), Err(expected));
    }
    let short = OpenError::TooShort {
        actual: needed - 8,
        needed,
    };
    assert_eq!(open_words(&words[..words.len() - 1]), Err(short));
}

#[test]
fn a_minor_version_and_a_larger_mapping_are_accepted() {
    let (memory, _writer) = writer_for(64);
    let mut words = memory.snapshot(usize::MAX);
    words[1] |= 9 << 32;
    words.extend([u64::MAX; 100]);
    assert_eq!(open_words(&words), Ok(()));
}

#[test]
fn creation_refuses_memory_that_is_short_or_used() {
    let layout = IndexLayout::for_capacity(64).unwrap();
    let needed = layout.total_bytes();
    let short = HeapMemory::from_words(&vec![0; needed as usize / 8 - 1]);
    let error = IndexWriter::create(short, layout, BOOT_ID, 0).unwrap_err();
    assert_eq!(
        error,
        CreateError::TooShort {
            actual: needed - 8,
            needed
        }
    );

    for (word, offset) in [(0, 0), (511, 4088), (512, 4096)] {
        let mut words = vec![0; needed as usize / 8];
        words[word] = 1;
        let used = HeapMemory::from_words(&words);
        let error = IndexWriter::create(used, layout, BOOT_ID, 0).unwrap_err();
        assert_eq!(error, CreateError::NotZeroed { offset });
    }
}
