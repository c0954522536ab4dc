//! Descriptors: what a ring slot carries beside its sequence number.
//!
//! A [`Submission`] goes from client to daemon, a [`Completion`] back. Both are 56 bytes of
//! fixed-width fields without padding, so that they travel as seven 64-bit words. Every request
//! has exactly one completion; a list too long for one arena chunk is sent as several submissions
//! with the same `request_id`, all but the last flagged [`flags::MORE`], and the completion answers
//! the last.

#![forbid(unsafe_code)]

use bytemuck::{Pod, Zeroable};

use crate::status::Status;

/// A descriptor as seven machine words, the unit rings move.
pub type Body = [u64; 7];

/// Operations a client can submit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Does nothing and completes: round-trip measurements and liveness probes.
    Nop = 1,
    /// Pins the cached blocks of a hash list and answers with a lease.
    Query = 2,
    /// Copies a lease's pages into the engine's KV memory.
    Load = 3,
    /// Copies blocks out of the engine's KV memory into the pool.
    Save = 4,
    /// Gives a lease back without loading.
    Release = 5,
    /// Extends a lease's time to live.
    Renew = 6,
    /// Cancels an unfinished request of the same session.
    Cancel = 7,
}

impl Op {
    /// The operation with this number.
    pub fn from_code(code: u8) -> Option<Op> {
        Some(match code {
            1 => Op::Nop,
            2 => Op::Query,
            3 => Op::Load,
            4 => Op::Save,
            5 => Op::Release,
            6 => Op::Renew,
            7 => Op::Cancel,
            _ => return None,
        })
    }

    /// Name in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Op::Nop => "nop",
            Op::Query => "query",
            Op::Load => "load",
            Op::Save => "save",
            Op::Release => "release",
            Op::Renew => "renew",
            Op::Cancel => "cancel",
        }
    }
}

/// Bits of [`Submission::flags`].
pub mod flags {
    /// More chunks of the same request follow.
    pub const MORE: u8 = 1;
    /// Block ids are given as runs `(start: u32, length: u32)` instead of single ids.
    pub const BLOCK_RUNS: u8 = 2;
    /// A query takes what is in the pool now, whatever is below it. In sessions of protocol 4 and
    /// later.
    pub const NOW: u8 = 4;
    /// A query is answered when the blocks that are below the pool have come up. In sessions of
    /// protocol 4 and later; not together with [`NOW`].
    pub const WAIT: u8 = 8;
    /// Every bit that has a meaning; a submission with another bit set is a protocol error.
    pub const KNOWN: u8 = MORE | BLOCK_RUNS | NOW | WAIT;
}

/// One request, or one chunk of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Submission {
    /// An [`Op`].
    pub op: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Cache group.
    pub group: u16,
    /// Registration the request speaks for; 0 where the operation needs none.
    pub registration: u32,
    /// Chosen by the client, not 0, unique among the session's unfinished requests.
    pub request_id: u64,
    /// Start of this chunk's payload, in bytes from the start of the client's arena.
    pub payload_offset: u32,
    /// Length of this chunk's payload in bytes.
    pub payload_bytes: u32,
    /// Hashes (query, save) or blocks (load) in this chunk.
    pub count: u32,
    /// Hashes or blocks in the whole request; the same in each of its chunks.
    pub total: u32,
    /// Query: the engine's request key. Load, release, renew: the lease. Cancel: the request id.
    /// Save: the event that it comes after, see [`Self::with_after`].
    pub arg0: u64,
    /// Query of a group other than 0: offset of the result in the daemon's result arena.
    /// Load: position in the lease of the first block, and half of [`Self::with_signal`]. Renew:
    /// new time to live in ms.
    pub arg1: u64,
    /// Query: time to live of the lease in ms, 0 for the daemon's default; of one that waits
    /// ([`flags::WAIT`]) the low half, and the high half is how long it waits at most, in ms, 0
    /// for as long as it takes. Load: the event that it comes after, see [`Self::with_after`], and
    /// half of [`Self::with_signal`]. Otherwise 0.
    pub arg2: u64,
}

/// Most steps of a load.
pub const MAX_LOAD_STEPS: u16 = 256;

