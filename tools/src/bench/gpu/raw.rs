//! What copies without a daemon cost an engine that computes: those of a process of its own, at
//! full rate, in the shapes in which a daemon could make them.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::cache::value;
use super::engine::Way;
use crate::error::ToolError;
use crate::gpu::{Direction, Event, Gpu, GpuError, Pair, Rows, Stream};

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
    /// All of them.
    pub const ALL: [Shape; 4] = [Shape::Whole, Shape::Pages, Shape::Pieces, Shape::Rows];

    /// What the table calls it.
    pub fn name(self) -> &'static str {
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
    thread: JoinHandle<Result<(f64, Pair), GpuError>>,
}

/// Memories between which they go, with bytes like those that a daemon has to copy: what bytes are
/// decides how much power a copy takes.
///
/// # Errors
/// GPU or host have not as much.
pub fn pair() -> Result<Pair, GpuError> {
    let words = (0..BYTES).step_by(8).map(|at| value(0, at));
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    Pair::of(&bytes)
}

impl Copying {
    /// Begins, and returns when the first are done.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn start(gpu: &Arc<Gpu>, pair: Pair, way: Way, shape: Shape) -> Result<Copying, ToolError> {
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
            let gbps = copy_until(&told, &pair, (direction, shape), || {
                // Who waits for this may have given up.
                let _ = begun.send(());
            })?;
            Ok((gbps, pair))
        });
        let copying = Copying { stop, thread };
        if has_begun.recv().is_ok() {
            return Ok(copying);
        }
        copying.stop().and_then(|_| Err(ended()))
    }

    /// Ends them; gives GB/s, and the memories.
    ///
    /// # Errors
    /// The GPU has failed.
    pub fn stop(self) -> Result<(f64, Pair), ToolError> {
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
