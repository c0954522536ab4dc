//! The engine of `bench gpu`, a process of its own: GPU memory, a client, and what is timed.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use serde::{Deserialize, Serialize};

use super::cache::GpuCache;
use super::case::{Case, Compute, GpuShape};
use super::compute::ComputeLoop;
use crate::bench::save::cpu_ns;
use crate::children::die_with_parent;
use crate::error::ToolError;
use crate::gpu::{Event, Gpu, PinnedMemory, Stream};
use crate::replay::kv::{KvShape, MemoryKind};
use crate::replay::latency::median;
use crate::replay::member::{Identity, Member, expect_ok};
use crate::replay::pipe::{LineReader, LineWriter};
use crate::replay::trace::block_hash;

/// Hidden argument: become an engine.
pub const ENGINE_ARGUMENT: &str = "__bench-gpu-engine";
/// Bytes of the copies that are the limit.
const RAW_BYTES: usize = 1 << 30;
const RAW_ROUNDS: usize = 5;
/// How long each part of an interference measurement takes.
const INTERFERENCE: Duration = Duration::from_millis(1500);

/// What an engine is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open this GPU; answered [`Answer::Opened`].
    Open {
        /// Number of the GPU.
        gpu: u32,
    },
    /// Allocate, fill and register; answered [`Answer::Ready`].
    Prepare {
        /// Socket of the daemon.
        socket: PathBuf,
        /// Keeps runs apart.
        salt: String,
        /// The case.
        case: Case,
    },
    /// Measure what was prepared; answered [`Answer::Figures`].
    Go {
        /// Process of the daemon.
        daemon: u32,
    },
    /// Compute alone, while saving and while loading; answered [`Answer::Slowdown`].
    Interfere {
        /// What to compute.
        compute: Compute,
    },
}

/// What an engine answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The GPU is open.
    Opened {
        /// Its name.
        name: String,
        /// One large copy to the host, GB/s.
        out_gbps: f64,
        /// One large copy to the GPU, GB/s.
        in_gbps: f64,
    },
    /// Registered.
    Ready,
    /// Of one case.
    Figures(Figures),
    /// Of one computation.
    Slowdown(Slowdown),
    /// It could not be done.
    Failed(String),
}

/// What was measured in a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Nanoseconds of the median save.
    pub save_ns: f64,
    /// Nanoseconds of the median load.
    pub load_ns: f64,
    /// CPU of the daemon while it saved, in cores.
    pub save_cpu: f64,
    /// CPU of the daemon while it loaded, in cores.
    pub load_cpu: f64,
}

/// What the copies cost a computation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Slowdown {
    /// Nanoseconds of one product alone.
    pub alone_ns: f64,
    /// While saving.
    pub saving_ns: f64,
    /// While loading.
    pub loading_ns: f64,
    /// Rate of the saves meanwhile.
    pub save_gbps: f64,
    /// Rate of the loads meanwhile.
    pub load_gbps: f64,
}

/// Hidden command: does what the lines of standard input say.
///
/// # Errors
/// The parent talks nonsense or is gone.
pub fn engine_main() -> Result<(), ToolError> {
    die_with_parent();
    let mut orders = LineReader::new("pegactl", std::io::stdin());
    let mut answers = LineWriter::new("pegactl", std::io::stdout());
    let mut engine = Engine::default();
    while let Some(order) = orders.receive::<Order>()? {
        let answer = engine.obey(order);
        answers.send(&answer.unwrap_or_else(|error| Answer::Failed(error.to_string())))?;
    }
    Ok(())
}

/// Registered memory, and what was saved from it. The session ends before the memory goes.
struct Prepared {
    member: Member,
    cache: GpuCache,
    case: Case,
    blocks: Vec<u32>,
    saved: u64,
    queries: u64,
}

#[derive(Default)]
struct Engine {
    prepared: Option<Prepared>,
    gpu: Option<Gpu>,
}

