//! Every interleaving and every allowed stale read of the block index, at small sizes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p pegaflow-shm --release --test loom_index`

#![cfg(loom)]
#![forbid(unsafe_code)]

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

/// At most three switches at arbitrary points (stale reads are still all explored): for models
/// whose full exploration takes minutes.
fn explore_switches(model: impl Fn() + Sync + Send + 'static) {
    explore_with(Some(3), model);
}

fn explore_with(preemption_bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemption_bound;
    builder.max_branches = 100_000;
    builder.check(model);
}

fn entry() -> Arc<EntryWords> {
    Arc::new(core::array::from_fn(|_| AtomicU64::new(0)))
}

/// The first word of a mixture decides how far a reader gets, so several cuts are tried.
fn a_mixture_is_never_a_hit(mixture: KeyWords) {
    explore(move || {
        let entry = entry();
        publish(&entry, &A);
        seal(&entry);
        let writer = thread::spawn({
            let entry = entry.clone();
            move || {
                vacate(&entry);
                publish(&entry, &B);
                seal(&entry);
            }
        });
        assert!(
            !is_sealed_match(&entry, &mixture),
            "a torn key was accepted"
        );
        writer.join().unwrap();
        assert!(is_sealed_match(&entry, &B));
        assert!(!is_sealed_match(&entry, &A));
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
    explore_switches(|| {
        let entry = entry();
        publish(&entry, &A);
        seal(&entry);
        let gone = Arc::new(AtomicU64::new(0));
        let writer = thread::spawn({
            let (entry, gone) = (entry.clone(), gone.clone());
            move || {
                unseal(&entry);
                gone.store(1, Ordering::Release);
                vacate(&entry);
                publish(&entry, &B);
            }
        });
        let was_gone = gone.load(Ordering::Acquire) == 1;
        let is_hit = is_sealed_match(&entry, &A);
        assert!(!(was_gone && is_hit), "a withdrawn key was accepted");
        // B is never sealed.
        assert!(!is_sealed_match(&entry, &B));
        writer.join().unwrap();
    });
}

#[test]
fn a_hit_sees_everything_that_was_written_before_sealing() {
    explore(|| {
        let entry = entry();
        let page = Arc::new(AtomicU64::new(0));
        let writer = thread::spawn({
            let (entry, page) = (entry.clone(), page.clone());
            move || {
                publish(&entry, &A);
                page.store(1, Ordering::Relaxed);
                seal(&entry);
            }
        });
        if is_sealed_match(&entry, &A) {
            assert_eq!(page.load(Ordering::Relaxed), 1);
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_key_that_is_resealed_is_never_accepted_across_another_keys_tenure() {
    explore_switches(|| {
        let entry = entry();
        publish(&entry, &A);
        seal(&entry);
        let gone = Arc::new(AtomicU64::new(0));
        let back = Arc::new(AtomicU64::new(0));
        let writer = thread::spawn({
            let (entry, gone, back) = (entry.clone(), gone.clone(), back.clone());
            move || {
                vacate(&entry);
                gone.store(1, Ordering::Release);
                publish(&entry, &B);
                vacate(&entry);
                publish(&entry, &A);
                back.store(1, Ordering::Relaxed);
                seal(&entry);
            }
        });
        let was_gone = gone.load(Ordering::Acquire) == 1;
        if is_sealed_match(&entry, &A) && was_gone {
            assert_eq!(
                back.load(Ordering::Relaxed),
                1,
                "accepted before it was sealed again"
            );
        }
        writer.join().unwrap();
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

#[test]
fn a_lookup_during_reuse_of_an_entry_hits_only_what_is_sealed_meanwhile() {
    explore_switches(|| {
        let (_memory, mut writer, reader) = index(2, 1);
        let first = insert_sealed(&mut writer, 1);
        let gone = Arc::new(AtomicU64::new(0));
        let coming = Arc::new(AtomicU64::new(0));
        let thread = thread::spawn({
            let (gone, coming) = (gone.clone(), coming.clone());
            move || {
                writer.remove(first).unwrap();
                gone.store(1, Ordering::Release);
                let second = writer.insert(&key(2)).unwrap();
                assert_eq!(second, first);
                coming.store(1, Ordering::Relaxed);
                writer.seal(second).unwrap();
            }
        });
        let was_gone = gone.load(Ordering::Acquire) == 1;
        assert!(
            !(was_gone && reader.contains(&key(1))),
            "a removed block was a hit"
        );
        if reader.contains(&key(2)) {
            assert_eq!(
                coming.load(Ordering::Relaxed),
                1,
                "a block was a hit before its sealing"
            );
        }
        thread.join().unwrap();
        assert!(reader.contains(&key(2)) && !reader.contains(&key(1)));
    });
}

#[test]
fn a_batch_during_reuse_of_an_entry_hits_only_what_is_sealed_meanwhile() {
    explore_switches(|| {
        let (_memory, mut writer, reader) = index(2, 1);
        let first = insert_sealed(&mut writer, 1);
        let gone = Arc::new(AtomicU64::new(0));
        let thread = thread::spawn({
            let gone = gone.clone();
            move || {
                writer.remove(first).unwrap();
                gone.store(1, Ordering::Release);
                insert_sealed(&mut writer, 2);
            }
        });
        let was_gone = gone.load(Ordering::Acquire) == 1;
        let mut bitmap = [0];
        reader.membership(1, 0, &[[1; 32]], &mut bitmap);
        assert!(!(was_gone && bitmap[0] != 0), "a removed block was a hit");
        thread.join().unwrap();
        assert_eq!(reader.prefix_len(1, 0, &[[2; 32], [1; 32]]), 1);
    });
}

/// Inserts keys 0, 1, .. until the lines count `passed` keys past them; the last one inserted is
/// then past its home.
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
    explore_switches(|| {
        let (memory, mut writer, reader) = index(14, 2);
        let stable = insert_until_passed(&mut writer, &memory, 0, 1);
        let other = insert_until_passed(&mut writer, &memory, stable + 1, 2);
        let thread = thread::spawn(move || {
            // The counter on the stable key's way goes down, up, and down again, and a slot of
            // its home line empties.
            let id = writer.find(&key(other)).unwrap();
            writer.remove(id).unwrap();
            let id = writer.insert(&key(other)).unwrap();
            writer.remove(id).unwrap();
            writer.remove(EntryId(0)).unwrap();
        });
        assert!(
            reader.contains(&key(stable)),
            "a sealed block was hidden by changes to others"
        );
        thread.join().unwrap();
    });
}
