//! Why a tier does not open.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

/// Why a tier does not open. A file that is refused is not changed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name every field")]
pub enum OpenError {
    #[error("{count} SSD shards; at most {most} can be used")]
    TooManyShards { count: usize, most: usize },
    #[error("node name `{node}` is longer than {most} bytes")]
    NodeName { node: String, most: usize },
    #[error("{}: named twice as an SSD shard", path.display())]
    NamedTwice { path: PathBuf },
    #[error("{}: {call} failed: {source}", path.display())]
    Io {
        path: PathBuf,
        call: &'static str,
        source: io::Error,
    },
    #[error(
        "{}: is not a regular file; an SSD shard is a file on a file system (name one that does \
         not exist yet, and its size)", path.display()
    )]
    NotAFile { path: PathBuf },
    #[error(
        "{}: does not exist, and no size was given to make it: --ssd {}:SIZE",
        path.display(), path.display()
    )]
    SizeMissing { path: PathBuf },
    #[error(
        "{}: {bytes} bytes are too few for this SSD shard; give at least {least} (a new file in its \
         place, with smaller segments, can be smaller)", path.display()
    )]
    TooSmall {
        path: PathBuf,
        bytes: u64,
        least: u64,
    },
    #[error(
        "{}: holds something that is not an SSD shard ({bytes} bytes); it was left alone. Name \
         another file, or remove this one", path.display()
    )]
    Foreign { path: PathBuf, bytes: u64 },
    #[error(
        "{}: its superblock is damaged in both places; it was left alone. Remove the file to \
         start over without its blocks", path.display()
    )]
    Damaged { path: PathBuf },
    #[error(
        "{}: has layout version {found}, this program reads {expected}; it was left alone. \
         Remove the file to start over without its blocks, or run the version that wrote it",
        path.display()
    )]
    OtherVersion {
        path: PathBuf,
        found: u32,
        expected: u32,
    },
    #[error(
        "{}: belongs to node `{found}`, this is node `{expected}`; it was left alone. Name the \
         node's own file, or remove this one", path.display()
    )]
    OtherNode {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error(
        "{}: belongs to another set of shards than {}; it was left alone. Name the shards of one \
         set, or remove the file", path.display(), other.display()
    )]
    OtherSet { path: PathBuf, other: PathBuf },
    #[error(
        "{}: is a copy of {}: both say they are the same shard; remove one",
        path.display(), other.display()
    )]
    SameShard { path: PathBuf, other: PathBuf },
    #[error(
        "{} and {} are one file, by a link or a mount; name it once", path.display(), other.display()
    )]
    SameFile { path: PathBuf, other: PathBuf },
    #[error(
        "{}: another process uses it as its SSD shard, or its drive has not ended yet what a \
         killed one asked of it", path.display()
    )]
    InUse { path: PathBuf },
    #[error(
        "{}: not made: {} cannot be used, so of which set of shards it would be is not known",
        path.display(), other.display()
    )]
    SetUnknown { path: PathBuf, other: PathBuf },
    #[error(
        "{}: io_uring cannot be used ({source}); allow it (kernel.io_uring_disabled, the \
         container's seccomp profile) or choose threads", path.display()
    )]
    NoUring { path: PathBuf, source: io::Error },
    #[error("{}: the thread that opens it panicked (a defect); it was left as it is", path.display())]
    Panicked { path: PathBuf },
}
