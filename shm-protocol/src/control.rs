//! Messages of the session socket.
//!
//! The socket is `SOCK_SEQPACKET`: one message is one packet, a JSON object with a `type`, and file
//! descriptors travel beside it. Nothing here is on a hot path; JSON keeps the two sides compatible
//! when one of them knows more fields than the other.
//!
//! ```text
//! client                                daemon
//! Hello        + [C2D memfd]      →
//!                                 ←     Welcome + [D2C memfd, eventfd to ring the daemon,
//!                                                  read end of the client's bell, index file]
//!                                       or Refused, then end of file
//! AddRegion    + [KV memfd]       →
//!                                 ←     Done or Failed
//! Register                        →
//!                                 ←     Registered or Failed
//!                                 ←     Ready, once every rank of the instance has registered
//!                                 ←     Draining (from protocol 2), when a stop begins
//! …                                     Closing{reason}, then end of file
//! ```
//!
//! GPU memory, from protocol 3 on:
//!
//! ```text
//! AddDeviceRegion + [descriptors] →
//!                                 ←     Done or Failed
//! AddDeviceChunks + [descriptors] →     as often as the region has 64 chunks more
//!                                 ←     Done (the region is there after the last) or Failed
//! AddEvents                       →
//!                                 ←     Done or Failed
//!                                 ←     DeviceDown, when a GPU can no longer be used
//!                                 ←     DeviceUp, when it can again
//! ```
//!
//! Each request of the client carries a `seq`, and its answer repeats it. The end of the socket is
//! the end of the session, for either side.
//!
//! A version of the protocol is frozen once it was released: members may be added to its messages
//! (unknown ones are ignored), words may not. A new word belongs to a new version and is said only
//! in sessions that negotiated it (`docs/decisions/0016-protocol-versions.md`).

#![forbid(unsafe_code)]

mod device;

pub use device::{
    DeviceHandle, DeviceUuid, IpcHandle, MAX_DEVICE_EVENTS, MAX_MESSAGE_CHUNKS, MAX_REGION_CHUNKS,
};

use serde::{Deserialize, Serialize};

use crate::namespace::NamespaceSpec;
use crate::status::Status;

/// Oldest protocol version this side speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol version this side speaks.
pub const PROTOCOL_MAX: u32 = 4;
/// First version with [`DaemonMessage::Draining`].
pub const PROTOCOL_DRAINING: u32 = 2;
/// First version with device memory, events, replicated groups, and the messages about devices.
pub const PROTOCOL_DEVICES: u32 = 3;
/// First version with queries that say what they do about blocks below the pool
/// ([`crate::desc::flags::NOW`], [`crate::desc::flags::WAIT`]).
pub const PROTOCOL_TIERS: u32 = 4;
/// Longest message in bytes.
pub const MAX_MESSAGE_BYTES: usize = 160 * 1024;
/// Most descriptors beside one message.
pub const MAX_MESSAGE_FDS: usize = MAX_MESSAGE_CHUNKS;
/// Longest instance or client name in bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// Most ranks of an instance: consumers of a lease are a 128-bit set.
pub const MAX_WORLD_SIZE: u32 = 128;
/// Most cache groups of an instance.
pub const MAX_GROUPS: usize = 64;
/// Most segments in one group of one rank.
pub const MAX_SEGMENTS: usize = 1024;

/// From client to daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// First message, with the C2D memfd.
    Hello(Hello),
    /// Shares a KV memory region; one memfd travels along.
    AddRegion {
        /// Request number.
        seq: u64,
        /// Chosen by the client, unique in the session.
        region: u32,
        /// Size in bytes.
        bytes: u64,
    },
    /// Shares device memory; its number is one of the regions'. From [`PROTOCOL_DEVICES`] on.
    AddDeviceRegion {
        /// Request number.
        seq: u64,
        /// Chosen by the client, unique in the session, memfds' regions included.
        region: u32,
        /// Size in bytes.
        bytes: u64,
        /// Where it lies.
        device: DeviceUuid,
        /// How the daemon maps it.
        handle: DeviceHandle,
    },
    /// The next descriptors of a region of [`DeviceHandle::Vmm`], up to [`MAX_MESSAGE_CHUNKS`]. The
    /// region is there once all have come. From [`PROTOCOL_DEVICES`] on.
    AddDeviceChunks {
        /// Request number.
        seq: u64,
        /// The region.
        region: u32,
    },
    /// Shares interprocess events, which order copies after the engine's work on a device, behind
    /// those that were shared before. Some have to be there before the first registration that has
    /// memory there. Descriptors name them by their place in the list. From [`PROTOCOL_DEVICES`]
    /// on.
    AddEvents {
        /// Request number.
        seq: u64,
        /// The device that all of them belong to.
        device: DeviceUuid,
        /// At most [`MAX_DEVICE_EVENTS`].
        handles: Vec<IpcHandle>,
    },
    /// Takes a region back; refused while a registration uses it. A region of device memory whose
    /// chunks have not all come may be taken back, too.
    RemoveRegion {
        /// Request number.
        seq: u64,
        /// The region.
        region: u32,
    },
    /// Registers a rank's KV memory, or a scheduler.
    Register {
        /// Request number.
        seq: u64,
        /// What to register.
        registration: Box<RegisterSpec>,
        /// The region of [`ClientMessage::AddRegion`] whose words its loads raise, see
        /// [`LoadSignal`](crate::desc::LoadSignal); none where it has no GPU memory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signals: Option<u32>,
    },
    /// Ends a registration: running copies drain first.
    Unregister {
        /// Request number.
        seq: u64,
        /// The registration.
        registration: u32,
    },
}

