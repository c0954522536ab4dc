//! What a replay came to.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use comfy_table::Table;
use pegaflow_shm::node::{Counter, field_text};
use serde_json::{Value, json};

use super::latency::Latency;
use super::plan::Plan;
use super::scheduler::RequestDone;
use super::trace::Request;
use super::workload::totals;
use crate::daemon::DaemonInUse;
use crate::output::{count, facts, nanos, percent, ratio, size};

/// Most mismatches and errors told one by one.
const TOLD: usize = 10;

/// Sums over all requests.
pub struct Report {
    /// Requests done.
    pub requests: u64,
    blocks: u64,
    different_blocks: u64,
    hit_blocks: u64,
    probed_blocks: u64,
    probe_differs: u64,
    loaded_bytes: u64,
    verified_bytes: u64,
    saved_bytes: u64,
    stored: u64,
    skipped: u64,
    dropped: u64,
    mismatches: u64,
    errors: u64,
    told: Vec<String>,
    reasons: BTreeMap<String, u64>,
    probe: Latency,
    query: Latency,
    loading: Latency,
    fetch: Latency,
    save: Latency,
    load: Latency,
    save_ns: u64,
    load_ns: u64,
    seconds: f64,
    daemon_cpu_seconds: Option<f64>,
    plan: Plan,
    policy: String,
    pool_bytes: u64,
    /// Hits that had to come up from the SSD tier, and blocks that it was not given in time, as the
    /// daemon counts them.
    ssd: SsdCounts,
    /// The same before the first request.
    ssd_before: SsdCounts,
}

#[derive(Clone, Copy, Default)]
struct SsdCounts {
    hits: u64,
    unwritten: u64,
}

impl SsdCounts {
    fn of(daemon: &DaemonInUse) -> SsdCounts {
        daemon.view().map_or_else(
            |_| SsdCounts::default(),
            |view| SsdCounts {
                hits: view.reader.counter(Counter::QueryHitSsd),
                unwritten: view.reader.counter(Counter::SsdUnwritten),
            },
        )
    }
}

/// Bytes per nanosecond are gigabytes per second.
fn gbps(bytes: u64, nanos: u64) -> f64 {
    if nanos == 0 {
        0.0
    } else {
        bytes as f64 / nanos as f64
    }
}

impl Report {
    /// Nothing yet.
    pub fn new(plan: &Plan, daemon: &DaemonInUse, requests: &[Request]) -> Report {
        let header = daemon.view().ok().map(|view| view.header);
        Report {
            requests: 0,
            blocks: 0,
            different_blocks: totals(requests).1,
            hit_blocks: 0,
            probed_blocks: 0,
            probe_differs: 0,
            loaded_bytes: 0,
            verified_bytes: 0,
            saved_bytes: 0,
            stored: 0,
            skipped: 0,
            dropped: 0,
            mismatches: 0,
            errors: 0,
            told: Vec::new(),
            reasons: BTreeMap::new(),
            probe: Latency::default(),
            query: Latency::default(),
            loading: Latency::default(),
            fetch: Latency::default(),
            save: Latency::default(),
            load: Latency::default(),
            save_ns: 0,
            load_ns: 0,
            seconds: 0.0,
            daemon_cpu_seconds: None,
            plan: plan.clone(),
            policy: header.map_or_else(|| plan.policy.clone(), |header| field_text(&header.policy)),
            pool_bytes: header.map_or(plan.daemon.pool_bytes, |header| header.pool_bytes),
            ssd: SsdCounts::default(),
            ssd_before: SsdCounts::of(daemon),
        }
    }

