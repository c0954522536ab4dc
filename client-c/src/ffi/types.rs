//! The structs of the C ABI. Their layout is compared with the header's by a test.
//!
//! A struct that callers fill starts with its `size` as the caller knows it, so that fields can be
//! added at the end: what the caller does not know reads as 0, and 0 always means the default.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::sync::Mutex;

use crate::{Client, HostMemory};

/// Version of this ABI: raised with each addition.
pub const PEGA_ABI_VERSION: u32 = 4;
/// Rank of a scheduler.
pub const PEGA_SCHEDULER: i32 = -1;
/// Saves, queries and loads.
pub const PEGA_MODE_READ_WRITE: u32 = 0;
/// Only saves.
pub const PEGA_MODE_SAVE_ONLY: u32 = 1;
/// The default for a switch.
pub const PEGA_DEFAULT: u32 = 0;
/// A switch that is on.
pub const PEGA_ON: u32 = 1;
/// A switch that is off.
pub const PEGA_OFF: u32 = 2;
/// `pega_options.log_level`: nothing is said.
pub const PEGA_LOG_OFF: u32 = 1;
/// Only what somebody may have to mend, and that it is over.
pub const PEGA_LOG_WARN: u32 = 2;
/// First connections, ends and failed attempts, too.
pub const PEGA_LOG_INFO: u32 = 3;
/// Memory that the library finds out about by its address.
pub const PEGA_MEMORY_AUTO: u32 = 0;
/// Memory that is none of a GPU's.
pub const PEGA_MEMORY_HOST: u32 = 1;
/// GPU memory of CUDA.
pub const PEGA_MEMORY_CUDA: u32 = 2;
/// `pega_order.kind`: nothing is pending.
pub const PEGA_ORDER_NONE: u32 = 0;
/// After what a stream has at the moment.
pub const PEGA_ORDER_STREAM: u32 = 1;
/// After an event as it was recorded last.
pub const PEGA_ORDER_EVENT: u32 = 2;
/// `pega_query_options.fetch`: blocks below the pool are fetched, and the query says so at once.
pub const PEGA_FETCH_POLL: u32 = 0;
/// They are left where they are.
pub const PEGA_FETCH_NEVER: u32 = 1;
/// They are fetched, and the query completes when they are in.
pub const PEGA_FETCH_WAIT: u32 = 2;

/// A client and the memory it gave out.
#[derive(Debug)]
pub struct pega_client {
    pub(super) client: Client,
    pub(super) hosts: Mutex<BTreeMap<usize, HostMemory>>,
}

/// Name of a block.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_hash {
    /// What the engine computed.
    pub bytes: [u8; 32],
}

/// Where a client's lines go.
pub type pega_log_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, level: u32, line: *const c_char)>;

/// How to connect.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_options {
    /// `sizeof(pega_options)` of the caller.
    pub size: u32,
    /// Slots of the submission ring.
    pub ring_slots: u32,
    /// Node name.
    pub node: *const c_char,
    /// Path of the daemon's socket.
    pub socket: *const c_char,
    /// Name of this process in tables.
    pub client_name: *const c_char,
    /// The daemon's program for autostart.
    pub daemon: *const c_char,
    /// Bytes of the submission arena.
    pub arena_bytes: u64,
    /// Longest time of `pega_connect` in ms.
    pub connect_timeout_ms: u64,
    /// Longest time of a call over the socket in ms.
    pub control_timeout_ms: u64,
    /// Spin before a sleep in ns.
    pub spin_ns: u64,
    /// Most unfinished or unconsumed requests.
    pub completion_slots: u32,
    /// Start a daemon where none listens.
    pub autostart: u32,
    /// Reconnect when the daemon was away.
    pub reconnect: u32,
    /// Do not spin.
    pub no_spin: u32,
    /// Begin disconnected where no daemon answers.
    pub start_without_daemon: u32,
    /// A `PEGA_LOG_*`.
    pub log_level: u32,
    /// Where lines go.
    pub log: pega_log_fn,
    /// First argument of `log`.
    pub log_user: *mut c_void,
}

/// What makes the blocks' bytes comparable.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_namespace {
    /// `sizeof(pega_namespace)` of the caller.
    pub size: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Model name or path.
    pub model: *const c_char,
    /// Whatever else changes the KV values.
    pub revision: *const c_char,
    /// Element type.
    pub dtype: *const c_char,
    /// Layout inside the segments.
    pub kv_layout: *const c_char,
    /// Parallel topology.
    pub topology: *const c_char,
    /// Algorithm, seed and input of the hashes.
    pub hash_algorithm: *const c_char,
    /// Tenant or cache salt.
    pub salt: *const c_char,
}

