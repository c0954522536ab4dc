//! The node file: what a daemon tells about itself, in shared memory.
//!
//! `/dev/shm/pegaflow/<node>/node` is written by the daemon alone and mapped read-only by tools. It
//! needs no answer from the daemon, so it can be read while the daemon is busy and after it died.
//!
//! ```text
//! 0       NodeHeader
//! 4096    counters    u64 each, in the order of `Counter::ALL`
//!         gauges      u64 each, in the order of `Gauge::ALL`
//!         histograms  count, sum, HISTOGRAM_BUCKETS buckets; u64 each
//!         sessions    SESSION_ROWS × (version, SessionRow)
//!         leases      LEASE_ROWS × (version, LeaseRow)
//!         namespaces  NAMESPACE_ROWS × (version, NamespaceRow)
//!         domains     DOMAIN_ROWS × (version, DomainRow)
//!         devices     DEVICE_ROWS × (version, DeviceRow)
//!         SSD shards  SSD_ROWS × (version, SsdRow)
//! ```
//!
//! Counters, gauges and buckets are single atomic words. A table row carries a version that is odd
//! while the daemon writes the row; a reader that sees it odd or changed reads again.

mod metrics;
mod rows;
mod view;

pub use metrics::{Counter, Gauge, HISTOGRAM_BUCKETS, Histogram, bucket_end, bucket_of};
pub use rows::{
    DEVICE_ROWS, DOMAIN_NAME_BYTES, DOMAIN_ROWS, DeviceRow, DomainRow, LEASE_ROWS, LeaseRow,
    NAMESPACE_ROWS, NamespaceRow, SESSION_ROWS, SSD_BUCKETS, SSD_ROWS, SessionRow, SsdRow,
    field_text, ssd_bucket_end, text_field,
};
pub use view::{HistogramSnapshot, NodeFault, NodeReader, NodeWriter};

use bytemuck::{Pod, Zeroable};

use crate::BootId;

/// First eight bytes of a node file.
pub const NODE_MAGIC: u64 = u64::from_le_bytes(*b"PGFLONOD");
/// Layout version; the tables' shape follows from it.
pub const NODE_LAYOUT: u32 = 4;

/// What does not change while a daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct NodeHeader {
    /// [`NODE_MAGIC`]; written last.
    pub magic: u64,
    /// [`NODE_LAYOUT`].
    pub layout: u32,
    /// Process id of the daemon.
    pub pid: u32,
    /// Boot id.
    pub boot_id: BootId,
    /// Unix time of the start in milliseconds.
    pub started_unix_ms: u64,
    /// Start time of the process in clock ticks since the kernel booted (`/proc/<pid>/stat` field
    /// 22), so that a recycled process id is not taken for the daemon.
    pub pid_start_ticks: u64,
    /// Bytes of the whole file.
    pub total_bytes: u64,
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Bytes of one extent.
    pub extent_bytes: u64,
    /// Numbers of counters, gauges, histograms and buckets, so that an older tool can find its way.
    pub counters: u32,
    /// See `counters`.
    pub gauges: u32,
    /// See `counters`.
    pub histograms: u32,
    /// See `counters`.
    pub buckets: u32,
    /// Default time to live of a lease in milliseconds.
    pub lease_ttl_ms: u64,
    /// Version of the daemon.
    pub version: [u8; 32],
    /// Name of the node.
    pub node: [u8; 64],
    /// Eviction policy.
    pub policy: [u8; 32],
    /// Session socket.
    pub socket: [u8; 256],
    /// Address of `/metrics`, empty when off.
    pub http: [u8; 64],
}

const _: () = assert!(size_of::<NodeHeader>() == 544 && size_of::<NodeHeader>() <= 4096);
const _: () = assert!(std::mem::offset_of!(NodeHeader, version) == 96);
