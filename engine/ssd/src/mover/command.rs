//! What a mover is asked to do, and how it ended.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::stats::ShardFault;

/// What a shard's thread is asked to do.
#[derive(Debug)]
pub(crate) struct Command {
    /// Comes back with the result.
    pub id: u32,
    /// When it was asked for.
    pub at: Instant,
    /// Where in the file.
    pub offset: u64,
    /// What.
    pub op: Op,
}

/// What is to be moved.
#[derive(Debug)]
pub(crate) enum Op {
    /// A page from the pool, at `page` and of `bytes` bytes, to be compared with `plain` unless
    /// that is [`NO_CHECKSUM`](crate::block::NO_CHECKSUM). Its checksum is the result.
    Write {
        page: u64,
        bytes: u32,
        seed: u64,
        plain: u64,
    },
    /// A page to the pool, to be compared with `checksum`. If `plain` is not
    /// [`NO_CHECKSUM`](crate::block::NO_CHECKSUM), what
    /// [`page_checksum`](crate::block::page_checksum) says of it is the result.
    Read {
        page: u64,
        bytes: u32,
        seed: u64,
        checksum: u64,
        plain: u64,
    },
    /// Bytes of the shard itself, at most [`super::BOUNCE_BYTES`].
    Table(Box<[u8]>),
    /// Makes durable what ended before.
    Sync,
}

/// The end of a command.
#[derive(Debug)]
pub(crate) struct Done {
    /// The command's id.
    pub id: u32,
    /// How it ended.
    pub result: Result<Moved, ShardFault>,
    /// How long it took since it was asked for.
    pub took: Duration,
    /// How much of that were checksums.
    pub checksums: Duration,
}

/// What a command that did not fail found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// It was done; for a page, with the checksum that was asked for.
    Fine { checksum: u64 },
    /// A page has another checksum.
    Different,
}

/// What direct I/O asks of addresses, and of offsets and lengths. Ones for buffered I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub memory: u32,
    pub offset: u32,
}

impl Op {
    /// How many bytes it moves.
    pub fn bytes(&self) -> u32 {
        match self {
            Op::Write { bytes, .. } | Op::Read { bytes, .. } => *bytes,
            Op::Table(content) => content.len() as u32,
            Op::Sync => 0,
        }
    }

    /// Where in the pool its page is, if it has one.
    pub fn page(&self) -> Option<u64> {
        match self {
            Op::Write { page, .. } | Op::Read { page, .. } => Some(*page),
            Op::Table(_) | Op::Sync => None,
        }
    }
}
