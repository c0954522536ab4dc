//! Every interleaving and every allowed stale read of the block index, at small sizes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p pegaflow-shm --release --test loom_index`

#![cfg(loom)]
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64 as Counter, Ordering::Relaxed};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use pegaflow_shm::index::model::{
    EntryWords, KeyWords, is_sealed_match, publish, seal, unseal, vacate,
};
use pegaflow_shm::index::{
    BlockKey, EntryId, HEADER_BYTES, HeapMemory, IndexLayout, IndexReader, IndexWriter,
};

const A: KeyWords = KeyWords {
    scope: 0xa0,
    hash: [0xa1, 0xa2, 0xa3, 0xa4],
};
const B: KeyWords = KeyWords {
    scope: 0xb0,
    hash: [0xb1, 0xb2, 0xb3, 0xb4],
};

/// Everything: for models of one entry.
fn explore(model: impl Fn() + Sync + Send + 'static) {
    explore_with(None, model);
}

/// At most two or three switches at arbitrary points (stale reads are still all explored): for
/// models whose full exploration takes minutes.
fn explore_switches(bound: usize, model: impl Fn() + Sync + Send + 'static) {
    explore_with(Some(bound), model);
}

fn explore_with(preemption_bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemption_bound;
    builder.max_branches = 100_000;
    let executions = std::sync::Arc::new(Counter::new(0));
    let counted = executions.clone();
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    // Guards against a model whose threads never get to race.
    let executions = executions.load(Relaxed);
    assert!(executions >= 20, "only {executions} executions explored");
}

/// Runs both sides as threads of their own and waits for them. Accesses of the model's first
/// thread are not always seen as races by loom, so neither side runs there.
fn race(write: impl FnOnce() + 'static, read: impl FnOnce() + 'static) {
    let reader = thread::spawn(read);
    let writer = thread::spawn(write);
    reader.join().unwrap();
    writer.join().unwrap();
}

fn flag() -> (Arc<AtomicU64>, Arc<AtomicU64>) {
    let flag = Arc::new(AtomicU64::new(0));
    (flag.clone(), flag)
}

fn entry() -> (Arc<EntryWords>, Arc<EntryWords>) {
    let entry = Arc::new(core::array::from_fn(|_| AtomicU64::new(0)));
    (entry.clone(), entry)
}

fn sealed_entry() -> (Arc<EntryWords>, Arc<EntryWords>) {
    let (entry, same) = entry();
    publish(&entry, &A);
    seal(&entry);
    (entry, same)
}

fn a_mixture_is_never_a_hit(mixture: KeyWords) {
    explore_switches(3, move || {
        let (entry, shared) = sealed_entry();
        race(
            move || {
                vacate(&entry);
                publish(&entry, &B);
                seal(&entry);
            },
            move || {
                assert!(
                    !is_sealed_match(&shared, &mixture),
                    "a torn key was accepted"
                )
            },
        );
    });
}

#[test]
fn a_key_torn_after_its_first_word_is_never_a_hit() {
    a_mixture_is_never_a_hit(KeyWords {
        scope: A.scope,
        hash: B.hash,
    });
    a_mixture_is_never_a_hit(KeyWords {
        scope: B.scope,
        hash: A.hash,
    });
}

#[test]
fn a_key_torn_in_its_hash_is_never_a_hit() {
    let [a, b] = [A.hash, B.hash];
    a_mixture_is_never_a_hit(KeyWords {
        scope: A.scope,
        hash: [a[0], a[1], b[2], b[3]],
    });
    a_mixture_is_never_a_hit(KeyWords {
        scope: B.scope,
        hash: [b[0], a[1], b[2], a[3]],
    });
    a_mixture_is_never_a_hit(KeyWords {
        scope: A.scope,
        hash: [a[0], a[1], a[2], b[3]],
    });
}

#[test]
fn a_key_withdrawn_before_the_lookup_is_never_a_hit() {
    explore_switches(3, || {
        let (entry, shared) = sealed_entry();
        let (gone, was_gone) = flag();
        race(
            move || {
                unseal(&entry);
                gone.store(1, Ordering::Release);
                vacate(&entry);
                publish(&entry, &B);
            },
            move || {
                let was_gone = was_gone.load(Ordering::Acquire) == 1;
                let is_hit = is_sealed_match(&shared, &A);
                assert!(!(was_gone && is_hit), "a withdrawn key was accepted");
                assert!(
                    !is_sealed_match(&shared, &B),
                    "a key was accepted that nobody sealed"
                );
            },
        );
    });
}

#[test]
fn a_hit_sees_everything_that_was_written_before_sealing() {
    explore(|| {
        let (entry, shared) = entry();
        let (page, page_seen) = flag();
        race(
            move || {
                publish(&entry, &A);
                page.store(1, Ordering::Relaxed);
                seal(&entry);
            },
            move || {
                if is_sealed_match(&shared, &A) {
                    assert_eq!(page_seen.load(Ordering::Relaxed), 1);
                }
            },
        );
    });
}

