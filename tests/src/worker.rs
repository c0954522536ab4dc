//! One rank of an engine, or its scheduler: a client, KV memory, and the bytes that belong there.

#![forbid(unsafe_code)]

use pegaflow::{
    BlockHash, Client, Completion, Error, GroupMemory, Mode, NamespaceSpec, Options, Registration,
    RegistrationId, RequestId, Status,
};
use serde::{Deserialize, Serialize};

use crate::SOON;
use crate::content::Shard;
use crate::layout::{Arrangement, Segment, segments};
use crate::memory::{KvMemory, MemoryKind};

/// What a worker registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Engine replica.
    pub instance: String,
    /// Part of the namespace; also decides the bytes of the blocks.
    pub salt: String,
    /// Ranks of the instance.
    pub world_size: u32,
    /// This rank, or `None` for a scheduler.
    pub rank: Option<u32>,
    /// Saves only.
    pub save_only: bool,
    /// Kind of KV memory.
    pub memory: MemoryKind,
    /// How the blocks lie in it.
    pub arrangement: Arrangement,
    /// Cache groups; each has its own memory.
    pub groups: Vec<u16>,
    /// Layers.
    pub layers: usize,
    /// Bytes of K (and of V) of one layer and block; a multiple of 8.
    pub half_bytes: usize,
    /// Blocks.
    pub blocks: u32,
}

impl Default for WorkerSpec {
    /// One rank, two layers, pages of 4 KiB, 64 blocks of shared memory.
    fn default() -> WorkerSpec {
        WorkerSpec {
            instance: "engine".into(),
            salt: String::new(),
            world_size: 1,
            rank: Some(0),
            save_only: false,
            memory: MemoryKind::Shared,
            arrangement: Arrangement::KvApart,
            groups: vec![0],
            layers: 2,
            half_bytes: 1024,
            blocks: 64,
        }
    }
}

impl WorkerSpec {
    /// The same of another instance.
    pub fn instance(&self, instance: &str) -> WorkerSpec {
        WorkerSpec {
            instance: instance.into(),
            ..self.clone()
        }
    }

    /// The same for another rank of a larger world.
    pub fn rank(&self, rank: u32, world_size: u32) -> WorkerSpec {
        WorkerSpec {
            rank: Some(rank),
            world_size,
            ..self.clone()
        }
    }

    /// The scheduler of the same instance.
    pub fn scheduler(&self) -> WorkerSpec {
        WorkerSpec {
            rank: None,
            ..self.clone()
        }
    }

    /// The same in another namespace.
    pub fn salt(&self, salt: &str) -> WorkerSpec {
        WorkerSpec {
            salt: salt.into(),
            ..self.clone()
        }
    }

    /// Bytes of one block of this rank.
    pub fn page_bytes(&self) -> usize {
        2 * self.half_bytes * self.layers
    }

    /// The namespace of the engine.
    pub fn namespace(&self) -> NamespaceSpec {
        NamespaceSpec {
            model: "test-model".into(),
            dtype: "bfloat16".into(),
            hash_algorithm: "test".into(),
            salt: self.salt.clone(),
            block_tokens: 16,
            ..NamespaceSpec::default()
        }
    }

    /// The registration over this memory, one piece per group.
    pub fn registration(&self, memory: &[KvMemory]) -> Registration {
        let (segments, _) = self.segments();
        let groups = self
            .groups
            .iter()
            .zip(memory)
            .map(|(group, memory)| GroupMemory {
                group: *group,
                num_blocks: self.blocks,
                segments: segments
                    .iter()
                    .map(|s| memory.segment(s.base, s.stride as u64, s.bytes as u64))
                    .collect(),
                replicated: false,
            });
        Registration {
            instance: self.instance.clone(),
            namespace: self.namespace(),
            world_size: self.world_size,
            rank: self.rank,
            mode: if self.save_only {
                Mode::SaveOnly
            } else {
                Mode::ReadWrite
            },
            groups: if self.rank.is_some() {
                groups.collect()
            } else {
                Vec::new()
            },
        }
    }

