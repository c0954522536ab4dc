use std::sync::Arc;
use std::time::Duration;

use bytemuck::Zeroable;
use pegaflow_shm::mapping::Mapping;
use pegaflow_shm::node::{
    Counter, DeviceRow, Gauge, Histogram, NodeHeader, NodeWriter, SessionRow, text_field,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::exposition::metrics_text;
use super::*;

fn node() -> NodeWriter {
    let mapping = Arc::new(Mapping::anonymous(NodeWriter::FILE_BYTES).unwrap());
    let header = NodeHeader {
        boot_id: [0xab; 16],
        started_unix_ms: 1_700_000_000_500,
        version: text_field("1.2.3"),
        node: text_field("n1"),
        policy: text_field("lru"),
        ..NodeHeader::zeroed()
    };
    NodeWriter::create(mapping, &header).unwrap()
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn every_counter_gauge_and_histogram_is_on_the_page_once() {
    let writer = node();
    writer.add(Counter::QueryHit, 7);
    writer.set(Gauge::Leases, 3);
    let text = metrics_text(&writer.reader()).unwrap();
    assert!(
        text.contains(
            "pegaflow_query_blocks_total{outcome=\"hit\",reason=\"none\",tier=\"ram\"} 7"
        ),
        "{text}"
    );
    assert!(text.contains("\npegaflow_leases 3\n"), "{text}");
    assert!(
        text.contains("process_start_time_seconds 1700000000.5"),
        "{text}"
    );
    assert!(
        text.contains("pegaflow_build_info{version=\"1.2.3\",node=\"n1\""),
        "{text}"
    );
    assert!(text.contains(&"ab".repeat(16)), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    let families = Counter::ALL.iter().map(|counter| counter.family());
    let families = families.chain(Gauge::ALL.iter().map(|gauge| gauge.family()));
    for family in families.chain(Histogram::ALL.iter().map(|histogram| histogram.family())) {
        assert_eq!(
            text.matches(&format!("# TYPE {family} ")).count(),
            1,
            "{family}"
        );
    }
}

#[test]
fn histogram_buckets_are_octaves_in_seconds_and_add_up() {
    let writer = node();
    for nanos in [1, 127, 128, 1_000_000, u64::MAX / 4] {
        writer.observe(Histogram::Query, nanos);
    }
    let text = metrics_text(&writer.reader()).unwrap();
    let buckets: Vec<(f64, u64)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pegaflow_query_seconds_bucket{le=\""))
        .map(|line| {
            let (bound, count) = line.split_once("\"} ").unwrap();
            let bound = if bound == "+Inf" {
                f64::INFINITY
            } else {
                bound.parse().unwrap()
            };
            (bound, count.parse().unwrap())
        })
        .collect();
    assert_eq!(buckets[0], (128e-9, 2));
    assert_eq!(buckets[1], (256e-9, 3));
    for pair in buckets.windows(2) {
        assert!(pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1, "{pair:?}");
        assert!(
            pair[1].0.is_infinite() || (pair[1].0 / pair[0].0 - 2.0).abs() < 1e-9,
            "{pair:?}"
        );
    }
    assert_eq!(buckets.last(), Some(&(f64::INFINITY, 5)));
    assert!(text.contains("pegaflow_query_seconds_count 5"), "{text}");
}

#[test]
fn a_session_shows_its_ring_depth_and_a_hostile_name_is_escaped() {
    let writer = node();
    let row = SessionRow {
        session: 4,
        pid: 5,
        unfinished: 6,
        submissions: 7,
        client_name: text_field("a\"b\\"),
        ..SessionRow::zeroed()
    };
    writer.write_session(0, &row);
    let text = metrics_text(&writer.reader()).unwrap();
    let labels = r#"{session="4",pid="5",client="a\"b\\",instance=""}"#;
    assert!(
        text.contains(&format!("pegaflow_session_unfinished_requests{labels} 6")),
        "{text}"
    );
    assert!(
        text.contains(&format!("pegaflow_session_submissions_total{labels} 7")),
        "{text}"
    );
}

#[tokio::test]
async fn pages_answer_by_phase_and_others_are_named() {
    let server = HttpServer::bind("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let address = server.address();
    assert_ne!(address.port(), 0);
    let health = Arc::new(Health::default());
    let task = tokio::spawn(server.serve(node().reader(), health.clone()));

    let starting = get(address, "/health").await;
    assert!(starting.starts_with("HTTP/1.1 503"), "{starting}");
    assert!(
        starting.contains("\"lane_heartbeat_age_ms\":null"),
        "{starting}"
    );
    health.set_phase(Phase::Ok);
    health.beat();
    tokio::time::sleep(Duration::from_millis(5)).await;
    let ok = get(address, "/health").await;
    assert!(ok.starts_with("HTTP/1.1 200"), "{ok}");
    assert!(ok.contains("{\"status\":\"ok\""), "{ok}");
    assert!(!ok.contains("null"), "{ok}");
    health.set_phase(Phase::Draining);
    let draining = get(address, "/health").await;
    assert!(draining.starts_with("HTTP/1.1 503"), "{draining}");
    assert!(draining.contains("\"status\":\"draining\""), "{draining}");

    let metrics = get(address, "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains(exposition::CONTENT_TYPE), "{metrics}");
    let other = get(address, "/").await;
    assert!(other.starts_with("HTTP/1.1 404"), "{other}");
    assert!(
        other.contains("/metrics") && other.contains("/health"),
        "{other}"
    );
    task.abort();
}

#[test]
fn a_gpu_has_its_families_under_its_uuid() {
    let writer = node();
    assert!(
        !metrics_text(&writer.reader())
            .unwrap()
            .contains("pegaflow_gpu")
    );
    let row = DeviceRow {
        used: 1,
        state: 1,
        loaded_bytes: 5,
        staged_bytes: 3,
        downs: 2,
        uuid: text_field("u1"),
        ..DeviceRow::zeroed()
    };
    writer.write_device(0, &row);
    let down = DeviceRow {
        state: 2,
        uuid: text_field("u2"),
        ..row
    };
    writer.write_device(1, &down);
    let text = metrics_text(&writer.reader()).unwrap();
    for line in [
        "pegaflow_gpu_copied_bytes_total{gpu=\"u1\",direction=\"load\"} 5",
        "pegaflow_gpu_planned_bytes_total{gpu=\"u1\",plan=\"staged\"} 3",
        "pegaflow_gpu_downs_total{gpu=\"u2\"} 2",
        "pegaflow_gpu_up{gpu=\"u1\"} 1",
        "pegaflow_gpu_up{gpu=\"u2\"} 0",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_option() {
    let first = HttpServer::bind("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let error = HttpServer::bind(first.address())
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(&format!("--http {}", first.address())),
        "{error}"
    );
    assert!(error.contains("in use"), "{error}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let server = HttpServer::bind("127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let address = server.address();
    let task = tokio::spawn(server.serve(node().reader(), Arc::new(Health::default())));
    let mut idle = Vec::new();
    for _ in 0..MAX_HTTP_CONNECTIONS {
        idle.push(TcpStream::connect(address).await.unwrap());
    }
    let late = tokio::time::timeout(Duration::from_millis(100), get(address, "/health")).await;
    assert!(late.is_err(), "no place is free");
    idle.clear();
    assert!(get(address, "/health").await.contains("starting"));
    task.abort();
}
