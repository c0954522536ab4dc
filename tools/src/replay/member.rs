//! A process of an instance: a scheduler or a worker rank, connected and registered.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pegaflow::{
    Client, Completion, Error, GroupMemory, Mode, NamespaceSpec, Options, Registration,
};
use pegaflow::{Fetch, RegistrationId, RequestId};
use pegaflow_shm::BlockHash;
use pegaflow_shm::status::Status;
use serde::{Deserialize, Serialize};

use super::kv::{KvCache, KvShape};
use crate::error::ToolError;

/// Longest time a request may take; a busy machine takes milliseconds.
const REQUEST_PATIENCE: Duration = Duration::from_secs(60);
/// Longest time until all ranks have registered.
const READY_PATIENCE: Duration = Duration::from_secs(60);

/// What the processes of an instance agree on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Name of the instance.
    pub instance: String,
    /// Keeps the blocks of different runs apart.
    pub salt: String,
    /// Ranks.
    pub world_size: u32,
    /// KV memory of each rank.
    pub kv: KvShape,
}

impl Identity {
    /// What makes the blocks of its processes comparable.
    pub fn namespace(&self) -> NamespaceSpec {
        NamespaceSpec {
            model: "pegactl".into(),
            dtype: "bytes".into(),
            hash_algorithm: "blake3 of a block number".into(),
            salt: self.salt.clone(),
            block_tokens: 512,
            ..NamespaceSpec::default()
        }
    }

    /// Name of the namespace in the bytes of blocks.
    pub fn pattern_name(&self) -> String {
        let KvShape {
            page_bytes,
            segments,
            ..
        } = self.kv;
        format!("{} x{} {page_bytes}/{segments}", self.salt, self.world_size)
    }

    fn connect(&self, role: &str) -> Result<Client, ToolError> {
        let options = Options {
            socket: Some(self.socket.clone()),
            client_name: format!("{} {role}", self.instance),
            autostart: Some(false),
            reconnect: false,
            ..Options::default()
        };
        Client::connect(options).map_err(ToolError::client("connecting"))
    }

    fn registration(&self, rank: Option<u32>, kv: Option<&KvCache>) -> Registration {
        Registration {
            instance: self.instance.clone(),
            namespace: self.namespace(),
            world_size: self.world_size,
            rank,
            mode: Mode::ReadWrite,
            groups: kv.map(KvCache::group).into_iter().collect(),
        }
    }
}

/// A connected and registered process.
pub struct Member {
    client: Client,
    registration: RegistrationId,
}

impl Member {
    /// A scheduler, which has no KV memory.
    ///
    /// # Errors
    /// The daemon does not answer or refuses.
    pub fn scheduler(identity: &Identity) -> Result<Member, ToolError> {
        let client = identity.connect("scheduler")?;
        let registration = client
            .register(&identity.registration(None, None))
            .map_err(ToolError::client("registering a scheduler"))?;
        Ok(Member {
            client,
            registration,
        })
    }

    /// A worker with its KV memory.
    ///
    /// # Errors
    /// The daemon does not answer or refuses, or there is no memory.
    pub fn worker(identity: &Identity, rank: u32) -> Result<(Member, KvCache), ToolError> {
        let client = identity.connect(&format!("rank {rank}"))?;
        let kv = KvCache::allocate(&client, identity.kv)?;
        let registration = client
            .register(&identity.registration(Some(rank), Some(&kv)))
            .map_err(ToolError::client("registering KV memory"))?;
        Ok((
            Member {
                client,
                registration,
            },
            kv,
        ))
    }

    /// A worker over memory of its own, which it keeps as long as this value.
    ///
    /// # Errors
    /// The daemon does not answer or refuses.
    pub fn over(
        identity: &Identity,
        rank: u32,
        groups: Vec<GroupMemory>,
    ) -> Result<Member, ToolError> {
        let client = identity.connect(&format!("rank {rank}"))?;
        let registration = Registration {
            groups,
            ..identity.registration(Some(rank), None)
        };
        let registration = client
            .register(&registration)
            .map_err(ToolError::client("registering KV memory"))?;
        Ok(Member {
            client,
            registration,
        })
    }

