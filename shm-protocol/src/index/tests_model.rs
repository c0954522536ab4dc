//! Random operations against a map, in tables so small that keys overflow their lines.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use proptest::prelude::*;

use super::layout::{SLOTS_PER_LINE, WORDS};
use super::tests_util::{GROUP, NAMESPACE, hash, key, writer};
use super::*;

const KEYS: u64 = 48;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Insert(u64),
    Seal(u64),
    Unseal(u64),
    Remove(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    (0..6, 0..KEYS).prop_map(|(kind, number)| match kind {
        0..=2 => Operation::Insert(number),
        3 => Operation::Seal(number),
        4 => Operation::Unseal(number),
        _ => Operation::Remove(number),
    })
}

/// Checks the bucket lines word by word: each key in use has one slot, and every line counts
/// exactly the keys that passed it.
fn check_lines(words: &[u64], homes: &HashMap<u32, usize>, buckets: usize) {
    let mut passed = vec![0; buckets];
    let mut seen = 0;
    for (i, line) in words[HEADER_BYTES / 8..]
        .chunks(WORDS)
        .take(buckets)
        .enumerate()
    {
        for slot in line[..SLOTS_PER_LINE].iter().filter(|slot| **slot != 0) {
            let mut at = homes[&(*slot as u32 - 1)];
            while at != i {
                passed[at] += 1;
                at = (at + 1) % buckets;
            }
            seen += 1;
        }
    }
    assert_eq!(seen, homes.len());
    for (i, line) in words[HEADER_BYTES / 8..]
        .chunks(WORDS)
        .take(buckets)
        .enumerate()
    {
        assert_eq!(
            line[SLOTS_PER_LINE], passed[i],
            "overflow count of line {i}"
        );
    }
}

fn run(capacity: u32, buckets: u32, operations: &[Operation]) {
    let layout = IndexLayout::with_buckets(capacity, buckets).unwrap();
    let (memory, mut writer) = writer(layout);
    let reader = IndexReader::open(memory.clone()).unwrap();
    let hasher = key::KeyHasher::new(42, buckets);
    let mut model: HashMap<u64, (EntryId, bool)> = HashMap::new();
    for operation in operations {
        match *operation {
            Operation::Insert(number) => match writer.insert(&key(number)) {
                Ok(id) => {
                    assert!(
                        model.values().all(|(used, _)| *used != id),
                        "{id} given twice"
                    );
                    assert_eq!(model.insert(number, (id, false)), None);
                }
                Err(InsertError::Exists(id)) => assert_eq!(model[&number].0, id),
                Err(InsertError::Full { .. }) => assert_eq!(model.len(), capacity as usize),
                Err(InsertError::ProbeLimit { .. }) => {
                    // All lines are within the bound here, so all slots must be taken.
                    assert_eq!(model.len(), SLOTS_PER_LINE * buckets as usize);
                }
                Err(error) => panic!("{error}"),
            },
            Operation::Seal(number) | Operation::Unseal(number) => {
                if let Some((id, is_sealed)) = model.get_mut(&number) {
                    *is_sealed = matches!(operation, Operation::Seal(_));
                    if *is_sealed {
                        writer.seal(*id)
                    } else {
                        writer.unseal(*id)
                    }
                    .unwrap();
                }
            }
            Operation::Remove(number) => {
                if let Some((id, _)) = model.remove(&number) {
                    assert_eq!(writer.remove(id), Ok(key(number)));
                }
            }
        }
        let sealed = model.values().filter(|(_, is_sealed)| *is_sealed).count();
        assert_eq!(
            (writer.len(), writer.sealed_len()),
            (model.len() as u32, sealed as u32)
        );
    }

    let hashes: Vec<_> = (0..KEYS).map(hash).collect();
    let mut out = Vec::new();
    writer.find_batch(NAMESPACE, GROUP, &hashes, &mut out, |_| ());
    let mut bitmap = [0];
    reader.membership(NAMESPACE, GROUP, &hashes, &mut bitmap);
    let mut prefix = None;
    for number in 0..KEYS {
        let expected = model.get(&number).copied();
        let id = expected.map(|(id, _)| id);
        let is_sealed = expected.is_some_and(|(_, is_sealed)| is_sealed);
        assert_eq!(writer.find(&key(number)), id);
        assert_eq!(out[number as usize], id);
        assert_eq!(reader.contains(&key(number)), is_sealed);
        assert_eq!(bitmap[0] >> number & 1 == 1, is_sealed);
        if let Some(id) = id {
            assert_eq!(writer.key(id), Some(key(number)));
            assert_eq!(writer.is_sealed(id), is_sealed);
        }
        if !is_sealed {
            prefix.get_or_insert(number);
        }
    }
    let prefix = prefix.unwrap_or(KEYS) as u32;
    assert_eq!(reader.prefix_len(NAMESPACE, GROUP, &hashes), prefix);
    let home = |number| hasher.home(&key(number).words()).line as usize;
    let homes = model
        .iter()
        .map(|(number, (id, _))| (id.0, home(*number)))
        .collect();
    check_lines(&memory.snapshot(usize::MAX), &homes, buckets as usize);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_index_is_a_map(
        capacity in 1u32..60,
        buckets in 1u32..9,
        operations in prop::collection::vec(operation(), 0..300),
    ) {
        run(capacity, buckets, &operations);
    }
}
