//! The policies on a real trace: block prefix hits of the Mooncake conversation trace (FAST '25).
//!
//! A request asks for its blocks in order; its hits are the longest prefix that is held when it
//! arrives; afterwards each of its blocks is touched or inserted in order.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use super::{AdmissionKind, PolicyKind, build, build_admission};

/// Points of per cent by which a run may miss the reference figures.
const TOLERANCE: f64 = 0.05;

/// Reference prefix hit ratios of LRU: cache size in blocks, per cent of block references.
const LRU_REFERENCE: [(u32, f64); 5] = [
    (1_000, 4.45),
    (5_000, 11.04),
    (10_000, 21.12),
    (30_000, 32.57),
    (50_000, 35.46),
];

fn trace() -> Option<Vec<Vec<u64>>> {
    let path = std::env::var_os("PEGAFLOW_TRACE").map_or_else(
        || {
            let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
            workspace.join("../shared/data/mooncake_conversation_trace.jsonl")
        },
        PathBuf::from,
    );
    let Ok(text) = fs::read_to_string(&path) else {
        eprintln!(
            "SKIPPED: no trace at {} (PEGAFLOW_TRACE names another)",
            path.display()
        );
        return None;
    };
    #[derive(serde::Deserialize)]
    struct Request {
        hash_ids: Vec<u64>,
    }
    let requests = text.lines().map(|line| {
        let request: Request = serde_json::from_str(line).expect("a trace line is JSON");
        request.hash_ids
    });
    Some(requests.collect())
}

/// The prefix hit ratio, in per cent of all block references.
fn prefix_hits(trace: &[Vec<u64>], blocks: u32, kind: PolicyKind, gate: AdmissionKind) -> f64 {
    let mut policy = build(kind, blocks);
    let mut gate = build_admission(gate, blocks);
    let mut held: HashMap<u64, u32> = HashMap::new();
    let mut keys = vec![0; blocks as usize];
    let mut free: Vec<u32> = (0..blocks).rev().collect();
    let (mut hits, mut references) = (0, 0);
    for request in trace {
        references += request.len();
        hits += request
            .iter()
            .take_while(|key| held.contains_key(*key))
            .count();
        for &key in request {
            if let Some(gate) = &mut gate {
                gate.record(key);
            }
            if let Some(&id) = held.get(&key) {
                policy.touch(id);
                continue;
            }
            if free.is_empty() {
                let id = policy
                    .victim(&mut |_| true)
                    .expect("a full cache has a victim");
                let victim = keys[id as usize];
                if gate.as_mut().is_some_and(|gate| !gate.admit(key, victim)) {
                    continue;
                }
                policy.remove(id);
                held.remove(&victim);
                free.push(id);
            }
            let id = free.pop().expect("a place was made");
            keys[id as usize] = key;
            held.insert(key, id);
            policy.insert(id, key);
        }
    }
    100.0 * hits as f64 / references as f64
}

#[test]
fn lru_reaches_the_reference_hit_ratios_and_the_others_are_shown_beside_it() {
    let Some(trace) = trace() else { return };
    let runs = [
        (PolicyKind::Lru, AdmissionKind::Off),
        (PolicyKind::S3Fifo, AdmissionKind::Off),
        (PolicyKind::Lru, AdmissionKind::TinyLfu),
        (PolicyKind::S3Fifo, AdmissionKind::TinyLfu),
    ];
    eprintln!("blocks     lru  s3-fifo  lru+tinylfu  s3-fifo+tinylfu   (prefix hits, %)");
    for (blocks, reference) in LRU_REFERENCE {
        let [lru, s3, lru_gate, s3_gate] =
            runs.map(|(kind, gate)| prefix_hits(&trace, blocks, kind, gate));
        eprintln!("{blocks:6}  {lru:6.2}  {s3:7.2}  {lru_gate:11.2}  {s3_gate:15.2}");
        assert!(
            (lru - reference).abs() <= TOLERANCE,
            "{blocks} blocks: {lru} % vs {reference} %"
        );
    }
}
