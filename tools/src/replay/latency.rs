//! Latencies as they are measured and as they travel between processes.

#![forbid(unsafe_code)]

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Longest latency that is told apart: one minute.
const HIGHEST_NS: u64 = 60_000_000_000;

/// Collects latencies with three significant digits.
#[derive(Clone, Debug)]
pub struct Latency {
    histogram: Histogram<u64>,
}

impl Default for Latency {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, HIGHEST_NS, 3).expect("the bounds are valid");
        Latency { histogram }
    }
}

impl Latency {
    /// Counts one latency in nanoseconds.
    pub fn record_ns(&mut self, nanos: u64) {
        self.histogram.saturating_record(nanos.max(1));
    }

    /// Counts one latency.
    pub fn record(&mut self, elapsed: Duration) {
        self.record_ns(elapsed.as_nanos() as u64);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The latency in microseconds that the given share (0 to 1) does not exceed; 0 of none.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        if self.histogram.is_empty() {
            return 0.0;
        }
        self.histogram.value_at_quantile(quantile) as f64 / 1e3
    }

    /// `{p50, p99}` in microseconds.
    pub fn json(&self) -> Value {
        json!({ "p50": self.quantile_us(0.5), "p99": self.quantile_us(0.99) })
    }
}

/// The middle of some numbers, 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
    }
}

/// The number that the given share of some numbers does not exceed, 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_ramp() {
        let mut latency = Latency::default();
        for micros in 1..=1000 {
            latency.record(Duration::from_micros(micros));
        }
        assert!((latency.quantile_us(0.5) - 500.0).abs() < 1.0);
        assert!((latency.quantile_us(0.99) - 990.0).abs() < 1.0);
        assert_eq!(Latency::default().quantile_us(0.5), 0.0);
        let ramp: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&ramp, 0.99), 99.0);
        assert_eq!(quantile(&ramp, 0.5), 50.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn the_median_of_an_even_count_lies_between() {
        assert_eq!(median(&[3.0, 1.0]), 2.0);
        assert_eq!(median(&[3.0, 1.0, 9.0]), 3.0);
        assert_eq!(median(&[]), 0.0);
    }
}
