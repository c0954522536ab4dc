//! Checksums: taken where asked for, compared where given.

use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::support::*;
use crate::copy::*;
use crate::layout::MemoryRef;

const PAGE: u64 = 3000;
/// What the pool makes of it.
const ROUNDED: u64 = 3008;
const BLOCKS: u32 = 8;

struct Scene {
    pool_map: Arc<RegionMapping>,
    memory: Arc<RegionMapping>,
    target: Arc<BoundLayout>,
}

impl Scene {
    /// A region of noise, dense or with gaps between the blocks.
    fn new(stride: u64) -> Scene {
        let bytes = stride * u64::from(BLOCKS);
        let (memory, pool_map) = (region(bytes), region(ROUNDED * u64::from(BLOCKS)));
        write(&memory, &noise(bytes, 5));
        let list = segments(MemoryRef::Region(0), &[(0, stride, PAGE)]);
        let target = bind(BLOCKS, list, std::slice::from_ref(&memory), None);
        Scene {
            pool_map,
            memory,
            target,
        }
    }

    /// Copies block `b` from or to page `b`, with these checksums; gives the list back.
    fn run(
        &self,
        direction: Direction,
        checksums: [u64; BLOCKS as usize],
    ) -> (Result<u64, CopyError>, u32, Vec<u64>) {
        let pages: Vec<_> = (0..BLOCKS).map(|b| (ROUNDED * u64::from(b), b)).collect();
        let mut task = task(direction, &self.target, &pages);
        for (page, checksum) in task.pages.iter_mut().zip(checksums) {
            page.checksum = checksum;
        }
        let mut done = 99;
        let result = HostBackend::new(pool(&self.pool_map)).copy(&mut task, &mut done);
        let checksums = task.pages.iter().map(|page| page.checksum).collect();
        (result, done, checksums)
    }

    fn expected(&self) -> Vec<u64> {
        let bytes = read(&self.pool_map);
        let pages = bytes.chunks(ROUNDED as usize);
        pages.map(XxHash3_64::oneshot).collect()
    }

    fn flip(&self, page: u64, byte: u64) {
        let mut bytes = read(&self.pool_map);
        bytes[(page * ROUNDED + byte) as usize] ^= 0x10;
        write(&self.pool_map, &bytes);
    }
}

#[test]
fn a_save_takes_the_checksums_that_are_asked_for_and_no_others() {
    for stride in [PAGE, PAGE + 72] {
        let scene = Scene::new(stride);
        let asked: [u64; 8] = std::array::from_fn(|at| (at % 3 == 0) as u64 * TAKE_CHECKSUM);
        let (result, done, checksums) = scene.run(Direction::Save, asked);
        assert_eq!((result, done), (Ok(8 * PAGE), 8));
        for (at, expected) in scene.expected().into_iter().enumerate() {
            let wanted = if at % 3 == 0 { expected } else { NO_CHECKSUM };
            assert_eq!(checksums[at], wanted, "page {at}");
        }
    }
}

#[test]
fn a_load_copies_sound_pages_and_none_from_the_first_changed_one_on() {
    for stride in [PAGE, PAGE + 72] {
        for (page, byte) in [(0, 0), (3, 1234), (7, PAGE - 1), (5, ROUNDED - 1)] {
            let scene = Scene::new(stride);
            let (_, _, taken) = scene.run(Direction::Save, [TAKE_CHECKSUM; 8]);
            let taken: [u64; 8] = taken.try_into().unwrap();
            let (result, done, _) = scene.run(Direction::Load, taken);
            assert_eq!((result, done), (Ok(8 * PAGE), 8), "nothing has changed");

            scene.flip(page, byte);
            write(&scene.memory, &vec![0; stride as usize * 8]);
            let (result, done, _) = scene.run(Direction::Load, taken);
            let found = scene.expected()[page as usize];
            let (offset, recorded) = (page * ROUNDED, taken[page as usize]);
            let error = CopyError::Checksum {
                offset,
                recorded,
                found,
            };
            assert_eq!((result, done), (Err(error), page as u32));
            let bytes = read(&scene.memory);
            let rest = &bytes[(page * stride) as usize..];
            assert!(
                rest.iter().all(|byte| *byte == 0),
                "nothing of it, or behind it"
            );

            // Without a checksum nobody looks.
            let mut unknown = taken;
            unknown[page as usize] = NO_CHECKSUM;
            assert_eq!(scene.run(Direction::Load, unknown).0, Ok(8 * PAGE));
        }
    }
}

#[test]
fn every_flipped_bit_of_a_page_is_found() {
    let scene = Scene::new(PAGE);
    let (_, _, taken) = scene.run(Direction::Save, [TAKE_CHECKSUM; 8]);
    let taken: [u64; 8] = taken.try_into().unwrap();
    let original = read(&scene.pool_map);
    for bit in (0..8 * PAGE as usize).step_by(7) {
        let mut bytes = original.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        write(&scene.pool_map, &bytes);
        let (result, done, _) = scene.run(Direction::Load, taken);
        assert!(
            matches!(result, Err(CopyError::Checksum { .. })),
            "bit {bit}"
        );
        assert_eq!(done, 0);
    }
}

#[test]
fn one_of_sixteen_pages_is_sampled_all_or_none_in_the_other_modes() {
    let taken = |mode| {
        let mut sampler = Sampler::new(mode);
        (0..160)
            .filter(|_| sampler.for_next_page() == TAKE_CHECKSUM)
            .count()
    };
    assert_eq!(taken(ChecksumMode::Off), 0);
    assert_eq!(taken(ChecksumMode::Sampled), 10);
    assert_eq!(taken(ChecksumMode::Always), 160);
}
