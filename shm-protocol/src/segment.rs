//! The two segments of a session: where everything lies in them.
//!
//! *Client-to-daemon* (C2D): header, doorbell and progress words of the client, submission slots,
//! payload arena. Created and written by the client, mapped read-only by the daemon.
//! *Daemon-to-client* (D2C): the same of the daemon, completion slots, result arena. Created and
//! written by the daemon, mapped read-only by the client. So each byte of shared memory has one
//! writer, and the MMU enforces it.
//!
//! ```text
//! 0     header      magic, version, feature bits, boot id, table of offsets
//! 256   sleep_epoch u32   0: awake; else asleep, with this epoch (see `bell`)
//! 384   consumed    u64   how far this side has read the other side's ring
//! 512   state       u32   D2C: a `SessionState`; C2D: 0
//! 4096  slots       capacity × 64 bytes
//! …     arena       page-aligned, chunks of `payload::CHUNK_BYTES`
//! ```

#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

use crate::BootId;
use crate::payload::CHUNK_BYTES;

/// First eight bytes of a client-to-daemon segment.
pub const C2D_MAGIC: u64 = u64::from_le_bytes(*b"PGFLOWC2");
/// First eight bytes of a daemon-to-client segment.
pub const D2C_MAGIC: u64 = u64::from_le_bytes(*b"PGFLOWD2");
/// Layout version of both segments; another major version is refused.
pub const LAYOUT_MAJOR: u16 = 1;
/// Additions that an older reader can ignore raise this.
pub const LAYOUT_MINOR: u16 = 0;

/// Offset of the owner's `sleep_epoch: AtomicU32`.
pub const SLEEP_EPOCH_OFFSET: usize = 256;
/// Offset of the owner's `consumed: AtomicU64`.
pub const CONSUMED_OFFSET: usize = 384;
/// Offset of the `state: AtomicU32` (D2C only).
pub const STATE_OFFSET: usize = 512;
/// Offset of the first ring slot.
pub const SLOTS_OFFSET: usize = 4096;
/// Bytes of one ring slot.
pub const SLOT_BYTES: usize = 64;

/// Smallest ring.
pub const MIN_RING_SLOTS: u32 = 16;
/// Largest ring.
pub const MAX_RING_SLOTS: u32 = 1 << 15;
/// Most chunks an arena can have (1 GiB).
pub const MAX_ARENA_CHUNKS: u32 = 1 << 16;

/// Header of either segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SegmentHeader {
    /// [`C2D_MAGIC`] or [`D2C_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_MAJOR`] of the writer.
    pub layout_major: u16,
    /// [`LAYOUT_MINOR`] of the writer.
    pub layout_minor: u16,
    /// Size of this struct in the writer's version.
    pub header_bytes: u32,
    /// Size of the whole segment.
    pub total_bytes: u64,
    /// Feature bits; none are defined yet.
    pub features: u64,
    /// D2C: the daemon's boot id. C2D: zero.
    pub boot_id: BootId,
    /// D2C: the session's id. C2D: zero.
    pub session_id: u64,
    /// Offset of slot 0.
    pub slots_offset: u64,
    /// Slots of the ring this side writes; a power of two.
    pub slots: u32,
    /// Distance of two slots in bytes.
    pub slot_stride: u32,
    /// Offset of arena chunk 0.
    pub arena_offset: u64,
    /// Chunks in the arena.
    pub arena_chunks: u32,
    /// Bytes of one chunk.
    pub arena_chunk_bytes: u32,
}

const _: () = {
    assert!(size_of::<SegmentHeader>() == 88);
    assert!(size_of::<SegmentHeader>() <= SLEEP_EPOCH_OFFSET);
    assert!(std::mem::offset_of!(SegmentHeader, boot_id) == 32);
    assert!(std::mem::offset_of!(SegmentHeader, slots_offset) == 56);
};

/// Sizes from which a segment's layout follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentShape {
    /// Ring slots; a power of two.
    pub slots: u32,
    /// Arena chunks.
    pub arena_chunks: u32,
}

impl SegmentShape {
    /// The client's default: 256 submissions and an arena of 4 MiB.
    ///
    /// A ring is passed through from end to end, so all of it competes for the first-level cache:
    /// the two rings of a session fit it at 16 KiB each, and do not at 64.
    pub const DEFAULT_C2D: SegmentShape = SegmentShape {
        slots: 256,
        arena_chunks: 256,
    };
    /// The daemon's default: 256 completions and a result arena of 256 KiB.
    pub const DEFAULT_D2C: SegmentShape = SegmentShape {
        slots: 256,
        arena_chunks: 16,
    };

    /// Checks the limits.
    ///
    /// # Errors
    /// Names the size that is out of range.
    pub fn check(&self) -> Result<(), SegmentFault> {
        if !self.slots.is_power_of_two() || !(MIN_RING_SLOTS..=MAX_RING_SLOTS).contains(&self.slots)
        {
            return Err(SegmentFault::Slots(self.slots));
        }
        if self.arena_chunks == 0 || self.arena_chunks > MAX_ARENA_CHUNKS {
            return Err(SegmentFault::ArenaChunks(self.arena_chunks));
        }
        Ok(())
    }

    /// Offset of the arena.
    pub fn arena_offset(&self) -> usize {
        (SLOTS_OFFSET + self.slots as usize * SLOT_BYTES).next_multiple_of(4096)
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena_chunks as usize * CHUNK_BYTES
    }

    /// Bytes of the whole segment.
    pub fn total_bytes(&self) -> usize {
        self.arena_offset() + self.arena_bytes()
    }

