//! What copies without a daemon cost an engine that computes: those of a process of its own, at
//! full rate, in the shapes in which a daemon could make them.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::case::Compute;
use super::engine::{Answer, Order, Product, Way};
use super::{Engine, say};
use crate::error::ToolError;
use crate::gpu::{Direction, Event, Gpu, GpuError, Pair, Rows, Stream};
use crate::output::table;

/// GPU memory and pinned memory of the copying process.
const BYTES: usize = 512 << 20;
/// Bytes that are queued at a time; so many are under way twice, as in the daemon.
const CHUNK: usize = 64 << 20;
const PAGE: usize = 2 << 20;
const ROW: usize = 64 << 10;

/// How copies are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// One for each chunk.
    Whole,
    /// One for each page of 2 MiB, in batches: what the daemon does for such pages where they lie
    /// apart.
    Pages,
    /// One for each 64 KiB, in batches.
    Pieces,
    /// Two of each page: every other row of 64 KiB.
    Rows,
}

impl Shape {
    const ALL: [Shape; 4] = [Shape::Whole, Shape::Pages, Shape::Pieces, Shape::Rows];

    fn name(self) -> &'static str {
        match self {
            Shape::Whole => "copies of 64 MiB",
            Shape::Pages => "batches of 2-MiB copies",
            Shape::Pieces => "batches of 64-KiB copies",
            Shape::Rows => "2-MiB pages, every other row of 64 KiB",
        }
    }

    fn copy(
        self,
        pair: &Pair,
        direction: Direction,
        from: usize,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        let chunk = from..from + CHUNK;
        match self {
            Shape::Whole => pair.copy_pieces(direction, chunk, CHUNK, stream),
            Shape::Pages => pair.copy_pieces(direction, chunk, PAGE, stream),
            Shape::Pieces => pair.copy_pieces(direction, chunk, ROW, stream),
            Shape::Rows => chunk.step_by(PAGE).try_for_each(|page| {
                [page, page + ROW].into_iter().try_for_each(|offset| {
                    let rows = Rows {
                        offset,
                        width: ROW,
                        pitch: 2 * ROW,
                        count: PAGE / (2 * ROW),
                    };
                    pair.copy_rows(direction, rows, stream)
                })
            }),
        }
    }
}

/// Copies that go on until they are stopped.
pub struct Copying {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<f64, GpuError>>,
}

impl Copying {
    /// Begins, and returns when the first are done.
    ///
    /// # Errors
    /// The GPU fails, or has too little memory.
    pub fn start(gpu: &Arc<Gpu>, way: Way, shape: Shape) -> Result<Copying, ToolError> {
        let direction = match way {
            Way::Out => Direction::ToHost,
            Way::In => Direction::ToDevice,
            Way::Both => return Err(ToolError::Plan("raw copies go one way".into())),
        };
        let (stop, gpu) = (Arc::new(AtomicBool::new(false)), gpu.clone());
        let (begun, has_begun) = channel();
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            gpu.bind()?;
            let pair = Pair::allocate(BYTES)?;
            copy_until(&told, &pair, (direction, shape), || {
                // Who waits for this may have given up.
                let _ = begun.send(());
            })
        });
        let copying = Copying { stop, thread };
        if has_begun.recv().is_ok() {
            return Ok(copying);
        }
        copying.stop().and_then(|_| Err(ended()))
    }

    /// Ends them; gives GB/s.
    ///
    /// # Errors
    /// The GPU has failed.
    pub fn stop(self) -> Result<f64, ToolError> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.thread.join().map_err(|_| ended())??)
    }
}

fn ended() -> ToolError {
    ToolError::Child {
        process: "the copying process".into(),
        what: "its thread has ended".into(),
    }
}