    fn segments(&self) -> (Vec<Segment>, usize) {
        segments(
            self.arrangement,
            self.layers,
            self.half_bytes,
            self.blocks as usize,
        )
    }
}

/// A byte of a block is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Block id.
    pub block: u32,
    /// Byte of the page.
    pub at: usize,
}

/// A registered rank (or scheduler) with its memory.
pub struct Worker {
    /// Its client.
    pub client: Client,
    /// Its registration.
    pub registration: RegistrationId,
    /// What it registered.
    pub spec: WorkerSpec,
    memory: Vec<KvMemory>,
    segments: Vec<Segment>,
}

impl Worker {
    /// Connects, allocates, registers.
    ///
    /// # Errors
    /// As the library's calls.
    pub fn open(options: Options, spec: WorkerSpec) -> Result<Worker, Error> {
        Worker::with_client(Client::connect(options)?, spec)
    }

    /// Allocates and registers over a client of its own.
    ///
    /// # Errors
    /// As the library's calls.
    pub fn with_client(client: Client, spec: WorkerSpec) -> Result<Worker, Error> {
        let (segments, bytes) = spec.segments();
        let pieces = if spec.rank.is_some() {
            spec.groups.len()
        } else {
            0
        };
        let memory = (0..pieces)
            .map(|_| KvMemory::allocate(&client, spec.memory, bytes))
            .collect::<Result<Vec<_>, _>>()?;
        let registration = client.register(&spec.registration(&memory))?;
        Ok(Worker {
            client,
            registration,
            spec,
            memory,
            segments,
        })
    }

    /// [`Self::open`], and waits until the instance is complete.
    ///
    /// # Panics
    /// Any of it fails.
    pub fn ready(options: Options, spec: WorkerSpec) -> Worker {
        let worker = Worker::open(options, spec).unwrap_or_else(|error| panic!("open: {error}"));
        worker.wait_ready();
        worker
    }

    /// Waits until the instance is complete.
    ///
    /// # Panics
    /// It does not become complete.
    pub fn wait_ready(&self) {
        self.client
            .wait_ready(self.registration, SOON)
            .expect("the instance becomes complete");
    }

    /// Waits for a request.
    ///
    /// # Panics
    /// It could not be submitted, or is not answered in time.
    pub fn finish(&self, request: Result<RequestId, Error>) -> Completion {
        let request = request.unwrap_or_else(|error| panic!("submit: {error}"));
        self.client
            .wait(request, SOON)
            .unwrap_or_else(|error| panic!("wait: {error}"))
    }

    fn piece(&self, group: u16) -> &KvMemory {
        let position = self.spec.groups.iter().position(|known| *known == group);
        &self.memory[position.expect("a group of this worker")]
    }

    fn shard<'a>(&'a self, group: u16, hash: &'a BlockHash) -> Shard<'a> {
        let rank = self.spec.rank.expect("a worker has a rank");
        Shard {
            salt: &self.spec.salt,
            group,
            rank,
            hash,
        }
    }

    /// Writes the bytes of a hash into a block, as if the engine had computed it.
    pub fn compute(&self, group: u16, block: u32, hash: &BlockHash) {
        let page = self.shard(group, hash).bytes(self.spec.page_bytes());
        self.put(group, block, &page);
    }

    /// Bytes of a group's memory, whether they belong to a block or not.
    pub fn raw(&self, group: u16, offset: usize, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.piece(group).read(offset, &mut out);
        out
    }

    /// Writes a page into a block.
    pub fn put(&self, group: u16, block: u32, page: &[u8]) {
        let mut rest = page;
        for segment in &self.segments {
            let (part, after) = rest.split_at(segment.bytes);
            self.piece(group)
                .write(segment.base + block as usize * segment.stride, part);
            rest = after;
        }
    }