#[test]
fn a_key_that_is_resealed_is_never_accepted_across_another_keys_tenure() {
    explore_switches(3, || {
        let (entry, shared) = sealed_entry();
        let (gone, was_gone) = flag();
        let (back, is_back) = flag();
        race(
            move || {
                vacate(&entry);
                gone.store(1, Ordering::Release);
                publish(&entry, &B);
                vacate(&entry);
                publish(&entry, &A);
                back.store(1, Ordering::Relaxed);
                seal(&entry);
            },
            move || {
                let was_gone = was_gone.load(Ordering::Acquire) == 1;
                if is_sealed_match(&shared, &A) && was_gone {
                    let is_back = is_back.load(Ordering::Relaxed) == 1;
                    assert!(is_back, "accepted before it was sealed again");
                }
            },
        );
    });
}

type Writer = IndexWriter<Arc<HeapMemory>>;
type Reader = IndexReader<Arc<HeapMemory>>;

fn index(entries: u32, buckets: u32) -> (Arc<HeapMemory>, Writer, Reader) {
    let layout = IndexLayout::with_buckets(entries, buckets).unwrap();
    let memory = Arc::new(HeapMemory::for_layout(&layout));
    let mut writer = IndexWriter::create(memory.clone(), layout, [3; 16], 1).unwrap();
    writer
        .reserve(entries, |_| Ok::<_, core::convert::Infallible>(()))
        .unwrap();
    let reader = IndexReader::open(memory.clone()).unwrap();
    (memory, writer, reader)
}

fn key(number: u8) -> BlockKey {
    BlockKey::new(1, 0, &[number; 32])
}

fn insert_sealed(writer: &mut Writer, number: u8) -> EntryId {
    let id = writer.insert(&key(number)).unwrap();
    writer.seal(id).unwrap();
    id
}

/// The writer removes block 1 and gives its entry to block 2, while `look` looks; `look` gets
/// whether block 1 was gone before, and a flag that is set before block 2 is sealed.
fn reuse_an_entry(look: impl Fn(&Reader, bool, &AtomicU64) + Copy + Send + Sync + 'static) {
    explore_switches(2, move || {
        let (_memory, mut writer, reader) = index(2, 1);
        let first = insert_sealed(&mut writer, 1);
        let (gone, was_gone) = flag();
        let (coming, is_coming) = flag();
        race(
            move || {
                writer.remove(first).unwrap();
                gone.store(1, Ordering::Release);
                let second = writer.insert(&key(2)).unwrap();
                assert_eq!(second, first);
                coming.store(1, Ordering::Relaxed);
                writer.seal(second).unwrap();
            },
            move || look(&reader, was_gone.load(Ordering::Acquire) == 1, &is_coming),
        );
    });
}

#[test]
fn a_lookup_of_a_removed_block_is_never_a_hit() {
    reuse_an_entry(|reader, was_gone, _| {
        assert!(
            !(reader.contains(&key(1)) && was_gone),
            "a removed block was a hit"
        );
    });
}

#[test]
fn a_lookup_of_a_block_before_its_sealing_is_never_a_hit() {
    reuse_an_entry(|reader, _, is_coming| {
        if reader.contains(&key(2)) {
            assert_eq!(
                is_coming.load(Ordering::Relaxed),
                1,
                "a hit before the sealing"
            );
        }
    });
}

#[test]
fn a_batch_with_a_removed_block_never_hits_it() {
    reuse_an_entry(|reader, was_gone, _| {
        let mut bitmap = [0];
        reader.membership(1, 0, &[[1; 32]], &mut bitmap);
        assert!(!(bitmap[0] != 0 && was_gone), "a removed block was a hit");
    });
}

/// Inserts keys `from`, `from + 1`, .. until the two lines count `passed` keys past them; the last
/// one inserted is then past its home.
fn insert_until_passed(writer: &mut Writer, memory: &HeapMemory, from: u8, passed: u64) -> u8 {
    const LINES: usize = HEADER_BYTES / 8;
    for number in from.. {
        insert_sealed(writer, number);
        let words = memory.snapshot(LINES + 16);
        if words[LINES + 7] + words[LINES + 15] == passed {
            return number;
        }
    }
    unreachable!("two full lines have no room for more keys")
}

#[test]
fn a_stable_block_past_a_full_line_stays_visible_while_others_come_and_go() {
    explore_switches(3, || {
        let (memory, mut writer, reader) = index(14, 2);
        let stable = insert_until_passed(&mut writer, &memory, 0, 1);
        let other = insert_until_passed(&mut writer, &memory, stable + 1, 2);
        race(
            move || {
                // The counter on the stable key's way goes down, up, and down again.
                let id = writer.find(&key(other)).unwrap();
                writer.remove(id).unwrap();
                let id = writer.insert(&key(other)).unwrap();
                writer.remove(id).unwrap();
            },
            move || {
                let is_hit = reader.contains(&key(stable));
                assert!(is_hit, "a sealed block was hidden by changes to others");
            },
        );
    });
}
