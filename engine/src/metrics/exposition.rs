//! The text of `/metrics`, in the OpenMetrics format, from the node file.

#![forbid(unsafe_code)]

use std::fmt;

use pegaflow_shm::node::{
    Counter, DeviceRow, DomainRow, Gauge, Histogram, HistogramSnapshot, NamespaceRow, NodeReader,
    SessionRow, bucket_end, field_text,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use super::ssds::encode_ssds;
use crate::control::hex;

/// Content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The node file has this many histogram buckets per octave; the page shows one.
const BUCKETS_PER_OCTAVE: usize = 4;
pub(super) const NANOS_PER_SECOND: f64 = 1e9;

pub(super) type Labels<'a> = Vec<(&'static str, &'a str)>;
const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, u64>> = None;

/// Makes the text.
///
/// # Errors
/// None in practice: a text in memory takes everything.
pub fn metrics_text(node: &NodeReader) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(NodeCollector(node.clone())));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

struct NodeCollector(NodeReader);

impl fmt::Debug for NodeCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let node = &self.0;
        encode_build(node, &mut encoder)?;
        let counters = Counter::ALL.iter().map(|counter| Sample {
            family: counter.family(),
            help: counter.help(),
            labels: counter.labels().to_vec(),
            value: node.counter(*counter),
        });
        encode_families(MetricType::Counter, counters, &mut encoder)?;
        let gauges = Gauge::ALL.iter().map(|gauge| Sample {
            family: gauge.family(),
            help: gauge.help(),
            labels: gauge.labels().to_vec(),
            value: node.gauge(*gauge),
        });
        encode_families(MetricType::Gauge, gauges, &mut encoder)?;
        encode_histograms(node, &mut encoder)?;
        encode_sessions(&node.sessions(), &mut encoder)?;
        encode_namespaces(node, &mut encoder)?;
        encode_domains(&node.domains(), &mut encoder)?;
        encode_devices(&node.devices(), &mut encoder)?;
        encode_ssds(&node.ssds(), &mut encoder)
    }
}

pub(super) struct Sample<'a> {
    pub(super) family: &'static str,
    pub(super) help: &'static str,
    pub(super) labels: Labels<'a>,
    pub(super) value: u64,
}

fn encode_value(
    kind: MetricType,
    value: u64,
    encoder: &mut MetricEncoder<'_>,
) -> Result<(), fmt::Error> {
    match kind {
        MetricType::Counter => encoder.encode_counter(&value, NO_EXEMPLAR),
        _ => encoder.encode_gauge(&value),
    }
}