    /// The header a writer puts at offset 0.
    pub fn header(&self, magic: u64, boot_id: BootId, session_id: u64) -> SegmentHeader {
        SegmentHeader {
            magic,
            layout_major: LAYOUT_MAJOR,
            layout_minor: LAYOUT_MINOR,
            header_bytes: size_of::<SegmentHeader>() as u32,
            total_bytes: self.total_bytes() as u64,
            features: 0,
            boot_id,
            session_id,
            slots_offset: SLOTS_OFFSET as u64,
            slots: self.slots,
            slot_stride: SLOT_BYTES as u32,
            arena_offset: self.arena_offset() as u64,
            arena_chunks: self.arena_chunks,
            arena_chunk_bytes: CHUNK_BYTES as u32,
        }
    }
}

impl SegmentHeader {
    /// Validates a private copy of a peer's header against the mapped size and yields its shape.
    ///
    /// # Errors
    /// Names the field, what was found and what this side expects.
    pub fn check(&self, magic: u64, mapped_bytes: usize) -> Result<SegmentShape, SegmentFault> {
        if self.magic != magic {
            return Err(SegmentFault::Magic {
                found: self.magic,
                expected: magic,
            });
        }
        if self.layout_major != LAYOUT_MAJOR {
            return Err(SegmentFault::Version {
                found: self.layout_major,
                expected: LAYOUT_MAJOR,
            });
        }
        let shape = SegmentShape {
            slots: self.slots,
            arena_chunks: self.arena_chunks,
        };
        shape.check()?;
        let expected = shape.header(magic, self.boot_id, self.session_id);
        let same = self.total_bytes == expected.total_bytes
            && self.slots_offset == expected.slots_offset
            && self.slot_stride == expected.slot_stride
            && self.arena_offset == expected.arena_offset
            && self.arena_chunk_bytes == expected.arena_chunk_bytes;
        if !same || self.total_bytes != mapped_bytes as u64 {
            return Err(SegmentFault::Geometry {
                announced: self.total_bytes,
                mapped: mapped_bytes as u64,
                expected: expected.total_bytes,
            });
        }
        Ok(shape)
    }
}

/// Life of a session as the daemon shows it in the D2C segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SessionState {
    /// Served.
    Active = 1,
    /// The daemon is shutting down: it finishes what it has and takes nothing new.
    Draining = 2,
    /// The session is over; the reason came over the socket.
    Closed = 3,
}

impl SessionState {
    /// The state with this number; an unknown one reads as closed.
    pub fn from_code(code: u32) -> SessionState {
        match code {
            1 => SessionState::Active,
            2 => SessionState::Draining,
            _ => SessionState::Closed,
        }
    }
}

/// A segment that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentFault {
    /// Not a segment of this kind.
    #[error("segment magic {found:#018x}, expected {expected:#018x}")]
    Magic {
        /// In the segment.
        found: u64,
        /// Of this kind of segment.
        expected: u64,
    },
    /// Another major version.
    #[error("segment layout version {found}, this side speaks {expected}: upgrade the older one")]
    Version {
        /// In the segment.
        found: u16,
        /// Ours.
        expected: u16,
    },
    /// Ring size out of range.
    #[error("{0} ring slots: must be a power of two from {MIN_RING_SLOTS} to {MAX_RING_SLOTS}")]
    Slots(u32),
    /// Arena size out of range.
    #[error("{0} arena chunks of 16 KiB: must be 1 to {MAX_ARENA_CHUNKS}")]
    ArenaChunks(u32),
    /// Offsets and sizes contradict each other.
    #[error("segment announces {announced} bytes, {mapped} are mapped, its shape needs {expected}")]
    Geometry {
        /// In the header.
        announced: u64,
        /// Actually mapped.
        mapped: u64,
        /// Computed from slots and chunks.
        expected: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_bytes_are_golden() {
        let shape = SegmentShape {
            slots: 16,
            arena_chunks: 2,
        };
        let header = shape.header(C2D_MAGIC, [7; 16], 9);
        let bytes: [u8; 88] = bytemuck::cast(header);
        assert_eq!(&bytes[..8], b"PGFLOWC2");
        assert_eq!(bytes[8..16], [1, 0, 0, 0, 88, 0, 0, 0]);
        assert_eq!(bytes[16..24], ((8192 + 32768) as u64).to_le_bytes());
        assert_eq!(bytes[32..48], [7; 16]);
        assert_eq!(bytes[64..72], [16, 0, 0, 0, 64, 0, 0, 0]);
        assert_eq!(header.check(C2D_MAGIC, shape.total_bytes()), Ok(shape));
    }

    #[test]
    fn every_contradiction_is_refused() {
        let shape = SegmentShape::DEFAULT_C2D;
        let good = shape.header(C2D_MAGIC, [0; 16], 0);
        let size = shape.total_bytes();
        let bad = [
            SegmentHeader {
                magic: D2C_MAGIC,
                ..good
            },
            SegmentHeader {
                layout_major: 2,
                ..good
            },
            SegmentHeader {
                slots: 1000,
                ..good
            },
            SegmentHeader { slots: 0, ..good },
            SegmentHeader {
                arena_chunks: 0,
                ..good
            },
            SegmentHeader {
                arena_chunks: u32::MAX,
                ..good
            },
            SegmentHeader {
                slot_stride: 0,
                ..good
            },
            SegmentHeader {
                slots_offset: 0,
                ..good
            },
            SegmentHeader {
                arena_offset: u64::MAX,
                ..good
            },
            SegmentHeader {
                total_bytes: 1,
                ..good
            },
        ];
        for header in bad {
            assert!(header.check(C2D_MAGIC, size).is_err(), "{header:?}");
        }
        assert!(good.check(C2D_MAGIC, size - 1).is_err());
    }
}
