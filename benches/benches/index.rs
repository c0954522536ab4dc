//! The block index: what the daemon's look-up and a client's probe cost by number of blocks.

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pegaflow_shm::BlockHash;
use pegaflow_shm::index::{BlockKey, HeapMemory, IndexLayout, IndexReader, IndexWriter};

const NAMESPACE: u32 = 3;
/// Entries in the index: 16 MiB of them, more than the caches near a core hold.
const HELD: u32 = 262_144;
const LENGTHS: [usize; 4] = [128, 1_024, 8_192, 32_768];

fn hashes(count: u32) -> Vec<BlockHash> {
    (0..count)
        .map(|number| *blake3::hash(&number.to_le_bytes()).as_bytes())
        .collect()
}

fn filled() -> (
    Arc<HeapMemory>,
    IndexWriter<Arc<HeapMemory>>,
    Vec<BlockHash>,
) {
    let layout = IndexLayout::for_capacity(HELD).expect("the capacity is in range");
    let memory = Arc::new(HeapMemory::for_layout(&layout));
    let mut writer =
        IndexWriter::create(memory.clone(), layout, [1; 16], 42).expect("the memory is zeroed");
    writer
        .reserve(HELD, |_| Ok::<(), std::io::Error>(()))
        .expect("nothing is allocated");
    let hashes = hashes(HELD);
    for hash in &hashes {
        let id = writer
            .insert(&BlockKey::new(NAMESPACE, 0, hash))
            .expect("there is room");
        writer.seal(id).expect("the entry is in use");
    }
    (memory, writer, hashes)
}

fn index(criterion: &mut Criterion) {
    let (memory, writer, hashes) = filled();
    let reader = IndexReader::open(memory).expect("the index was created above");
    let mut group = criterion.benchmark_group("index");
    let mut found = Vec::new();
    for length in LENGTHS {
        // From the middle, so that short lists are not always the same few cache lines.
        let list = &hashes[HELD as usize / 2..][..length];
        group.throughput(Throughput::Elements(length as u64));
        group.bench_with_input(BenchmarkId::new("probe", length), list, |bencher, list| {
            bencher.iter(|| black_box(reader.prefix_len(NAMESPACE, 0, black_box(list))));
        });
        group.bench_with_input(BenchmarkId::new("find", length), list, |bencher, list| {
            bencher.iter(|| {
                writer.find_batch(NAMESPACE, 0, black_box(list), &mut found, |_| ());
                black_box(found.len())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, index);
criterion_main!(benches);