/// Keeps two chunks under way until told to stop; gives GB/s.
fn copy_until(
    stop: &AtomicBool,
    pair: &Pair,
    (direction, shape): (Direction, Shape),
    begun: impl Fn(),
) -> Result<f64, GpuError> {
    let streams = [Stream::new()?, Stream::new()?];
    let events = [Event::new()?, Event::new()?];
    let places = pair.bytes() / CHUNK;
    let mut started = Instant::now();
    let (mut queued, mut counted_from) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let slot = queued % 2;
        if queued >= 2 {
            events[slot].synchronize()?;
        }
        if queued == 2 {
            begun();
            (started, counted_from) = (Instant::now(), queued - 1);
        }
        let from = queued % places * CHUNK;
        shape.copy(pair, direction, from, &streams[slot])?;
        events[slot].record(&streams[slot])?;
        queued += 1;
    }
    streams.iter().try_for_each(Stream::synchronize)?;
    let chunks = queued - counted_from;
    Ok((chunks * CHUNK) as f64 / started.elapsed().as_nanos() as f64)
}

/// What copies of one shape cost a computation.
#[derive(Clone, Debug, Serialize)]
pub struct RawRow {
    gpu: u32,
    pub shape: Shape,
    name: &'static str,
    compute: &'static str,
    /// A product alone.
    alone: Product,
    /// Beside copies to the host, and to the GPU.
    beside_out: Product,
    beside_in: Product,
    /// Their rates meanwhile.
    out_gbps: f64,
    in_gbps: f64,
}

impl RawRow {
    /// By how much a product slows down in the median, beside copies to the host and to the GPU.
    pub fn slowdowns(&self) -> [f64; 2] {
        [self.beside_out, self.beside_in].map(|beside| beside.times(self.alone).median)
    }
}

/// Measures all shapes beside one computation.
pub(super) fn measure(
    engine: &mut Engine,
    compute: Compute,
    part_ms: u64,
) -> Result<Vec<RawRow>, ToolError> {
    let gpu = engine.gpu;
    let mut copier = Engine::start(gpu)?;
    match copier.ask(&Order::Open { gpu })? {
        Answer::Opened { .. } => {}
        other => return Err(copier.unexpected(&other)),
    }
    let order = Order::Compute { compute, part_ms };
    let mut product = || match engine.ask(&order)? {
        Answer::Product(product) => Ok(product),
        other => Err(engine.unexpected(&other)),
    };
    let mut rows = Vec::new();
    let mut before = product()?;
    for shape in Shape::ALL {
        say(&format!("{} beside {}", compute.name(), shape.name()));
        let mut beside = |way| {
            match copier.ask(&Order::StartCopies { way, shape })? {
                Answer::Done => {}
                other => return Err(copier.unexpected(&other)),
            }
            let product = product()?;
            match copier.ask(&Order::StopCopies)? {
                Answer::Rate(gbps) => Ok((product, gbps)),
                other => Err(copier.unexpected(&other)),
            }
        };
        let (beside_out, out_gbps) = beside(Way::Out)?;
        let (beside_in, in_gbps) = beside(Way::In)?;
        let after = product()?;
        rows.push(RawRow {
            gpu,
            shape,
            name: shape.name(),
            compute: compute.name(),
            alone: Product::between(before, after),
            beside_out,
            beside_in,
            out_gbps,
            in_gbps,
        });
        before = after;
    }
    Ok(rows)
}

/// As a table.
pub(super) fn render(rows: &[RawRow]) -> String {
    let header = [
        "GPU",
        "raw copies",
        "engine",
        "out",
        "in",
        "slow-down by out (mean)",
        "by in (mean)",
    ];
    let mut raws = table(&header, &[0, 3, 4, 5, 6]);
    let rate = |gbps: f64| format!("{gbps:.1} GB/s");
    for row in rows {
        raws.add_row([
            row.gpu.to_string(),
            row.name.to_owned(),
            row.compute.to_owned(),
            rate(row.out_gbps),
            rate(row.in_gbps),
            row.beside_out.times(row.alone).to_string(),
            row.beside_in.times(row.alone).to_string(),
        ]);
    }
    format!("Copies of a process of its own, without a daemon\n{raws}")
}
