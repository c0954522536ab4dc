//! Counters at two moments, and the rates between them.

#![forbid(unsafe_code)]

use std::time::Instant;

use pegaflow_shm::BootId;
use pegaflow_shm::node::{Counter, Gauge, HISTOGRAM_BUCKETS, Histogram, HistogramSnapshot};
use serde_json::{Map, Value, json};

use crate::node::{NodeView, ProcStat};
use crate::output::{ratio, unix_now_ms};
use crate::status::daemon_json;

/// All counters and histograms at one moment.
pub struct Sample {
    at: Instant,
    boot_id: BootId,
    counters: Vec<u64>,
    histograms: Vec<HistogramSnapshot>,
    hits: u64,
    queried: u64,
    cpu_seconds: Option<f64>,
}

impl Sample {
    /// Reads them.
    pub fn take(view: &NodeView) -> Sample {
        let (hits, queried) = view.hits_of_queried();
        Sample {
            at: Instant::now(),
            boot_id: view.header.boot_id,
            counters: Counter::ALL
                .iter()
                .map(|counter| view.reader.counter(*counter))
                .collect(),
            histograms: Histogram::ALL
                .iter()
                .map(|one| view.reader.histogram(*one))
                .collect(),
            hits,
            queried,
            cpu_seconds: ProcStat::read(view.header.pid).map(|stat| stat.cpu_seconds()),
        }
    }
}

/// What happened between two samples.
pub struct Rates {
    seconds: f64,
    counters: Vec<u64>,
    histograms: Vec<HistogramSnapshot>,
    /// Hits and blocks queried.
    pub hits: (u64, u64),
    /// CPUs the daemon used, 1 being one whole CPU.
    pub daemon_cpus: Option<f64>,
}

fn difference(before: &HistogramSnapshot, now: &HistogramSnapshot) -> HistogramSnapshot {
    let mut buckets = [0; HISTOGRAM_BUCKETS];
    for (bucket, (now, before)) in buckets
        .iter_mut()
        .zip(now.buckets.iter().zip(&before.buckets))
    {
        *bucket = now.saturating_sub(*before);
    }
    HistogramSnapshot {
        count: now.count.saturating_sub(before.count),
        sum_nanos: now.sum_nanos.saturating_sub(before.sum_nanos),
        buckets,
    }
}

impl Rates {
    /// Of two samples; after a restart of the daemon, which counts from zero, everything is 0.
    pub fn between(before: &Sample, now: &Sample) -> Rates {
        let before = if before.boot_id == now.boot_id {
            before
        } else {
            now
        };
        let histograms = before.histograms.iter().zip(&now.histograms);
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let cpus = before.cpu_seconds.zip(now.cpu_seconds);
        Rates {
            seconds,
            counters: now
                .counters
                .iter()
                .zip(&before.counters)
                .map(|(now, before)| now.saturating_sub(*before))
                .collect(),
            histograms: histograms
                .map(|(before, now)| difference(before, now))
                .collect(),
            hits: (
                now.hits.saturating_sub(before.hits),
                now.queried.saturating_sub(before.queried),
            ),
            daemon_cpus: cpus
                .filter(|_| seconds > 0.0)
                .map(|(before, now)| (now - before).max(0.0) / seconds),
        }
    }

    /// A counter's increase per second.
    pub fn per_second(&self, counter: Counter) -> f64 {
        if self.seconds <= 0.0 {
            return 0.0;
        }
        self.counters[counter as usize] as f64 / self.seconds
    }

    /// A histogram of what happened in between.
    pub fn histogram(&self, histogram: Histogram) -> &HistogramSnapshot {
        &self.histograms[histogram as usize]
    }

    /// One line of `top --json`.
    pub fn json(&self, view: &NodeView) -> Value {
        let latencies: Map<String, Value> = Histogram::ALL
            .iter()
            .map(|histogram| {
                let snapshot = self.histogram(*histogram);
                let name = histogram.family().trim_start_matches("pegaflow_");
                let us = |share| snapshot.quantile_nanos(share) as f64 / 1e3;
                let value =
                    json!({ "count": snapshot.count, "p50_us": us(0.5), "p99_us": us(0.99) });
                (name.trim_end_matches("_seconds").to_owned(), value)
            })
            .collect();
        let gauge = |gauge| view.reader.gauge(gauge);
        json!({
            "unix_ms": unix_now_ms(),
            "interval_s": self.seconds,
            "daemon": daemon_json(view),
            "daemon_cpus": self.daemon_cpus,
            "queries_per_second": self.per_second(Counter::RequestsQuery),
            "loads_per_second": self.per_second(Counter::RequestsLoad),
            "saves_per_second": self.per_second(Counter::RequestsSave),
            "hit_ratio": ratio(self.hits.0, self.hits.1),
            "queried_blocks": self.hits.1,
            "save_gbps": self.per_second(Counter::SavedBytes) / 1e9,
            "load_gbps": self.per_second(Counter::LoadedBytes) / 1e9,
            "evicted_blocks_per_second": self.per_second(Counter::EvictedCapacity),
            "errors_per_second": self.per_second(Counter::RequestErrors),
            "latency": latencies,
            "pool_bytes": gauge(Gauge::PoolBytes),
            "pool_used_bytes": gauge(Gauge::PoolUsedBytes),
            "blocks": gauge(Gauge::BlocksHeld),
            "sessions": gauge(Gauge::Sessions),
            "leases": gauge(Gauge::Leases),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::NodePlace;
    use crate::node::tests::{fake_node, shm_folder};

    #[test]
    fn rates_count_what_happened_in_between_only() {
        let root = shm_folder();
        let writer = fake_node(root.path(), "n", std::process::id());
        let place = NodePlace {
            node: "n".into(),
            shm_dir: root.path().into(),
        };
        let view = NodeView::open(&place).unwrap();
        writer.add(Counter::RequestsQuery, 100);
        writer.observe(Histogram::Query, 1_000_000);
        let before = Sample::take(&view);
        writer.add(Counter::RequestsQuery, 10);
        writer.add(Counter::QueryHit, 3);
        writer.add(Counter::QueryMissAbsent, 1);
        writer.observe(Histogram::Query, 1_000);
        std::thread::sleep(std::time::Duration::from_millis(5));
        let rates = Rates::between(&before, &Sample::take(&view));
        assert_eq!(rates.hits, (3, 4));
        assert_eq!(rates.counters[Counter::RequestsQuery as usize], 10);
        assert!(rates.per_second(Counter::RequestsQuery) > 0.0);
        assert_eq!(rates.histogram(Histogram::Query).count, 1);
        assert!(rates.histogram(Histogram::Query).quantile_nanos(0.99) < 2_000);
        let same = Sample::take(&view);
        assert_eq!(
            Rates::between(&same, &same).per_second(Counter::RequestsQuery),
            0.0
        );
    }
}