/// How a load tells a GPU how far it is: by a 32-bit word in memory that client and daemon share,
/// whose value never falls. Once the first `n` of the steps are in place in all blocks it is
/// `base + n` at least; when the load has ended, however that was, `base + steps`.
///
/// Step `n`, counted from 1, has the group's segments from `(n - 1) * segments / steps` on, up to
/// `n * segments / steps`. A daemon may bring all of them in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSignal {
    /// Place of the word, in words from the start of the region.
    pub word: u16,
    /// Steps, from 1 to [`MAX_LOAD_STEPS`].
    pub steps: u16,
    /// What the word is at least from now on. `base + steps` does not overflow.
    pub base: u32,
}

/// The answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Completion {
    /// The request's [`Op`].
    pub op: u8,
    /// A [`Status`].
    pub status: u8,
    /// Query: a [`MissReason`] for the first position that is not a hit.
    pub reason: u16,
    /// Query: blocks that are hits; when it is loading, those that are in the pool so far. Load:
    /// blocks loaded. Save: blocks newly stored.
    pub count: u32,
    /// The request's id.
    pub request_id: u64,
    /// Query: the lease, or 0 when there was no hit.
    pub lease: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// Save: blocks already held or already on their way in: nothing was copied for them.
    pub skipped: u32,
    /// Save: blocks not stored for want of room or because a copy failed.
    pub dropped: u32,
    /// The value an error is about (a block id, a lease, a limit); query: the lease's ttl in ms, or
    /// how many blocks are still coming up when it is loading.
    pub arg0: u64,
    /// Nanoseconds between the daemon seeing the request and posting this.
    pub daemon_ns: u64,
}

const _: () = {
    assert!(size_of::<Submission>() == 56 && align_of::<Submission>() == 8);
    assert!(size_of::<Completion>() == 56 && align_of::<Completion>() == 8);
    assert!(std::mem::offset_of!(Submission, request_id) == 8);
    assert!(std::mem::offset_of!(Submission, arg0) == 32);
    assert!(std::mem::offset_of!(Completion, lease) == 16);
    assert!(std::mem::offset_of!(Completion, daemon_ns) == 48);
};

impl Submission {
    /// As ring words.
    #[inline]
    pub fn to_body(self) -> Body {
        bytemuck::cast(self)
    }

    /// From ring words; any words make a `Submission`, validation is [`Self::check`].
    #[inline]
    pub fn from_body(body: Body) -> Submission {
        bytemuck::cast(body)
    }

    /// A save or load whose copies begin only once an event has happened: the one at this place in
    /// the list of the session's events on the registration's device. The client has recorded it
    /// before it publishes the submission, and records it again only after the completion. Every
    /// chunk of a request names the same. In sessions of protocol 3 and later; 0 is no event.
    ///
    /// Other operations wait for no event and stay as they are.
    #[inline]
    pub fn with_after(mut self, event: Option<u32>) -> Submission {
        let word = event.map_or(0, |index| u64::from(index) + 1);
        match Op::from_code(self.op) {
            Some(Op::Save) => self.arg0 = word,
            Some(Op::Load) => self.arg2 = self.arg2 >> 32 << 32 | word,
            _ => {}
        }
        self
    }

    /// The event that a save or load comes after, see [`Self::with_after`].
    #[inline]
    pub fn after(&self) -> Option<u32> {
        let word = match Op::from_code(self.op) {
            Some(Op::Save) => self.arg0,
            Some(Op::Load) => self.arg2,
            _ => 0,
        };
        (word as u32).checked_sub(1)
    }

    /// A load that comes in steps and raises a word of the registration's signals with each: only
    /// where the daemon has said that it does so.
    ///
    /// Other operations stay as they are.
    #[inline]
    pub fn with_signal(mut self, signal: Option<LoadSignal>) -> Submission {
        if Op::from_code(self.op) == Some(Op::Load)
            && let Some(LoadSignal { word, steps, base }) = signal
        {
            self.arg1 = u64::from(base) << 32 | self.arg1 & 0xFFFF_FFFF;
            self.arg2 |= u64::from(word) << 48 | u64::from(steps) << 32;
        }
        self
    }

