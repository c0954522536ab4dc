//! A shard's row of the node file.

#![forbid(unsafe_code)]

use pegaflow_shm::node::{SSD_BUCKETS, SsdRow, text_field};
use pegaflow_ssd::{LatencyHistogram, ShardFault, ShardHealth, ShardStats};

const _: () = assert!(SSD_BUCKETS == LatencyHistogram::BUCKETS);

/// What the node file says of a shard.
pub fn ssd_row(stats: &ShardStats) -> SsdRow {
    let (state, reason) = match &stats.health {
        ShardHealth::Healthy => (0, String::new()),
        ShardHealth::ReadsOnly(fault) => (1, fault.to_string()),
        // Its reason is longer than the field.
        ShardHealth::Degraded(ShardFault::Unusable(_)) => {
            (2, "cannot be used: the log says why".to_owned())
        }
        ShardHealth::Degraded(fault) => (2, fault.to_string()),
    };
    SsdRow {
        used: 1,
        state,
        pending: stats.pending,
        reserved: 0,
        capacity_bytes: stats.capacity_bytes,
        live_bytes: stats.live_bytes,
        blocks: stats.blocks,
        uncommitted_blocks: stats.uncommitted_blocks,
        written_bytes: stats.page_bytes_written,
        device_written_bytes: stats.device_bytes_written,
        read_bytes: stats.page_bytes_read,
        bad_pages: stats.bad_pages,
        read_errors: stats.read_errors,
        write_errors: stats.write_errors,
        degradations: stats.degradations,
        refused: stats.refused_degraded,
        evicted_blocks: stats.evicted_blocks,
        segments_reclaimed: stats.segments_reclaimed,
        commits: stats.commits,
        read_nanos: stats.read_latency.sum_ns,
        write_nanos: stats.write_latency.sum_ns,
        read_buckets: stats.read_latency.buckets,
        write_buckets: stats.write_latency.buckets,
        reason: text_field(&reason),
        path: text_field(&stats.path.to_string_lossy()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pegaflow_shm::node::{field_text, ssd_bucket_end};

    #[test]
    fn every_reason_fits_its_field() {
        for fault in [
            ShardFault::NoSpace,
            ShardFault::ReadOnly,
            ShardFault::Stalled,
            ShardFault::Truncated,
            ShardFault::Stopped,
            ShardFault::Opening,
            ShardFault::InUse,
            ShardFault::Unusable("a".repeat(100)),
        ] {
            let stats = ShardStats {
                health: ShardHealth::Degraded(fault.clone()),
                ..ShardStats::default()
            };
            let row = ssd_row(&stats);
            let told = field_text(&row.reason);
            assert!(told.len() < row.reason.len(), "{told}");
            assert!(
                told == fault.to_string() || told.contains("the log"),
                "{told}"
            );
        }
    }

    #[test]
    fn a_row_tells_the_state_with_its_reason_and_the_same_buckets() {
        let mut stats = ShardStats {
            health: ShardHealth::Degraded(ShardFault::Stalled),
            path: "/mnt/a".into(),
            page_bytes_written: 10,
            device_bytes_written: 11,
            ..ShardStats::default()
        };
        stats
            .read_latency
            .record(std::time::Duration::from_micros(17));
        let row = ssd_row(&stats);
        assert_eq!((row.state_text(), row.read_buckets[1]), ("degraded", 1));
        assert_eq!(field_text(&row.reason), "the drive does not answer");
        assert_eq!(field_text(&row.path), "/mnt/a");
        assert!((row.write_amplification() - 1.1).abs() < 1e-9);
        for bucket in 0..SSD_BUCKETS {
            let bound = LatencyHistogram::bound(bucket).map(|bound| bound.as_nanos() as u64);
            assert_eq!(ssd_bucket_end(bucket), bound);
        }
    }
}
