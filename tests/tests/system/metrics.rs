//! One denominator for hits and misses, over HTTP and in shared memory alike.

use std::collections::HashMap;

use pegaflow_shm::node::{Counter, field_text};
use pegaflow_tests::Daemon;
use pegaflow_tests::content::hashes;
use pegaflow_tests::worker::{Worker, WorkerSpec};

fn get(daemon: &Daemon, path: &str) -> (u16, String) {
    let address = field_text(&daemon.node_reader().expect("the node file").header().http);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .into();
    let mut answer = agent
        .get(format!("http://{address}{path}"))
        .call()
        .expect("an answer");
    (
        answer.status().as_u16(),
        answer.body_mut().read_to_string().expect("text"),
    )
}

fn samples(text: &str) -> HashMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    lines.filter_map(sample).collect()
}

#[test]
fn health_answers_and_unknown_pages_do_not() {
    let daemon = Daemon::start();
    assert_eq!(get(&daemon, "/health").0, 200);
    assert_eq!(get(&daemon, "/other").0, 404);
}

#[test]
fn hits_and_misses_add_up_to_the_blocks_asked_for() {
    let daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    let names = hashes(1, 20);
    worker.save(&names[..8]);
    worker.query(1, &names);
    worker.query(2, &names[8..]);
    worker.fetch(3, &names[..5]);
    let asked = 20 + 12 + 5;
    let queried = [
        Counter::QueryHit,
        Counter::QueryHitSsd,
        Counter::QueryMissAbsent,
        Counter::QueryMissIncomplete,
        Counter::QueryMissInFlight,
        Counter::QueryMissAfterMiss,
        Counter::QueryMissNoLease,
    ];
    let total = || {
        queried
            .iter()
            .map(|counter| daemon.counter(*counter))
            .sum::<u64>()
    };
    assert!(
        pegaflow_tests::eventually(|| total() == asked),
        "{} of {asked}",
        total()
    );
    assert_eq!(daemon.counter(Counter::QueryHit), 8 + 5);
    let (status, text) = get(&daemon, "/metrics");
    assert_eq!(status, 200);
    let samples = samples(&text);
    let of = |prefix: &str| -> f64 {
        samples
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(_, value)| value)
            .sum()
    };
    assert_eq!(of("pegaflow_query_blocks_total"), asked as f64, "{text}");
    assert_eq!(of("pegaflow_save_shards_total"), 8.0, "{text}");
    for family in [
        "pegaflow_query_seconds_count",
        "pegaflow_save_seconds_count",
        "pegaflow_pool_bytes",
    ] {
        assert!(of(family) > 0.0, "{family} in {text}");
    }
}

#[test]
fn the_operations_page_explains_every_metric() {
    let page = pegaflow_tests::binaries::repository().join("docs/operations.md");
    let page = std::fs::read_to_string(page).expect("the page");
    for counter in Counter::ALL {
        assert!(page.contains(counter.family()), "{}", counter.family());
    }
    for gauge in pegaflow_shm::node::Gauge::ALL {
        assert!(page.contains(gauge.family()), "{}", gauge.family());
    }
}

#[test]
fn the_node_file_can_be_read_after_the_daemon_died() {
    let mut daemon = Daemon::start();
    let worker = Worker::ready(daemon.options(), WorkerSpec::default());
    worker.save(&hashes(1, 8));
    assert!(daemon.counter_reaches(Counter::SaveStored, 8));
    let pid = daemon.pid();
    daemon.kill();
    let node = daemon.node_reader().expect("still there");
    assert_eq!(
        (node.header().pid, node.counter(Counter::SaveStored)),
        (pid, 8)
    );
}
