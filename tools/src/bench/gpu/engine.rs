//! The engine of `bench gpu`, a process of its own: GPU memory, a client, and what is timed.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pegaflow_shm::BlockHash;
use serde::{Deserialize, Serialize};

use super::cache::GpuCache;
use super::case::{Case, Compute, GpuShape, Target};
use super::compute::ComputeLoop;
use super::raw::{self, Copying, Shape};
use crate::bench::save::ThreadTimes;
use crate::children::die_with_parent;
use crate::error::ToolError;
use crate::gpu::{DeviceMemory, Gpu, Pair, PinnedMemory, Stream};
use crate::replay::kv::{KvShape, MemoryKind};
use crate::replay::latency::median;
use crate::replay::member::{Identity, Member, expect_ok};
use crate::replay::pipe::{LineReader, LineWriter};
use crate::replay::trace::block_hash;

/// Hidden argument: become an engine.
pub const ENGINE_ARGUMENT: &str = "__bench-gpu-engine";
/// Bytes of the copies that are the limit.
const RAW_BYTES: usize = 1 << 30;
/// How long each way is copied: what several GPUs do together is seen only while all are at it.
const RAW_TIME: Duration = Duration::from_millis(400);
/// A direction over the bus, or both at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// To the host: saves.
    Out,
    /// To the GPU: loads.
    In,
    /// Both at once.
    Both,
}

/// What an engine is told. Several engines that do the same at once are told so when each has
/// answered what was before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open this GPU; answered [`Answer::Opened`].
    Open {
        /// Number of the GPU.
        gpu: u32,
    },
    /// Get ready for [`Order::Limit`]; answered [`Answer::Done`].
    PrepareLimit,
    /// Take the limit one way; answered [`Answer::Rate`]. Both ways come last.
    Limit {
        /// Which way.
        way: Way,
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
    /// Save and load once, and check the bytes; answered [`Answer::Done`].
    WarmUp,
    /// Measure what was prepared, one way, which saves have to go first; answered
    /// [`Answer::Measured`].
    Measure {
        /// Which way.
        way: Way,
        /// Process of the daemon.
        daemon: u32,
    },
    /// Compute, while what was prepared is saved or loaded again and again if so wished, which
    /// [`Order::WarmUp`] has to go before; answered [`Answer::Product`].
    Compute {
        /// What to compute.
        compute: Compute,
        /// For how long.
        part_ms: u64,
        /// Not both.
        beside: Option<Way>,
    },
    /// Copy without a daemon until [`Order::StopCopies`]; answered [`Answer::Done`] when the first
    /// copies are.
    StartCopies {
        /// One way, not both.
        way: Way,
        /// How.
        shape: Shape,
    },
    /// Answered [`Answer::Rate`].
    StopCopies,
}

/// What an engine answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The GPU is open.
    Opened {
        /// Its name.
        name: String,
    },
    /// Nothing to be told.
    Done,
    /// What one large copy does, or two at once, in GB/s.
    Rate(f64),
    /// Registered.
    Ready {
        /// How long allocating and filling took, in milliseconds.
        fill_ms: f64,
        /// How long connecting and registering took, in milliseconds.
        register_ms: f64,
    },
    /// Of one case and way; of both at once only if the case has a rate.
    Measured(Option<Measured>),
    /// Of one computation, and the rate in GB/s of what went on beside it.
    Product(Product, Option<f64>),
    /// It could not be done.
    Failed(String),
}

/// What was measured one way.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Nanoseconds of the median.
    pub ns: f64,
    /// CPU of the daemon meanwhile, in cores.
    pub cpu: f64,
}

/// What large copies between GPU memory and pinned memory of the engine do, in GB/s.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Limit {
    /// One to the host.
    pub out_gbps: f64,
    /// One to the GPU.
    pub in_gbps: f64,
    /// One each way at once, together.
    pub both_gbps: f64,
}