    /// The word that a load raises, see [`Self::with_signal`].
    #[inline]
    pub fn signal(&self) -> Option<LoadSignal> {
        let steps = (self.arg2 >> 32) as u16;
        (Op::from_code(self.op) == Some(Op::Load) && steps > 0).then_some(LoadSignal {
            word: (self.arg2 >> 48) as u16,
            steps,
            base: (self.arg1 >> 32) as u32,
        })
    }

    /// Load: position in the lease of the first block.
    #[inline]
    pub fn first(&self) -> u64 {
        match self.signal() {
            Some(_) => self.arg1 & 0xFFFF_FFFF,
            None => self.arg1,
        }
    }

    /// Checks the fields that need no state: operation, flags, id, payload bounds.
    ///
    /// # Errors
    /// Names the first field that cannot come from a correct client.
    #[inline]
    pub fn check(&self, arena_bytes: u32) -> Result<Op, DescriptorFault> {
        let op = Op::from_code(self.op).ok_or(DescriptorFault::Op(self.op))?;
        let reach = self.flags & (flags::NOW | flags::WAIT);
        let odd_reach = match op {
            Op::Query => reach == flags::NOW | flags::WAIT,
            _ => reach != 0,
        };
        if self.flags & !flags::KNOWN != 0 || odd_reach {
            return Err(DescriptorFault::Flags(self.flags));
        }
        if self.request_id == 0 {
            return Err(DescriptorFault::RequestId);
        }
        if self.count > self.total {
            return Err(DescriptorFault::Count {
                count: self.count,
                total: self.total,
            });
        }
        let end = u64::from(self.payload_offset) + u64::from(self.payload_bytes);
        if end > u64::from(arena_bytes) || !self.payload_offset.is_multiple_of(8) {
            return Err(DescriptorFault::Payload {
                offset: self.payload_offset,
                bytes: self.payload_bytes,
                arena_bytes,
            });
        }
        let listed = matches!(op, Op::Query | Op::Load | Op::Save);
        if !listed && (self.payload_bytes != 0 || self.flags != 0 || self.total != 0) {
            return Err(DescriptorFault::UnexpectedPayload(self.op));
        }
        Ok(op)
    }
}

impl Completion {
    /// As ring words.
    #[inline]
    pub fn to_body(self) -> Body {
        bytemuck::cast(self)
    }

    /// From ring words.
    #[inline]
    pub fn from_body(body: Body) -> Completion {
        bytemuck::cast(body)
    }

    /// A completion without result fields.
    #[inline]
    pub fn new(op: Op, request_id: u64, status: Status) -> Completion {
        Completion {
            op: op as u8,
            status: status as u8,
            request_id,
            ..Completion::zeroed()
        }
    }

    /// The status; a number from a newer daemon reads as [`Status::Internal`].
    pub fn status(&self) -> Status {
        Status::from_code(self.status).unwrap_or(Status::Internal)
    }
}

/// A submission that no correct client sends: the session is closed with this as the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorFault {
    /// Unknown operation number.
    #[error("unknown operation {0}")]
    Op(u8),
    /// Unknown flag bits.
    #[error("unknown flag bits in {0:#04x}")]
    Flags(u8),
    /// Request id 0.
    #[error("request id 0 is reserved")]
    RequestId,
    /// A chunk claims more items than its request.
    #[error("chunk of {count} items in a request of {total}")]
    Count {
        /// Items in the chunk.
        count: u32,
        /// Items in the request.
        total: u32,
    },
    /// The payload does not lie in the arena.
    #[error("payload of {bytes} bytes at {offset} does not lie in the arena of {arena_bytes}")]
    Payload {
        /// Offset in the arena.
        offset: u32,
        /// Length.
        bytes: u32,
        /// Arena size.
        arena_bytes: u32,
    },
    /// A payload, flag or list length on an operation that takes none.
    #[error("operation {0} takes no payload")]
    UnexpectedPayload(u8),
    /// The payload's length does not fit its count.
    #[error("payload of {bytes} bytes does not hold {count} items")]
    PayloadSize {
        /// Length.
        bytes: u32,
        /// Items announced.
        count: u32,
    },
    /// Chunks of one request contradict each other.
    #[error("chunk of request {request_id} contradicts its first chunk")]
    Chunk {
        /// The request.
        request_id: u64,
    },
    /// More unfinished requests than the completion ring has room for.
    #[error("more than {limit} unfinished requests")]
    Credit {
        /// Completion slots.
        limit: u32,
    },
    /// The id of a request that is still unfinished was used again.
    #[error("request id {request_id} is still in use")]
    RequestInUse {
        /// The request.
        request_id: u64,
    },
    /// The event to come after is none that the session has shared.
    #[error("event {index} of {count} that the session has shared for the registration's device")]
    Event {
        /// Place named by the submission.
        index: u32,
        /// Events that there are.
        count: u32,
    },
    /// A load's word lies outside the registration's signals, or its steps are none that there are.
    #[error("a load raises {signal:?}, of {bytes} bytes of signals and {segments} segments")]
    Signal {
        /// What the submission says.
        signal: LoadSignal,
        /// Bytes of the registration's signals.
        bytes: u64,
        /// Segments of the group.
        segments: usize,
    },
    /// The result lies outside the result arena.
    #[error("result at {offset} for {count} positions does not lie in the result arena")]
    Result {
        /// Offset asked for.
        offset: u64,
        /// Positions.
        count: u32,
    },
}

