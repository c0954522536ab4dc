//! The bytes of a shard's file, and what is refused.

use super::*;
use crate::block::BlockKey;

fn geometry() -> Geometry {
    Geometry::for_file(1 << 30, 64 << 20)
}

fn superblock() -> Superblock {
    Superblock {
        sequence: 3,
        created_unix_s: 1_700_000_000,
        geometry: geometry(),
        set: [0x11; 16],
        shard: [0x22; 16],
        node: "node-a".to_owned(),
        members: vec![[0x22; 16], [0x33; 16]],
    }
}

fn record() -> Record {
    Record {
        scope: [0xa0; 32],
        hash: [0xb0; 32],
        write_id: 0x0102_0304,
        checksum: 0x1122_3344_5566_7788,
        group: 9,
        page: 1,
        pages: 2,
        offset: 8192,
        bytes: 5000,
    }
}

fn place() -> Place {
    Place {
        shard: [0x22; 16],
        segment: 4,
        generation: 6,
    }
}

fn chunk() -> Chunk {
    Chunk {
        place: place(),
        slot: 1,
        records: vec![record()],
    }
}

/// Every change of these bytes is a change of the layout, whose version must be raised with it.
#[test]
fn the_bytes_of_version_1_stay_as_they_are() {
    assert_eq!(LAYOUT_VERSION, 1);
    let bytes = superblock().encode();
    assert_eq!(&bytes[..8], b"PEGASSD\0");
    assert_eq!(bytes[8..12], 1u32.to_le_bytes(), "version");
    assert_eq!(bytes[12..16], (64u32 << 20).to_le_bytes(), "segment");
    assert_eq!(bytes[16..20], (512u32 << 10).to_le_bytes(), "table");
    assert_eq!(bytes[20..24], 15u32.to_le_bytes(), "segments");
    assert_eq!(bytes[32..40], 3u64.to_le_bytes(), "sequence");
    assert_eq!(bytes[48..64], [0x11; 16], "set");
    assert_eq!(bytes[64..80], [0x22; 16], "shard");
    assert_eq!(&bytes[80..86], b"node-a");
    assert_eq!(bytes[152..168], [0x22; 16], "members");
    let bytes = chunk().encode();
    assert_eq!(&bytes[..8], b"PEGATBL\0");
    assert_eq!(bytes[16..32], [0x22; 16], "shard");
    assert_eq!(bytes[32..40], 6u64.to_le_bytes(), "generation");
    assert_eq!(
        bytes[40..52],
        [4, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        "segment, slot, count"
    );
    assert_eq!(bytes[64..96], [0xa0; 32], "scope");
    assert_eq!(bytes[96..128], [0xb0; 32], "hash");
    assert_eq!(bytes[128..136], 0x0102_0304u64.to_le_bytes(), "write id");
    assert_eq!(bytes[144..148], 9u32.to_le_bytes(), "group");
    assert_eq!(bytes[148..152], [1, 0, 2, 0], "page of pages");
    assert_eq!(bytes[152..156], 8192u32.to_le_bytes(), "offset");
    assert_eq!(bytes[156..160], 5000u32.to_le_bytes(), "length");
    // Checksums by another way than the code takes.
    let mut bare = superblock().encode();
    let sum = u64::from_le_bytes(bare[24..32].try_into().expect("8 bytes"));
    bare[24..32].fill(0);
    assert_eq!(sum, twox_hash::XxHash3_64::oneshot(&bare[..152 + 64 * 16]));
    assert_eq!(
        geometry().chunk_offset(1, 2),
        (1 << 20) + (64 << 20) + (512 << 10) + 8192
    );
    assert_eq!(
        geometry().data_offset(0, 4096),
        (1 << 20) + (512 << 10) + 4096
    );
}

#[test]
fn what_is_written_is_what_is_read() {
    assert_eq!(Superblock::decode(&superblock().encode()), Ok(superblock()));
    let read = Chunk::decode(&chunk().encode(), [0x22; 16], 4, 1, &geometry());
    assert_eq!(read, Ok(chunk()));
    assert_eq!(
        record().key(),
        BlockKey {
            scope: [0xa0; 32],
            group: 9,
            hash: [0xb0; 32]
        }
    );
}

#[test]
fn every_flipped_bit_of_a_chunk_is_noticed() {
    let good = chunk().encode();
    for at in (0..CHUNK_BYTES).filter(|at| *at < 200 || at % 97 == 0) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        let read = Chunk::decode(&bytes, [0x22; 16], 4, 1, &geometry());
        assert_eq!(read, Err(ChunkError::Damaged), "byte {at}");
    }
    let half = [&good[..2048], &[0; 2048][..]].concat();
    // Only the part with records was torn off: nothing is missing then.
    assert_eq!(
        Chunk::decode(&half, [0x22; 16], 4, 1, &geometry()),
        Ok(chunk())
    );
    let other = [&[0; 2048][..], &good[2048..]].concat();
    let read = Chunk::decode(&other, [0x22; 16], 4, 1, &geometry());
    assert_eq!(
        read,
        Err(ChunkError::Blank),
        "its second half was blank before, too"
    );
    let torn = [&good[..512], &[7; 3584][..]].concat();
    let read = Chunk::decode(&torn, [0x22; 16], 4, 1, &geometry());
    assert_eq!(read, Err(ChunkError::Damaged));
}