impl Engine {
    fn obey(&mut self, order: Order) -> Result<Answer, ToolError> {
        match order {
            Order::Open { gpu } => {
                let gpu = Gpu::open(gpu)?;
                let (out_gbps, in_gbps) = raw_gbps()?;
                let name = gpu.name()?;
                self.gpu = Some(gpu);
                Ok(Answer::Opened {
                    name,
                    out_gbps,
                    in_gbps,
                })
            }
            Order::Prepare { socket, salt, case } => {
                self.prepared = None;
                self.prepared = Some(Prepared::new(socket, salt, case)?);
                Ok(Answer::Ready)
            }
            Order::Go { daemon } => Ok(Answer::Figures(self.prepared()?.measure(daemon)?)),
            Order::Interfere { compute } => {
                let gpu = self.gpu.take().ok_or_else(not_prepared)?;
                let result = self.prepared()?.interfere(&gpu, compute);
                self.gpu = Some(gpu);
                Ok(Answer::Slowdown(result?))
            }
        }
    }

    fn prepared(&mut self) -> Result<&mut Prepared, ToolError> {
        self.prepared.as_mut().ok_or_else(not_prepared)
    }
}

fn not_prepared() -> ToolError {
    ToolError::Plan("an engine is told to measure before it is prepared".into())
}

/// One large copy each way, between GPU memory and pinned memory of this process: the limit.
fn raw_gbps() -> Result<(f64, f64), ToolError> {
    let memory = crate::gpu::DeviceMemory::allocate(RAW_BYTES)?;
    let mut host = PinnedMemory::allocate(RAW_BYTES)?;
    host.fill(0x5A);
    let (stream, start, end) = (Stream::new()?, Event::new()?, Event::new()?);
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..RAW_ROUNDS {
        for (way, rates) in rates.iter_mut().enumerate() {
            start.record(&stream)?;
            match way {
                0 => memory.read_to(0, (&host, 0), RAW_BYTES, &stream)?,
                _ => memory.write_from(0, (&host, 0), RAW_BYTES, &stream)?,
            }
            end.record(&stream)?;
            end.synchronize()?;
            rates.push(RAW_BYTES as f64 / end.ns_since(&start)?);
        }
    }
    Ok((median(&rates[0]), median(&rates[1])))
}

impl Prepared {
    fn new(socket: PathBuf, salt: String, case: Case) -> Result<Prepared, ToolError> {
        let GpuShape {
            blocks, segments, ..
        } = case.shape;
        let cache = GpuCache::allocate(case.shape)?;
        cache.fill(1)?;
        let identity = Identity {
            socket,
            instance: format!("bench-gpu-{salt}"),
            salt,
            world_size: 1,
            kv: KvShape {
                memory: MemoryKind::Process,
                num_blocks: blocks,
                page_bytes: case.shape.page_bytes(),
                segments,
            },
        };
        let member = Member::over(&identity, 0, vec![cache.group()])?;
        member.wait_ready()?;
        Ok(Prepared {
            member,
            cache,
            blocks: (0..blocks).collect(),
            case,
            saved: 0,
            queries: 0,
        })
    }

    /// Hashes that were never saved.
    fn new_hashes(&mut self) -> Vec<BlockHash> {
        let count = self.blocks.len() as u64;
        let first = self.saved * count;
        self.saved += 1;
        (first..first + count).map(block_hash).collect()
    }

    /// Saves all blocks under new hashes; gives nanoseconds.
    fn save(&mut self, hashes: &[BlockHash]) -> Result<f64, ToolError> {
        let start = Instant::now();
        let answer = self.member.save(hashes, &self.blocks)?;
        let elapsed = start.elapsed();
        let answer = expect_ok("save", answer)?;
        expect_all("stored", answer.count, hashes)?;
        Ok(elapsed.as_nanos() as f64)
    }

