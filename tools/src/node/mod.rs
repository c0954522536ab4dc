//! A node as its shared memory shows it, whether its daemon is busy, idle or dead.

#![forbid(unsafe_code)]

mod liveness;

pub use liveness::{Liveness, ProcStat};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pegaflow_shm::mapping::{Access, NamedFile};
use pegaflow_shm::node::{Counter, Gauge, NodeHeader, NodeReader, field_text};
use pegaflow_shm::paths;

use crate::error::ToolError;

/// Where to look for a node.
#[derive(Clone, Debug)]
pub struct NodePlace {
    /// The node's name.
    pub node: String,
    /// Folder that holds one folder per node.
    pub shm_dir: PathBuf,
}

impl NodePlace {
    /// The node's folder.
    pub fn dir(&self) -> PathBuf {
        self.shm_dir.join(&self.node)
    }

    /// Names of all nodes that have a folder, sorted.
    pub fn all_nodes(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.shm_dir) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }
}

/// A mapped node file.
pub struct NodeView {
    /// Its reader.
    pub reader: NodeReader,
    /// Its header, copied once.
    pub header: NodeHeader,
    /// The node's folder.
    pub dir: PathBuf,
}

impl NodeView {
    /// Opens a node's file read-only.
    ///
    /// # Errors
    /// There is none, or it is of another layout.
    pub fn open(place: &NodePlace) -> Result<NodeView, ToolError> {
        paths::check_node_name(&place.node)?;
        let dir = place.dir();
        let path = dir.join("node");
        if !path.exists() {
            let others: Vec<String> = place
                .all_nodes()
                .into_iter()
                .filter(|name| place.shm_dir.join(name).join("node").exists())
                .collect();
            return Err(ToolError::NoNode {
                node: place.node.clone(),
                path,
                others: others.join(", "),
            });
        }
        let reader = open_reader(&path)?;
        let header = reader.header();
        Ok(NodeView {
            reader,
            header,
            dir,
        })
    }

    /// Whether the daemon lives.
    pub fn liveness(&self) -> Liveness {
        Liveness::of(self.header.pid, self.header.pid_start_ticks)
    }

    /// Of a dead daemon: it could not unlink its socket, which is the last thing an orderly stop
    /// does.
    pub fn ended_uncleanly(&self) -> bool {
        self.liveness() == Liveness::Dead && Path::new(&field_text(&self.header.socket)).exists()
    }

    /// Requests and copies under way by the gauges.
    pub fn work_under_way(&self) -> (u64, u64) {
        (
            self.reader.gauge(Gauge::Requests),
            self.reader.gauge(Gauge::CopyTasks),
        )
    }

    /// One plain sentence about the daemon: alive, busy, stopped or dead.
    pub fn daemon_sentence(&self) -> String {
        let pid = self.header.pid;
        let (requests, copies) = self.work_under_way();
        match self.liveness() {
            Liveness::Dead if self.ended_uncleanly() => format!(
                "DEAD: pid {pid} is gone; this is the last state of a dead daemon, ended uncleanly"
            ),
            Liveness::Dead => format!(
                "NOT RUNNING: pid {pid} stopped in an orderly way; this is its last state, and what it \
                 held waits for the next start"
            ),
            Liveness::Stopped => format!("STOPPED: pid {pid} is halted by a signal or a debugger"),
            Liveness::Alive if requests + copies > 0 => format!(
                "alive and busy: pid {pid}, {requests} requests and {copies} copies under way"
            ),
            Liveness::Alive => format!("alive and idle: pid {pid}"),
        }
    }

    /// One word for JSON: `idle`, `busy`, `stopped` (halted), `ended` (orderly) or `dead`.
    pub fn daemon_state(&self) -> &'static str {
        let (requests, copies) = self.work_under_way();
        match self.liveness() {
            Liveness::Dead if self.ended_uncleanly() => "dead",
            Liveness::Dead => "ended",
            Liveness::Stopped => "stopped",
            Liveness::Alive if requests + copies > 0 => "busy",
            Liveness::Alive => "idle",
        }
    }

    /// Hits and all blocks asked for by queries.
    pub fn hits_of_queried(&self) -> (u64, u64) {
        let hits: u64 = hit_counters()
            .map(|counter| self.reader.counter(counter))
            .sum();
        let misses: u64 = miss_counters()
            .map(|counter| self.reader.counter(counter))
            .sum();
        (hits, hits + misses)
    }
}

