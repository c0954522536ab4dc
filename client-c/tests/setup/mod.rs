//! What the session tests have in common: a place for a socket, a client, a registered worker.

#![allow(dead_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pegaflow::{
    BlockHash, Client, GroupMemory, HostMemory, Mode, NamespaceSpec, Options, Registration,
    RegistrationId, SegmentMemory,
};

pub const LONG: Duration = Duration::from_secs(10);

pub struct Place {
    pub folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("test.sock")
    }

    pub fn options(&self) -> Options {
        Options {
            socket: Some(self.socket()),
            client_name: "test".into(),
            autostart: Some(false),
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(50),
            ..Options::default()
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.options()).unwrap()
    }
}

pub fn hash(number: u32) -> BlockHash {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&number.to_le_bytes());
    hash
}

pub fn hashes(range: std::ops::Range<u32>) -> Vec<BlockHash> {
    range.map(hash).collect()
}

pub fn registration(groups: Vec<GroupMemory>) -> Registration {
    Registration {
        instance: "engine-0".into(),
        namespace: NamespaceSpec {
            model: "m".into(),
            dtype: "bfloat16".into(),
            hash_algorithm: "sha256".into(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        },
        world_size: 1,
        rank: (!groups.is_empty()).then_some(0),
        mode: Mode::ReadWrite,
        groups,
    }
}

pub const PAGE: usize = 4096;

pub fn worker(client: &Client, memory: &HostMemory) -> RegistrationId {
    let blocks = (memory.len() / PAGE) as u32;
    let segment = SegmentMemory::in_host(memory, 0, PAGE as u64, PAGE as u64);
    let group = |group| GroupMemory {
        group,
        num_blocks: blocks,
        segments: vec![segment.clone()],
        replicated: false,
    };
    let id = client
        .register(&registration(vec![group(0), group(1)]))
        .unwrap();
    client.wait_ready(id, LONG).unwrap();
    id
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
