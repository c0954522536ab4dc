//! Shards of the SSD tier in `status`.

#![forbid(unsafe_code)]

use comfy_table::Table;
use pegaflow_shm::node::{SSD_BUCKETS, SsdRow, field_text, ssd_bucket_end};
use serde_json::{Value, json};

use crate::output::{count, percent, printable, size, table};

/// The shards as a JSON list.
pub fn ssds_json(rows: &[SsdRow]) -> Value {
    let one = |row: &SsdRow| {
        json!({
            "path": field_text(&row.path),
            "state": row.state_text(),
            "reason": field_text(&row.reason),
            "capacity_bytes": row.capacity_bytes,
            "live_bytes": row.live_bytes,
            "blocks": row.blocks,
            "uncommitted_blocks": row.uncommitted_blocks,
            "queue_depth": row.pending,
            "written_bytes": row.written_bytes,
            "device_written_bytes": row.device_written_bytes,
            "write_amplification": row.write_amplification(),
            "read_bytes": row.read_bytes,
            "write_p99_nanoseconds": quantile(&row.write_buckets, 0.99),
            "read_p99_nanoseconds": quantile(&row.read_buckets, 0.99),
            "bad_pages": row.bad_pages,
            "read_errors": row.read_errors,
            "write_errors": row.write_errors,
            "degradations": row.degradations,
            "refused": row.refused,
            "evicted_blocks": row.evicted_blocks,
            "segments_reclaimed": row.segments_reclaimed,
            "commits": row.commits,
        })
    };
    rows.iter().map(one).collect()
}

/// The shards as a table; `None` when the daemon has no SSD tier.
pub fn ssds_table(rows: &[SsdRow]) -> Option<Table> {
    if rows.is_empty() {
        return None;
    }
    let header = [
        "SSD shard",
        "state",
        "filled",
        "blocks",
        "queue",
        "written",
        "amplification",
        "read",
        "read p99",
        "bad pages",
        "errors",
    ];
    let mut shards = table(&header, &[2, 3, 4, 5, 6, 7, 8, 9, 10]);
    for row in rows {
        let reason = field_text(&row.reason);
        let state = match reason.as_str() {
            "" => row.state_text().to_owned(),
            reason => format!("{}: {}", row.state_text(), printable(reason)),
        };
        shards.add_row([
            printable(&field_text(&row.path)),
            state,
            percent(row.live_bytes, row.capacity_bytes),
            count(row.blocks),
            row.pending.to_string(),
            size(row.written_bytes),
            format!("{:.3}", row.write_amplification()),
            size(row.read_bytes),
            quantile(&row.read_buckets, 0.99).map_or("-".to_owned(), |nanos| {
                format!("<= {:.2} ms", nanos as f64 / 1e6)
            }),
            count(row.bad_pages),
            count(row.read_errors + row.write_errors),
        ]);
    }
    Some(shards)
}

/// Upper end in nanoseconds of the bucket that holds the quantile; `None` without observations, or
/// beyond the last bound.
fn quantile(buckets: &[u64; SSD_BUCKETS], quantile: f64) -> Option<u64> {
    let total: u64 = buckets.iter().sum();
    let target = ((quantile * total as f64).ceil() as u64).max(1);
    let mut seen = 0;
    for (at, count) in buckets.iter().enumerate() {
        seen += count;
        if total > 0 && seen >= target {
            return ssd_bucket_end(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;
    use pegaflow_shm::node::text_field;

    #[test]
    fn a_shard_out_of_order_is_shown_with_its_reason() {
        let row = SsdRow {
            used: 1,
            state: 2,
            path: text_field("/mnt/a"),
            reason: text_field("the drive does not answer"),
            written_bytes: 100,
            device_written_bytes: 110,
            ..SsdRow::zeroed()
        };
        let text = ssds_table(&[row]).unwrap().to_string();
        assert!(
            text.contains("degraded: the drive does not answer"),
            "{text}"
        );
        assert!(text.contains("1.100"), "{text}");
        let json = ssds_json(&[row]);
        assert_eq!(json[0]["state"], "degraded");
        assert!(ssds_table(&[]).is_none());
    }

    #[test]
    fn a_quantile_is_the_end_of_its_bucket() {
        let mut buckets = [0; SSD_BUCKETS];
        assert_eq!(quantile(&buckets, 0.99), None);
        (buckets[0], buckets[3]) = (98, 2);
        assert_eq!(quantile(&buckets, 0.5), ssd_bucket_end(0));
        assert_eq!(quantile(&buckets, 0.99), ssd_bucket_end(3));
    }
}
