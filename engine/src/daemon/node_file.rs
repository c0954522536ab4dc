//! The `node` file: made under another name and moved into place, so that no reader sees half a
//! header.

#![forbid(unsafe_code)]

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytemuck::Zeroable;
use pegaflow_shm::BootId;
use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::node::{NodeHeader, NodeWriter, text_field};

use super::DaemonError;
use crate::config::Config;
use crate::fault::{self, CrashPoint};

/// Makes the file. That of a previous daemon goes; whoever has it mapped keeps what it said last.
pub(super) fn create(
    dir: &Path,
    config: &Config,
    boot_id: BootId,
    http: Option<SocketAddr>,
) -> Result<NodeWriter, DaemonError> {
    let (path, new) = (dir.join("node"), dir.join("node.new"));
    let failed = |problem: &dyn std::fmt::Display| DaemonError::NodeFile {
        path: path.clone(),
        problem: problem.to_string(),
    };
    match fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(&error)),
        _ => {}
    }
    let bytes = NodeWriter::FILE_BYTES as u64;
    let file = NamedFile::create(&new, "node file", bytes).map_err(|error| failed(&error))?;
    file.reserve(0, bytes).map_err(|error| failed(&error))?;
    let mapping = file
        .map(Access::ReadWrite)
        .map_err(|error| failed(&error))?;
    let header = header(config, boot_id, http).map_err(|error| failed(&error))?;
    let writer = NodeWriter::create(Arc::new(mapping), &header)?;
    fault::point(CrashPoint::NodeFileMade);
    fs::rename(&new, &path).map_err(|error| failed(&error))?;
    Ok(writer)
}

fn header(
    config: &Config,
    boot_id: BootId,
    http: Option<SocketAddr>,
) -> std::io::Result<NodeHeader> {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(NodeHeader {
        pid: std::process::id(),
        boot_id,
        started_unix_ms: since_epoch.as_millis() as u64,
        pid_start_ticks: own_start_ticks()?,
        pool_bytes: config.pool_bytes,
        extent_bytes: config.extent_bytes,
        lease_ttl_ms: config.lease_ttl.as_millis() as u64,
        version: text_field(env!("CARGO_PKG_VERSION")),
        node: text_field(&config.node),
        policy: text_field(config.policy.name()),
        socket: text_field(&config.socket.to_string_lossy()),
        http: text_field(&http.map_or_else(String::new, |address| address.to_string())),
        ..NodeHeader::zeroed()
    })
}

/// Field 22 of `/proc/self/stat`.
fn own_start_ticks() -> std::io::Result<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // Field 2, the name, may hold spaces and parentheses; field 3 follows the last one.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = fields
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok());
    field.ok_or_else(|| std::io::Error::other("/proc/self/stat has no start time"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use pegaflow_shm::node::{NodeReader, field_text};

    use super::*;

    #[test]
    fn the_header_tells_who_runs_and_a_restart_replaces_the_file() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let config = Config {
            node: "n1".into(),
            ..Config::default()
        };
        let http = "127.0.0.1:4711".parse().ok();
        let first = create(dir.path(), &config, [1; 16], http).unwrap();
        let _second = create(dir.path(), &config, [2; 16], http).unwrap();
        assert_eq!(
            first.reader().header().boot_id,
            [1; 16],
            "the old mapping stays as it was"
        );
        let path = dir.path().join("node");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(!dir.path().join("node.new").exists());
        let file = NamedFile::open(&path, "node file", Access::ReadOnly).unwrap();
        let reader = NodeReader::open(Arc::new(file.map(Access::ReadOnly).unwrap())).unwrap();
        let header = reader.header();
        assert_eq!(header.boot_id, [2; 16]);
        assert_eq!(header.pid, std::process::id());
        assert!(header.pid_start_ticks > 0 && header.started_unix_ms > 1_600_000_000_000);
        assert_eq!(field_text(&header.http), "127.0.0.1:4711");
        assert_eq!(field_text(&header.node), "n1");
        assert_eq!(field_text(&header.policy), "lru");
    }
}