    /// Reads a block as a page.
    pub fn page(&self, group: u16, block: u32) -> Vec<u8> {
        let mut page = vec![0; self.spec.page_bytes()];
        let mut rest = page.as_mut_slice();
        for segment in &self.segments {
            let (part, after) = rest.split_at_mut(segment.bytes);
            self.piece(group)
                .read(segment.base + block as usize * segment.stride, part);
            rest = after;
        }
        page
    }

    /// Overwrites blocks with bytes that belong to no hash.
    pub fn wipe(&self, group: u16, blocks: &[u32]) {
        let page = vec![0xA5; self.spec.page_bytes()];
        for block in blocks {
            self.put(group, *block, &page);
        }
    }

    /// Compares every byte of a block with what belongs to the hash.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn verify(&self, group: u16, block: u32, hash: &BlockHash) -> Result<(), Mismatch> {
        let expected = self.shard(group, hash).bytes(self.spec.page_bytes());
        let found = self.page(group, block);
        match expected
            .iter()
            .zip(&found)
            .position(|(expected, found)| expected != found)
        {
            None => Ok(()),
            Some(at) => Err(Mismatch { block, at }),
        }
    }

    /// Computes and saves blocks, and waits.
    pub fn save_in(&self, group: u16, blocks: &[u32], hashes: &[BlockHash]) -> Completion {
        for (block, hash) in blocks.iter().zip(hashes) {
            self.compute(group, *block, hash);
        }
        self.finish(self.client.save(self.registration, group, hashes, blocks))
    }

    /// [`Self::save_in`] group 0, into blocks `0..`.
    pub fn save(&self, hashes: &[BlockHash]) -> Completion {
        self.save_in(0, &first_blocks(hashes.len()), hashes)
    }

    /// Asks for a lease of group 0 and waits.
    pub fn query(&self, key: u64, hashes: &[BlockHash]) -> Completion {
        self.query_in(0, key, hashes)
    }

    /// Asks for a lease and waits.
    pub fn query_in(&self, group: u16, key: u64, hashes: &[BlockHash]) -> Completion {
        self.finish(self.client.query(self.registration, group, key, hashes, 0))
    }

    /// Loads blocks of a lease, from its position `first` on, and waits.
    pub fn load_in(&self, group: u16, lease: u64, first: u32, blocks: &[u32]) -> Completion {
        self.finish(
            self.client
                .load(self.registration, group, lease, first, blocks),
        )
    }

    /// Gives a lease back and waits.
    pub fn release(&self, lease: u64) -> Completion {
        self.finish(self.client.release(self.registration, lease))
    }

    /// Queries, wipes, loads and verifies every byte of group 0 in blocks `0..`; returns the hits.
    ///
    /// # Panics
    /// Anything fails or differs.
    pub fn fetch(&self, key: u64, hashes: &[BlockHash]) -> usize {
        let answer = self.query(key, hashes);
        assert_eq!(answer.status, Status::Ok, "query");
        let hits = answer.count as usize;
        if hits == 0 {
            assert_eq!(answer.lease, 0, "no hit, no lease");
            return 0;
        }
        self.load_and_verify(answer.lease, &hashes[..hits]);
        hits
    }

    /// Wipes, loads and verifies the hits of a lease of group 0 in blocks `0..`.
    ///
    /// # Panics
    /// Anything fails or differs.
    pub fn load_and_verify(&self, lease: u64, hashes: &[BlockHash]) {
        let blocks = first_blocks(hashes.len());
        self.wipe(0, &blocks);
        let loaded = self.load_in(0, lease, 0, &blocks);
        assert_eq!(
            (loaded.status, loaded.count as usize),
            (Status::Ok, hashes.len()),
            "load"
        );
        assert_eq!(
            loaded.bytes,
            (hashes.len() * self.spec.page_bytes()) as u64,
            "bytes loaded"
        );
        for (block, hash) in blocks.iter().zip(hashes) {
            assert_eq!(
                self.verify(0, *block, hash),
                Ok(()),
                "rank {:?}",
                self.spec.rank
            );
        }
    }
}

/// Blocks `0..count`.
pub fn first_blocks(count: usize) -> Vec<u32> {
    (0..count as u32).collect()
}
