//! `status`, `sessions`, `cache`, `leases`: tables of what the node file holds.

#![forbid(unsafe_code)]

use pegaflow_shm::node::{
    Counter, Gauge, Histogram, LeaseRow, NamespaceRow, SessionRow, field_text,
};
use pegaflow_shm::status::Status;
use serde_json::{Value, json};

use crate::domains::{domains_json, domains_line, domains_table};
use crate::gpus::{gpus_json, gpus_table};
use crate::node::{NodeView, ProcStat, hit_counters, label, miss_counters};
use crate::output::{
    age, count, duration, facts, nanos, percent, print_json, printable, ratio, size, table,
    unix_now_ms,
};
use crate::ssds::{ssds_json, ssds_table};

/// Rank that marks a scheduler or a session that has not registered.
const NO_RANK: u32 = u32::MAX;

/// The daemon, as a JSON object that every command puts under `daemon`.
pub fn daemon_json(view: &NodeView) -> Value {
    let header = &view.header;
    json!({
        "state": view.daemon_state(),
        "text": view.daemon_sentence(),
        "pid": header.pid,
        "node": field_text(&header.node),
        "version": field_text(&header.version),
        "boot_id": hex(&header.boot_id),
        "started_unix_ms": header.started_unix_ms,
        "socket": field_text(&header.socket),
        "http": field_text(&header.http),
        "policy": field_text(&header.policy),
        "pool_bytes": header.pool_bytes,
        "extent_bytes": header.extent_bytes,
        "lease_ttl_ms": header.lease_ttl_ms,
        "cpu_seconds": ProcStat::read(header.pid).map(|stat| stat.cpu_seconds()),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `pegactl status`.
pub fn status(view: &NodeView, as_json: bool) {
    let gauge = |gauge| view.reader.gauge(gauge);
    let (hits, queried) = view.hits_of_queried();
    if as_json {
        print_json(&json!({
            "daemon": daemon_json(view),
            "sessions": gauge(Gauge::Sessions),
            "instances": gauge(Gauge::Instances),
            "instances_ready": gauge(Gauge::InstancesReady),
            "namespaces": gauge(Gauge::Namespaces),
            "domains": domains_json(&view.reader.domains()),
            "gpus": gpus_json(&view.reader.devices()),
            "ssds": ssds_json(&view.reader.ssds()),
            "hit_blocks_by_tier": object(hit_counters(), view, "tier"),
            "pool_pinned_bytes": gauge(Gauge::PoolPinnedBytes),
            "leases": gauge(Gauge::Leases),
            "blocks": gauge(Gauge::BlocksHeld),
            "blocks_max": gauge(Gauge::BlocksMax),
            "blocks_unfinished": gauge(Gauge::BlocksUnfinished),
            "blocks_pinned": gauge(Gauge::BlocksPinned),
            "pool_bytes": gauge(Gauge::PoolBytes),
            "pool_used_bytes": gauge(Gauge::PoolUsedBytes),
            "queried_blocks": queried,
            "hit_blocks": hits,
            "hit_ratio": ratio(hits, queried),
            "saved_bytes": view.reader.counter(Counter::SavedBytes),
            "loaded_bytes": view.reader.counter(Counter::LoadedBytes),
            "requests_unfinished": gauge(Gauge::Requests),
            "copy_tasks": gauge(Gauge::CopyTasks),
            "request_errors": view.reader.counter(Counter::RequestErrors),
        }));
        return;
    }
    let header = &view.header;
    let http = field_text(&header.http);
    println!("{}", view.daemon_sentence());
    let rows = [
        ("node", field_text(&header.node)),
        ("version", field_text(&header.version)),
        ("started", format!("{} ago", age(header.started_unix_ms))),
        ("socket", field_text(&header.socket)),
        (
            "metrics",
            if http.is_empty() {
                "off".to_owned()
            } else {
                format!("http://{http}/metrics")
            },
        ),
        ("policy", field_text(&header.policy)),
        (
            "pool",
            format!(
                "{} used of {} ({})",
                size(gauge(Gauge::PoolUsedBytes)),
                size(gauge(Gauge::PoolBytes)),
                percent(gauge(Gauge::PoolUsedBytes), gauge(Gauge::PoolBytes))
            ),
        ),
        (
            "blocks",
            format!(
                "{} sealed, {} unfinished, {} pinned, room for {}",
                count(gauge(Gauge::BlocksHeld)),
                count(gauge(Gauge::BlocksUnfinished)),
                count(gauge(Gauge::BlocksPinned)),
                count(gauge(Gauge::BlocksMax))
            ),
        ),
        (
            "sessions",
            format!(
                "{} of {} instances ({} ready)",
                gauge(Gauge::Sessions),
                gauge(Gauge::Instances),
                gauge(Gauge::InstancesReady)
            ),
        ),
        ("isolation domains", domains_line(&view.reader.domains())),
        ("leases", gauge(Gauge::Leases).to_string()),
        (
            "hits",
            format!(
                "{} of {} blocks ({}), {} of them from SSD",
                count(hits),
                count(queried),
                percent(hits, queried),
                count(view.reader.counter(Counter::QueryHitSsd))
            ),
        ),
        (
            "copied",
            format!(
                "{} saved, {} loaded",
                size(view.reader.counter(Counter::SavedBytes)),
                size(view.reader.counter(Counter::LoadedBytes))
            ),
        ),
        (
            "request errors",
            count(view.reader.counter(Counter::RequestErrors)),
        ),
    ];
    println!("{}", facts(rows));
    if let Some(gpus) = gpus_table(&view.reader.devices()) {
        println!("{gpus}");
    }
    if let Some(shards) = ssds_table(&view.reader.ssds()) {
        println!("{shards}");
    }
}

fn session_json(row: &SessionRow) -> Value {
    json!({
        "session": row.session,
        "pid": row.pid,
        "uid": row.uid,
        "domain": field_text(&row.domain),
        "connected_unix_ms": row.connected_unix_ms,
        "client_name": field_text(&row.client_name),
        "instance": field_text(&row.instance),
        "rank": (row.rank != NO_RANK).then_some(row.rank),
        "world_size": row.world_size,
        "registrations": row.registrations,
        "submissions": row.submissions,
        "completions": row.completions,
        "unfinished": row.unfinished,
        "submission_slots": row.submission_slots,
        "completion_slots": row.completion_slots,
    })
}

/// Rank column: `1/2`, `scheduler`, or `-` before registering.
pub fn rank_text(row: &SessionRow) -> String {
    match (row.rank, row.world_size) {
        (_, 0) => "-".to_owned(),
        (NO_RANK, _) => "scheduler".to_owned(),
        (rank, world) => format!("{rank}/{world}"),
    }
}

/// `pegactl sessions`.
pub fn sessions(view: &NodeView, as_json: bool) {
    let rows = view.reader.sessions();
    if as_json {
        let rows: Vec<Value> = rows.iter().map(session_json).collect();
        print_json(&json!({ "daemon": daemon_json(view), "sessions": rows }));
        return;
    }
    println!("{}", view.daemon_sentence());
    let header = [
        "session",
        "pid",
        "uid",
        "domain",
        "name",
        "instance",
        "rank",
        "age",
        "submissions",
        "unfinished",
    ];
    let mut table = table(&header, &[0, 1, 2, 8, 9]);
    for row in &rows {
        table.add_row([
            row.session.to_string(),
            row.pid.to_string(),
            row.uid.to_string(),
            printable(&field_text(&row.domain)),
            printable(&field_text(&row.client_name)),
            printable(&field_text(&row.instance)),
            rank_text(row),
            age(row.connected_unix_ms),
            count(row.submissions),
            row.unfinished.to_string(),
        ]);
    }
    println!("{table}\n{} sessions", rows.len());
}

fn namespace_json((key, row): &(usize, NamespaceRow)) -> Value {
    json!({
        "key": key,
        "summary": field_text(&row.summary),
        "digest": hex(&row.digest),
        "domain": field_text(&row.domain),
        "world_size": row.world_size,
        "block_tokens": row.block_tokens,
        "blocks": row.blocks,
        "bytes": row.bytes,
        "queried": row.queried,
        "hits": row.hits,
        "hit_ratio": ratio(row.hits, row.queried),
    })
}

/// `pegactl cache`.
pub fn cache(view: &NodeView, as_json: bool) {
    let namespaces = view.reader.namespaces();
    let families = [
        "pegaflow_pool_bytes",
        "pegaflow_pool_extents",
        "pegaflow_blocks",
    ];
    let gauges: Vec<Gauge> = Gauge::ALL
        .iter()
        .copied()
        .filter(|g| families.contains(&g.family()))
        .collect();
    let by_outcome = |family: &str| -> Vec<Counter> {
        Counter::ALL
            .iter()
            .copied()
            .filter(|counter| counter.family() == family)
            .collect()
    };
    let (saves, evicted) = (
        by_outcome("pegaflow_save_shards"),
        by_outcome("pegaflow_evicted_blocks"),
    );
    if as_json {
        let misses = object(miss_counters(), view, "reason");
        let pool: serde_json::Map<String, Value> = gauges
            .iter()
            .map(|gauge| {
                let family = gauge.family().trim_start_matches("pegaflow_");
                let name = format!("{family}_{}", label(gauge.labels(), "state"));
                (name, view.reader.gauge(*gauge).into())
            })
            .collect();
        print_json(&json!({
            "daemon": daemon_json(view),
            "pool": pool,
            "domains": domains_json(&view.reader.domains()),
            "namespaces": namespaces.iter().map(namespace_json).collect::<Vec<_>>(),
            "hit_blocks": view.hits_of_queried().0,
            "hit_blocks_by_tier": object(hit_counters(), view, "tier"),
            "missed_blocks": misses,
            "save_shards": object(saves.into_iter(), view, "outcome"),
            "evicted_blocks": object(evicted.into_iter(), view, "reason"),
            "blocks_sealed": view.reader.counter(Counter::BlocksSealed),
            "adopted_blocks": view.reader.counter(Counter::AdoptedBlocks),
        }));
        return;
    }
    println!("{}", view.daemon_sentence());
    let mut pool = table(&["pool and index", "value"], &[1]);
    for gauge in gauges {
        let value = view.reader.gauge(gauge);
        let text = if gauge.family().ends_with("bytes") {
            size(value)
        } else {
            count(value)
        };
        let family = gauge
            .family()
            .trim_start_matches("pegaflow_")
            .replace('_', " ");
        pool.add_row([
            format!("{family}, {}", label(gauge.labels(), "state")),
            text,
        ]);
    }
    println!("{pool}\n{}", domains_table(&view.reader.domains()));
    let header = [
        "key",
        "namespace",
        "domain",
        "ranks",
        "blocks",
        "bytes",
        "queried",
        "hit ratio",
    ];
    let mut spaces = table(&header, &[0, 3, 4, 5, 6, 7]);
    for (key, row) in &namespaces {
        spaces.add_row([
            key.to_string(),
            printable(&field_text(&row.summary)),
            printable(&field_text(&row.domain)),
            row.world_size.to_string(),
            count(row.blocks),
            size(row.bytes),
            count(row.queried),
            percent(row.hits, row.queried),
        ]);
    }
    println!("{spaces}");
    let (hits, queried) = view.hits_of_queried();
    let mut fates = table(&["blocks and shards", "count", "share"], &[1, 2]);
    fates.add_row([
        "queried, hit".to_owned(),
        count(hits),
        percent(hits, queried),
    ]);
    for counter in miss_counters() {
        let value = view.reader.counter(counter);
        let reason = label(counter.labels(), "reason");
        fates.add_row([
            format!("queried, missed: {reason}"),
            count(value),
            percent(value, queried),
        ]);
    }
    let offered: u64 = saves
        .iter()
        .map(|counter| view.reader.counter(*counter))
        .sum();
    for counter in saves {
        let value = view.reader.counter(counter);
        let outcome = label(counter.labels(), "outcome");
        fates.add_row([
            format!("saved shards: {outcome}"),
            count(value),
            percent(value, offered),
        ]);
    }
    for counter in evicted {
        let reason = label(counter.labels(), "reason");
        let value = view.reader.counter(counter);
        fates.add_row([format!("evicted: {reason}"), count(value), String::new()]);
    }
    println!("{fates}");
}

fn object(counters: impl Iterator<Item = Counter>, view: &NodeView, key: &str) -> Value {
    let map: serde_json::Map<String, Value> = counters
        .map(|counter| {
            (
                label(counter.labels(), key).to_owned(),
                view.reader.counter(counter).into(),
            )
        })
        .collect();
    Value::Object(map)
}

fn lease_json(row: &LeaseRow, now_ms: u64) -> Value {
    json!({
        "lease": row.lease,
        "session": row.session,
        "request_key": row.request_key,
        "blocks": row.blocks,
        "group": row.group,
        "namespace": row.namespace,
        "consumed_by": row.consumed_by,
        "world_size": row.world_size,
        "copies": row.copies,
        "expires_unix_ms": row.expires_unix_ms,
        "expires_in_ms": row.expires_unix_ms as i64 - now_ms as i64,
    })
}

/// `pegactl leases`.
pub fn leases(view: &NodeView, as_json: bool) {
    let rows = view.reader.leases();
    let (live, now_ms) = (view.reader.gauge(Gauge::Leases), unix_now_ms());
    if as_json {
        let rows: Vec<Value> = rows.iter().map(|row| lease_json(row, now_ms)).collect();
        print_json(&json!({ "daemon": daemon_json(view), "live": live, "leases": rows }));
        return;
    }
    println!("{}", view.daemon_sentence());
    let header = [
        "lease",
        "session",
        "request key",
        "group",
        "blocks",
        "loaded by",
        "copies",
        "expires in",
    ];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7]);
    for row in &rows {
        let left = row.expires_unix_ms.saturating_sub(now_ms);
        table.add_row([
            format!("{:#x}", row.lease),
            row.session.to_string(),
            format!("{:#x}", row.request_key),
            row.group.to_string(),
            count(u64::from(row.blocks)),
            format!("{} of {}", row.consumed_by, row.world_size),
            row.copies.to_string(),
            if left == 0 {
                "expired, draining".to_owned()
            } else {
                duration(left)
            },
        ]);
    }
    println!("{table}\n{live} live leases, {} shown", rows.len());
}

/// One line of latencies: count, mean, p50 and p99.
pub fn histogram_row(view: &NodeView, histogram: Histogram) -> [String; 5] {
    let snapshot = view.reader.histogram(histogram);
    let mean = if snapshot.count == 0 {
        0.0
    } else {
        snapshot.sum_nanos as f64 / snapshot.count as f64
    };
    [
        histogram
            .family()
            .trim_start_matches("pegaflow_")
            .trim_end_matches("_seconds")
            .to_owned(),
        count(snapshot.count),
        nanos(mean),
        nanos(snapshot.quantile_nanos(0.5) as f64),
        nanos(snapshot.quantile_nanos(0.99) as f64),
    ]
}

/// What a status code in a table means, for the reader who does not know it by heart.
pub fn status_text(status: Status) -> String {
    format!("{status}: {}", status.text())
}
