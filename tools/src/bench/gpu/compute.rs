//! A loop of products on the engine's GPU, and how long each takes.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::case::Compute;
use super::engine::Product;
use crate::gpu::{Blas, DeviceMemory, Event, Gpu, GpuError, Matrix, Stream};
use crate::replay::latency::median;

const MATMUL: i32 = 4096;
const GEMV: i32 = 8192;
const GEMV_MATRICES: usize = 16;
/// Products that are submitted before the first is waited for: the GPU never runs dry.
const AHEAD: usize = 8;

/// One kind of product, with its memory.
pub struct ComputeLoop {
    kind: Compute,
    blas: Blas,
    stream: Stream,
    operands: DeviceMemory,
}

impl ComputeLoop {
    /// On the GPU that is the thread's.
    ///
    /// # Errors
    /// There is no cuBLAS, or no memory.
    pub fn new(kind: Compute) -> Result<ComputeLoop, GpuError> {
        let stream = Stream::new()?;
        let blas = Blas::new(&stream)?;
        let matrix = |rows: i32| 2 * rows as usize * rows as usize;
        let bytes = match kind {
            Compute::Matmul => 3 * matrix(MATMUL),
            Compute::Gemv => GEMV_MATRICES * matrix(GEMV) + 4 * GEMV as usize,
        };
        let operands = DeviceMemory::allocate(bytes)?;
        operands.fill(0)?;
        Ok(ComputeLoop {
            kind,
            blas,
            stream,
            operands,
        })
    }

    /// What it computes.
    pub fn kind(&self) -> Compute {
        self.kind
    }

    fn submit(&mut self) -> Result<(), GpuError> {
        let (blas, memory) = (&mut self.blas, &self.operands);
        let at = |offset| Matrix { memory, offset };
        match self.kind {
            Compute::Matmul => {
                let bytes = 2 * MATMUL as usize * MATMUL as usize;
                let size = (MATMUL, MATMUL, MATMUL);
                blas.multiply(size, at(0), at(bytes), at(2 * bytes))
            }
            Compute::Gemv => {
                let bytes = 2 * GEMV as usize * GEMV as usize;
                let vectors = GEMV_MATRICES * bytes;
                let out = vectors + 2 * GEMV as usize;
                (0..GEMV_MATRICES).try_for_each(|matrix| {
                    let size = (GEMV, 1, GEMV);
                    self.blas
                        .multiply(size, at(matrix * bytes), at(vectors), at(out))
                })
            }
        }
    }

    /// Computes until told to stop, for `least` at least; gives the nanoseconds of one.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn run(
        &mut self,
        gpu: &Gpu,
        least: Duration,
        stop: &AtomicBool,
    ) -> Result<Product, GpuError> {
        gpu.bind()?;
        let mut events = Vec::with_capacity(AHEAD + 1);
        for _ in 0..=AHEAD {
            events.push(Event::new()?);
        }
        events[0].record(&self.stream)?;
        let (mut times, mut submitted) = (Vec::new(), 0);
        let started = Instant::now();
        while started.elapsed() < least || !stop.load(Ordering::Relaxed) {
            self.submit()?;
            submitted += 1;
            events[submitted % (AHEAD + 1)].record(&self.stream)?;
            if submitted >= AHEAD {
                // The oldest two that are still kept lie one product apart.
                let oldest = submitted - AHEAD;
                let (before, after) = (oldest % (AHEAD + 1), (oldest + 1) % (AHEAD + 1));
                events[after].synchronize()?;
                times.push(events[after].ns_since(&events[before])?);
            }
        }
        self.stream.synchronize()?;
        // The first ones warm up clocks and library.
        let warm = &times[times.len() / 10..];
        Ok(Product {
            median_ns: median(warm),
            mean_ns: warm.iter().sum::<f64>() / warm.len().max(1) as f64,
        })
    }
}
