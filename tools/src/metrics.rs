//! `metrics`: every counter, gauge and histogram, read from shared memory.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use pegaflow_shm::node::{Counter, Gauge, Histogram, bucket_end};
use serde_json::{Map, Value, json};

use crate::node::NodeView;
use crate::output::{count, print_json, size, table};
use crate::status::{daemon_json, histogram_row};

type Labels = &'static [(&'static str, &'static str)];

fn sample_name(family: &str, labels: Labels) -> String {
    if labels.is_empty() {
        return family.to_owned();
    }
    let pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}=\"{value}\""))
        .collect();
    format!("{family}{{{}}}", pairs.join(","))
}

fn counter_name(counter: Counter) -> String {
    sample_name(&format!("{}_total", counter.family()), counter.labels())
}

/// `pegactl metrics`: a table, or everything as JSON.
pub fn metrics(view: &NodeView, as_json: bool) {
    if as_json {
        print_json(&all_json(view));
        return;
    }
    println!("{}", view.daemon_sentence());
    let mut values = table(&["metric", "value"], &[1]);
    for gauge in Gauge::ALL {
        let value = view.reader.gauge(*gauge);
        let text = if gauge.family().ends_with("_bytes") {
            size(value)
        } else {
            count(value)
        };
        values.add_row([sample_name(gauge.family(), gauge.labels()), text]);
    }
    for counter in Counter::ALL {
        values.add_row([counter_name(*counter), count(view.reader.counter(*counter))]);
    }
    println!("{values}");
    let mut latencies = table(
        &["latency in the daemon", "count", "mean", "p50", "p99"],
        &[1, 2, 3, 4],
    );
    for histogram in Histogram::ALL {
        latencies.add_row(histogram_row(view, *histogram));
    }
    println!("{latencies}");
}

fn all_json(view: &NodeView) -> Value {
    let counters: Map<String, Value> = Counter::ALL
        .iter()
        .map(|counter| (counter_name(*counter), view.reader.counter(*counter).into()))
        .collect();
    let gauges: Map<String, Value> = Gauge::ALL
        .iter()
        .map(|gauge| {
            (
                sample_name(gauge.family(), gauge.labels()),
                view.reader.gauge(*gauge).into(),
            )
        })
        .collect();
    let histograms: Map<String, Value> = Histogram::ALL
        .iter()
        .map(|histogram| {
            let snapshot = view.reader.histogram(*histogram);
            let buckets: Vec<Value> = snapshot
                .buckets
                .iter()
                .enumerate()
                .filter(|(_, count)| **count > 0)
                .map(|(bucket, count)| json!({ "below_ns": bucket_end(bucket), "count": count }))
                .collect();
            let value = json!({
                "count": snapshot.count,
                "sum_ns": snapshot.sum_nanos,
                "p50_ns": snapshot.quantile_nanos(0.5),
                "p99_ns": snapshot.quantile_nanos(0.99),
                "buckets": buckets,
            });
            (histogram.family().to_owned(), value)
        })
        .collect();
    json!({
        "daemon": daemon_json(view),
        "counters": counters,
        "gauges": gauges,
        "histograms": histograms,
    })
}

/// `pegactl metrics --prometheus`: the text exposition format, for a node whose daemon cannot
/// answer.
pub fn prometheus(view: &NodeView) -> String {
    let mut text = String::new();
    let mut last = "";
    for counter in Counter::ALL {
        family(
            &mut text,
            &mut last,
            counter.family(),
            "_total",
            "counter",
            counter.help(),
        );
        let _ = writeln!(
            text,
            "{} {}",
            counter_name(*counter),
            view.reader.counter(*counter)
        );
    }
    for gauge in Gauge::ALL {
        family(
            &mut text,
            &mut last,
            gauge.family(),
            "",
            "gauge",
            gauge.help(),
        );
        let name = sample_name(gauge.family(), gauge.labels());
        let _ = writeln!(text, "{name} {}", view.reader.gauge(*gauge));
    }
    for histogram in Histogram::ALL {
        let name = histogram.family();
        family(
            &mut text,
            &mut last,
            name,
            "",
            "histogram",
            histogram.help(),
        );
        let snapshot = view.reader.histogram(*histogram);
        let mut seen = 0;
        for (bucket, count) in snapshot.buckets.iter().enumerate() {
            seen += count;
            if let (Some(end), true) = (bucket_end(bucket), *count > 0) {
                let _ = writeln!(text, "{name}_bucket{{le=\"{}\"}} {seen}", end as f64 / 1e9);
            }
        }
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {seen}");
        let _ = writeln!(text, "{name}_sum {}", snapshot.sum_nanos as f64 / 1e9);
        let _ = writeln!(text, "{name}_count {seen}");
    }
    text
}

fn family(
    text: &mut String,
    last: &mut &'static str,
    name: &'static str,
    suffix: &str,
    kind: &str,
    help: &str,
) {
    if *last != name {
        *last = name;
        let _ = write!(
            text,
            "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::NodePlace;
    use crate::node::tests::{fake_node, shm_folder};

    #[test]
    fn exposition_declares_each_family_once_and_counts_up() {
        let root = shm_folder();
        let writer = fake_node(root.path(), "n", 1);
        writer.add(Counter::QueryHit, 5);
        writer.observe(Histogram::Query, 1_000);
        writer.observe(Histogram::Query, 1_000_000);
        let place = NodePlace {
            node: "n".into(),
            shm_dir: root.path().into(),
        };
        let text = prometheus(&NodeView::open(&place).unwrap());
        assert_eq!(
            text.matches("# TYPE pegaflow_query_blocks_total counter")
                .count(),
            1
        );
        assert!(
            text.contains(
                "pegaflow_query_blocks_total{outcome=\"hit\",reason=\"none\",tier=\"ram\"} 5\n"
            ),
            "{text}"
        );
        assert!(text.contains("pegaflow_query_seconds_bucket{le=\"+Inf\"} 2\n"));
        assert!(text.contains("pegaflow_query_seconds_count 2\n"));
    }
}