/// Why a queried position is not a hit. The numbers are part of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum MissReason {
    /// All positions are hits.
    None = 0,
    /// The block is not held: never saved, or evicted.
    Absent = 1,
    /// Some ranks' shards are in, others are not yet.
    Incomplete = 2,
    /// Its last copy is still running.
    InFlight = 3,
    /// A position after the first miss of a prefix query; not looked up.
    AfterMiss = 4,
    /// The lease table or pin limit was full.
    NoLease = 5,
    /// The daemon was away.
    Disconnected = 6,
}

impl MissReason {
    /// Every reason, in numeric order.
    pub const ALL: [MissReason; 7] = [
        MissReason::None,
        MissReason::Absent,
        MissReason::Incomplete,
        MissReason::InFlight,
        MissReason::AfterMiss,
        MissReason::NoLease,
        MissReason::Disconnected,
    ];

    /// Label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            MissReason::None => "none",
            MissReason::Absent => "absent",
            MissReason::Incomplete => "incomplete",
            MissReason::InFlight => "in_flight",
            MissReason::AfterMiss => "after_miss",
            MissReason::NoLease => "no_lease",
            MissReason::Disconnected => "disconnected",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nop() -> Submission {
        Submission {
            op: Op::Nop as u8,
            request_id: 7,
            ..Submission::zeroed()
        }
    }

    #[test]
    fn only_queries_reach_below_the_pool_and_in_one_way() {
        let query = |flags| Submission {
            op: Op::Query as u8,
            flags,
            ..nop()
        };
        assert_eq!(query(flags::NOW).check(0), Ok(Op::Query));
        assert_eq!(query(flags::WAIT | flags::MORE).check(0), Ok(Op::Query));
        let both = flags::NOW | flags::WAIT;
        assert_eq!(query(both).check(0), Err(DescriptorFault::Flags(both)));
        for op in [Op::Load, Op::Save] {
            let other = Submission {
                op: op as u8,
                ..query(flags::WAIT)
            };
            assert_eq!(other.check(0), Err(DescriptorFault::Flags(flags::WAIT)));
        }
        assert_eq!(query(16).check(0), Err(DescriptorFault::Flags(16)));
    }

