//! What the daemon relies on: ids, storage, errors, look-ups.

#![forbid(unsafe_code)]

use super::tests_util::{BOOT_ID, GROUP, NAMESPACE, hash, hashes, key, writer, writer_for};
use super::*;

#[test]
fn ids_go_up_while_filling_and_come_back_last_freed_first() {
    let (_memory, mut writer) = writer_for(100);
    for i in 0..100 {
        assert_eq!(writer.insert(&key(i)), Ok(EntryId(i as u32)));
    }
    assert_eq!(
        writer.insert(&key(100)),
        Err(InsertError::Full { capacity: 100 })
    );
    assert_eq!(writer.remove(EntryId(3)), Ok(key(3)));
    assert_eq!(writer.remove(EntryId(50)), Ok(key(50)));
    assert_eq!(writer.len(), 98);
    assert_eq!(writer.insert(&key(200)), Ok(EntryId(50)));
    assert_eq!(writer.insert(&key(201)), Ok(EntryId(3)));
    assert_eq!(writer.entries_touched_bytes(), 6400);
}

#[test]
fn a_key_is_inserted_once() {
    let (_memory, mut writer) = writer_for(100);
    let id = writer.insert(&key(1)).unwrap();
    assert_eq!(writer.insert(&key(1)), Err(InsertError::Exists(id)));
    writer.seal(id).unwrap();
    assert_eq!(writer.insert(&key(1)), Err(InsertError::Exists(id)));
    assert_eq!(writer.len(), 1);
}

#[test]
fn hash_namespace_and_group_are_all_part_of_the_key() {
    let (_memory, mut writer) = writer_for(100);
    let mut near = hash(1);
    near[31] ^= 0x80;
    let keys = [
        BlockKey::new(1, 1, &hash(1)),
        BlockKey::new(2, 1, &hash(1)),
        BlockKey::new(1, 2, &hash(1)),
        BlockKey::new(u32::MAX, u16::MAX, &hash(1)),
        BlockKey::new(1, 1, &near),
    ];
    for (i, key) in keys.iter().enumerate() {
        assert_eq!(writer.insert(key), Ok(EntryId(i as u32)));
    }
    for (i, key) in keys.iter().enumerate() {
        assert_eq!(writer.find(key), Some(EntryId(i as u32)));
        assert_eq!(writer.key(EntryId(i as u32)), Some(*key));
    }
    assert_eq!(keys[4].hash(), near);
}

#[test]
fn sealing_and_unsealing_are_counted_once() {
    let (_memory, mut writer) = writer_for(100);
    let id = writer.insert(&key(1)).unwrap();
    assert!(!writer.is_sealed(id));
    for _ in 0..2 {
        writer.seal(id).unwrap();
        assert!(writer.is_sealed(id));
        assert_eq!(writer.sealed_len(), 1);
    }
    for _ in 0..2 {
        writer.unseal(id).unwrap();
        assert!(!writer.is_sealed(id));
        assert_eq!(writer.sealed_len(), 0);
    }
    writer.seal(id).unwrap();
    writer.remove(id).unwrap();
    assert_eq!((writer.len(), writer.sealed_len()), (0, 0));
}

#[test]
fn ids_that_are_not_in_use_are_refused() {
    let (_memory, mut writer) = writer_for(100);
    let freed = writer.insert(&key(1)).unwrap();
    writer.remove(freed).unwrap();
    for id in [
        freed,
        EntryId(1),
        EntryId(99),
        EntryId(100),
        EntryId(u32::MAX),
    ] {
        assert_eq!(writer.seal(id), Err(EntryError(id)));
        assert_eq!(writer.unseal(id), Err(EntryError(id)));
        assert_eq!(writer.remove(id), Err(EntryError(id)));
        assert_eq!(writer.key(id), None);
        assert!(!writer.is_sealed(id));
    }
}

