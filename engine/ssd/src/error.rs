//! Why a tier does not open.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

/// Why a tier does not open. Nothing was changed in a file that is refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum OpenError {
    #[error("{count} SSD shards; at most {most} can be used")]
    TooManyShards { count: usize, most: usize },
    #[error("{}: named twice as an SSD shard", path.display())]
    NamedTwice { path: PathBuf },
    #[error("{}: {call} failed: {source}", path.display())]
    Io {
        path: PathBuf,
        call: &'static str,
        source: io::Error,
    },
}