    /// Asks for the blocks and loads them; gives nanoseconds of the load alone.
    fn load(&mut self, hashes: &[BlockHash], clear: bool) -> Result<f64, ToolError> {
        self.queries += 1;
        let answer = expect_ok("query", self.member.query(self.queries, hashes)?)?;
        expect_all("holds", answer.count, hashes)?;
        if clear {
            self.cache.memory().fill(0)?;
        }
        let start = Instant::now();
        let loaded = self.member.load(answer.lease, &self.blocks)?;
        let elapsed = start.elapsed();
        expect_ok("load", loaded)?;
        Ok(elapsed.as_nanos() as f64)
    }

    fn measure(&mut self, daemon: u32) -> Result<Figures, ToolError> {
        // The first of each warms up, and is the one whose bytes are checked.
        let mut hashes = self.new_hashes();
        self.save(&hashes)?;
        self.load(&hashes, true)?;
        self.cache.verify(1)?;
        let cpu = || cpu_ns(daemon).unwrap_or(0) as f64;
        let (mut saves, mut loads) = (Vec::new(), Vec::new());
        let before = cpu();
        for _ in 0..self.case.rounds {
            hashes = self.new_hashes();
            saves.push(self.save(&hashes)?);
        }
        let between = cpu();
        for _ in 0..self.case.rounds {
            loads.push(self.load(&hashes, false)?);
        }
        let after = cpu();
        let share = |cpu: f64, times: &[f64]| cpu / times.iter().sum::<f64>();
        Ok(Figures {
            save_ns: median(&saves),
            load_ns: median(&loads),
            save_cpu: share(between - before, &saves),
            load_cpu: share(after - between, &loads),
        })
    }

    fn interfere(&mut self, gpu: &Gpu, compute: Compute) -> Result<Slowdown, ToolError> {
        let mut products = ComputeLoop::new(compute)?;
        let alone =
            |products: &mut ComputeLoop| products.run(gpu, INTERFERENCE, &AtomicBool::new(true));
        alone(&mut products)?;
        let before = alone(&mut products)?;
        let mut hashes = self.new_hashes();
        self.save(&hashes)?;
        let (saving_ns, saves) = beside(gpu, &mut products, || {
            hashes = self.new_hashes();
            self.save(&hashes)
        })?;
        let (loading_ns, loads) = beside(gpu, &mut products, || self.load(&hashes, false))?;
        let after = alone(&mut products)?;
        let bytes = self.case.shape.total_bytes() as f64;
        Ok(Slowdown {
            alone_ns: (before + after) / 2.0,
            saving_ns,
            loading_ns,
            save_gbps: bytes / median(&saves),
            load_gbps: bytes / median(&loads),
        })
    }
}

/// Computes on another thread while `copy` is called again and again; gives the median product and
/// the times of the copies.
fn beside(
    gpu: &Gpu,
    products: &mut ComputeLoop,
    mut copy: impl FnMut() -> Result<f64, ToolError>,
) -> Result<(f64, Vec<f64>), ToolError> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let computing = scope.spawn(|| products.run(gpu, INTERFERENCE, &stop));
        let started = Instant::now();
        let mut times = Vec::new();
        let mut result = Ok(());
        while started.elapsed() < INTERFERENCE && result.is_ok() {
            result = copy().map(|time| times.push(time));
        }
        stop.store(true, Ordering::Relaxed);
        let product = computing.join().map_err(|_| ToolError::Child {
            process: "the engine".into(),
            what: "its computing thread panicked".into(),
        })?;
        result?;
        Ok((product?, times))
    })
}

fn expect_all(what: &str, count: u32, hashes: &[BlockHash]) -> Result<(), ToolError> {
    if count as usize == hashes.len() {
        return Ok(());
    }
    let all = hashes.len();
    Err(ToolError::Child {
        process: "the daemon".into(),
        what: format!("{what} {count} of {all} blocks: is its pool too small?"),
    })
}