/// Writes samples; those of one family come one after the other, under one description.
pub(super) fn encode_families<'a>(
    kind: MetricType,
    samples: impl Iterator<Item = Sample<'a>>,
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let samples: Vec<Sample<'a>> = samples.collect();
    for family in samples.chunk_by(|left, right| left.family == right.family) {
        let Some(first) = family.first() else {
            continue;
        };
        let mut metric = encoder.encode_descriptor(first.family, first.help, None, kind)?;
        for sample in family {
            if sample.labels.is_empty() {
                encode_value(kind, sample.value, &mut metric)?;
            } else {
                let labels = sample.labels.as_slice();
                encode_value(kind, sample.value, &mut metric.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

fn encode_build(node: &NodeReader, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let header = node.header();
    let (version, name) = (field_text(&header.version), field_text(&header.node));
    let (policy, boot_id) = (field_text(&header.policy), hex(&header.boot_id));
    let labels = [
        ("version", version.as_str()),
        ("node", name.as_str()),
        ("boot_id", boot_id.as_str()),
        ("policy", policy.as_str()),
    ];
    let help = "The running daemon.";
    let mut info = encoder.encode_descriptor("pegaflow_build", help, None, MetricType::Info)?;
    info.encode_info(&labels.as_slice())?;
    let started = header.started_unix_ms as f64 / 1000.0;
    let help = "Unix time of the daemon's start.";
    let name = "process_start_time_seconds";
    encoder
        .encode_descriptor(name, help, None, MetricType::Gauge)?
        .encode_gauge(&started)
}

fn encode_histograms(
    node: &NodeReader,
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    for histogram in Histogram::ALL {
        let (family, help) = (histogram.family(), histogram.help());
        let snapshot = node.histogram(*histogram);
        let buckets = octaves(&snapshot);
        // The page's count is that of its buckets, so that the two agree in every scrape.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = snapshot.sum_nanos as f64 / NANOS_PER_SECOND;
        encoder
            .encode_descriptor(family, help, None, MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
    }
    Ok(())
}

/// Upper bounds in seconds and the counts below them, not yet summed up.
fn octaves(snapshot: &HistogramSnapshot) -> Vec<(f64, u64)> {
    let chunks = snapshot.buckets.chunks(BUCKETS_PER_OCTAVE).enumerate();
    chunks
        .map(|(octave, buckets)| {
            let last = octave * BUCKETS_PER_OCTAVE + buckets.len() - 1;
            let end = bucket_end(last).map_or(f64::INFINITY, |end| end as f64 / NANOS_PER_SECOND);
            (end, buckets.iter().sum())
        })
        .collect()
}

type SessionValue = fn(&SessionRow) -> u64;
type NamespaceValue = fn(&NamespaceRow) -> u64;
type DomainValue = fn(&DomainRow) -> u64;

fn encode_sessions(
    sessions: &[SessionRow],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    if sessions.is_empty() {
        return Ok(());
    }
    let texts: Vec<[String; 4]> = sessions
        .iter()
        .map(|row| {
            let (client, instance) = (field_text(&row.client_name), field_text(&row.instance));
            [
                row.session.to_string(),
                row.pid.to_string(),
                client,
                instance,
            ]
        })
        .collect();
    let families: [(MetricType, &'static str, &'static str, SessionValue); 7] = [
        (
            MetricType::Gauge,
            "pegaflow_session_unfinished_requests",
            "Requests of a session that are taken and not completed: the depth of its rings.",
            |row| u64::from(row.unfinished),
        ),
        (
            MetricType::Gauge,
            "pegaflow_session_copy_tasks",
            "Copy tasks of a session that are handed out and not done.",
            |row| u64::from(row.copies),
        ),
        (
            MetricType::Gauge,
            "pegaflow_session_copy_tasks_stuck",
            "Copy tasks of a session that its process holds up.",
            |row| u64::from(row.stuck_copies),
        ),
        (
            MetricType::Gauge,
            "pegaflow_session_submission_slots",
            "Slots of a session's submission ring.",
            |row| u64::from(row.submission_slots),
        ),
        (
            MetricType::Gauge,
            "pegaflow_session_completion_slots",
            "Slots of a session's completion ring.",
            |row| u64::from(row.completion_slots),
        ),
        (
            MetricType::Counter,
            "pegaflow_session_submissions",
            "Submissions read from a session's ring.",
            |row| row.submissions,
        ),
        (
            MetricType::Counter,
            "pegaflow_session_completions",
            "Completions posted to a session's ring.",
            |row| row.completions,
        ),
    ];
    for (kind, family, help, value) in families {
        let samples = sessions.iter().zip(&texts).map(|(row, texts)| {
            let keys = ["session", "pid", "client", "instance"];
            let labels = keys
                .into_iter()
                .zip(texts.iter().map(String::as_str))
                .collect();
            Sample {
                family,
                help,
                labels,
                value: value(row),
            }
        });
        encode_families(kind, samples, encoder)?;
    }
    Ok(())
}

fn encode_namespaces(
    node: &NodeReader,
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let rows = node.namespaces();
    let texts: Vec<[String; 3]> = rows
        .iter()
        .map(|(key, row)| {
            [
                key.to_string(),
                field_text(&row.domain),
                field_text(&row.summary),
            ]
        })
        .collect();
    let families: [(MetricType, &'static str, &'static str, NamespaceValue); 4] = [
        (
            MetricType::Gauge,
            "pegaflow_namespace_blocks",
            "Sealed blocks of a namespace.",
            |row| row.blocks,
        ),
        (
            MetricType::Gauge,
            "pegaflow_namespace_bytes",
            "Bytes of a namespace's pages.",
            |row| row.bytes,
        ),
        (
            MetricType::Counter,
            "pegaflow_namespace_queried_blocks",
            "Blocks of a namespace that queries asked for.",
            |row| row.queried,
        ),
        (
            MetricType::Counter,
            "pegaflow_namespace_hit_blocks",
            "Blocks of a namespace that queries hit.",
            |row| row.hits,
        ),
    ];
    for (kind, family, help, value) in families {
        let samples = rows.iter().zip(&texts).map(|((_, row), texts)| {
            let keys = ["namespace", "domain", "summary"];
            let labels = keys
                .into_iter()
                .zip(texts.iter().map(String::as_str))
                .collect();
            Sample {
                family,
                help,
                labels,
                value: value(row),
            }
        });
        encode_families(kind, samples, encoder)?;
    }
    Ok(())
}

type DeviceValue = fn(&DeviceRow) -> u64;

fn encode_devices(
    rows: &[DeviceRow],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let uuids: Vec<String> = rows.iter().map(|row| field_text(&row.uuid)).collect();
    let copied = "Bytes copied between a GPU and the pool.";
    let busy = "Time during which copies of a direction were under way on a GPU.";
    let by_plan = "Bytes copied between a GPU and the pool, segment by segment or through staging by \
                   a kernel; those that went through the CPU besides count as bounced, too.";
    type Family = (
        MetricType,
        &'static str,
        &'static str,
        &'static [(&'static str, &'static str, DeviceValue)],
    );
    let families: [Family; 8] = [
        (
            MetricType::Counter,
            "pegaflow_gpu_copied_bytes",
            copied,
            &[
                ("direction", "save", |row| row.saved_bytes),
                ("direction", "load", |row| row.loaded_bytes),
            ],
        ),
        (
            MetricType::Counter,
            "pegaflow_gpu_busy_nanoseconds",
            busy,
            &[
                ("direction", "save", |row| row.save_busy_nanos),
                ("direction", "load", |row| row.load_busy_nanos),
            ],
        ),
        (
            MetricType::Counter,
            "pegaflow_gpu_planned_bytes",
            by_plan,
            &[
                ("plan", "direct", |row| row.direct_bytes),
                ("plan", "staged", |row| row.staged_bytes),
                ("plan", "bounced", |row| row.bounced_bytes),
            ],
        ),
        (
            MetricType::Counter,
            "pegaflow_gpu_downs",
            "Times a GPU went down.",
            &[("", "", |row| row.downs)],
        ),
        (
            MetricType::Gauge,
            "pegaflow_gpu_up",
            "Whether a GPU can be used: 0 while it is down.",
            &[("", "", |row| u64::from(row.state < 2))],
        ),
        (
            MetricType::Gauge,
            "pegaflow_gpu_regions",
            "Allocations of engines that the daemon has mapped.",
            &[("", "", |row| u64::from(row.regions))],
        ),
        (
            MetricType::Gauge,
            "pegaflow_gpu_copy_tasks",
            "Copy tasks handed to a GPU's thread and not done.",
            &[("", "", |row| row.tasks)],
        ),
        (
            MetricType::Gauge,
            "pegaflow_gpu_staging_bytes",
            "GPU memory that the daemon has taken beside its context.",
            &[("", "", |row| row.staging_bytes)],
        ),
    ];
    for (kind, family, help, values) in families {
        let samples = rows.iter().zip(&uuids).flat_map(|(row, uuid)| {
            values.iter().map(move |(key, label, value)| {
                let mut labels = vec![("gpu", uuid.as_str())];
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
    Ok(())
}

fn encode_domains(
    rows: &[DomainRow],
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let names: Vec<String> = rows.iter().map(|row| field_text(&row.name)).collect();
    let families: [(&'static str, &'static str, DomainValue); 5] = [
        (
            "pegaflow_domain_sessions",
            "Sessions of an isolation domain.",
            |row| u64::from(row.sessions),
        ),
        (
            "pegaflow_domain_leases",
            "Live leases of an isolation domain.",
            |row| row.leases,
        ),
        (
            "pegaflow_domain_blocks",
            "Sealed blocks of an isolation domain.",
            |row| row.blocks,
        ),
        (
            "pegaflow_domain_bytes",
            "Bytes of the pages of an isolation domain.",
            |row| row.bytes,
        ),
        (
            "pegaflow_domain_pinned_blocks",
            "Blocks of an isolation domain that leases hold.",
            |row| row.pinned,
        ),
    ];
    for (family, help, value) in families {
        let samples = rows.iter().zip(&names).map(|(row, name)| Sample {
            family,
            help,
            labels: vec![("domain", name.as_str())],
            value: value(row),
        });
        encode_families(MetricType::Gauge, samples, encoder)?;
    }
    Ok(())
}
