//! Bytes loaded into GPU memory are the bytes saved from it, and no other byte is touched.

use pegaflow_tests::content::Stream;
use pegaflow_tests::gpu::Gpus;
use pegaflow_tests::gpu::engine::Task;
use pegaflow_tests::gpu::rank::GpuSpec;

use crate::{daemon, engine, load, save};

/// Blocks of a list in a random order.
fn some_blocks(random: &mut Stream, of: u32) -> Vec<u32> {
    let mut blocks: Vec<u32> = (0..of).collect();
    if random.below(3) > 0 {
        for at in (1..blocks.len()).rev() {
            blocks.swap(at, random.below(at as u64 + 1) as usize);
        }
    }
    blocks.truncate(1 + random.below(u64::from(of)) as usize);
    blocks
}

/// Saves all groups in one process and loads them in another, which arranges them otherwise.
fn there_and_back(seeds: std::ops::Range<u64>, base: &GpuSpec) {
    let gpus = Gpus::emulated(1);
    let daemon = daemon(&gpus);
    for seed in seeds {
        let mut random = Stream::new(&[seed]);
        let saver = GpuSpec {
            instance: format!("saver {seed}"),
            salt: format!("{seed}"),
            sizes: seed,
            arrangement: random.next(),
            ..base.clone()
        };
        let loader = saver.instance(&format!("loader {seed}"), random.next());
        let mut left = engine(&gpus, &daemon, &saver);
        let mut right = engine(&gpus, &daemon, &loader);
        for sizes in saver.groups() {
            let (group, first) = (sizes.group, 1000 * u64::from(sizes.group));
            let from = some_blocks(&mut random, sizes.blocks);
            let saved = save(&mut left, group, first, &from);
            let bytes = (from.len() * sizes.page_bytes()) as u64;
            assert!(saved.is_ok(), "{seed}: {saved:?}\n{}", daemon.log());
            assert_eq!((saved.count as usize, saved.bytes), (from.len(), bytes));
            let mut into = some_blocks(&mut random, sizes.blocks);
            into.truncate(from.len());
            let loaded = load(&mut right, group, first, &into);
            assert!(loaded.is_ok(), "{seed}: {loaded:?}\n{}", daemon.log());
            assert_eq!(loaded.count as usize, into.len());
        }
        let (saved_from, loaded_into) = (left.run(&Task::Check), right.run(&Task::Check));
        assert!(saved_from.is_ok(), "{seed}: {saved_from:?}");
        assert!(loaded_into.is_ok(), "{seed}: {loaded_into:?}");
        left.finish();
        right.finish();
    }
}

#[test]
fn random_layouts_give_their_bytes_back_in_another_process() {
    there_and_back(0..14, &GpuSpec::default());
}

#[test]
fn memory_that_was_mapped_from_chunks_is_shared_by_descriptors() {
    let base = GpuSpec {
        mapped: true,
        // More chunks than one message carries.
        budget: 160 << 20,
        ..GpuSpec::default()
    };
    there_and_back(1..2, &base);
    let base = GpuSpec {
        budget: 4 << 20,
        ..base
    };
    there_and_back(40..44, &base);
}
