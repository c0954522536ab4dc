//! A folder in shared memory for one input, and what a lane over it is started with.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytemuck::Zeroable;
use pegaflow_shm::mapping::Mapping;
use pegaflow_shm::node::{NodeHeader, NodeWriter};
use tempfile::TempDir;

use crate::config::PoolStart;
use crate::isolation::DomainRules;
use crate::lane::LaneOptions;
use crate::policy::{AdmissionKind, PolicyKind};

/// Names the folder under which those of all inputs lie; whoever runs a fuzzer that may be killed
/// removes it. Default: `/dev/shm`.
const FOLDER_VARIABLE: &str = "PEGAFLOW_FUZZ_DIR";

/// The folder of one input; gone with it.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        let parent = std::env::var_os(FOLDER_VARIABLE);
        let parent = parent.map_or(PathBuf::from("/dev/shm"), PathBuf::from);
        let made = tempfile::Builder::new()
            .prefix("pegaflow-fuzz")
            .tempdir_in(parent);
        Place(made.expect("shared memory is writable"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A node of the smallest sizes that leave something to contend for.
pub(crate) fn lane_options(dir: &Path) -> LaneOptions {
    LaneOptions {
        dir: dir.to_owned(),
        rules: DomainRules::any_user(),
        boot_id: [3; 16],
        node_name: "fuzz".into(),
        node: node_file(),
        pool_bytes: 64 << 10,
        extent_bytes: 16 << 10,
        nodes: crate::pool::MemoryNodes::default(),
        hugepages: false,
        max_blocks: 64,
        policy: PolicyKind::Lru,
        admission: AdmissionKind::Off,
        copy_threads: 1,
        checksum: crate::copy::ChecksumMode::Off,
        lease_ttl: Duration::from_secs(30),
        lease_ttl_max: Duration::from_secs(60),
        incomplete_ttl: Duration::from_secs(60),
        max_leases: 8,
        max_sessions: 4,
        max_instances: 4,
        spin: Duration::ZERO,
        pool: PoolStart::Adopt,
        tier: None,
    }
}

/// One node file for all inputs, in private memory: nobody reads it.
fn node_file() -> NodeWriter {
    static NODE: OnceLock<NodeWriter> = OnceLock::new();
    let make = || {
        let mapping = Mapping::anonymous(NodeWriter::FILE_BYTES).expect("there is memory");
        NodeWriter::create(Arc::new(mapping), &NodeHeader::zeroed()).expect("it fits")
    };
    NODE.get_or_init(make).clone()
}
