//! What the lane is started with.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use pegaflow_shm::BootId;
use pegaflow_shm::node::NodeWriter;

use crate::config::PoolStart;
use crate::copy::ChecksumMode;
use crate::isolation::DomainRules;
use crate::policy::{AdmissionKind, PolicyKind};
use crate::pool::MemoryNodes;
use crate::tier::TierOptions;

/// Everything the lane needs to know from the configuration.
#[derive(Clone)]
pub struct LaneOptions {
    /// The node's folder of shared files.
    pub dir: PathBuf,
    /// Which stored domains still are one.
    pub rules: DomainRules,
    /// Boot id.
    pub boot_id: BootId,
    /// Name of the node.
    pub node_name: String,
    /// The node file.
    pub node: NodeWriter,
    /// Bytes of the pool; a multiple of the extent size.
    pub pool_bytes: u64,
    /// Bytes of an extent.
    pub extent_bytes: u64,
    /// Memory nodes that have GPUs, by which the pool is cut.
    pub nodes: MemoryNodes,
    /// Whether to ask for hugepages.
    pub hugepages: bool,
    /// Most blocks of one user.
    pub max_blocks: u32,
    /// Eviction order.
    pub policy: PolicyKind,
    /// Admission gate.
    pub admission: AdmissionKind,
    /// Copy threads.
    pub copy_threads: usize,
    /// Which pages get a checksum.
    pub checksum: ChecksumMode,
    /// Time to live of a lease when the query names none.
    pub lease_ttl: Duration,
    /// Longest time to live of a lease.
    pub lease_ttl_max: Duration,
    /// How long a block may wait for its remaining shards.
    pub incomplete_ttl: Duration,
    /// Most live leases.
    pub max_leases: usize,
    /// Most sessions.
    pub max_sessions: usize,
    /// Most instances.
    pub max_instances: usize,
    /// How long the lane polls without work before it sleeps.
    pub spin: Duration,
    /// What becomes of the pool of a previous daemon.
    pub pool: PoolStart,
    /// How the tier below the pool is used; `None` without one.
    pub tier: Option<TierOptions>,
}
