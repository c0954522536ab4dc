//! The SSD tier's shards on the page.

#![forbid(unsafe_code)]

use std::fmt;

use pegaflow_shm::node::{SSD_BUCKETS, SsdRow, field_text, ssd_bucket_end};
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::exposition::{NANOS_PER_SECOND, Sample, encode_families};

type SsdValue = fn(&SsdRow) -> u64;
type Values = &'static [(&'static str, &'static str, SsdValue)];

const COUNTERS: &[(&str, &str, Values)] = &[
    (
        "pegaflow_ssd_page_bytes",
        "Bytes of pages moved between the pool and a shard's file.",
        &[
            ("direction", "write", |row| row.written_bytes),
            ("direction", "read", |row| row.read_bytes),
        ],
    ),
    (
        "pegaflow_ssd_device_written_bytes",
        "Bytes that went to a shard's drive for the pages written: with padding and tables.",
        &[("", "", |row| row.device_written_bytes)],
    ),
    (
        "pegaflow_ssd_errors",
        "Pages with wrong bytes, and requests that the system failed.",
        &[
            ("kind", "bad_page", |row| row.bad_pages),
            ("kind", "read", |row| row.read_errors),
            ("kind", "write", |row| row.write_errors),
        ],
    ),
    (
        "pegaflow_ssd_degradations",
        "Times that a shard went out of order.",
        &[("", "", |row| row.degradations)],
    ),
    (
        "pegaflow_ssd_refused",
        "Requests refused because the shard was out of order.",
        &[("", "", |row| row.refused)],
    ),
    (
        "pegaflow_ssd_evicted_blocks",
        "Blocks that left a shard to make room.",
        &[("", "", |row| row.evicted_blocks)],
    ),
    (
        "pegaflow_ssd_segments_reclaimed",
        "Segments of a shard that were emptied and used again.",
        &[("", "", |row| row.segments_reclaimed)],
    ),
    (
        "pegaflow_ssd_commits",
        "Tables of a shard written and synced.",
        &[("", "", |row| row.commits)],
    ),
];

const GAUGES: &[(&str, &str, Values)] = &[
    (
        "pegaflow_ssd_up",
        "Whether a shard takes requests: by direction, 0 while it does not.",
        &[
            ("direction", "write", |row| u64::from(row.state == 0)),
            ("direction", "read", |row| u64::from(row.state < 2)),
        ],
    ),
    (
        "pegaflow_ssd_bytes",
        "Bytes that can hold pages, and bytes of pages that can be read.",
        &[
            ("state", "capacity", |row| row.capacity_bytes),
            ("state", "live", |row| row.live_bytes),
        ],
    ),
    (
        "pegaflow_ssd_held_blocks",
        "Blocks that can be read, and of these those that a power loss now would lose.",
        &[
            ("state", "readable", |row| row.blocks),
            ("state", "uncommitted", |row| row.uncommitted_blocks),
        ],
    ),
    (
        "pegaflow_ssd_queue_depth",
        "Requests of a shard that wait or are at the drive.",
        &[("", "", |row| u64::from(row.pending))],
    ),
];

type Histogram = (
    &'static str,
    fn(&SsdRow) -> u64,
    fn(&SsdRow) -> &[u64; SSD_BUCKETS],
);

const HISTOGRAMS: &[Histogram] = &[
    ("write", |row| row.write_nanos, |row| &row.write_buckets),
    ("read", |row| row.read_nanos, |row| &row.read_buckets),
];

pub(super) fn encode_ssds(
    rows: &[SsdRow],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let paths: Vec<String> = rows.iter().map(|row| field_text(&row.path)).collect();
    let counters = COUNTERS.iter().map(|family| (MetricType::Counter, family));
    let gauges = GAUGES.iter().map(|family| (MetricType::Gauge, family));
    for (kind, (family, help, values)) in counters.chain(gauges) {
        let samples = rows.iter().zip(&paths).flat_map(|(row, path)| {
            values.iter().map(move |(key, label, value)| {
                let mut labels = vec![("shard", path.as_str())];
                if !key.is_empty() {
                    labels.push((key, label));
                }
                Sample {
                    family,
                    help,
                    labels,
                    value: value(row),
                }
            })
        });
        encode_families(kind, samples, encoder)?;
    }
    if rows.is_empty() {
        return Ok(());
    }
    let help = "How long a page took from its submission to the drive to its completion.";
    let kind = MetricType::Histogram;
    let mut metric = encoder.encode_descriptor("pegaflow_ssd_page_seconds", help, None, kind)?;
    for (row, path) in rows.iter().zip(&paths) {
        for (direction, nanos, buckets) in HISTOGRAMS {
            let buckets: Vec<(f64, u64)> = buckets(row)
                .iter()
                .enumerate()
                .map(|(at, count)| {
                    let end = ssd_bucket_end(at);
                    (
                        end.map_or(f64::INFINITY, |end| end as f64 / NANOS_PER_SECOND),
                        *count,
                    )
                })
                .collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let labels: [(&str, &str); 2] = [("shard", path), ("direction", direction)];
            let sum = nanos(row) as f64 / NANOS_PER_SECOND;
            metric
                .encode_family(&labels.as_slice())?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
    }
    Ok(())
}