#[test]
fn a_chunk_of_another_shard_segment_or_slot_is_not_taken_for_this_one() {
    let bytes = chunk().encode();
    for (shard, segment, slot) in [([0x23; 16], 4, 1), ([0x22; 16], 5, 1), ([0x22; 16], 4, 0)] {
        let read = Chunk::decode(&bytes, shard, segment, slot, &geometry());
        assert_eq!(read, Err(ChunkError::Foreign));
    }
    let blank = [0; CHUNK_BYTES];
    let read = Chunk::decode(&blank, [0x22; 16], 4, 1, &geometry());
    assert_eq!(read, Err(ChunkError::Blank));
}

#[test]
fn a_checksum_fits_one_identity_one_place_and_one_generation() {
    let bytes = [1, 2, 3];
    let sum = Record::checksum_of(record().seed(&place()), &bytes);
    let others: [fn(&mut Record); 8] = [
        |record| record.scope[31] ^= 1,
        |record| record.hash[0] ^= 1,
        |record| record.group ^= 1,
        |record| record.page ^= 1,
        |record| record.pages ^= 1,
        |record| record.write_id ^= 1,
        |record| record.offset ^= 4096,
        |record| record.bytes ^= 1,
    ];
    for (index, change) in others.iter().enumerate() {
        let mut other = record();
        change(&mut other);
        assert_ne!(
            Record::checksum_of(other.seed(&place()), &bytes),
            sum,
            "field {index}"
        );
    }
    let places: [fn(&mut Place); 3] = [
        |place| place.shard[0] ^= 1,
        |place| place.segment ^= 1,
        |place| place.generation ^= 1,
    ];
    for change in places {
        let mut other = place();
        change(&mut other);
        assert_ne!(Record::checksum_of(record().seed(&other), &bytes), sum);
    }
    let later = Record {
        checksum: 1,
        ..record()
    };
    assert_eq!(
        later.seed(&place()),
        record().seed(&place()),
        "it does not cover itself"
    );
}

#[test]
fn of_two_superblocks_the_later_one_counts_and_one_is_enough() {
    let (older, newer) = (superblock(), superblock());
    let newer = Superblock {
        sequence: older.sequence + 1,
        ..newer
    };
    let slots = |a: &[u8], b: &[u8]| [a, b].concat();
    let (a, b) = (older.encode(), newer.encode());
    assert_eq!(Superblock::choose(&slots(&b, &a)), Ok(newer.clone()));
    assert_ne!(older.offset(), newer.offset());
    let mut torn = b.clone();
    torn[60] ^= 1;
    assert_eq!(Superblock::choose(&slots(&torn, &a)), Ok(older));
    assert_eq!(
        Superblock::choose(&slots(&torn, &torn)),
        Err(SuperblockError::Damaged)
    );
    assert_eq!(
        Superblock::choose(&[0; 8192]),
        Err(SuperblockError::NoMagic)
    );
    assert_eq!(Superblock::choose(b"short"), Err(SuperblockError::NoMagic));
    let mut other = b.clone();
    other[8] = 7;
    assert_eq!(
        Superblock::choose(&slots(&other, &other)),
        Err(SuperblockError::Version(7))
    );
}

#[test]
fn segments_and_tables_do_not_overlap_and_end_with_the_file() {
    for (file_bytes, segment_bytes) in [(1 << 30, 64 << 20), (9 << 20, 64 << 10), (20 << 30, 1)] {
        let geometry = Geometry::for_file(file_bytes, segment_bytes);
        assert!(geometry.is_valid(), "{geometry:?}");
        assert!(geometry.file_bytes() <= file_bytes);
        assert_eq!(
            geometry.segments_in(geometry.file_bytes()),
            geometry.segments
        );
        assert_eq!(
            geometry.segments_in(geometry.file_bytes() - 1),
            geometry.segments - 1
        );
        let mut end = 1 << 20;
        for segment in 0..geometry.segments.min(100) {
            assert_eq!(geometry.chunk_offset(segment, 0), end);
            let last = geometry.chunk_offset(segment, geometry.slots() - 1) + 4096;
            assert_eq!(geometry.data_offset(segment, 0), last);
            end = last + u64::from(geometry.segment_bytes);
        }
    }
    assert!(
        !Geometry::for_file(1 << 20, 1 << 20).is_valid(),
        "too small"
    );
}