/// Counters of blocks that queries hit, one per tier.
pub fn hit_counters() -> impl Iterator<Item = Counter> {
    query_counters("hit")
}

/// Counters of blocks that queries missed, one per reason.
pub fn miss_counters() -> impl Iterator<Item = Counter> {
    query_counters("miss")
}

fn query_counters(outcome: &'static str) -> impl Iterator<Item = Counter> {
    Counter::ALL.iter().copied().filter(move |counter| {
        counter.family() == Counter::QueryHit.family()
            && label(counter.labels(), "outcome") == outcome
    })
}

/// Value of a counter's or gauge's label.
pub fn label(labels: &[(&'static str, &'static str)], key: &str) -> &'static str {
    labels
        .iter()
        .find(|(name, _)| *name == key)
        .map_or("", |(_, value)| value)
}

fn open_reader(path: &Path) -> Result<NodeReader, ToolError> {
    let mapping = NamedFile::open(path, "node file", Access::ReadOnly)
        .and_then(|file| file.map(Access::ReadOnly))
        .map_err(|source| ToolError::Mapping {
            path: path.to_owned(),
            source,
        })?;
    NodeReader::open(Arc::new(mapping)).map_err(|source| ToolError::Node {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use bytemuck::Zeroable;
    use pegaflow_shm::node::{NodeWriter, text_field};

    /// A node file written by the test, as if by the process `pid`.
    pub(crate) fn fake_node(root: &Path, node: &str, pid: u32) -> NodeWriter {
        let dir = root.join(node);
        std::fs::create_dir_all(&dir).unwrap();
        let file = NamedFile::create(
            &dir.join("node"),
            "node file",
            NodeWriter::FILE_BYTES as u64,
        )
        .unwrap();
        let mapping = Arc::new(file.map(Access::ReadWrite).unwrap());
        let header = NodeHeader {
            pid,
            pid_start_ticks: ProcStat::read(pid).map_or(1, |stat| stat.start_ticks),
            // As after a kill: the socket's file is still there.
            socket: text_field(&dir.join("node").to_string_lossy()),
            ..NodeHeader::zeroed()
        };
        NodeWriter::create(mapping, &header).unwrap()
    }

    pub(crate) fn shm_folder() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    #[test]
    fn a_living_and_a_dead_daemon_are_told_apart() {
        let root = shm_folder();
        let place = |node: &str| NodePlace {
            node: node.into(),
            shm_dir: root.path().into(),
        };
        let writer = fake_node(root.path(), "alive", std::process::id());
        fake_node(root.path(), "dead", u32::MAX >> 1);
        let alive = NodeView::open(&place("alive")).unwrap();
        assert_eq!(alive.daemon_state(), "idle");
        writer.set(Gauge::Requests, 2);
        assert_eq!(alive.daemon_state(), "busy");
        let dead = NodeView::open(&place("dead")).unwrap();
        assert_eq!(dead.daemon_state(), "dead");
        assert!(dead.daemon_sentence().contains("ended uncleanly"));
        let unlinked = NodeHeader {
            socket: text_field("/no/such.sock"),
            ..dead.header
        };
        let ended = NodeView {
            header: unlinked,
            ..dead
        };
        assert_eq!(ended.daemon_state(), "ended");
    }

    #[test]
    fn a_missing_node_names_those_that_exist() {
        let root = shm_folder();
        fake_node(root.path(), "here", 1);
        let place = NodePlace {
            node: "elsewhere".into(),
            shm_dir: root.path().into(),
        };
        let text = NodeView::open(&place).err().unwrap().to_string();
        assert!(
            text.contains("elsewhere") && text.contains("Nodes here: here"),
            "{text}"
        );
    }

    #[test]
    fn hits_and_misses_add_up_to_all_blocks() {
        let root = shm_folder();
        let writer = fake_node(root.path(), "n", 1);
        writer.add(Counter::QueryHit, 3);
        for counter in miss_counters() {
            writer.add(counter, 1);
        }
        let place = NodePlace {
            node: "n".into(),
            shm_dir: root.path().into(),
        };
        let view = NodeView::open(&place).unwrap();
        assert_eq!(view.hits_of_queried(), (3, 8));
    }
}