/// What was measured in a case.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Nanoseconds of the median save.
    pub save_ns: f64,
    /// Nanoseconds of the median load.
    pub load_ns: f64,
    /// Nanoseconds of the median load of half of the blocks while the other half is saved; of cases
    /// with a rate.
    pub both_ns: Option<f64>,
    /// CPU of the daemon while it saved, in cores.
    pub save_cpu: f64,
    /// CPU of the daemon while it loaded, in cores.
    pub load_cpu: f64,
}

/// Nanoseconds of a product.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Product {
    /// Median.
    pub median_ns: f64,
    /// Mean, which sees the few that wait for long.
    pub mean_ns: f64,
}

impl Product {
    /// Of several turns: the median of their medians, and of their means.
    pub fn of_turns(turns: &[Product]) -> Product {
        let middle = |figure: fn(&Product) -> f64| {
            let figures: Vec<f64> = turns.iter().map(figure).collect();
            median(&figures)
        };
        Product {
            median_ns: middle(|turn| turn.median_ns),
            mean_ns: middle(|turn| turn.mean_ns),
        }
    }

    /// How many times as long as `alone` it takes.
    pub fn times(self, alone: Product) -> Times {
        Times {
            median: self.median_ns / alone.median_ns,
            mean: self.mean_ns / alone.mean_ns,
        }
    }
}

/// How much longer a product takes, as a factor.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Of the medians.
    pub median: f64,
    /// Of the means.
    pub mean: f64,
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "x{:.3} (x{:.3})", self.median, self.mean)
    }
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
    seed: u64,
    saved: u64,
    queries: u64,
    /// What was saved last.
    held: Vec<BlockHash>,
}

#[derive(Default)]
struct Engine {
    prepared: Option<Prepared>,
    raw: Option<RawCopies>,
    computing: Option<ComputeLoop>,
    copying: Option<Copying>,
    pair: Option<Pair>,
    gpu: Option<Arc<Gpu>>,
    /// Of the bytes, which differ from GPU to GPU.
    seed: u64,
}

impl Engine {
    fn obey(&mut self, order: Order) -> Result<Answer, ToolError> {
        match order {
            Order::Open { gpu } => {
                let opened = Gpu::open(gpu)?;
                let name = opened.name()?;
                (self.gpu, self.seed) = (Some(Arc::new(opened)), 1 + u64::from(gpu));
                Ok(Answer::Opened { name })
            }
            Order::PrepareLimit => {
                self.raw = Some(RawCopies::new()?);
                Ok(Answer::Done)
            }
            Order::Limit { way } => {
                let rate = self.raw.as_mut().ok_or_else(not_prepared)?.rate(way)?;
                if way == Way::Both {
                    self.raw = None;
                }
                Ok(Answer::Rate(rate))
            }
            Order::Prepare { socket, salt, case } => {
                (self.prepared, self.computing) = (None, None);
                let started = Instant::now();
                let cache = GpuCache::allocate(case.shape)?;
                cache.fill(self.seed)?;
                let filled = Instant::now();
                self.prepared = Some(Prepared::new(socket, salt, case, (cache, self.seed))?);
                Ok(Answer::Ready {
                    fill_ms: (filled - started).as_secs_f64() * 1e3,
                    register_ms: filled.elapsed().as_secs_f64() * 1e3,
                })
            }
            Order::WarmUp => {
                self.prepared()?.warm_up()?;
                Ok(Answer::Done)
            }
            Order::Measure { way, daemon } => {
                Ok(Answer::Measured(self.prepared()?.measure(way, daemon)?))
            }
            Order::Compute {
                compute,
                part_ms,
                beside,
            } => {
                let part = Duration::from_millis(part_ms);
                let (product, gbps) = self.compute(compute, part, beside)?;
                Ok(Answer::Product(product, gbps))
            }
            Order::StartCopies { way, shape } => {
                let pair = match self.pair.take() {
                    Some(pair) => pair,
                    None => raw::pair()?,
                };
                self.copying = Some(Copying::start(&self.gpu()?, pair, way, shape)?);
                Ok(Answer::Done)
            }
            Order::StopCopies => {
                let copying = self.copying.take().ok_or_else(not_prepared)?;
                let (gbps, pair) = copying.stop()?;
                self.pair = Some(pair);
                Ok(Answer::Rate(gbps))
            }
        }
    }