    /// Waits until all ranks have registered.
    ///
    /// # Errors
    /// They do not within a minute, or the session ended.
    pub fn wait_ready(&self) -> Result<(), ToolError> {
        self.client
            .wait_ready(self.registration, READY_PATIENCE)
            .map_err(ToolError::client("waiting for all ranks"))
    }

    /// Blocks at the front of `hashes` that the shared index shows.
    ///
    /// # Errors
    /// The library refused.
    pub fn probe(&self, hashes: &[BlockHash]) -> Result<u32, ToolError> {
        self.client
            .probe(self.registration, 0, hashes)
            .map_err(ToolError::client("probe"))
    }

    /// Pins the cached prefix of `hashes`.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn query(&self, key: u64, hashes: &[BlockHash]) -> Result<Completion, ToolError> {
        self.finish("query", || {
            self.client.query(self.registration, 0, key, hashes, 0)
        })
    }

    /// [`Self::query`] that waits for the blocks that are below the daemon's pool.
    ///
    /// # Errors
    /// As [`Self::query`].
    pub fn query_and_wait(&self, key: u64, hashes: &[BlockHash]) -> Result<Completion, ToolError> {
        self.finish("query", || {
            let wait = Fetch::Wait(None);
            self.client
                .query_with(self.registration, 0, key, hashes, 0, wait)
        })
    }

    /// Loads the first blocks of a lease.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn load(&self, lease: u64, blocks: &[u32]) -> Result<Completion, ToolError> {
        self.finish("load", || {
            self.client.load(self.registration, 0, lease, 0, blocks)
        })
    }

    /// Saves blocks and waits until they are copied.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn save(&self, hashes: &[BlockHash], blocks: &[u32]) -> Result<Completion, ToolError> {
        self.finish("save", || {
            self.client.save(self.registration, 0, hashes, blocks)
        })
    }

    /// Loads a lease's first blocks and saves others at the same time; gives both answers.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn load_and_save(
        &self,
        (lease, into): (u64, &[u32]),
        (hashes, from): (&[BlockHash], &[u32]),
    ) -> Result<(Completion, Completion), ToolError> {
        let (client, registration) = (&self.client, self.registration);
        let load = Self::start("load", || client.load(registration, 0, lease, 0, into))?;
        let save = Self::start("save", || client.save(registration, 0, hashes, from))?;
        let wait = |what, request| {
            let answer = client.wait(request, REQUEST_PATIENCE);
            answer.map_err(ToolError::client(what))
        };
        Ok((wait("load", load)?, wait("save", save)?))
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn release(&self, lease: u64) -> Result<Completion, ToolError> {
        self.finish("release", || self.client.release(self.registration, lease))
    }

    /// An empty request, there and back.
    ///
    /// # Errors
    /// The library refused or the daemon did not answer.
    pub fn nop(&self) -> Result<Completion, ToolError> {
        self.finish("nop", || self.client.nop())
    }

    #[inline]
    fn finish(
        &self,
        what: &'static str,
        submit: impl Fn() -> Result<RequestId, Error>,
    ) -> Result<Completion, ToolError> {
        let request = Self::start(what, submit)?;
        self.client
            .wait(request, REQUEST_PATIENCE)
            .map_err(ToolError::client(what))
    }

    #[inline]
    fn start(
        what: &'static str,
        submit: impl Fn() -> Result<RequestId, Error>,
    ) -> Result<RequestId, ToolError> {
        match submit() {
            Err(error) if error.status() == Status::Again => submit_later(what, submit),
            other => other.map_err(ToolError::client(what)),
        }
    }
}

/// The ring or arena was full: tries again until there is room.
#[cold]
fn submit_later(
    what: &'static str,
    submit: impl Fn() -> Result<RequestId, Error>,
) -> Result<RequestId, ToolError> {
    let started = Instant::now();
    loop {
        match submit() {
            Err(error)
                if error.status() == Status::Again && started.elapsed() < REQUEST_PATIENCE =>
            {
                std::thread::sleep(Duration::from_micros(100));
            }
            other => return other.map_err(ToolError::client(what)),
        }
    }
}

/// Turns an answer other than `ok` into an error.
///
/// # Errors
/// The answer's status, if it is not `ok`.
pub fn expect_ok(what: &'static str, completion: Completion) -> Result<Completion, ToolError> {
    match completion.status {
        Status::Ok => Ok(completion),
        status => Err(ToolError::Request { what, status }),
    }
}