#[test]
fn entries_are_taken_only_where_storage_was_reserved() {
    let layout = IndexLayout::for_capacity(100).unwrap();
    let memory = HeapMemory::for_layout(&layout);
    let mut writer = IndexWriter::create(memory, layout, BOOT_ID, 42).unwrap();
    assert_eq!(
        writer.insert(&key(0)),
        Err(InsertError::NeedReserve { reserved: 0 })
    );

    let mut ranges = Vec::new();
    let reserved = writer.reserve(1, |range| {
        ranges.push(range);
        Ok::<_, &str>(())
    });
    assert_eq!(reserved, Ok(64));
    for i in 0..64 {
        writer.insert(&key(i)).unwrap();
    }
    assert_eq!(
        writer.insert(&key(64)),
        Err(InsertError::NeedReserve { reserved: 64 })
    );

    assert_eq!(writer.reserve(1, |_| Err("no space")), Err("no space"));
    assert_eq!(writer.reserved_entries(), 64);

    let push = |range| {
        ranges.push(range);
        Ok::<_, &str>(())
    };
    assert_eq!(writer.reserve(u32::MAX, push), Ok(100));
    let start = layout.fixed_bytes();
    assert_eq!(ranges, [start..start + 4096, start + 4096..start + 8192]);
    assert_eq!(
        writer.reserve(1, |_| Err("nothing is left to allocate")),
        Ok(100)
    );

    for i in 64..100 {
        writer.insert(&key(i)).unwrap();
    }
    assert_eq!(
        writer.insert(&key(100)),
        Err(InsertError::Full { capacity: 100 })
    );
}

#[test]
fn a_probe_ends_at_its_bound_and_the_insertion_says_so() {
    // One line for all: seven keys fit, and the bound is one line.
    let (_memory, mut one) = writer(IndexLayout::with_buckets(64, 1).unwrap());
    for i in 0..7 {
        one.insert(&key(i)).unwrap();
    }
    assert_eq!(
        one.insert(&key(7)),
        Err(InsertError::ProbeLimit { lines: 1 })
    );
    assert_eq!(one.len(), 7);
    one.remove(EntryId(2)).unwrap();
    assert_eq!(one.insert(&key(7)), Ok(EntryId(2)));

    // More lines than the bound, and keys until one of them does not fit.
    let (_memory, mut many) = writer(IndexLayout::with_buckets(4096, 128).unwrap());
    let failure = (0..4096).find_map(|i| many.insert(&key(i)).err());
    assert_eq!(
        failure,
        Some(InsertError::ProbeLimit {
            lines: MAX_PROBE_LINES
        })
    );
    let inserted = u64::from(many.len());
    assert!(inserted > 7 * 100, "{inserted} keys in 896 slots");
    for i in 0..inserted {
        assert_eq!(many.find(&key(i)), Some(EntryId(i as u32)));
    }
}

#[test]
fn a_full_index_of_the_default_shape_never_meets_the_probe_bound() {
    let (_memory, mut writer) = writer_for(65_536);
    for i in 0..65_536 {
        assert_eq!(writer.insert(&key(i)), Ok(EntryId(i as u32)));
    }
}

#[test]
fn a_batch_finds_what_single_lookups_find() {
    let (_memory, mut writer) = writer(IndexLayout::with_buckets(1000, 150).unwrap());
    for i in 0..1000 {
        let id = writer.insert(&key(i)).unwrap();
        if i % 2 == 0 {
            writer.seal(id).unwrap();
        }
        if i % 7 == 0 {
            writer.remove(id).unwrap();
        }
    }
    let mut out = vec![Some(EntryId(9)); 5];
    for count in [0, 1, 31, 32, 33, 64, 100, 2000] {
        let mut heard = Vec::new();
        let asked = hashes(0..count);
        writer.find_batch(NAMESPACE, GROUP, &asked, &mut out, |id| heard.push(id));
        assert_eq!(out.len(), count as usize);
        for (i, result) in (0..).zip(&out) {
            assert_eq!(*result, writer.find(&key(i)), "hash {i} of {count}");
        }
        assert!(out.iter().flatten().all(|id| heard.contains(id)));
    }
    writer.find_batch(NAMESPACE + 1, GROUP, &hashes(0..100), &mut out, |_| ());
    assert_eq!(out, [None; 100]);
}