    /// Adds one request.
    pub fn add(&mut self, done: RequestDone) {
        self.requests += 1;
        self.blocks += done.blocks;
        self.hit_blocks += u64::from(done.hits);
        self.probed_blocks += u64::from(done.probed);
        self.probe_differs += u64::from(done.probed != done.hits);
        *self.reasons.entry(done.reason).or_default() += 1;
        self.probe.record_ns(done.probe_ns);
        match done.fetch_ns {
            None => self.query.record_ns(done.query_ns),
            Some(nanos) => {
                self.loading.record_ns(done.query_ns);
                self.fetch.record_ns(nanos);
            }
        }
        self.complain(done.errors.len() as u64, done.errors);
        for rank in done.ranks {
            if let Some(nanos) = rank.load_ns {
                self.load.record_ns(nanos);
                self.load_ns += nanos;
            }
            if let Some(nanos) = rank.save_ns {
                self.save.record_ns(nanos);
                self.save_ns += nanos;
            }
            self.loaded_bytes += rank.loaded_bytes;
            self.verified_bytes += rank.verified_bytes;
            self.saved_bytes += rank.saved_bytes;
            self.stored += rank.stored;
            self.skipped += rank.skipped;
            self.dropped += rank.dropped;
            self.mismatches += rank.mismatches;
            self.complain(0, rank.described);
            self.complain(rank.errors.len() as u64, rank.errors);
        }
    }

    fn complain(&mut self, errors: u64, lines: Vec<String>) {
        self.errors += errors;
        let room = TOLD.saturating_sub(self.told.len());
        self.told.extend(lines.into_iter().take(room));
    }

    /// Notes what is known only at the end.
    pub fn finish(&mut self, elapsed: Duration, cpu_before: Option<f64>, daemon: &DaemonInUse) {
        self.seconds = elapsed.as_secs_f64();
        let (after, before) = (SsdCounts::of(daemon), self.ssd_before);
        self.ssd = SsdCounts {
            hits: after.hits.saturating_sub(before.hits),
            unwritten: after.unwritten.saturating_sub(before.unwritten),
        };
        self.daemon_cpu_seconds =
            cpu_before.and_then(|before| Some(daemon.cpu_seconds()? - before));
    }

    /// Hits that were in the pool.
    fn ram_hits(&self) -> u64 {
        self.hit_blocks.saturating_sub(self.ssd.hits)
    }

    /// Beside the progress bar.
    pub fn progress(&self) -> String {
        let wrong = match self.mismatches {
            0 => String::new(),
            mismatches => format!(", {mismatches} MISMATCHES"),
        };
        format!("{} hits{wrong}", percent(self.hit_blocks, self.blocks))
    }

    /// Every byte right and every request done.
    pub fn is_clean(&self) -> bool {
        self.mismatches == 0 && self.errors == 0
    }