    fn gpu(&self) -> Result<Arc<Gpu>, ToolError> {
        self.gpu.clone().ok_or_else(not_prepared)
    }

    /// Computes for so long, with the same memory as the last time if it was the same; gives also
    /// the rate of what went on beside it.
    fn compute(
        &mut self,
        compute: Compute,
        part: Duration,
        way: Option<Way>,
    ) -> Result<(Product, Option<f64>), ToolError> {
        let gpu = self.gpu()?;
        if self.computing.as_ref().is_none_or(|l| l.kind() != compute) {
            self.computing = None;
            let mut products = ComputeLoop::new(compute)?;
            products.run(&gpu, part, &AtomicBool::new(true))?;
            self.computing = Some(products);
        }
        let products = self.computing.as_mut().ok_or_else(not_prepared)?;
        let Some(way) = way else {
            let product = products.run(&gpu, part, &AtomicBool::new(true))?;
            return Ok((product, None));
        };
        let prepared = self.prepared.as_mut().ok_or_else(not_prepared)?;
        let (product, times) = beside(&gpu, part, products, || prepared.copy(way))?;
        let bytes = prepared.case.shape.total_bytes() as f64;
        Ok((product, Some(bytes / median(&times))))
    }

    fn prepared(&mut self) -> Result<&mut Prepared, ToolError> {
        self.prepared.as_mut().ok_or_else(not_prepared)
    }
}

fn not_prepared() -> ToolError {
    ToolError::Plan("an engine is told to measure before it is prepared".into())
}

/// Large copies between GPU memory and pinned memory of this process: the limit.
struct RawCopies {
    memories: [DeviceMemory; 2],
    hosts: [PinnedMemory; 2],
    streams: [Stream; 2],
}

impl RawCopies {
    fn new() -> Result<RawCopies, ToolError> {
        let memories = [
            DeviceMemory::allocate(RAW_BYTES)?,
            DeviceMemory::allocate(RAW_BYTES)?,
        ];
        let mut hosts = [
            PinnedMemory::allocate(RAW_BYTES)?,
            PinnedMemory::allocate(RAW_BYTES)?,
        ];
        hosts.iter_mut().for_each(|host| host.fill(0x5A));
        Ok(RawCopies {
            memories,
            hosts,
            streams: [Stream::new()?, Stream::new()?],
        })
    }

    /// GB/s of the median copy, or of two at once, together.
    fn rate(&mut self, way: Way) -> Result<f64, ToolError> {
        let (memories, hosts, streams) = (&self.memories, &self.hosts, &self.streams);
        let out = || memories[0].read_to(0, (&hosts[0], 0), RAW_BYTES, &streams[0]);
        let back = || memories[1].write_from(0, (&hosts[1], 0), RAW_BYTES, &streams[1]);
        let (mut rates, began) = (Vec::new(), Instant::now());
        while began.elapsed() < RAW_TIME {
            let start = Instant::now();
            if way != Way::In {
                out()?;
            }
            if way != Way::Out {
                back()?;
            }
            streams.iter().try_for_each(Stream::synchronize)?;
            let copies = if way == Way::Both { 2 } else { 1 };
            rates.push((copies * RAW_BYTES) as f64 / start.elapsed().as_nanos() as f64);
        }
        Ok(median(&rates))
    }
}

