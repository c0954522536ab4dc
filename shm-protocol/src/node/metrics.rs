//! The counters, gauges and histograms of a node, from one table.
//!
//! Each has a fixed position in the node file, so that the daemon writes it with one relaxed add,
//! and `/metrics` as well as a tool that maps the file of a busy or dead daemon read the same
//! numbers.

#![forbid(unsafe_code)]

macro_rules! metrics {
    ($(#[$meta:meta])* $kind:ident;
     $($name:ident = $family:literal, [$($key:literal = $value:literal),*], $help:literal;)*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum $kind { $(#[doc = $help] $name,)* }

        impl $kind {
            /// Every one, in the order of its position in the node file.
            pub const ALL: &'static [$kind] = &[$($kind::$name),*];

            /// Family name, without the `_total` that the exposition adds to counters.
            pub fn family(self) -> &'static str { match self { $($kind::$name => $family,)* } }

            /// Labels.
            pub fn labels(self) -> &'static [(&'static str, &'static str)] {
                match self { $($kind::$name => &[$(($key, $value)),*],)* }
            }

            /// One sentence for `# HELP`.
            pub fn help(self) -> &'static str { match self { $($kind::$name => $help,)* } }
        }
    };
}

metrics! {
    /// Monotonic counters.
    Counter;
    QueryHit = "pegaflow_query_blocks", ["outcome" = "hit", "reason" = "none", "tier" = "ram"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryHitSsd = "pegaflow_query_blocks", ["outcome" = "hit", "reason" = "none", "tier" = "ssd"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryMissAbsent = "pegaflow_query_blocks", ["outcome" = "miss", "reason" = "absent", "tier" = "none"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryMissIncomplete = "pegaflow_query_blocks", ["outcome" = "miss", "reason" = "incomplete", "tier" = "none"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryMissInFlight = "pegaflow_query_blocks", ["outcome" = "miss", "reason" = "in_flight", "tier" = "none"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryMissAfterMiss = "pegaflow_query_blocks", ["outcome" = "miss", "reason" = "after_miss", "tier" = "none"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryMissNoLease = "pegaflow_query_blocks", ["outcome" = "miss", "reason" = "no_lease", "tier" = "none"], "Blocks asked for by queries, each counted once; hits and misses add up to all of them.";
    QueryRepeated = "pegaflow_query_repeats", [], "Queries answered from a live lease of the same request; their blocks are not counted again.";
    SaveStored = "pegaflow_save_shards", ["outcome" = "stored"], "Shards offered by saves, by what became of them.";
    SaveHeld = "pegaflow_save_shards", ["outcome" = "already_held"], "Shards offered by saves, by what became of them.";
    SaveInFlight = "pegaflow_save_shards", ["outcome" = "already_in_flight"], "Shards offered by saves, by what became of them.";
    SaveNoSpace = "pegaflow_save_shards", ["outcome" = "no_space"], "Shards offered by saves, by what became of them.";
    SaveRejected = "pegaflow_save_shards", ["outcome" = "not_admitted"], "Shards offered by saves, by what became of them.";
    SaveFailed = "pegaflow_save_shards", ["outcome" = "failed"], "Shards offered by saves, by what became of them.";
    SaveCancelled = "pegaflow_save_shards", ["outcome" = "cancelled"], "Shards offered by saves, by what became of them.";
    LoadLoaded = "pegaflow_load_shards", ["outcome" = "loaded"], "Shards asked for by loads, by what became of them.";
    LoadFailed = "pegaflow_load_shards", ["outcome" = "failed"], "Shards asked for by loads, by what became of them.";
    LoadCancelled = "pegaflow_load_shards", ["outcome" = "cancelled"], "Shards asked for by loads, by what became of them.";
    SavedBytes = "pegaflow_copied_bytes", ["direction" = "save"], "Bytes copied between engines and the pool.";
    LoadedBytes = "pegaflow_copied_bytes", ["direction" = "load"], "Bytes copied between engines and the pool.";
    CopySaveNanos = "pegaflow_copy_busy_nanoseconds", ["direction" = "save"], "Time copy threads spent copying.";
    CopyLoadNanos = "pegaflow_copy_busy_nanoseconds", ["direction" = "load"], "Time copy threads spent copying.";
    ChecksumMismatches = "pegaflow_checksum_mismatches", [], "Pages whose bytes no longer had their checksum when a load wanted them.";
    BlocksSealed = "pegaflow_blocks_sealed", [], "Blocks whose last shard came in.";
    EvictedCapacity = "pegaflow_evicted_blocks", ["reason" = "capacity"], "Blocks evicted.";
    EvictedExtent = "pegaflow_evicted_blocks", ["reason" = "extent_moved"], "Blocks evicted.";
    EvictedIncomplete = "pegaflow_evicted_blocks", ["reason" = "never_completed"], "Blocks evicted.";
    AdoptedBlocks = "pegaflow_adopted_blocks", [], "Sealed blocks taken over from a previous daemon at start.";
    AdoptDiscarded = "pegaflow_adopt_discarded_pages", [], "Pages of a previous daemon that were not taken over.";
    LeasesGranted = "pegaflow_leases_granted", [], "Leases given out.";
    LeasesConsumed = "pegaflow_leases_ended", ["reason" = "consumed"], "Leases that ended, by reason.";
    LeasesReleased = "pegaflow_leases_ended", ["reason" = "released"], "Leases that ended, by reason.";
    LeasesExpired = "pegaflow_leases_ended", ["reason" = "expired"], "Leases that ended, by reason.";
    LeasesReplaced = "pegaflow_leases_ended", ["reason" = "replaced"], "Leases that ended, by reason.";
    LeasesOwnerGone = "pegaflow_leases_ended", ["reason" = "owner_gone"], "Leases that ended, by reason.";
    SessionsOpened = "pegaflow_sessions_opened", [], "Sessions that came about.";
    SessionsLeft = "pegaflow_sessions_closed", ["reason" = "left"], "Sessions that ended.";
    SessionsDied = "pegaflow_sessions_closed", ["reason" = "died"], "Sessions that ended.";
    SessionsFaulted = "pegaflow_sessions_closed", ["reason" = "protocol_error"], "Sessions that ended.";
    SessionsRefused = "pegaflow_sessions_refused", [], "Connections that did not become sessions.";
    RequestsNop = "pegaflow_requests", ["op" = "nop"], "Requests completed.";
    RequestsQuery = "pegaflow_requests", ["op" = "query"], "Requests completed.";
    RequestsLoad = "pegaflow_requests", ["op" = "load"], "Requests completed.";
    RequestsSave = "pegaflow_requests", ["op" = "save"], "Requests completed.";
    RequestsRelease = "pegaflow_requests", ["op" = "release"], "Requests completed.";
    RequestsRenew = "pegaflow_requests", ["op" = "renew"], "Requests completed.";
    RequestsCancel = "pegaflow_requests", ["op" = "cancel"], "Requests completed.";
    RequestErrors = "pegaflow_request_errors", [], "Requests completed with a status other than ok.";
    Descriptors = "pegaflow_ring_descriptors", [], "Submissions read from rings.";
    BellsRung = "pegaflow_bells_rung", [], "Times a sleeping client was woken.";
    LaneParks = "pegaflow_lane_parks", [], "Times the lane went to sleep.";
    QueryLoading = "pegaflow_query_loading", [], "Queries answered loading; their blocks are counted with the final answer.";
    SsdWritten = "pegaflow_ssd_blocks", ["event" = "written"], "Blocks between the pool and the SSD tier, by what became of them.";
    SsdWriteFailed = "pegaflow_ssd_blocks", ["event" = "write_failed"], "Blocks between the pool and the SSD tier, by what became of them.";
    SsdUnwritten = "pegaflow_ssd_blocks", ["event" = "evicted_unwritten"], "Blocks between the pool and the SSD tier, by what became of them.";
    SsdFetched = "pegaflow_ssd_blocks", ["event" = "fetched"], "Blocks between the pool and the SSD tier, by what became of them.";
    SsdFetchBad = "pegaflow_ssd_blocks", ["event" = "fetch_bad"], "Blocks between the pool and the SSD tier, by what became of them.";
    SsdFetchFailed = "pegaflow_ssd_blocks", ["event" = "fetch_failed"], "Blocks between the pool and the SSD tier, by what became of them.";
    PrefetchBegun = "pegaflow_prefetches_begun", [], "Queries that had blocks fetched.";
    PrefetchReady = "pegaflow_prefetches", ["end" = "answered"], "Queries that had blocks fetched, by how that ended; those that lost patience are also among the answered or abandoned.";
    PrefetchAbandoned = "pegaflow_prefetches", ["end" = "abandoned"], "Queries that had blocks fetched, by how that ended; those that lost patience are also among the answered or abandoned.";
    PrefetchLate = "pegaflow_prefetches", ["end" = "lost_patience"], "Queries that had blocks fetched, by how that ended; those that lost patience are also among the answered or abandoned.";
}

metrics! {
    /// Values that go up and down.
    Gauge;
    PoolBytes = "pegaflow_pool_bytes", ["state" = "total"], "Bytes of the RAM pool.";
    PoolUsedBytes = "pegaflow_pool_bytes", ["state" = "used"], "Bytes of the RAM pool.";
    PoolPinnedBytes = "pegaflow_pool_pinned_bytes", [], "Bytes of the RAM pool that are pinned for GPUs.";
    PoolExtents = "pegaflow_pool_extents", ["state" = "total"], "Extents of the RAM pool.";
    PoolExtentsUsed = "pegaflow_pool_extents", ["state" = "used"], "Extents of the RAM pool.";
    BlocksMax = "pegaflow_blocks", ["state" = "max"], "Blocks the index can hold, holds sealed, holds unfinished, holds pinned.";
    BlocksHeld = "pegaflow_blocks", ["state" = "sealed"], "Blocks the index can hold, holds sealed, holds unfinished, holds pinned.";
    BlocksUnfinished = "pegaflow_blocks", ["state" = "unfinished"], "Blocks the index can hold, holds sealed, holds unfinished, holds pinned.";
    BlocksPinned = "pegaflow_blocks", ["state" = "pinned"], "Blocks the index can hold, holds sealed, holds unfinished, holds pinned.";
    Leases = "pegaflow_leases", [], "Live leases.";
    Sessions = "pegaflow_sessions", [], "Connected sessions.";
    Instances = "pegaflow_instances", ["state" = "all"], "Registered instances, and those with all ranks in.";
    InstancesReady = "pegaflow_instances", ["state" = "ready"], "Registered instances, and those with all ranks in.";
    Namespaces = "pegaflow_namespaces", [], "Namespaces in use.";
    CopyTasks = "pegaflow_copy_tasks", [], "Copy tasks handed to copy threads and not yet done.";
    CopyTasksStuck = "pegaflow_copy_tasks_stuck", [], "Copy tasks that the process whose memory they touch holds up.";
    CopyThreads = "pegaflow_copy_threads", [], "Copy threads for shared regions; each session has as many at most for its process memory.";
    Requests = "pegaflow_requests_unfinished", [], "Requests taken and not completed.";
    Prefetches = "pegaflow_prefetches_live", [], "Queries that have blocks fetched, or whose blocks wait to be asked for.";
    SsdReading = "pegaflow_ssd_moving_blocks", ["direction" = "up"], "Blocks on their way between the pool and the SSD tier.";
    SsdWriting = "pegaflow_ssd_moving_blocks", ["direction" = "down"], "Blocks on their way between the pool and the SSD tier.";
}

metrics! {
    /// Latency distributions, in nanoseconds.
    Histogram;
    Query = "pegaflow_query_seconds", [], "From the daemon seeing a query's last chunk to its completion.";
    Save = "pegaflow_save_seconds", [], "From the daemon seeing a save's first chunk to its completion.";
    Load = "pegaflow_load_seconds", [], "From the daemon seeing a load's first chunk to its completion.";
    Release = "pegaflow_release_seconds", [], "From the daemon seeing a release to its completion.";
    Prefetch = "pegaflow_prefetch_seconds", [], "From a query that had blocks fetched to its answer with a lease.";
}

/// Buckets of one histogram: four per octave from 64 ns to about 68 s, the last one open.
pub const HISTOGRAM_BUCKETS: usize = 121;
const FIRST_OCTAVE: u32 = 6;
const PER_OCTAVE_BITS: u32 = 2;

/// The bucket that counts a value of `nanos`.
#[inline]
pub fn bucket_of(nanos: u64) -> usize {
    if nanos < 1 << FIRST_OCTAVE {
        return 0;
    }
    let octave = 63 - nanos.leading_zeros();
    let quarter = (nanos >> (octave - PER_OCTAVE_BITS)) as usize & 3;
    let bucket = ((octave - FIRST_OCTAVE) as usize) * 4 + quarter;
    bucket.min(HISTOGRAM_BUCKETS - 1)
}

/// Smallest value in nanoseconds above everything that `bucket` counts; `None` for the last.
pub fn bucket_end(bucket: usize) -> Option<u64> {
    if bucket + 1 >= HISTOGRAM_BUCKETS {
        return None;
    }
    let next = bucket + 1;
    let octave = next as u32 / 4 + FIRST_OCTAVE;
    Some((1u64 << octave) + (next as u64 % 4) * (1u64 << (octave - PER_OCTAVE_BITS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_below_its_buckets_end_and_not_below_the_one_before() {
        for shift in 0..40 {
            for offset in [0u64, 1, 7] {
                let nanos = (1u64 << shift) + offset * (1u64 << shift) / 8;
                let bucket = bucket_of(nanos);
                if let Some(end) = bucket_end(bucket) {
                    assert!(nanos < end, "{nanos} in {bucket}");
                }
                if bucket > 0 {
                    assert!(
                        nanos >= bucket_end(bucket - 1).unwrap(),
                        "{nanos} in {bucket}"
                    );
                }
            }
        }
        assert_eq!(bucket_of(u64::MAX), HISTOGRAM_BUCKETS - 1);
    }

    #[test]
    fn a_family_has_one_help_text() {
        let mut seen = std::collections::HashMap::new();
        for counter in Counter::ALL {
            let help = seen.entry(counter.family()).or_insert(counter.help());
            assert_eq!(*help, counter.help());
        }
    }
}
