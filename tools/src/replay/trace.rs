//! Traces in the public Mooncake format: one JSON object a line.
//!
//! `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id, …]}`; each id stands for
//! one block of tokens and everything before it, so equal ids mean equal prefixes.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use pegaflow_shm::BlockHash;
use serde::{Deserialize, Serialize};

/// Most blocks in one request: what the library's arena takes in one list.
pub const MAX_REQUEST_BLOCKS: usize = 100_000;

/// A trace that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file itself.
    #[error("trace {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A line is not what the format says.
    #[error("trace {}, line {line}, column {column}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1; 0 when the whole line is meant.
        column: usize,
        /// What is wrong.
        what: String,
    },
    /// Nothing to replay.
    #[error("trace {}: no request in it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct TraceLine {
    timestamp: u64,
    input_length: u64,
    #[allow(
        dead_code,
        reason = "part of the format, and so required; no block follows from it"
    )]
    output_length: u64,
    hash_ids: Vec<u64>,
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Arrival in milliseconds since the workload's start; shown, not waited for.
    pub timestamp_ms: u64,
    /// Conversation it belongs to, when the workload knows: its requests go to one engine.
    pub conversation: Option<u64>,
    /// Its blocks, in order.
    pub hash_ids: Vec<u64>,
}

/// Reads at most `limit` requests of a trace.
///
/// # Errors
/// Names file, line and what is wrong with it.
pub fn read_trace(path: &Path, limit: usize) -> Result<Vec<Request>, TraceError> {
    let io = |source| TraceError::Io {
        path: path.to_owned(),
        source,
    };
    let reader = BufReader::new(File::open(path).map_err(io)?);
    let mut requests = Vec::new();
    for (number, line) in (1..).zip(reader.lines()) {
        if requests.len() == limit {
            break;
        }
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let request = parse_line(&line).map_err(|(column, what)| TraceError::Line {
            path: path.to_owned(),
            line: number,
            column,
            what,
        })?;
        requests.push(request);
    }
    if requests.is_empty() {
        return Err(TraceError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(requests)
}

fn parse_line(line: &str) -> Result<Request, (usize, String)> {
    let parsed: TraceLine = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        // serde_json counts lines within the text it was given; the file's line is known better.
        let what = text.split(" at line ").next().unwrap_or(&text).to_owned();
        (error.column(), what)
    })?;
    if parsed.hash_ids.is_empty() {
        return Err((
            0,
            "`hash_ids` is empty: a request has at least one block".to_owned(),
        ));
    }
    if parsed.hash_ids.len() > MAX_REQUEST_BLOCKS {
        let blocks = parsed.hash_ids.len();
        return Err((
            0,
            format!("{blocks} `hash_ids`, at most {MAX_REQUEST_BLOCKS} fit one request"),
        ));
    }
    if parsed.input_length == 0 {
        return Err((
            0,
            "`input_length` is 0, but there are `hash_ids`".to_owned(),
        ));
    }
    let mut seen = std::collections::HashSet::with_capacity(parsed.hash_ids.len());
    if let Some(twice) = parsed.hash_ids.iter().find(|id| !seen.insert(**id)) {
        let what = format!("hash id {twice} occurs twice: an id stands for its whole prefix");
        return Err((0, what));
    }
    Ok(Request {
        timestamp_ms: parsed.timestamp,
        conversation: None,
        hash_ids: parsed.hash_ids,
    })
}

/// The 32-byte name of a block id.
pub fn block_hash(id: u64) -> BlockHash {
    *blake3::hash(&id.to_le_bytes()).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const GOOD: &str =
        r#"{"timestamp": 3, "input_length": 900, "output_length": 5, "hash_ids": [0, 7]}"#;

    fn read(text: &str) -> Result<Vec<Request>, TraceError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read_trace(file.path(), usize::MAX)
    }

    #[test]
    fn a_good_line_is_a_request() {
        let requests = read(&format!("{GOOD}\n\n{GOOD}\n")).unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[0].hash_ids, [0, 7]);
        assert_eq!(requests[0].timestamp_ms, 3);
    }

    #[test]
    fn a_bad_line_is_named_with_what_is_wrong() {
        let cases = [
            ("{\"timestamp\": 3}", "missing field"),
            (
                "{\"timestamp\": -3, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [1]}",
                "-3",
            ),
            ("not json", "expected"),
            (
                "{\"timestamp\": 3, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": []}",
                "empty",
            ),
            (
                "{\"timestamp\": 3, \"input_length\": 1, \"output_length\": 1, \"hash_ids\": [4, 4]}",
                "4 occurs twice",
            ),
        ];
        for (bad, what) in cases {
            let text = read(&format!("{GOOD}\n{bad}\n")).unwrap_err().to_string();
            assert!(text.contains("line 2") && text.contains(what), "{text}");
        }
    }

    #[test]
    fn an_empty_or_missing_trace_is_an_error() {
        assert!(matches!(read("\n"), Err(TraceError::Empty { .. })));
        let missing = read_trace(Path::new("/no/such/trace"), 1).unwrap_err();
        assert!(missing.to_string().contains("/no/such/trace"));
    }

    #[test]
    fn ids_name_different_blocks() {
        assert_ne!(block_hash(0), block_hash(1));
        assert_eq!(block_hash(7), block_hash(7));
    }
}