impl Prepared {
    fn new(
        socket: PathBuf,
        salt: String,
        case: Case,
        (cache, seed): (GpuCache, u64),
    ) -> Result<Prepared, ToolError> {
        let GpuShape {
            blocks, segments, ..
        } = case.shape;
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
            seed,
            saved: 0,
            queries: 0,
            held: Vec::new(),
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

    /// The first of each, and the one whose bytes are checked.
    fn warm_up(&mut self) -> Result<(), ToolError> {
        let hashes = self.new_hashes();
        self.save(&hashes)?;
        self.load(&hashes, true)?;
        self.cache.verify(self.seed)?;
        self.held = hashes;
        Ok(())
    }

    fn measure(&mut self, way: Way, daemon: u32) -> Result<Option<Measured>, ToolError> {
        let cpu = || {
            ThreadTimes::of(daemon).ok_or_else(|| ToolError::Child {
                process: "the daemon".into(),
                what: "ended".into(),
            })
        };
        let mut times = Vec::new();
        let before = cpu()?;
        match way {
            Way::Out | Way::In => {
                for _ in 0..self.case.rounds {
                    times.push(self.copy(way)?);
                }
            }
            Way::Both => {
                let hashes = std::mem::take(&mut self.held);
                if matches!(self.case.target, Target::Ratio(_)) && self.blocks.len() > 1 {
                    times = self.both_ways(&hashes)?;
                }
                // Nothing that another GPU's engine had copied meanwhile came here.
                self.cache.verify(self.seed)?;
                if times.is_empty() {
                    return Ok(None);
                }
            }
        }
        let cpu_ns = cpu()?.since(&before) as f64;
        Ok(Some(Measured {
            ns: median(&times),
            cpu: cpu_ns / times.iter().sum::<f64>(),
        }))
    }

    /// Loads half of the blocks while the other half is saved; gives nanoseconds of each round.
    fn both_ways(&mut self, held: &[BlockHash]) -> Result<Vec<f64>, ToolError> {
        let half = self.blocks.len() / 2;
        let (into, from) = (&self.blocks[..half], &self.blocks[half..2 * half]);
        let mut times = Vec::new();
        for _ in 0..self.case.rounds {
            self.queries += 1;
            let answer = self.member.query(self.queries, &held[..half])?;
            let lease = expect_ok("query", answer)?.lease;
            let first = self.saved * self.blocks.len() as u64;
            self.saved += 1;
            let new: Vec<_> = (first..first + half as u64).map(block_hash).collect();
            let start = Instant::now();
            let (loaded, saved) = self.member.load_and_save((lease, into), (&new, from))?;
            times.push(start.elapsed().as_nanos() as f64);
            expect_ok("load", loaded)?;
            expect_all("stored", expect_ok("save", saved)?.count, &new)?;
        }
        Ok(times)
    }

    /// Saves all blocks under new hashes, or loads what was saved last; gives nanoseconds.
    fn copy(&mut self, way: Way) -> Result<f64, ToolError> {
        let (hashes, time) = match way {
            Way::Out => {
                let hashes = self.new_hashes();
                let time = self.save(&hashes)?;
                (hashes, time)
            }
            Way::In => {
                let hashes = std::mem::take(&mut self.held);
                let time = self.load(&hashes, false)?;
                (hashes, time)
            }
            Way::Both => return Err(ToolError::Plan("copies go one way at a time".into())),
        };
        self.held = hashes;
        Ok(time)
    }
}

/// Computes on another thread while `copy` is called again and again; gives the products' times and
/// the times of the copies.
fn beside(
    gpu: &Gpu,
    part: Duration,
    products: &mut ComputeLoop,
    mut copy: impl FnMut() -> Result<f64, ToolError>,
) -> Result<(Product, Vec<f64>), ToolError> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let computing = scope.spawn(|| products.run(gpu, part, &stop));
        let started = Instant::now();
        let mut times = Vec::new();
        let mut result = Ok(());
        while started.elapsed() < part && result.is_ok() {
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