/// Opening of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version the client speaks.
    pub protocol_min: u32,
    /// Newest version the client speaks.
    pub protocol_max: u32,
    /// Version of the client library, for logs.
    pub client_version: String,
    /// Name of the process in tables, such as `vllm-worker-0`.
    pub client_name: String,
    /// Bytes of the C2D memfd that travels along.
    pub c2d_bytes: u64,
    /// Completion slots the client wants; a power of two.
    pub completion_slots: u32,
}

/// One rank (or the scheduler) of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterSpec {
    /// Name of the engine replica; its processes find each other by it.
    pub instance: String,
    /// What makes the blocks' bytes comparable.
    pub namespace: NamespaceSpec,
    /// Worker ranks of the instance.
    pub world_size: u32,
    /// This worker's rank, or `None` for a scheduler, which has no KV memory.
    pub rank: Option<u32>,
    /// Save only, or also query and load.
    pub mode: Mode,
    /// KV memory, one entry per cache group; empty for a scheduler.
    pub groups: Vec<GroupLayout>,
}

/// What an instance does with the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Saves, queries and loads.
    ReadWrite,
    /// Only saves: a prefill engine.
    SaveOnly,
}

/// Where the blocks of one group lie in the worker's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupLayout {
    /// Cache group, 0 for full attention.
    pub group: u16,
    /// Block ids are `0..num_blocks`.
    pub num_blocks: u32,
    /// Parts of a block in packing (layer) order.
    pub segments: Vec<SegmentLayout>,
    /// All ranks hold the same bytes (MLA): they are stored once and each rank loads them. The same
    /// for all ranks of an instance. From [`PROTOCOL_DEVICES`] on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replicated: bool,
}

/// One strided array: block `b` has `bytes` bytes at `base + b * block_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentLayout {
    /// What `base` counts from.
    pub memory: MemoryRef,
    /// Byte offset in the region, or virtual address in the client's process.
    pub base: u64,
    /// Bytes from one block to the next.
    pub block_stride: u64,
    /// Bytes of one block.
    pub bytes: u64,
}

/// Kinds of KV memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryRef {
    /// Memory that the client shared with [`ClientMessage::AddRegion`] or
    /// [`ClientMessage::AddDeviceRegion`].
    Region(u32),
    /// Plain memory of the client's process, reached with `process_vm_readv` and
    /// `process_vm_writev`.
    Process,
}

/// From daemon to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DaemonMessage {
    /// Answer to [`Hello`], with four descriptors: D2C memfd, the eventfd that rings the daemon,
    /// the read end of the pipe that the daemon rings the client with, and the index file
    /// (read-only).
    Welcome(Welcome),
    /// The session does not come about; the socket ends after it.
    Refused {
        /// Kind of refusal.
        status: Status,
        /// What, with which value, and the way out.
        message: String,
    },
    /// A request without result succeeded.
    Done {
        /// The request's number.
        seq: u64,
    },
    /// A request failed; nothing of it took effect.
    Failed {
        /// The request's number.
        seq: u64,
        /// Kind of failure.
        status: Status,
        /// What, with which value, and the way out.
        message: String,
    },
    /// A registration was accepted.
    Registered {
        /// The request's number.
        seq: u64,
        /// Its id in this session's descriptors.
        registration: u32,
        /// Its loads can raise the words of the region that it named for that.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        signals: bool,
    },
    /// Every rank of the registration's instance is there.
    Ready {
        /// The registration.
        registration: u32,
        /// Key of the instance's blocks in the index.
        namespace: u32,
    },
    /// A rank of the instance left: queries miss until it is back.
    NotReady {
        /// The registration.
        registration: u32,
    },
    /// The daemon has been told to stop: it completes what it has taken and takes nothing new. A
    /// successor may come up soon. From [`PROTOCOL_DRAINING`] on.
    Draining {
        /// It gives what it has taken this long at most, in milliseconds.
        limit_ms: u64,
    },
    /// A GPU failed: copies of its memory end with an error, and so do the session's registrations
    /// and regions that lie on it, and its events. Told to the sessions that had memory or events
    /// there. From [`PROTOCOL_DEVICES`] on.
    DeviceDown {
        /// The device.
        device: DeviceUuid,
        /// What happened, and what the operator can do.
        message: String,
    },
    /// The GPU works again: share and register anew. From [`PROTOCOL_DEVICES`] on.
    DeviceUp {
        /// The device.
        device: DeviceUuid,
    },
    /// The session ends and answers nothing more; the socket's end follows as soon as no copy
    /// touches the client's memory any more.
    Closing {
        /// Kind of reason.
        status: Status,
        /// The reason in words.
        message: String,
    },
}