    /// The first mismatches and errors in words.
    pub fn complaints(&self) -> impl Iterator<Item = String> + '_ {
        let more = (self.mismatches + self.errors).saturating_sub(self.told.len() as u64);
        let rest = (more > 0).then(|| format!("and {more} more"));
        self.told
            .iter()
            .map(|line| format!("pegactl: {line}"))
            .chain(rest)
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "requests": self.requests,
            "blocks": self.blocks,
            "different_blocks": self.different_blocks,
            "hit_blocks": self.hit_blocks,
            "hit_ratio": ratio(self.hit_blocks, self.blocks),
            "saved_bytes": self.saved_bytes,
            "loaded_bytes": self.loaded_bytes,
            "verified_bytes": self.verified_bytes,
            "mismatches": self.mismatches,
            "errors": self.errors,
            "save_gbps": gbps(self.saved_bytes, self.save_ns),
            "load_gbps": gbps(self.loaded_bytes, self.load_ns),
            "latency_us": {
                "probe": self.probe.json(),
                "query": self.query.json(),
                "query_loading": self.loading.json(),
                "fetch": self.fetch.json(),
                "save": self.save.json(),
                "load": self.load.json(),
            },
            "shards": { "stored": self.stored, "skipped": self.skipped, "dropped": self.dropped },
            "requests_by_miss_reason": self.reasons,
            "probe_hit_blocks": self.probed_blocks,
            "probe_differs_from_query": self.probe_differs,
            "engines": self.plan.engines,
            "ranks": self.plan.ranks,
            "page_bytes": self.plan.kv.page_bytes,
            "segments": self.plan.kv.segments,
            "memory": self.plan.kv.memory,
            "policy": self.policy,
            "capacity_blocks": self.plan.capacity_blocks,
            "ssd": self.plan.ssd,
            "ram_hit_blocks": self.ram_hits(),
            "ram_hit_ratio": ratio(self.ram_hits(), self.blocks),
            "ssd_hit_blocks": self.ssd.hits,
            "ssd_hit_ratio": ratio(self.ssd.hits, self.blocks),
            "miss_blocks": self.blocks - self.hit_blocks,
            "miss_ratio": ratio(self.blocks - self.hit_blocks, self.blocks),
            "ssd_unwritten_blocks": self.ssd.unwritten,
            "pool_bytes": self.pool_bytes,
            "seconds": self.seconds,
            "requests_per_second": self.requests as f64 / self.seconds,
            "daemon_cpu_seconds": self.daemon_cpu_seconds,
        })
    }

    /// For a person.
    pub fn table(&self) -> Table {
        let latency = |latency: &Latency| {
            format!(
                "p50 {}, p99 {} ({} requests)",
                nanos(latency.quantile_us(0.5) * 1e3),
                nanos(latency.quantile_us(0.99) * 1e3),
                count(latency.count())
            )
        };
        let Plan {
            engines,
            ranks,
            kv,
            capacity_blocks,
            ..
        } = &self.plan;
        let room = capacity_blocks.map_or_else(String::new, |n| format!(", {} blocks", count(n)));
        let cpu = self.daemon_cpu_seconds.map_or_else(
            || "unknown".to_owned(),
            |seconds| format!("{seconds:.2} s of CPU"),
        );
        let of_all = |blocks| format!("{} blocks, {}", count(blocks), percent(blocks, self.blocks));
        let per_request = |bytes, nanos| format!("{:.2} GB/s per rank", gbps(bytes, nanos));
        let unwritten = (self.ssd.unwritten > 0).then(|| {
            let blocks = count(self.ssd.unwritten);
            (
                "not on SSD",
                format!("{blocks} blocks, evicted before they were written"),
            )
        });
        let rows = [
            (
                "engines",
                format!(
                    "{engines} of {ranks} ranks, pages of {}",
                    size(kv.page_bytes as u64)
                ),
            ),
            (
                "pool",
                format!("{}{room}, policy {}", size(self.pool_bytes), self.policy),
            ),
            (
                "requests",
                format!(
                    "{} in {:.1} s, {:.0} a second",
                    count(self.requests),
                    self.seconds,
                    self.requests as f64 / self.seconds
                ),
            ),
            (
                "blocks",
                format!(
                    "{}, {} different",
                    count(self.blocks),
                    count(self.different_blocks)
                ),
            ),
            (
                "hits",
                format!(
                    "{} blocks, {}",
                    count(self.hit_blocks),
                    percent(self.hit_blocks, self.blocks)
                ),
            ),
            ("from RAM", of_all(self.ram_hits())),
            ("from SSD", of_all(self.ssd.hits)),
            ("missed", of_all(self.blocks - self.hit_blocks)),
            (
                "saved",
                format!(
                    "{}, {}",
                    size(self.saved_bytes),
                    per_request(self.saved_bytes, self.save_ns)
                ),
            ),
            (
                "loaded",
                format!(
                    "{}, {}",
                    size(self.loaded_bytes),
                    per_request(self.loaded_bytes, self.load_ns)
                ),
            ),
            ("verified", size(self.verified_bytes)),
            (
                "shards",
                format!(
                    "{} stored, {} held already, {} without room",
                    count(self.stored),
                    count(self.skipped),
                    count(self.dropped)
                ),
            ),
            ("probe", latency(&self.probe)),
            ("query", latency(&self.query)),
            ("query that loads", latency(&self.loading)),
            ("until loaded", latency(&self.fetch)),
            ("save", latency(&self.save)),
            ("load", latency(&self.load)),
            ("daemon", cpu),
            ("failed requests", count(self.errors)),
            ("mismatches", count(self.mismatches)),
        ];
        facts(rows.into_iter().chain(unwritten))
    }
}