    #[test]
    fn submission_bytes_are_golden() {
        let submission = Submission {
            op: 4,
            flags: 1,
            group: 0x0203,
            registration: 0x0405_0607,
            request_id: 0x1122_3344_5566_7788,
            payload_offset: 0x4000,
            payload_bytes: 0x20,
            count: 1,
            total: 2,
            arg0: 3,
            arg1: 4,
            arg2: 5,
        };
        let bytes: [u8; 56] = bytemuck::cast(submission);
        assert_eq!(bytes[..8], [4, 1, 3, 2, 7, 6, 5, 4]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(bytes[16..24], [0, 0x40, 0, 0, 0x20, 0, 0, 0]);
        assert_eq!(bytes[24..32], [1, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(Submission::from_body(submission.to_body()), submission);
    }

    #[test]
    fn a_load_names_the_word_that_it_raises_beside_its_place_and_its_event() {
        let load = Submission {
            op: Op::Load as u8,
            arg0: 7,
            arg1: 0xFFFF_FFF0,
            ..nop()
        };
        let signal = LoadSignal {
            word: 0x1234,
            steps: 256,
            base: 0x8000_0001,
        };
        for event in [None, Some(255)] {
            let plain = load.with_after(event);
            assert_eq!((plain.signal(), plain.first()), (None, 0xFFFF_FFF0));
            for both in [
                plain.with_signal(Some(signal)),
                load.with_signal(Some(signal)).with_after(event),
            ] {
                assert_eq!(both.signal(), Some(signal));
                assert_eq!((both.after(), both.first()), (event, 0xFFFF_FFF0));
            }
        }
        let golden = load.with_after(Some(4)).with_signal(Some(signal));
        assert_eq!(golden.arg1, 0x8000_0001_FFFF_FFF0);
        assert_eq!(golden.arg2, 0x1234_0100_0000_0005);
        let save = Submission {
            op: Op::Save as u8,
            ..load
        };
        assert_eq!(save.with_signal(Some(signal)), save);
    }

    #[test]
    fn completion_round_trips_and_reads_unknown_status_as_internal() {
        let mut completion = Completion::new(Op::Load, 9, Status::LeaseExpired);
        completion.count = 3;
        assert_eq!(Completion::from_body(completion.to_body()), completion);
        assert_eq!(completion.status(), Status::LeaseExpired);
        completion.status = 250;
        assert_eq!(completion.status(), Status::Internal);
    }

    #[test]
    fn every_bad_field_is_refused_by_name() {
        assert_eq!(nop().check(4096), Ok(Op::Nop));
        assert_eq!(
            Submission { op: 99, ..nop() }.check(4096),
            Err(DescriptorFault::Op(99))
        );
        assert_eq!(
            Submission { flags: 8, ..nop() }.check(4096),
            Err(DescriptorFault::Flags(8))
        );
        assert_eq!(
            Submission {
                request_id: 0,
                ..nop()
            }
            .check(4096),
            Err(DescriptorFault::RequestId)
        );
        assert_eq!(
            Submission {
                payload_bytes: 8,
                ..nop()
            }
            .check(4096),
            Err(DescriptorFault::UnexpectedPayload(1))
        );
        let save = Submission {
            op: Op::Save as u8,
            ..nop()
        };
        assert!(
            Submission {
                payload_offset: u32::MAX - 7,
                payload_bytes: 64,
                ..save
            }
            .check(u32::MAX)
            .is_err()
        );
        assert!(
            Submission {
                count: 2,
                total: 1,
                ..save
            }
            .check(4096)
            .is_err()
        );
        assert!(
            Submission {
                payload_offset: 4,
                ..save
            }
            .check(4096)
            .is_err()
        );
    }

    #[test]
    fn a_save_and_a_load_name_the_event_that_they_come_after_and_nothing_else_does() {
        for code in 1..=7 {
            let plain = Submission {
                op: code,
                arg0: 0,
                ..nop()
            };
            let op = Op::from_code(code).unwrap();
            let listed = matches!(op, Op::Save | Op::Load);
            for event in [None, Some(0), Some(255)] {
                let ordered = plain.with_after(event);
                assert_eq!(ordered.after(), event.filter(|_| listed), "{op:?}");
            }
            let golden = plain.with_after(Some(4));
            let expected = match op {
                Op::Save => (5, 0),
                Op::Load => (0, 5),
                _ => (0, 0),
            };
            assert_eq!((golden.arg0, golden.arg2), expected, "{op:?}");
        }
        // A lease is no event.
        let load = Submission {
            op: Op::Load as u8,
            arg0: 77,
            ..nop()
        };
        assert_eq!(load.after(), None);
    }

    #[test]
    fn operations_round_trip() {
        for code in 0..=255u8 {
            if let Some(op) = Op::from_code(code) {
                assert_eq!(op as u8, code);
            }
        }
        for (number, reason) in MissReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
        }
    }
}