/// A session came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Version both sides speak from here on.
    pub protocol: u32,
    /// Version of the daemon, for logs.
    pub daemon_version: String,
    /// The daemon's boot id in hex.
    pub boot_id: String,
    /// Name of the node.
    pub node: String,
    /// Session id, for logs and tables.
    pub session: u64,
    /// The daemon's process id: a client with `ptrace_scope` 1 names it in `PR_SET_PTRACER`.
    pub daemon_pid: u32,
    /// Bytes of the D2C memfd.
    pub d2c_bytes: u64,
    /// Bytes of the index file.
    pub index_bytes: u64,
    /// Default time to live of a lease in milliseconds.
    pub lease_ttl_ms: u64,
}

/// The version that both sides speak, if any: the newest common one.
pub fn negotiate(client_min: u32, client_max: u32) -> Option<u32> {
    newest_common((client_min, client_max), (PROTOCOL_MIN, PROTOCOL_MAX))
}

/// The newest version that lies in both ranges; an empty range has none in common with any.
fn newest_common(client: (u32, u32), daemon: (u32, u32)) -> Option<u32> {
    let newest = client.1.min(daemon.1);
    (newest >= client.0 && newest >= daemon.0).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negotiation_takes_the_newest_common_version() {
        assert_eq!(negotiate(1, 1), Some(1));
        assert_eq!(negotiate(1, 9), Some(PROTOCOL_MAX));
        assert_eq!(negotiate(PROTOCOL_MAX + 1, PROTOCOL_MAX + 3), None);
        assert_eq!(negotiate(0, 0), None);
        assert_eq!(negotiate(2, 1), None);
        assert_eq!(negotiate(1, 2), Some(PROTOCOL_DRAINING));
        assert_eq!(negotiate(1, 3), Some(PROTOCOL_DEVICES));
    }

    #[test]
    fn every_pair_of_releases_negotiates_as_the_table_says() {
        // One line per pair: what the client speaks, what the daemon speaks, what both speak then.
        let table = [
            ((1, 1), (1, 1), Some(1)),
            ((1, 1), (1, 2), Some(1)),
            ((1, 2), (1, 1), Some(1)),
            ((1, 2), (1, 2), Some(2)),
            ((1, 3), (1, 2), Some(2)),
            ((2, 3), (1, 2), Some(2)),
            ((1, 3), (1, 1), Some(1)),
            ((1, 3), (1, 3), Some(3)),
            ((1, 2), (1, 3), Some(2)),
            ((1, 1), (1, 3), Some(1)),
            ((3, 3), (1, 2), None),
            ((2, 3), (1, 1), None),
            ((1, 1), (2, 3), None),
            ((3, 4), (1, 2), None),
            ((0, 0), (1, 2), None),
            ((2, 1), (1, 2), None),
            ((u32::MAX, u32::MAX), (1, 2), None),
            ((0, u32::MAX), (1, 2), Some(2)),
        ];
        for (client, daemon, spoken) in table {
            assert_eq!(
                newest_common(client, daemon),
                spoken,
                "{client:?} {daemon:?}"
            );
        }
        // And whatever the ranges: spoken by both, and nothing newer is.
        for (a, b, c, d) in (0..256).map(|n: u32| (n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6)) {
            let common = (a..=b).filter(|version| (c..=d).contains(version)).max();
            assert_eq!(newest_common((a, b), (c, d)), common, "{a}-{b} {c}-{d}");
        }
    }

    #[test]
    fn messages_are_golden() {
        let message = ClientMessage::AddRegion {
            seq: 1,
            region: 2,
            bytes: 3,
        };
        let text = r#"{"type":"add_region","seq":1,"region":2,"bytes":3}"#;
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
        assert_eq!(
            serde_json::to_string(&DaemonMessage::Draining { limit_ms: 30_000 }).unwrap(),
            r#"{"type":"draining","limit_ms":30000}"#
        );
        let segment = SegmentLayout {
            memory: MemoryRef::Region(4),
            base: 0,
            block_stride: 64,
            bytes: 64,
        };
        assert_eq!(
            serde_json::to_string(&segment).unwrap(),
            r#"{"memory":{"region":4},"base":0,"block_stride":64,"bytes":64}"#
        );
    }

    #[test]
    fn unknown_fields_are_ignored_and_unknown_types_refused() {
        let newer = r#"{"type":"unregister","seq":1,"registration":2,"why":"new field"}"#;
        assert!(serde_json::from_str::<ClientMessage>(newer).is_ok());
        assert!(serde_json::from_str::<ClientMessage>(r#"{"type":"dance"}"#).is_err());
    }
}
