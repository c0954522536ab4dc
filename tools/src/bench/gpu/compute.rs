//! A loop of products on the engine's GPU, and how long each takes.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::case::Compute;
use super::engine::Product;
use crate::gpu::{Blas, DeviceMemory, Event, Gpu, GpuError, Matrix, Stream};
use crate::replay::latency::median;

const MATMUL: i32 = 4096;
const GEMV: i32 = 8192;
const GEMV_MATRICES: usize = 16;
/// Products that are submitted before the first is waited for: the GPU never runs dry.
const AHEAD: usize = 8;
/// Bytes of numbers that are made; operands that are longer have them again and again.
const NUMBERS: usize = 32 << 20;

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
            Compute::Matmul | Compute::MatmulOfZeros => 3 * matrix(MATMUL),
            Compute::Gemv => GEMV_MATRICES * matrix(GEMV) + 4 * GEMV as usize,
        };
        let operands = DeviceMemory::allocate(bytes)?;
        match kind {
            Compute::MatmulOfZeros => operands.fill(0)?,
            Compute::Matmul | Compute::Gemv => fill_with_numbers(&operands)?,
        }
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
            Compute::Matmul | Compute::MatmulOfZeros => {
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
        let warm = &times[times.len() / 4..];
        Ok(Product {
            median_ns: median(warm),
            mean_ns: warm.iter().sum::<f64>() / warm.len().max(1) as f64,
        })
    }
}

/// Writes numbers as weights and activations are: spread about normally around 0. The power that a
/// product takes, and with it the clock of the GPU, depends on them.
fn fill_with_numbers(operands: &DeviceMemory) -> Result<(), GpuError> {
    let mut random = SmallRng::seed_from_u64(1);
    let numbers: Vec<u8> = (0..NUMBERS / 2)
        .flat_map(|_| bf16(normal(random.random())).to_le_bytes())
        .collect();
    let parts = (0..operands.bytes()).step_by(NUMBERS);
    parts.into_iter().try_for_each(|at| {
        let bytes = NUMBERS.min(operands.bytes() - at);
        operands.write(at, &numbers[..bytes])
    })
}

/// Of random bits a number that is about normal, with mean 0 and variance 1: the sum of four even
/// ones.
fn normal(bits: u64) -> f32 {
    let parts = [0, 16, 32, 48].map(|shift| f32::from((bits >> shift) as u16) / 65_536.0 - 0.5);
    parts.iter().sum::<f32>() * 3.0_f32.sqrt()
}

/// The upper half of an f32, which is all that bf16 keeps.
fn bf16(number: f32) -> u16 {
    (number.to_bits() >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_spread_as_a_normal_distribution_is() {
        let mut random = SmallRng::seed_from_u64(7);
        let numbers: Vec<f32> = (0..100_000).map(|_| normal(random.random())).collect();
        let count = numbers.len() as f32;
        let mean = numbers.iter().sum::<f32>() / count;
        let variance = numbers.iter().map(|n| (n - mean).powi(2)).sum::<f32>() / count;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.03, "{variance}");
        let near = numbers.iter().filter(|n| n.abs() < 1.0).count() as f32 / count;
        assert!((0.64..0.72).contains(&near), "{near}");
    }

    #[test]
    fn bf16_keeps_sign_exponent_and_seven_bits() {
        assert_eq!(bf16(1.0), 0x3F80);
        assert_eq!(bf16(-2.0), 0xC000);
        assert_eq!(bf16(1.0 + 1.0 / 128.0), 0x3F81);
    }
}