/// One strided array of KV memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_segment {
    /// `sizeof(pega_segment)` of the caller.
    pub size: u32,
    /// A `PEGA_MEMORY_*`.
    pub memory: u32,
    /// First byte of block 0.
    pub address: *mut c_void,
    /// Bytes from one block to the next.
    pub block_stride: u64,
    /// Bytes of one block.
    pub bytes: u64,
}

/// KV memory of one cache group.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_group {
    /// `sizeof(pega_group)` of the caller.
    pub size: u32,
    /// Cache group.
    pub group: u32,
    /// Blocks.
    pub num_blocks: u32,
    /// Entries of `segments`.
    pub num_segments: u32,
    /// Parts of a block in layer order.
    pub segments: *const pega_segment,
    /// All ranks hold the same bytes.
    pub replicated: u32,
    /// 0.
    pub reserved: u32,
}

/// What a save or load comes after.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_order {
    /// `sizeof(pega_order)` of the caller.
    pub size: u32,
    /// A `PEGA_ORDER_*`.
    pub kind: u32,
    /// `cudaStream_t`, `CUstream`, `cudaEvent_t` or `CUevent`.
    pub handle: *mut c_void,
}

/// What a query does about blocks below the pool.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_query_options {
    /// `sizeof(pega_query_options)` of the caller.
    pub size: u32,
    /// A `PEGA_FETCH_*`.
    pub fetch: u32,
    /// Time to live of the lease.
    pub ttl_ms: u64,
    /// How long a query that waits does so at most.
    pub limit_ms: u64,
}

/// A rank with its memory, or a scheduler.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_registration {
    /// `sizeof(pega_registration)` of the caller.
    pub size: u32,
    /// Worker ranks of the instance.
    pub world_size: u32,
    /// This worker's rank, or `PEGA_SCHEDULER`.
    pub rank: i32,
    /// A `PEGA_MODE_*`.
    pub mode: u32,
    /// Name of the engine replica.
    pub instance: *const c_char,
    /// The namespace.
    pub ns: *const pega_namespace,
    /// KV memory.
    pub groups: *const pega_group,
    /// Entries of `groups`.
    pub num_groups: u32,
    /// 0.
    pub reserved: u32,
}

/// The answer to a request. Never grows: additions take from `reserved`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct pega_completion {
    /// Bytes that the library has filled in.
    pub size: u32,
    /// A `PEGA_OP_*`.
    pub op: u32,
    /// `PEGA_OK` or a positive status.
    pub status: u32,
    /// A `PEGA_REASON_*`.
    pub reason: u32,
    /// The request.
    pub request: u64,
    /// Query: the lease.
    pub lease: u64,
    /// Hits, blocks loaded, or blocks newly stored.
    pub count: u32,
    /// Save: already held.
    pub skipped: u32,
    /// Save: not stored.
    pub dropped: u32,
    /// 0.
    pub reserved0: u32,
    /// Bytes copied.
    pub bytes: u64,
    /// What an error is about; query and renew: time to live in ms.
    pub value: u64,
    /// Time in the daemon in ns.
    pub daemon_ns: u64,
    /// 0.
    pub reserved: [u64; 3],
}

/// Counters of a client.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_stats {
    /// `sizeof(pega_stats)` of the caller.
    pub size: u32,
    /// A `PEGA_STATE_*`.
    pub state: u32,
    /// Requests accepted.
    pub submitted: u64,
    /// Completions.
    pub completed: u64,
    /// Those with another status than `PEGA_OK`.
    pub failed: u64,
    /// Submissions refused with `PEGA_AGAIN`.
    pub again: u64,
    /// Probes.
    pub probes: u64,
    /// Blocks asked about.
    pub probed_blocks: u64,
    /// Blocks found.
    pub probe_hits: u64,
    /// Bytes of loads.
    pub loaded_bytes: u64,
    /// Bytes of saves.
    pub saved_bytes: u64,
    /// Sessions lost.
    pub disconnects: u64,
    /// Sessions regained.
    pub reconnects: u64,
    /// Requests not yet consumed.
    pub outstanding: u64,
    /// Time without a session in ms.
    pub away_ms: u64,
    /// Attempts to get a session that failed.
    pub failed_attempts: u64,
    /// Registrations that the present daemon refuses.
    pub refused_registrations: u64,
    /// Saves and loads whose call waited for the engine's stream or event.
    pub waited_orders: u64,
}

/// Sizes of the largest lists.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct pega_limits {
    /// `sizeof(pega_limits)` of the caller.
    pub size: u32,
    /// 0.
    pub reserved: u32,
    /// Hashes in one query.
    pub query_hashes: u64,
    /// Hashes in one query of another group than 0.
    pub membership_hashes: u64,
    /// Blocks in one save.
    pub save_blocks: u64,
    /// Blocks in one load.
    pub load_blocks: u64,
    /// Requests not yet consumed.
    pub requests: u64,
}
