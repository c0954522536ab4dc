//! Where a node's socket and shared files lie; the daemon, the library and the tools ask here.

#![forbid(unsafe_code)]

use std::path::PathBuf;

/// Node name when none is given.
pub const DEFAULT_NODE: &str = "default";
/// Longest node name in bytes.
pub const MAX_NODE_NAME_BYTES: usize = 64;
/// Folder of all nodes' shared files, unless `PEGAFLOW_SHM_DIR` names another tmpfs.
pub const SHM_ROOT: &str = "/dev/shm/pegaflow";

/// A node name that cannot be part of a path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "node name `{0}`: use 1 to {MAX_NODE_NAME_BYTES} letters, digits, `-`, `_` or `.`, not starting \
     with a dot"
)]
pub struct NodeNameFault(pub String);

/// Checks that a node name is safe as a file name.
///
/// # Errors
/// Returns the name when it is not.
pub fn check_node_name(name: &str) -> Result<(), NodeNameFault> {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty()
        || name.len() > MAX_NODE_NAME_BYTES
        || name.starts_with('.')
        || !name.chars().all(safe)
    {
        return Err(NodeNameFault(name.to_owned()));
    }
    Ok(())
}

/// Folder of a node's shared files: `node`, `pool`, `catalog`, `index-<domain>`, `lock`, and
/// `sessions/`.
pub fn node_dir(node: &str) -> PathBuf {
    let root =
        std::env::var_os("PEGAFLOW_SHM_DIR").map_or_else(|| PathBuf::from(SHM_ROOT), PathBuf::from);
    root.join(node)
}

/// The session socket of a node: `PEGAFLOW_SOCKET` if set, else `/run/pegaflow/<node>.sock` for
/// root and the user's runtime folder for everybody else.
pub fn socket_path(node: &str) -> PathBuf {
    if let Some(path) = std::env::var_os("PEGAFLOW_SOCKET") {
        return PathBuf::from(path);
    }
    let file = format!("{node}.sock");
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/pegaflow").join(file);
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) => PathBuf::from(dir).join("pegaflow").join(file),
        None => {
            let uid = rustix::process::geteuid().as_raw();
            PathBuf::from(format!("/tmp/pegaflow-{uid}")).join(file)
        }
    }
}

/// The node name from `PEGAFLOW_NODE`, or the default.
pub fn node_from_env() -> String {
    std::env::var("PEGAFLOW_NODE").unwrap_or_else(|_| DEFAULT_NODE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for bad in ["", "..", ".", "a/b", "../x", "a b", "é", &"x".repeat(65)] {
            assert!(check_node_name(bad).is_err(), "{bad}");
        }
        for good in ["default", "node-1", "a_b.c"] {
            assert!(check_node_name(good).is_ok(), "{good}");
        }
    }
}
